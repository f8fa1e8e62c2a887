"""The arrays that hold images, and arrays given by users brought to these forms. Needs numpy only.

An image is one of three arrays everywhere in flawmap: uint8 (H, W) for grey, uint8 (H, W, 3) for RGB and
uint16 (H, W) for 16-bit grey. Sizes are (height, width), as array shapes are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flawmap.errors import ImageError

_FORMS = "uint8, uint16 or float in [0, 1], shaped (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)"


def as_pixels(array: ArrayLike) -> NDArray[Any]:
    """An array given by a user, checked and brought to a form that `Preprocessing` takes.

    Alpha is laid onto black and a single channel's axis is dropped.

    Args:
        array: uint8, uint16 or float in [0, 1]; (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), colours in RGB order.

    Returns:
        uint8, uint16 or (for any float) float32; (H, W) or (H, W, 3). The input itself where nothing had to change.

    Raises:
        ImageError: another type, shape or range, or no pixels.
    """
    pixels = np.asarray(array)
    got = f"an array of {pixels.dtype}, shape {pixels.shape}"
    if not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (1, 3, 4))):
        raise ImageError(f"got {got}; expected {_FORMS}")
    if pixels.size == 0:
        raise ImageError(f"got {got}, which holds no pixels; expected at least one")
    if pixels.dtype.kind == "f":
        low, high = float(pixels.min()), float(pixels.max())
        if not (low >= 0 and high <= 1):  # written so that NaN fails
            raise ImageError(f"got {got}, values from {low:g} to {high:g}; expected {_FORMS}: scale or clip it")
        pixels = pixels.astype(np.float32, copy=False)
    elif pixels.dtype.kind == "u" and pixels.dtype.itemsize <= 2:
        pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    else:
        raise ImageError(f"got {got}; expected {_FORMS}: convert it with .astype")
    if pixels.ndim == 3 and pixels.shape[2] == 4:
        return over_black(pixels)
    return pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels


def over_black(pixels: NDArray[Any]) -> NDArray[Any]:
    """(H, W, 2) or (H, W, 4) with alpha last, laid onto black: (H, W) or (H, W, 3) of the same type."""
    colours, alpha = pixels[:, :, :-1], pixels[:, :, -1:]
    if pixels.dtype.kind == "f":
        laid = colours * alpha
    else:
        most = int(np.iinfo(pixels.dtype).max)
        laid = (colours.astype(np.uint32) * alpha + most // 2) // most
    result: NDArray[Any] = laid.astype(pixels.dtype, copy=False)
    return result[:, :, 0] if result.shape[2] == 1 else result


def size_text(size: tuple[int, ...]) -> str:
    """(height, width) in words, such as "480 x 640 (height x width)"."""
    return f"{size[0]} x {size[1]} (height x width)"
