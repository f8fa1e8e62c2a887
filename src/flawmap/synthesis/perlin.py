"""Irregular masks from Perlin noise (Perlin, SIGGRAPH 1985), as DRAEM makes them (ICCV 2021, section 3.2)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def perlin_noise(rng: np.random.Generator, shape: tuple[int, int], cell: tuple[float, float]) -> NDArray[np.float32]:
    """Gradient noise with the fade 6t⁵ - 15t⁴ + 10t³, scaled by √2 so that it lies in [-1, 1].

    Args:
        shape: (H, W), in pixels.
        cell: height and width of the lattice's cells, in pixels.

    Returns:
        float32 (H, W), zero at the lattice's corners, of which one is pixel (0, 0).
    """
    rows, fade_down, ramp_down = _lattice(shape[0], cell[0])
    columns, fade_across, ramp_across = _lattice(shape[1], cell[1])
    angles = rng.uniform(0, 2 * math.pi, (rows[-1] + 2, columns[-1] + 2))
    down, across = np.sin(angles).astype(np.float32), np.cos(angles).astype(np.float32)  # the gradients
    # A corner's share is its gradient times the offset to it, faded in both directions: products of a row and a column.
    faded = sum(down[:, columns + k] * fade_across[k] for k in (0, 1))  # (lattice rows, W)
    ramped = sum(across[:, columns + k] * ramp_across[k] for k in (0, 1))
    noise, part = np.zeros(shape, np.float32), np.empty(shape, np.float32)
    for k in (0, 1):
        for values, weights in ((faded, ramp_down), (ramped, fade_down)):
            np.take(values, rows + k, axis=0, out=part, mode="clip")
            part *= weights[k][:, None]
            noise += part
    noise *= math.sqrt(2)
    return noise


def perlin_mask(
    rng: np.random.Generator,
    shape: tuple[int, int],
    scales: tuple[int, int] = (0, 5),
    threshold: float = 0.5,
) -> NDArray[np.bool_]:
    """Where Perlin noise, turned by up to 90 degrees either way, lies over a threshold; it may be nowhere.

    The noise is made for as much of the plane as the turned image covers, so that its corners may be masked too.

    Args:
        shape: (H, W), in pixels.
        scales: the image is 2^k cells high and 2^l wide, k and l uniform between the two, both included.
        threshold: on noise in [-1, 1].

    Returns:
        bool (H, W).
    """
    height, width = shape
    down, across = (2 ** int(power) for power in rng.integers(scales[0], scales[1], size=2, endpoint=True))
    angle = math.radians(rng.uniform(-90, 90))
    cosine, sine = abs(math.cos(angle)), abs(math.sin(angle))
    canvas = (math.ceil(height * cosine + width * sine) + 1, math.ceil(height * sine + width * cosine) + 1)
    return _turned(perlin_noise(rng, canvas, (height / down, width / across)) > threshold, shape, angle)


def _lattice(length: int, cell_length: float) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
    """The cell of each of `length` pixels; its ends' fade weights, and those times the offsets: (2, length)."""
    position = np.arange(length) / cell_length
    cell = position.astype(np.int64)
    offset = position - cell
    rise = offset**3 * (offset * (offset * 6 - 15) + 10)
    fade = np.stack([1 - rise, rise])
    return cell, fade.astype(np.float32), (fade * np.stack([offset, offset - 1])).astype(np.float32)


def _turned(mask: NDArray[np.bool_], shape: tuple[int, int], angle: float) -> NDArray[np.bool_]:
    """The (H, W) window about the centre of a larger mask, turned by an angle in radians, to the nearest pixel."""
    height, width = shape
    cosine, sine = math.cos(angle), math.sin(angle)
    middle_y, middle_x = mask.shape[0] / 2, mask.shape[1] / 2
    affine = (
        cosine, -sine, middle_x - cosine * width / 2 + sine * height / 2,
        sine, cosine, middle_y - sine * width / 2 - cosine * height / 2,
    )  # fmt: skip
    picture = Image.fromarray(mask.view(np.uint8))
    return np.asarray(picture.transform((width, height), Image.Transform.AFFINE, affine)).view(np.bool_)
