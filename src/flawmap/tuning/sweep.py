"""Labelled images whose latents are kept on disk, scored again for each choice of a method's live settings."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flawmap.datasets import Sample
from flawmap.imaging.decoding import read_image
from flawmap.imaging.masks import read_mask
from flawmap.imaging.preparation import Preparation
from flawmap.learning.data import COLLECTED, Progress, batches, on_device, quiet
from flawmap.learning.feature_cache import FeatureCache
from flawmap.line.engines import Engine
from flawmap.methods import Method
from flawmap.methods.blocks.smoothing import on_grid
from flawmap.metrics import PixelCurves, auroc

FIGURES = ("image_auroc", "pixel_auroc", "pixel_ap", "aupro")


@dataclass(frozen=True)
class Labelled:
    """One image of known label.

    Attributes:
        pixels: (H, W) or (H, W, 3), as `read_image` gives them.
        defective: what is known of it.
        mask: (H, W) bool, True on the defect; None for a good image, and where a defect has none.
    """

    pixels: NDArray[Any]
    defective: bool
    mask: NDArray[np.bool_] | None = None


def labelled(sample: Sample) -> Labelled:
    """A test image with its mask.

    Raises:
        ImageError: one of them cannot be read.
    """
    pixels = read_image(sample.path)
    mask = None
    if sample.label == 1 and sample.mask is not None:
        mask = read_mask(sample.mask, (pixels.shape[0], pixels.shape[1]))
    return Labelled(pixels, sample.label == 1, mask)


@dataclass(frozen=True)
class Batch:
    """Some windows of a sweep's images.

    Attributes:
        images: which image each belongs to.
        maps: (B, h, w) float32.
        scores: (B,) float32.
        masks: (h, w) bool each; None where a defect has no mask.
        inside: (B, h, w) bool, the pixels that are scored; None for all.
    """

    images: list[int]
    maps: NDArray[np.float32]
    scores: NDArray[np.float32]
    masks: list[NDArray[np.bool_] | None]
    inside: NDArray[np.bool_] | None


class Sweep:
    """Runs backbone and flow once for each image. A context manager: its temporary folder goes when the block ends.

    Pixel figures are taken at the model's input size, window by window; masks are resized nearest.
    """

    def __init__(
        self,
        method: Method,
        images: Iterable[Labelled],
        count: int,
        preparation: Preparation,
        engine: Engine,
        device: str,
        progress: Progress = quiet,
    ) -> None:
        self.device = device
        self.labels: list[bool] = []
        self._rows: list[int] = []  # of each image
        self._masks: list[NDArray[np.uint8] | None] = []  # packed, of each row
        self._size = preparation.size
        self._masked = preparation.masked
        self._folder = tempfile.TemporaryDirectory(prefix="flawmap-", ignore_cleanup_errors=True)
        self._cache = FeatureCache(Path(self._folder.name), "", half=True)
        try:
            for done, image in enumerate(images, start=1):
                self._add(method, image, count, preparation, engine)
                progress("latents", done, count)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Sweep:
        return self

    def __exit__(self, *reason: object) -> None:
        self._folder.cleanup()

    def _add(self, method: Method, image: Labelled, count: int, preparation: Preparation, engine: Engine) -> None:
        placement = preparation.place(image.pixels)
        inputs = np.stack(list(preparation.inputs(image.pixels, placement)))
        inside = placement.inside()[:, None] if self._masked else None
        scored = None if inside is None else inside.astype(np.float32)
        normalised = preparation.preprocessing.normalised(inputs)
        maps = [torch.from_numpy(level) for level in engine(normalised, scored)]
        features, where = on_device((maps, None if scored is None else torch.from_numpy(scored)), self.device)
        with torch.inference_mode():
            kept: list[NDArray[Any]] = [method.latents(features, where).cpu().numpy()]
        self._cache.write([*kept, *([] if inside is None else [inside])], expected_rows=count * len(inputs))
        self._cache.commit(str(len(self.labels)), len(inputs), None)
        self._rows += [len(self.labels)] * len(inputs)
        self.labels.append(image.defective)
        if image.mask is not None:
            self._masks += [np.packbits(mask) for mask in placement.project(image.mask)]
        else:
            empty = None if image.defective else np.packbits(np.zeros(self._size, np.bool_))
            self._masks += [empty] * len(inputs)

    @torch.inference_mode()
    def scored(self, method: Method) -> Iterator[Batch]:
        """Every window, in order, by `method` as it is set now."""
        start = 0
        for rows in batches(range(len(self._rows)), COLLECTED):
            values = self._cache.read(rows)
            inside = torch.from_numpy(values[1]).float().to(self.device) if self._masked else None
            anomaly_map, scores = method.score_latents(torch.from_numpy(values[0]).to(self.device), inside)
            yield Batch(
                [self._rows[row] for row in rows],
                method.enlarge(anomaly_map, inside)[:, 0].cpu().numpy(),
                scores.cpu().numpy(),
                [None if mask is None else self._unpacked(mask) for mask in self._masks[start : start + len(rows)]],
                None if inside is None else inside[:, 0].cpu().numpy() > 0,
            )
            start += len(rows)

    def patches(self, most: int) -> torch.Tensor:
        """Latents (N, C) of positions that are scored, as many of each window, `most` in all at most."""
        each = max(1, most // len(self._rows))
        generator = torch.Generator().manual_seed(0)
        kept = []
        for rows in batches(range(len(self._rows)), COLLECTED):
            values = self._cache.read(rows)
            for row, latents in enumerate(torch.from_numpy(values[0])):  # (T, C)
                if self._masked:
                    latents = latents[self._on_positions(values[1][row], len(latents))]
                kept.append(latents[torch.randperm(len(latents), generator=generator)[:each]])
        return torch.cat(kept).to(self.device)

    def _on_positions(self, inside: NDArray[np.bool_], positions: int) -> torch.Tensor:
        """(1, H, W) bool at the input size -> (T,) bool, on a grid of its proportions."""
        height = round((positions * self._size[0] / self._size[1]) ** 0.5)
        return on_grid(torch.from_numpy(inside)[None].float(), (height, positions // height)).flatten() > 0

    def figures(self, method: Method) -> dict[str, float]:
        """Each of `FIGURES` by `method` as it is set now, fractions in 0..1; nan where it does not exist."""
        return figures_of(self.scored(method), self.labels, method.localises)

    def _unpacked(self, packed: NDArray[np.uint8]) -> NDArray[np.bool_]:
        height, width = self._size
        return np.unpackbits(packed, count=height * width).view(np.bool_).reshape(height, width)


def figures_of(windows: Iterable[Batch], labels: Sequence[bool], localises: bool) -> dict[str, float]:
    """Each of `FIGURES` of scored windows, fractions in 0..1; nan where it does not exist.

    Args:
        windows: of all images.
        labels: (N,) True for images with a defect; it may still grow while the windows come.
        localises: as `Method.localises`.
    """
    best: dict[int, float] = {}
    pixels = PixelCurves()
    for batch in windows:
        for image, score in zip(batch.images, batch.scores.tolist(), strict=True):
            best[image] = max(score, best.get(image, score))
        if localises:
            pixels.update(batch.maps, batch.masks, batch.inside)
    scores = np.array([best[image] for image in range(len(labels))], np.float32)
    found = dict.fromkeys(FIGURES, float("nan")) | {"image_auroc": auroc(scores, labels)}
    if localises:
        curves = pixels.compute()
        found |= {"pixel_auroc": curves.auroc, "pixel_ap": curves.average_precision, "aupro": curves.aupro}
    return found
