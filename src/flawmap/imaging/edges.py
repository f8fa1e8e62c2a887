"""Maps of edge strength, which keep their shape when the light changes. Needs numpy and Pillow only."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_COARSEST = 96  # pixels; the smallest map's longest side is no larger
_LUMA = np.array((0.299, 0.587, 0.114), np.float32)


def edge_pyramid(grey: NDArray[np.float32], count: int | None = None) -> list[NDArray[np.float32]]:
    """Maps of edge strength, each half as large as the one before; `count`, or down to `_COARSEST`."""
    planes = [_edges(grey)]
    while (max(planes[-1].shape) > _COARSEST) if count is None else (len(planes) < count):
        planes.append(_reduced(planes[-1], 0.5))
    return planes


def _edges(grey: NDArray[np.float32]) -> NDArray[np.float32]:
    """The length of the gradient, smoothed before against noise and after for a wider reach."""
    if min(grey.shape) < 2:
        return np.zeros_like(grey)
    down, across = np.gradient(_smoothed(_smoothed(grey)))
    return _smoothed(_smoothed(np.hypot(down, across)))


def _smoothed(plane: NDArray[np.float32]) -> NDArray[np.float32]:
    """1 2 1 on both axes."""
    padded = np.pad(plane, 1, mode="edge")
    rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    smoothed: NDArray[np.float32] = (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) * np.float32(1 / 16)
    return smoothed


def to_grey(pixels: NDArray[Any], factor: float) -> NDArray[np.float32]:
    """Any image, reduced, on the scale 0..255."""
    white = {"uint8": 255, "uint16": 65535}.get(pixels.dtype.name, 1)
    if pixels.dtype != np.uint8:
        # Pillow has no floating-point mode of several channels.
        pixels = pixels @ _LUMA if pixels.ndim == 3 else pixels.astype(np.float32)
    reduced: NDArray[np.float32] = _reduced(pixels, factor).astype(np.float32) * np.float32(255 / white)
    return reduced if reduced.ndim == 2 else np.asarray(reduced @ _LUMA)


def _reduced(pixels: NDArray[Any], factor: float) -> NDArray[Any]:
    """At exactly `factor`, whose rest at the right and lower edge is left out."""
    height, width = (max(1, math.floor(side * factor + 1e-9)) for side in pixels.shape[:2])
    box = (0, 0, min(width / factor, pixels.shape[1]), min(height / factor, pixels.shape[0]))
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR, box))
