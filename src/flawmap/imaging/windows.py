"""The boxes of an image that model inputs cover, and the pixels under them. Needs numpy and Pillow only.

Pixel i spans i to i + 1, so its centre lies at i + 0.5, in images, model inputs and maps alike.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image


class Window(NamedTuple):
    """The box that one model input covers, in pixels of the frame. What exceeds the image is padding.

    The image's edges lie on edges of model pixels, so that no model pixel is image in part: `Geometry` moves a window's
    edges by up to half a model pixel to have it so.
    """

    left: float
    top: float
    right: float
    bottom: float


def resize_window(pixels: NDArray[Any], window: Window, size: tuple[int, int]) -> NDArray[Any]:
    """The part of an image under a window, at (height, width), by Pillow's bilinear filter; the edge repeated outside.

    Args:
        pixels: uint8 (H, W) or (H, W, 3), or one float32 plane (H, W).

    Returns:
        (height, width) or (height, width, 3) of the same type; may be read-only.
    """
    return cut_window(pixels, window, size, Image.Resampling.BILINEAR)


def cut_window(
    pixels: NDArray[Any], window: Window, size: tuple[int, int], resampling: Image.Resampling
) -> NDArray[Any]:
    """`resize_window` by any of Pillow's filters."""
    rows, columns = content_slices(window, pixels.shape[:2], size)
    left, top, right, bottom = clipped(window, pixels.shape[:2])
    height, width = rows.stop - rows.start, columns.stop - columns.start
    # The filter reaches one model pixel, or one image pixel where that is larger, beyond the window.
    down, across = math.ceil(max((bottom - top) / height, 1)) + 1, math.ceil(max((right - left) / width, 1)) + 1
    y, x = max(math.floor(top) - down, 0), max(math.floor(left) - across, 0)
    part = pixels[y : math.ceil(bottom) + down, x : math.ceil(right) + across]
    box = (left - x, top - y, right - x, bottom - y)
    resized = np.asarray(Image.fromarray(part).resize((width, height), resampling, box))
    if resized.shape[:2] == size:
        return resized
    padding = [(rows.start, size[0] - rows.stop), (columns.start, size[1] - columns.stop), (0, 0)]
    return np.pad(resized, padding[: pixels.ndim], mode="edge")


def content_slices(window: Window, frame: tuple[int, ...], size: tuple[int, int]) -> tuple[slice, slice]:
    """The rows and columns of the model input that are image."""
    left, top, right, bottom = window
    down, across = size[0] / (bottom - top), size[1] / (right - left)
    return (
        slice(max(0, round(-top * down)), min(size[0], round((frame[0] - top) * down))),
        slice(max(0, round(-left * across)), min(size[1], round((frame[1] - left) * across))),
    )


def clipped(window: Window, frame: tuple[int, ...]) -> Window:
    """The part of a window that is image."""
    left, top, right, bottom = window
    return Window(max(left, 0), max(top, 0), min(right, frame[1]), min(bottom, frame[0]))
