"""PNG files written row by row, of pictures that are never held whole. Needs numpy only."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

_UP = 2  # the filter: each byte less that of the row above
_COLOUR_TYPES = {2: 0, 3: 2}


def png_of_rows(
    size: tuple[int, int], bands: Iterable[NDArray[Any]], *, software: str | None = None, level: int = 3
) -> Iterator[bytes]:
    """A PNG file, part by part.

    Args:
        size: (height, width).
        bands: its rows from the top, uint8 or uint16, (r, W) grey or (r, W, 3) colours; at least one.
        software: what it says of who wrote it.
        level: of compression, 0 to 9.
    """
    packer = zlib.compressobj(level)
    above: NDArray[np.uint8] | None = None
    for band in bands:
        kind = band.dtype.newbyteorder(">") if band.dtype == np.uint16 else band.dtype
        rows = np.ascontiguousarray(band, kind).reshape(len(band), -1).view(np.uint8)
        if above is None:
            yield b"\x89PNG\r\n\x1a\n"
            colour = _COLOUR_TYPES[band.ndim]
            yield _chunk(b"IHDR", struct.pack(">IIBBBBB", size[1], size[0], 8 * kind.itemsize, colour, 0, 0, 0))
            if software is not None:
                yield _chunk(b"tEXt", b"Software\0" + software.encode("latin-1"))
            above = np.zeros(rows.shape[1], np.uint8)
        filtered = np.empty((len(rows), 1 + rows.shape[1]), np.uint8)
        filtered[:, 0] = _UP
        filtered[:1, 1:] = rows[:1] - above
        filtered[1:, 1:] = rows[1:] - rows[:-1]
        above = rows[-1]
        if packed := packer.compress(filtered.data):
            yield _chunk(b"IDAT", packed)
    yield _chunk(b"IDAT", packer.flush())
    yield _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
