"""Images read ahead of their use, cut into windows, packed into batches."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from flawmap.errors import ImageError
from flawmap.imaging.arrays import as_pixels, is_array
from flawmap.imaging.captures import capture_statistics
from flawmap.imaging.decoding import read_image_and_digest
from flawmap.imaging.fingerprints import fingerprint
from flawmap.imaging.placement import Placement
from flawmap.imaging.preparation import Preparation

BATCH = 8

_KEPT = 1 << 26  # bytes of pixels that are kept of one batch, about
_LARGE = 1 << 27  # bytes of one image; so many are not kept beside those of another

Source = Any
"""An image file (a Path), or an image as `as_pixels` takes it."""


def as_source(given: Any) -> Source:
    """One image as a user gives it: a path, or what `as_pixels` takes.

    Raises:
        ImageError: it is neither.
    """
    if isinstance(given, (bytes, bytearray)):
        raise ImageError(f"got {type(given).__name__}; give the path of the file, or a NumPy array of its pixels")
    return Path(given) if isinstance(given, (str, os.PathLike)) else as_pixels(given)


def is_several(given: Any) -> TypeGuard[Iterable[Any]]:
    """Whether a user gives several images: neither a path nor something that stands for one image, right or wrong."""
    one = isinstance(given, (str, os.PathLike, bytes, bytearray)) or is_array(given)
    return not one and isinstance(given, Iterable)


@dataclass(frozen=True)
class Picture:
    """One image on its way through.

    Attributes:
        path: the file; None for an array.
        placement: its windows; None where it could not be read.
        statistics: of the capture, see `flawmap.imaging.captures`.
        fingerprint: of the whole image, see `flawmap.imaging.fingerprints`; where asked for.
        error: why it could not be read.
        pixels: as they were read; where asked for.
        milliseconds: from its pixels to its windows.
        digest: SHA-256, in hexadecimal, of the bytes of the file that the pixels came from; None for an array.
    """

    path: Path | None
    placement: Placement | None = None
    statistics: NDArray[np.float64] | None = None
    fingerprint: NDArray[np.float32] | None = None
    error: ImageError | None = None
    pixels: NDArray[Any] | None = None
    milliseconds: float = 0.0
    digest: str | None = None

    @property
    def windows(self) -> int:
        """How many model inputs it became."""
        return 0 if self.placement is None else len(self.placement.windows)


@dataclass
class Batch:
    """Model inputs in the order of the images, whose windows may go on in the next batch.

    Attributes:
        inputs: (N, 3, h, w), as `Preparation.inputs` gives them.
        inside: (N, 1, h, w) bool, where they are scored; None where that is everywhere.
        pictures: the images whose last window this batch holds, and those that have none.
        large: whether the last of them has so many pixels, kept for whoever asked for them, that the next image is
            read only when this one has been dealt with.
    """

    inputs: NDArray[Any]
    inside: NDArray[np.bool_] | None
    pictures: list[Picture] = field(default_factory=list)
    large: bool = False


def read_batches(
    sources: Iterable[Source],
    prepare: Preparation,
    *,
    size: int = BATCH,
    fingerprints: bool = False,
    keep_pixels: bool = False,
) -> Iterator[Batch]:
    """Reads images in a thread of its own, two batches ahead. One that cannot be read has an error and no windows.

    Nothing is read ahead of a large image whose pixels are kept: see `Batch.large`.
    """
    done = threading.Semaphore(0)  # one for each large image that has been dealt with
    batches = pack(
        sources, prepare, size=size, fingerprints=fingerprints, keep_pixels=keep_pixels, after_large=done.acquire
    )
    with ThreadPoolExecutor(1) as pool:
        ahead = [pool.submit(next, batches, None) for _ in range(2)]
        try:
            while (batch := ahead.pop(0).result()) is not None:
                ahead.append(pool.submit(next, batches, None))
                large = batch.large
                yield batch
                del batch
                if large:
                    done.release()
        finally:
            for future in ahead:
                future.cancel()
            done.release()


def pack(
    sources: Iterable[Source],
    prepare: Preparation,
    *,
    size: int = BATCH,
    fingerprints: bool = False,
    keep_pixels: bool = False,
    after_large: Callable[[], object] = lambda: None,
) -> Iterator[Batch]:
    """As `read_batches`, but each batch is read when it is asked for.

    `after_large` is called before the image after a large one is read.
    """
    batch, filled, kept_bytes = _empty(prepare, size), 0, 0
    for source in sources:
        path = source if isinstance(source, Path) else None
        name = "the array" if path is None else str(path)
        if batch.large:
            yield _filled(batch, filled)
            batch, filled, kept_bytes = _empty(prepare, size), 0, 0
            after_large()
        elif kept_bytes > _KEPT:
            yield _filled(batch, filled)
            batch, filled, kept_bytes = _empty(prepare, size), 0, 0
        try:
            pixels, digest = read_image_and_digest(path) if path is not None else (as_pixels(source), None)
            start = time.perf_counter()
            statistics = capture_statistics(pixels, prepare.preprocessing.white)
            identifying = fingerprint(pixels, prepare.preprocessing.white) if fingerprints else None
            placement = prepare.place(pixels)
        except ImageError as error:
            told = error if str(error).startswith(name) else ImageError(f"{name}: {error}")
            batch.pictures.append(Picture(path, error=told))
            continue
        insides = placement.each_inside() if prepare.masked else repeat(None)
        away = 0.0  # while whoever asked for the batch was busy with it
        for window, inside in zip(prepare.inputs(pixels, placement), insides, strict=False):
            if filled == size:
                left = time.perf_counter()
                yield batch
                away += time.perf_counter() - left
                batch, filled, kept_bytes = _empty(prepare, size), 0, 0
            batch.inputs[filled] = window
            if inside is not None and batch.inside is not None:
                batch.inside[filled, 0] = inside
            filled += 1
        taken = 1000 * (time.perf_counter() - start - away)
        if keep_pixels:
            kept_bytes += pixels.nbytes
            batch.large = pixels.nbytes > _LARGE
        batch.pictures.append(
            Picture(
                path,
                placement,
                statistics,
                identifying,
                pixels=pixels if keep_pixels else None,
                milliseconds=taken,
                digest=digest,
            )
        )
        del pixels  # before the next image's are read
    if batch.pictures or filled:
        yield _filled(batch, filled)


def _filled(batch: Batch, filled: int) -> Batch:
    """With so many model inputs only."""
    batch.inputs = batch.inputs[:filled]
    batch.inside = None if batch.inside is None else batch.inside[:filled]
    return batch


def _empty(prepare: Preparation, size: int) -> Batch:
    inside = np.zeros((size, 1, *prepare.size), np.bool_) if prepare.masked else None
    return Batch(np.empty((size, 3, *prepare.size), prepare.preprocessing.dtype), inside)
