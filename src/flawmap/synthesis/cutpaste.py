"""Patches of the image itself in another place: CutPaste and its scar (Li et al., CVPR 2021, section 2.2)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

_DESIGN_SIDE = 256  # the image side that the scar's sizes in pixels are meant for


def cutpaste(
    rng: np.random.Generator, image: NDArray[Any], region: NDArray[np.bool_], jitter: float = 0.1
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """An upright rectangle of 2 to 15 % of the image's area and an aspect ratio of up to 1 : 3.3 either way.

    Args:
        image: (H, W) or (H, W, 3), any type.
        region: bool (H, W), True somewhere: the patch's centre and its new place's centre lie in it.
        jitter: the patch's brightness and contrast change by up to this share.

    Returns:
        (source, mask): an array like the image that holds the patch where the mask, bool (H, W), is True. The mask may
        reach beyond the region.
    """
    height, width = region.shape
    area = rng.uniform(0.02, 0.15) * height * width
    aspect = rng.uniform(0.3, 1.0) if rng.random() < 0.5 else rng.uniform(1.0, 3.3)
    return _move(rng, image, region, (math.sqrt(area / aspect), math.sqrt(area * aspect)), 0.0, jitter)


def scar(
    rng: np.random.Generator, image: NDArray[Any], region: NDArray[np.bool_], jitter: float = 0.1
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """A thin rectangle, 2 to 16 by 10 to 25 pixels in an image of 256, turned by up to 45 degrees.

    Arguments and results as of `cutpaste`.
    """
    scale = max(region.shape) / _DESIGN_SIDE
    narrow, long = max(1.0, rng.uniform(2, 16) * scale), max(2.0, rng.uniform(10, 25) * scale)
    box = (narrow, long) if rng.random() < 0.5 else (long, narrow)
    return _move(rng, image, region, box, math.radians(rng.uniform(-45, 45)), jitter)


def _move(
    rng: np.random.Generator,
    image: NDArray[Any],
    region: NDArray[np.bool_],
    box: tuple[float, float],
    angle: float,
    jitter: float,
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """A rectangle, `box` down and across, about one point of the region, turned about another; nearest pixels."""
    height, width = region.shape
    places = np.flatnonzero(region)
    (from_y, to_y), (from_x, to_x) = np.divmod(rng.choice(places, 2), width)
    y, x = np.arange(height)[:, None] - to_y, np.arange(width)[None] - to_x
    u = math.cos(angle) * x + math.sin(angle) * y  # (H, W)
    v = math.cos(angle) * y - math.sin(angle) * x
    mask = (np.abs(v) <= box[0] / 2) & (np.abs(u) <= box[1] / 2)
    source_y, source_x = np.rint(from_y + v[mask]).astype(np.int64), np.rint(from_x + u[mask]).astype(np.int64)
    # Where the patch would reach over the image's edge it is mirrored.
    patch = image[_mirrored(source_y, height), _mirrored(source_x, width)].astype(np.float32)  # (N,) or (N, C)
    mean = patch.mean(axis=0)
    patch = (patch - mean) * np.float32(1 + rng.uniform(-jitter, jitter)) + mean * np.float32(
        1 + rng.uniform(-jitter, jitter)
    )
    source = image.copy()
    if image.dtype.kind == "f":
        source[mask] = np.clip(patch, 0, 1)
    else:
        source[mask] = np.clip(patch, 0, np.iinfo(image.dtype).max).round().astype(image.dtype)
    return source, mask


def _mirrored(index: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    folded = index % (2 * length)
    return np.minimum(folded, 2 * length - 1 - folded)
