"""Which way up a picture was taken, as its EXIF says, however damaged the rest of its EXIF is. Needs Pillow only."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_TAG = 0x0112
_TURNS: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {  # stored -> upright, from the EXIF standard's table
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).swapaxes(0, 1),
    8: lambda stored: np.rot90(stored, 1),
}


def orientation(image: Image.Image) -> int:
    """How the stored picture is turned, 1 (upright) to 8, see the EXIF standard; 1 where nothing legible says so."""
    try:
        value = image.getexif().get(_TAG)
    except Exception:  # damaged EXIF makes Pillow's reader raise nearly every type there is
        value = None
    if value is None:
        value = _only_orientation(image.info.get("exif"))
    return value if value in _TURNS else 1


def turned(pixels: NDArray[Any], way: int) -> NDArray[Any]:
    """The stored pixels (H, W) or (H, W, 3) as the picture was taken, whose `orientation` is `way`."""
    turn = _TURNS.get(way)
    return pixels if turn is None else np.ascontiguousarray(turn(pixels))


def without_exif(content: bytes) -> tuple[bytes, bytes] | None:
    """A JPEG, PNG or AVIF file that holds the same pixels, its EXIF out of the reader's sight; and that EXIF block.

    None where it has no EXIF, or none that can be found.
    """
    if content.startswith(b"\xff\xd8"):
        found = _in_jpeg(content)
    elif content.startswith(b"\x89PNG"):
        found = _in_png(content)
    elif content[4:8] == b"ftyp":  # which way up such a picture was taken is said elsewhere
        named = re.search(rb"infe[\x02\x03].{3}(?:.{4}|.{6})Exif", content[: 1 << 16], re.DOTALL)
        return None if named is None else (content[: named.end() - 4] + b"none" + content[named.end() :], b"")
    else:
        return None
    if found is None:
        return None
    start, end, block = found
    return content[:start] + content[end:], block


def _in_jpeg(content: bytes) -> tuple[int, int, bytes] | None:
    """Where the EXIF lies, and what it holds."""
    at = 2
    while content[at : at + 1] == b"\xff" and content[at + 1 : at + 2] != b"\xda":
        length = int.from_bytes(content[at + 2 : at + 4], "big")
        if content[at + 1] == 0xE1 and content[at + 4 : at + 8] == b"Exif":
            return at, at + 2 + length, content[at + 10 : at + 2 + length]
        at += 2 + length
    return None


def _in_png(content: bytes) -> tuple[int, int, bytes] | None:
    """Where the EXIF lies, and what it holds."""
    at = 8
    while at + 8 <= len(content) and content[at + 4 : at + 8] != b"IEND":
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")
        if content[at + 4 : at + 8] == b"eXIf":
            return at, end, content[at + 8 : end - 4]
        at = end
    return None


def _only_orientation(exif: object) -> int | None:
    """The one tag, found in the first directory of an EXIF block without reading any other."""
    if not isinstance(exif, bytes):
        return None
    block = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(order + "I", block, 4)
        (count,) = struct.unpack_from(order + "H", block, start)
        for entry in range(count):
            tag, kind, length, value = struct.unpack_from(order + "HHIH", block, start + 2 + 12 * entry)
            if (tag, kind, length) == (_TAG, 3, 1):
                return int(value)
    except struct.error:  # the directory is cut off
        pass
    return None
