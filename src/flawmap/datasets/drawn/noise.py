"""Random fields: the unevenness of paint, cloth and metal, drawn small and enlarged smoothly."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Plane = NDArray[np.float32]


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], cell: float | tuple[float, float]) -> Plane:
    """Smooth noise of roughly zero mean and unit deviation, `shape` (H, W), float32.

    `cell` is the distance in pixels over which the values change; a pair (down, across) gives streaks.
    """
    down, across = cell if isinstance(cell, tuple) else (cell, cell)
    height, width = shape
    grid = rng.standard_normal((int(height / down) + 3, int(width / across) + 3), dtype=np.float32)
    top, left = rng.uniform(0, 1, 2)
    window = (left, top, left + width / across, top + height / down)
    enlarged = Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC, box=window)
    noise: Plane = np.asarray(enlarged, dtype=np.float32) * np.float32(1.4)  # interpolation takes some deviation
    return noise


def fractal_noise(rng: np.random.Generator, shape: tuple[int, int], cell: float, octaves: int = 3) -> Plane:
    """`smooth_noise` at `cell`, `cell / 2`, ... with halving weights, `shape` (H, W), float32, unit deviation."""
    total = np.zeros(shape, dtype=np.float32)
    weights = 0.5 ** np.arange(octaves)
    for octave, weight in enumerate(weights / np.sqrt(np.sum(weights**2))):
        total += np.float32(weight) * smooth_noise(rng, shape, cell / 2**octave)
    return total
