"""Images read ahead of their use, cut into windows, packed into batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flawmap.errors import ImageError
from flawmap.imaging.captures import capture_statistics
from flawmap.imaging.decoding import read_image
from flawmap.imaging.fingerprints import fingerprint
from flawmap.imaging.placement import Placement
from flawmap.imaging.preparation import Preparation

BATCH = 8


@dataclass(frozen=True)
class Picture:
    """One image on its way through.

    Attributes:
        path: the file; None for an array.
        placement: its windows; None where it could not be read.
        statistics: of the capture, see `flawmap.imaging.captures`.
        fingerprint: of the whole image, see `flawmap.imaging.fingerprints`; where asked for.
        error: why it could not be read.
    """

    path: Path | None
    placement: Placement | None = None
    statistics: NDArray[np.float64] | None = None
    fingerprint: NDArray[np.float32] | None = None
    error: ImageError | None = None

    @property
    def windows(self) -> int:
        """How many model inputs it became."""
        return 0 if self.placement is None else len(self.placement.windows)


@dataclass
class Batch:
    """Model inputs in the order of the images, whose windows may go on in the next batch.

    Attributes:
        inputs: (N, 3, h, w) float32.
        inside: (N, 1, h, w) bool, where they are scored; None where that is everywhere.
        pictures: the images whose last window this batch holds, and those that have none.
    """

    inputs: NDArray[np.float32]
    inside: NDArray[np.bool_] | None
    pictures: list[Picture] = field(default_factory=list)


def read_batches(
    paths: Sequence[Path], prepare: Preparation, *, size: int = BATCH, fingerprints: bool = False
) -> Iterator[Batch]:
    """Reads images in a thread of its own, two batches ahead. One that cannot be read has an error and no windows."""
    batches = _batches(paths, prepare, size, fingerprints)
    with ThreadPoolExecutor(1) as pool:
        ahead = [pool.submit(next, batches, None) for _ in range(2)]
        try:
            while (batch := ahead.pop(0).result()) is not None:
                ahead.append(pool.submit(next, batches, None))
                yield batch
        finally:
            for future in ahead:
                future.cancel()


def _batches(paths: Sequence[Path], prepare: Preparation, size: int, fingerprints: bool) -> Iterator[Batch]:
    batch, filled = _empty(prepare, size), 0
    for path in paths:
        try:
            pixels = read_image(path)
            statistics = capture_statistics(pixels, prepare.preprocessing.white)
            identifying = fingerprint(pixels, prepare.preprocessing.white) if fingerprints else None
            placement = prepare.place(pixels)
        except ImageError as error:
            told = error if str(error).startswith(str(path)) else ImageError(f"{path}: {error}")
            batch.pictures.append(Picture(path, error=told))
            continue
        inside = placement.inside() if prepare.masked else None
        for i, window in enumerate(prepare.inputs(pixels, placement)):
            if filled == size:
                yield batch
                batch, filled = _empty(prepare, size), 0
            batch.inputs[filled] = window
            if inside is not None and batch.inside is not None:
                batch.inside[filled, 0] = inside[i]
            filled += 1
        batch.pictures.append(Picture(path, placement, statistics, identifying))
    batch.inputs = batch.inputs[:filled]
    batch.inside = None if batch.inside is None else batch.inside[:filled]
    if batch.pictures or filled:
        yield batch


def _empty(prepare: Preparation, size: int) -> Batch:
    inside = np.zeros((size, 1, *prepare.size), np.bool_) if prepare.masked else None
    return Batch(np.empty((size, 3, *prepare.size), np.float32), inside)
