"""The maps of an image's windows while they come: in memory, or in a file where there are very many of them.

Needs numpy only.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from flawmap.errors import FlawmapError

IN_MEMORY = 1 << 27
"""Bytes; more maps of one image lie in a temporary file, and are mapped."""


class WindowMaps:
    """Takes the maps (h, w) float32 of one image's windows, one after the other."""

    def __init__(self) -> None:
        self._held: list[NDArray[np.float32]] = []
        self._file: BinaryIO | None = None
        self._filed = 0
        self._shape: tuple[int, ...] = ()

    def add(self, one: NDArray[np.float32]) -> None:
        """The next window's.

        Raises:
            FlawmapError: there is no room for the file.
        """
        self._held.append(one)
        if len(self._held) * one.nbytes > IN_MEMORY:
            self._put_away()

    def _put_away(self) -> None:
        try:
            # Without a name, so that it goes with the last who reads it.
            self._file = self._file or tempfile.TemporaryFile(prefix="flawmap-")  # noqa: SIM115
            for one in self._held:
                self._file.write(np.ascontiguousarray(one).data)
                self._shape = one.shape
        except OSError as error:
            raise FlawmapError(
                f"the maps of a large image cannot be kept in {tempfile.gettempdir()} ({error.strerror or error}): "
                "free some space, or set TMPDIR to a larger disk"
            ) from error
        self._filed += len(self._held)
        self._held = []

    def take(self) -> NDArray[np.float32] | None:
        """All of them, (T, h, w), None where there are none; the next that is added is another image's."""
        if self._file is None:
            maps = np.stack(self._held) if self._held else None
            self._held = []
            return maps
        self._put_away()
        self._file.flush()
        mapped: NDArray[np.float32] = np.memmap(self._file, np.float32, "r", shape=(self._filed, *self._shape))
        self._file, self._filed = None, 0
        return mapped


def each(maps: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    """The maps (h, w) of (T, h, w), of which mapped ones leave the memory again when they have been read."""
    mapped = getattr(maps, "_mmap", None) if isinstance(maps, np.memmap) else None
    for number, one in enumerate(maps, start=1):
        yield one
        if mapped is not None and number % 64 == 0 and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)
