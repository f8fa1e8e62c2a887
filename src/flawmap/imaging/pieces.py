"""Large pictures taken from their files piece by piece, so that they are held once only. Needs numpy and Pillow."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from io import BytesIO
from itertools import accumulate
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from flawmap.errors import ImageError

_PIECE = 1 << 24  # bytes of a piece, about, once it is decoded

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER = 256, 257, 258, 259, 262, 266
_OFFSETS, _ORIENTATION, _SAMPLES, _ROWS, _COUNTS, _PLANAR, _PREDICTOR = 273, 274, 277, 278, 279, 284, 317
_COLOURS, _TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_COUNTS = 320, 322, 323, 324, 325
_EXTRA_SAMPLES, _SAMPLE_FORMAT = 338, 339
_OF_YCBCR = 6
# What decides how pixels are read, but for what says where they are.
_MEANING = (
    *(_WIDTH, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _SAMPLES, _PLANAR, _PREDICTOR, _COLOURS, _TILE_WIDTH),
    *(_TILE_HEIGHT, _EXTRA_SAMPLES, _SAMPLE_FORMAT),
)
_PLAIN, _LZW, _DEFLATES, _PACKED = 1, 5, (8, 32946), 32773


def tiff_pieces(image: TiffImageFile, file: BinaryIO) -> Iterator[BytesIO] | None:
    """A TIFF cut along its strips, or rows of tiles, into small ones, each of which holds some rows, from the top.

    None where it cannot be cut: one compressed strip, planes, other compressions than deflate, LZW and PackBits,
    YCbCr colours, or a picture that has to be turned.
    """
    tags = image.tag_v2
    tiled = _TILE_OFFSETS in tags
    offsets = tags.get(_TILE_OFFSETS if tiled else _OFFSETS, ())
    counts = tags.get(_TILE_COUNTS if tiled else _COUNTS, ())
    compression = tags.get(_COMPRESSION, 1)
    if (
        compression not in (_PLAIN, _LZW, *_DEFLATES, _PACKED)
        or tags.get(_ORIENTATION, 1) != 1
        or tags.get(_PHOTOMETRIC) == _OF_YCBCR
        or (tags.get(_PLANAR, 1) != 1 and tags.get(_SAMPLES, 1) > 1)
        or len(offsets) != len(counts)
    ):
        return None
    width, height = int(tags[_WIDTH]), int(tags[_HEIGHT])
    if tiled:
        rows, across = int(tags.get(_TILE_HEIGHT, 0)), -(-width // max(1, int(tags.get(_TILE_WIDTH, 0))))
    else:
        rows, across = min(int(tags.get(_ROWS, height)), height), 1
    if rows < 1 or len(offsets) != -(-height // rows) * across:
        return None
    row_bytes = max(1, width * sum(tags.get(_BITS, (1,))) // 8)
    if len(offsets) == 1 and not tiled and compression == _PLAIN and counts[0] % height == 0:
        stored = counts[0] // height
        rows = max(1, _PIECE // max(stored, 1))
        offsets = [offsets[0] + top * stored for top in range(0, height, rows)]
        counts = [min(rows, height - top) * stored for top in range(0, height, rows)]
    if len(offsets) == across:
        return None
    return _small_tiffs(image, file, list(offsets), list(counts), rows, across, max(1, _PIECE // (row_bytes * rows)))


def _small_tiffs(
    image: TiffImageFile,
    file: BinaryIO,
    offsets: list[int],
    counts: list[int],
    rows: int,
    across: int,
    together: int,
) -> Iterator[BytesIO]:
    """`offsets` and `counts` of what holds `rows` rows, `across` beside each other; so many of them in each piece."""
    tags = image.tag_v2
    tiled = _TILE_OFFSETS in tags
    where, long = (_TILE_OFFSETS, _TILE_COUNTS) if tiled else (_OFFSETS, _COUNTS)
    height = int(tags[_HEIGHT])
    for first in range(0, -(-height // rows), together):
        part = slice(first * across, (first + together) * across)
        data = []
        for offset, count in zip(offsets[part], counts[part], strict=True):
            file.seek(offset)
            data.append(file.read(count))
            if len(data[-1]) < count:
                raise ImageError("is cut off; copy it again")
        made = {tag: _numbers(tags[tag]) for tag in _MEANING if tag in tags}
        made[_HEIGHT] = (min(rows * together, height - first * rows),)
        if not tiled:
            made[_ROWS] = (rows,)
        made[where], made[long] = (0,) * len(data), tuple(map(len, data))
        start = len(_tiff(made, where, "<"))
        made[where] = tuple(accumulate(map(len, data[:-1]), initial=start))
        # In the byte order of the file, as that of the samples is.
        yield BytesIO(_tiff(made, where, "<" if tags.prefix == b"II" else ">") + b"".join(data))


def _numbers(value: Any) -> tuple[int, ...]:
    return tuple(map(int, value)) if isinstance(value, tuple) else (int(value),)


def _tiff(tags: dict[int, tuple[int, ...]], where: int, order: Literal["<", ">"]) -> bytes:
    """A TIFF file without its data; the values of the tag `where`, offsets, are of 32 bits, whatever they are."""
    after = 8 + 2 + 12 * len(tags) + 4
    entries, beyond = b"", b""
    for tag, values in sorted(tags.items()):
        short = tag != where and max(values) < 1 << 16
        packed = struct.pack(f"{order}{len(values)}{'H' if short else 'I'}", *values)
        entries += struct.pack(f"{order}HHI", tag, 3 if short else 4, len(values))
        if len(packed) <= 4:
            entries += packed.ljust(4, b"\0")
        else:
            entries += struct.pack(f"{order}I", after + len(beyond))
            beyond += packed
    head = b"II" if order == "<" else b"MM"
    return head + struct.pack(f"{order}HIH", 42, 8, len(tags)) + entries + bytes(4) + beyond


def raw_pieces(image: ImageFile, file: BinaryIO) -> Iterator[NDArray[np.uint8]] | None:
    """The rows of a picture that is stored as it is, such as BMP and binary PNM of 8 bits; None of any other."""
    tile = image.tile[0] if len(image.tile) == 1 else None
    if tile is None or tile.codec_name != "raw" or tile.extents != (0, 0, *image.size):
        return None
    args: tuple[Any, ...] = tile.args if isinstance(tile.args, tuple) else (tile.args,)
    raw, stride, way = (*args, 0, 1)[:3] if len(args) < 3 else args[:3]
    channels = {("L", "L"): 1, ("RGB", "RGB"): 3, ("RGB", "BGR"): 3}.get((image.mode, str(raw)))
    if channels is None or "transparency" in image.info:
        return None
    return _rows(file, tile.offset, image.size, channels, stride, upwards=way == -1, reverse=raw == "BGR")


def _rows(
    file: BinaryIO,
    offset: int,
    size: tuple[int, int],
    channels: int,
    stride: int,
    *,
    upwards: bool,
    reverse: bool,
) -> Iterator[NDArray[np.uint8]]:
    (width, height), stride = size, stride or size[0] * channels
    at_once = max(1, _PIECE // stride)
    for top in range(0, height, at_once):
        count = min(at_once, height - top)
        file.seek(offset + stride * (height - top - count if upwards else top))
        data = np.frombuffer(file.read(stride * count), np.uint8)
        if len(data) < stride * count - (stride - width * channels):  # the last row's padding may be missing
            raise ImageError("is cut off; copy it again")
        rows = np.pad(data, (0, stride * count - len(data))).reshape(count, stride)[:, : width * channels]
        rows = rows[::-1] if upwards else rows
        yield rows if channels == 1 else rows.reshape(count, width, 3)[:, :, :: -1 if reverse else 1]
