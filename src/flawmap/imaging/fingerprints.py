"""Small pictures by which images are compared with each other. Needs numpy and Pillow only."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from flawmap.imaging.arrays import as_pixels

SIDE = 32
"""A fingerprint is a grey picture of SIDE x SIDE pixels."""


def fingerprint(pixels: ArrayLike, white: int = 65535) -> NDArray[np.float32]:
    """An image as a small, smooth grey picture without regard to its aspect ratio.

    Args:
        pixels: an image as `flawmap.imaging.arrays.as_pixels` takes it.
        white: the value that counts as white in 16-bit images.

    Returns:
        float32 (SIDE * SIDE,), row by row, 0 black to 1 white.

    Raises:
        ImageError: as `as_pixels`.
    """
    array = as_pixels(pixels)
    top = 255 if array.dtype == np.uint8 else white if array.dtype == np.uint16 else 1
    planes = [array] if array.ndim == 2 else [array[:, :, channel] for channel in range(3)]
    grey = np.mean([_shrink(plane) for plane in planes], axis=0) / top
    # Smooth enough that shifting it by a part of a pixel, by linear interpolation, leaves it as it was.
    for _ in range(2):
        for axis in (0, 1):
            around = np.pad(grey, [(1, 1) if side == axis else (0, 0) for side in (0, 1)], mode="edge")
            before, after = (around[:-2], around[2:]) if axis == 0 else (around[:, :-2], around[:, 2:])
            grey = grey / 2 + (before + after) / 4
    return np.asarray(grey, dtype=np.float32).ravel()


def _shrink(plane: NDArray[Any]) -> NDArray[np.float32]:
    image = Image.fromarray(plane if plane.dtype == np.uint8 else plane.astype(np.float32))
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR), dtype=np.float32)
