"""Pillow's pictures as the arrays that hold images. Needs numpy and Pillow only."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flawmap.errors import ImageError


def pixels_of(image: Image.Image) -> NDArray[Any]:
    """The pixels of a picture in any of Pillow's modes: grey, or RGB; transparency is laid onto black.

    Returns:
        uint8 (H, W) for grey, uint8 (H, W, 3) for colour, uint16 (H, W) for deep grey.

    Raises:
        ImageError: floating-point values, values that do not fit 16 bits, or CIELAB colours.
    """
    if image.mode == "F":
        raise ImageError("holds floating-point values; save it as 8- or 16-bit grey")
    if image.mode == "LAB":
        raise ImageError("holds CIELAB colours; save it as RGB")
    if is_deep(image):
        values = np.array(image)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 65535:
            raise ImageError(f"holds values from {low} to {high}; save it as 8- or 16-bit grey")
        deep = values.astype(np.uint16, copy=False)
        key = image.info.get("transparency")
        return np.where(deep == key, np.uint16(0), deep) if isinstance(key, int) else deep

    base = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        return over_black(np.array(image.convert(base + "A")))
    return np.array(image if image.mode == base else image.convert(base))


def is_deep(image: Image.Image) -> bool:
    """Whether it is grey of more than 8 bits."""
    return image.mode.startswith("I")


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
