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
from flawmap.text import counted

MOST = 1e-3
"""Of the largest value, by which a file's may differ: some hundred times what rounding explains."""


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
        images = counted(self.images, "image")
        text = f"{self.engine}: {images}, scores differ by at most {self.score:.2g} ({self.score_share:.1e})"
        return text + ("" if self.map is None else f", maps by {self.map:.2g} ({self.map_share:.1e})")


def prove(
    detector: Detector, graph: bytes, content: Mapping[str, Any], images: Sequence[Path], progress: Progress
) -> list[Proof]:
    """Runs images, or drawn ones where there are none, through the detector in torch and through a file as read back.

    Raises:
        FlawmapError: scores, maps or embeddings differ by more than `MOST`, so that a verdict may differ whose score
            does not lie at the threshold.
    """
    preparation, graph_here = detector.preparation_, detector.graph()
    reference = TorchEngine(graph_here, detector.device, preparation.masked)
    engines = [name for name in available_engines() if name != "torch"]
    others = [inspector_of(graph, content, engine=name).engine for name in engines]
    inputs = list(model_inputs(images, preparation) if images else _drawn(preparation))
    if not inputs:
        raise FlawmapError(f"no image to check by can be read, of {len(images)}: give another --check folder")
    found: list[list[list[NDArray[np.float32]]]] = []  # of each engine, of each batch, its outputs
    for number in range(0, len(inputs), BATCH):
        part = inputs[number : number + BATCH]
        shown = np.stack([pixels for pixels, _ in part])
        inside = np.stack([scored[None] for _, scored in part]).astype(np.float32) if preparation.masked else None
        found.append([engine(shown, inside) for engine in (reference, *others)])
        progress("proof", min(number + BATCH, len(inputs)), len(inputs))
    named = enumerate(engines, start=1)
    return [_held_against(name, [(one[0], one[i]) for one in found], graph_here.outputs) for i, name in named]


def _held_against(
    engine: str, pairs: Sequence[tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]]], names: Sequence[str]
) -> Proof:
    """Both sides' outputs, batch by batch; `names` of the outputs."""
    apart, shares = dict[str, float](), dict[str, float]()
    for i, name in enumerate(names):
        ours = np.concatenate([side[i] for side, _ in pairs])
        theirs = np.concatenate([side[i] for _, side in pairs])
        apart[name] = float(np.abs(ours - theirs).max())
        shares[name] = apart[name] / max(float(np.abs(ours).max()), 1e-12)
        if not shares[name] <= MOST:  # written so that NaN fails
            raise FlawmapError(
                f"with {engine} the exported file says something else: {name}s differ by {apart[name]:.3g}, "
                f"{shares[name]:.1e} of the largest; nothing was written: please report it"
            )
    return Proof(
        engine,
        sum(len(side[0]) for side, _ in pairs),
        apart["score"],
        apart.get("map"),
        shares["score"],
        shares.get("map"),
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
