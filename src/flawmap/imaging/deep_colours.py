"""Colours of 16 bits a channel, which Pillow has no mode for. Needs numpy and Pillow only.

Pillow's readers of PNG and TIFF undo compression and filters at full depth, and cut to 8 bits when they write the
pixels into the picture. Which byte of each value is kept is the last letter of the raw mode: so a file is decoded
twice, once for the upper bytes and once for the lower.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL.ImageFile import ImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile

from flawmap.errors import ImageError
from flawmap.imaging.modes import over_black
from flawmap.imaging.png import png_of_rows
from flawmap.imaging.tiff import has_undeclared_sample

_NATIVE = "L" if sys.byteorder == "little" else "B"
_UPPER = {"L": "L", "B": "B", "N": _NATIVE}
_LOWER = {"L": "B", "B": "L", "N": "B" if _NATIVE == "L" else "L"}
_KINDS = ("RGB;16", "RGBX;16", "RGBA;16", "RGBa;16", "LA;16")


def has_deep_colours(image: ImageFile) -> bool:
    """Whether an opened picture, not loaded yet, holds colours (or grey with alpha) of 16 bits a channel."""
    if isinstance(image, PpmImageFile):
        return image.mode == "RGB" and _pnm_white(image) > 255
    return _raw_mode(image)[:-1] in _KINDS


def read_deep_colours(image: ImageFile, again: Callable[[], ImageFile]) -> NDArray[np.uint16]:
    """The pixels of a picture that `has_deep_colours`, at full depth, transparency laid onto black.

    Args:
        image: opened, not loaded yet.
        again: opens the same file once more.

    Returns:
        uint16 (H, W, 3), or (H, W) for grey with alpha, as stored.

    Raises:
        ImageError: a PNM file that is cut off, or whose values are over what it says is the largest.
    """
    if isinstance(image, PpmImageFile):
        return _read_pnm(image)
    raw = _raw_mode(image)
    if raw.startswith("LA"):  # four bytes a pixel, each of which becomes a channel
        quads = _loaded(image, "RGBA")
        return over_black(_joined(quads[:, :, ::2], quads[:, :, 1::2]))
    undeclared = isinstance(image, TiffImageFile) and has_undeclared_sample(image)
    # Pillow divides by alpha what is stored multiplied by it, byte by byte; laid onto black it is right as stored.
    kind = raw[:-1].replace("a", "A")
    key = image.info.get("transparency")
    pixels = _joined(_loaded(image, kind + _UPPER[raw[-1]]), _loaded(again(), kind + _LOWER[raw[-1]]))
    if raw.startswith("RGBA") and not undeclared:
        return over_black(pixels)
    pixels = np.ascontiguousarray(pixels[:, :, :3])
    if isinstance(key, tuple):
        pixels[(pixels == key).all(axis=2)] = 0
    return pixels


def png_of_deep_colours(pixels: NDArray[np.uint16]) -> bytes:
    """A PNG file of uint16 (H, W, 3), which Pillow does not write."""
    return b"".join(png_of_rows((pixels.shape[0], pixels.shape[1]), [pixels], level=1))


def _joined(upper: NDArray[np.uint8], lower: NDArray[np.uint8]) -> NDArray[np.uint16]:
    joined = upper.astype(np.uint16)
    joined <<= np.uint16(8)
    joined |= lower
    return joined


def _raw_mode(image: ImageFile) -> str:
    args = image.tile[0].args if image.tile else None
    raw = args[0] if isinstance(args, tuple) and args else args
    return raw if isinstance(raw, str) else ""


def _loaded(image: ImageFile, raw: str) -> NDArray[np.uint8]:
    image.tile = [
        tile._replace(args=(raw, *tile.args[1:]) if isinstance(tile.args, tuple) else raw) for tile in image.tile
    ]
    return np.array(image)


def _pnm_white(image: PpmImageFile) -> int:
    args = image.tile[0].args if image.tile else None
    return args[1] if isinstance(args, tuple) and len(args) > 1 and isinstance(args[1], int) else 255


def _read_pnm(image: PpmImageFile) -> NDArray[np.uint16]:
    """Values are scaled to 65535, as Pillow scales those of 16-bit grey."""
    tile, white = image.tile[0], _pnm_white(image)
    count = 3 * image.width * image.height
    assert image.fp is not None
    image.fp.seek(tile.offset)
    if tile.codec_name == "ppm_plain":
        values = np.array(image.fp.read().split(), dtype=np.uint32)
    else:
        values = np.frombuffer(image.fp.read(2 * count), ">u2").astype(np.uint32)
    if values.size < count:
        raise ImageError(f"holds {values.size} of {count} values, cut off; copy it again")
    if int(values.max(initial=0)) > white:
        raise ImageError(f"holds values over {white}, which it says is the largest; save it again")
    scaled = (values[:count] * 65535 + white // 2) // white
    return scaled.astype(np.uint16).reshape(image.height, image.width, 3)
