"""An exported file held against the detector in torch that it was made from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flawmap.backbones.tracing import TorchEngine
from flawmap.datasets.drawn import KINDS, draw_part
from flawmap.datasets.drawn.dataset import SMALLEST
from flawmap.detector import Detector
from flawmap.errors import FlawmapError, ImageError
from flawmap.imaging.decoding import read_image
from flawmap.imaging.preparation import Preparation
from flawmap.imaging.reading import BATCH
from flawmap.learning.data import Progress
from flawmap.line.engines import available_engines
from flawmap.line.exported import inspector_of


@dataclass(frozen=True)
class Proof:
    """How far a file is from its detector.

    Attributes:
        engine: what ran the file.
        images: model inputs that both were given.
        score, map: largest difference of scores and of map values, in the method's units; no map, no difference.
        score_share, map_share: the same as shares of the largest score and map value.
    """

    engine: str
    images: int
    score: float
    map: float | None
    score_share: float
    map_share: float | None

    def describe(self) -> str:
        """One line."""
        text = (
            f"{self.engine}: {self.images} images, scores differ by at most {self.score:.2g} ({self.score_share:.1e})"
        )
        return text + ("" if self.map is None else f", maps by {self.map:.2g} ({self.map_share:.1e})")


def prove(
    detector: Detector, graph: bytes, content: Mapping[str, Any], images: Sequence[Path], progress: Progress
) -> list[Proof]:
    """Runs images, or drawn ones where there are none, through the detector in torch and through a file as read back.

    Raises:
        FlawmapError: a verdict differs whose score lies farther from the threshold than the largest difference.
    """
    preparation, threshold = detector.preparation_, detector.threshold_.value
    reference = TorchEngine(detector.graph(), detector.device, preparation.masked)
    engines = [name for name in available_engines() if name != "torch"]
    others = [inspector_of(graph, content, engine=name).engine for name in engines]
    inputs = list(model_inputs(images, preparation) if images else _drawn(preparation))
    if not inputs:
        raise FlawmapError(f"none of the {len(images)} images to check by can be read: give another --check folder")
    found: list[list[list[NDArray[np.float32]]]] = []  # of each engine, of each batch, its outputs
    for number in range(0, len(inputs), BATCH):
        part = inputs[number : number + BATCH]
        shown = np.stack([pixels for pixels, _ in part])
        inside = np.stack([scored[None] for _, scored in part]).astype(np.float32) if preparation.masked else None
        found.append([engine(shown, inside) for engine in (reference, *others)])
        progress("proof", min(number + BATCH, len(inputs)), len(inputs))
    return [
        _held_against(name, [(batch[0], batch[i]) for batch in found], threshold) for i, name in enumerate(engines, 1)
    ]


def _held_against(
    engine: str, pairs: Sequence[tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]]], threshold: float
) -> Proof:
    *maps, scores, _ = (np.concatenate(output) for output in zip(*(ours for ours, _ in pairs), strict=True))
    *other_maps, others, _ = (np.concatenate(output) for output in zip(*(theirs for _, theirs in pairs), strict=True))
    apart = float(np.abs(scores - others).max())
    if not np.isfinite(others).all():
        raise FlawmapError(f"the exported file gives scores that are no numbers with {engine}: please report it")
    changed = ((scores >= threshold) != (others >= threshold)) & (np.abs(scores - threshold) > apart)
    if changed.any():
        worst = int(np.argmax(np.abs(scores - threshold) * changed))
        raise FlawmapError(
            f"with {engine} the exported file judges otherwise: score {others[worst]:.6g} for {scores[worst]:.6g}, "
            f"threshold {threshold:.6g}; nothing was written: please report it"
        )
    map_apart = float(np.abs(maps[0] - other_maps[0]).max()) if maps else None
    return Proof(
        engine,
        len(scores),
        apart,
        map_apart,
        apart / max(float(np.abs(scores).max()), 1e-12),
        None if map_apart is None else map_apart / max(float(np.abs(maps[0]).max()), 1e-12),
    )


def model_inputs(paths: Sequence[Path], preparation: Preparation) -> Iterator[tuple[NDArray[Any], NDArray[np.bool_]]]:
    """The model inputs of image files, with where they are scored; what cannot be read is passed over."""
    for path in paths:
        try:
            pixels = read_image(path)
            placement = preparation.place(pixels)
        except ImageError:
            continue
        yield from zip(preparation.inputs(pixels, placement), placement.inside(), strict=True)


def _drawn(preparation: Preparation) -> Iterator[tuple[NDArray[Any], NDArray[np.bool_]]]:
    """Model inputs of drawn parts, good and with each defect, scored everywhere or, every other one, but for a rim."""
    side = max(SMALLEST, *preparation.size)
    for kind, drawn in KINDS.items():
        for number, defect in enumerate((None, None, *drawn.defects)):
            pixels, _ = draw_part(kind, defect, np.random.default_rng(number), side)
            inside = np.ones(preparation.size, np.bool_)
            if number % 2:
                inside[: preparation.size[0] // 8] = False
            yield preparation.preprocessing(pixels), inside
