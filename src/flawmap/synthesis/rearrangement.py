"""Structural defects: the right material in the wrong place."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def rearrange(rng: np.random.Generator, image: NDArray[Any], grid: int = 8) -> NDArray[Any]:
    """The image cut into `grid` x `grid` patches, which change places and are turned by half a turn or not.

    MemSeg (arXiv 2205.00908) shuffles so, without turning. What a whole number of patches does not cover, at the right
    and at the bottom, stays; along a side with fewer pixels than patches each pixel is a patch.

    Args:
        image: (H, W) or (H, W, C), any type.

    Returns:
        A new array like it, with the same values in other places.
    """
    rows, columns = (min(grid, side) for side in image.shape[:2])
    height, width = image.shape[0] // rows, image.shape[1] // columns
    inner = image[: rows * height, : columns * width]
    patches = inner.reshape(rows, height, columns, width, -1).swapaxes(1, 2).reshape(rows * columns, height, width, -1)
    patches = patches[rng.permutation(len(patches))]
    turned = rng.random(len(patches)) < 0.5
    patches[turned] = patches[turned, ::-1, ::-1]
    arranged: NDArray[Any] = image.copy()
    arranged[: rows * height, : columns * width] = (
        patches.reshape(rows, columns, height, width, -1).swapaxes(1, 2).reshape(inner.shape)
    )
    return arranged
