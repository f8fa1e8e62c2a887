"""Laying a source into an image where a mask says so."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Planes = NDArray[np.floating[Any]]

_SMALL = 64  # unknown pixels that conjugate gradients solve from any start in as many steps at most


def alpha_blend(image: Planes, source: Planes, mask: NDArray[np.bool_], opacity: float) -> Planes:
    """`opacity` of the source and the rest of the image inside the mask, the image itself outside.

    DRAEM (ICCV 2021), equation 1, with opacity 1 - β.

    Args:
        image, source: (H, W, C) floating point.
        mask: bool (H, W).
        opacity: 0..1.

    Returns:
        (H, W, C), of the image's type.
    """
    blended: Planes = image.copy()
    blended[mask] += image.dtype.type(opacity) * (source[mask] - image[mask])
    return blended


def seamless_blend(image: Planes, source: Planes, mask: NDArray[np.bool_], tolerance: float = 1e-3) -> Planes:
    """The source's gradients inside the mask, the image's values around it: no edge shows at the mask's outline.

    Pérez, Gangnet & Blake, "Poisson image editing" (SIGGRAPH 2003), equation 10: the solution is the source plus a
    harmonic correction that equals image - source around the mask. The image's own border sets no condition. A mask
    over the whole image leaves only the mean undetermined, which is taken from the image.

    Args:
        image, source: (H, W, C) floating point, values of about 0..1; results may leave that range.
        mask: bool (H, W).
        tolerance: the largest residual of the Poisson equation at any pixel, on the scale of the values.

    Returns:
        (H, W, C), of the image's type; outside the mask the image, bit for bit.
    """
    blended: Planes = image.copy()
    if mask.all():
        blended[:] = source + (image.mean(axis=(0, 1)) - source.mean(axis=(0, 1)))
        return blended
    if mask.any():
        correction = harmonic_fill(image - source, mask, tolerance)
        blended[mask] = source[mask] + correction[mask]
    return blended


def harmonic_fill(values: Planes, mask: NDArray[np.bool_], tolerance: float) -> Planes:
    """The values with those inside the mask replaced by a solution of Laplace's equation, given those around it.

    Each unknown pixel becomes the mean of its neighbours in the image (up to four). Conjugate gradients, started from
    the solution at half the resolution, which leaves only short waves to be found.

    Args:
        values: (H, W, C) floating point; those inside the mask are not read.
        mask: bool (H, W), False somewhere.
        tolerance: the largest |neighbours' sum - neighbours' number * value| accepted at any pixel.
    """
    filled: Planes = values.copy()
    unknown = int(mask.sum())
    if unknown == 0:
        return filled
    if unknown > _SMALL:
        coarse, coarse_mask = _halve(values, mask)
        coarse = harmonic_fill(coarse, coarse_mask, tolerance)
        filled[mask] = _double(coarse, mask.shape)[mask]
    else:
        filled[mask] = values[~mask].mean(axis=0)
    filled[mask] = _conjugate_gradients(filled, mask, tolerance)
    return filled


def _halve(values: Planes, mask: NDArray[np.bool_]) -> tuple[Planes, NDArray[np.bool_]]:
    """Means of the known pixels of each 2 x 2 block; a block is unknown where it has none."""
    height, width, channels = values.shape
    rows, columns = -(-height // 2), -(-width // 2)
    known = np.zeros((2 * rows, 2 * columns, channels + 1), values.dtype)
    known[:height, :width, :channels] = values * ~mask[..., None]
    known[:height, :width, channels] = ~mask
    blocks = known[::2, ::2] + known[1::2, ::2] + known[::2, 1::2] + known[1::2, 1::2]  # (rows, columns, C + 1)
    count = blocks[..., channels:]
    return blocks[..., :channels] / np.maximum(count, 1), count[..., 0] == 0


def _double(values: Planes, shape: tuple[int, ...]) -> Planes:
    """Bilinear, from block centres to pixel centres."""
    for axis in (0, 1):
        moved = np.moveaxis(values, axis, 0)
        before = np.concatenate([moved[:1], moved[:-1]])
        after = np.concatenate([moved[1:], moved[-1:]])
        doubled = np.empty((2 * len(moved), *moved.shape[1:]), values.dtype)
        doubled[::2], doubled[1::2] = 0.75 * moved + 0.25 * before, 0.75 * moved + 0.25 * after
        values = np.moveaxis(doubled[: shape[axis]], 0, axis)
    return values


def _conjugate_gradients(filled: Planes, mask: NDArray[np.bool_], tolerance: float) -> Planes:
    """The (N, C) unknown values, from those in `filled` on; the channels are solved side by side."""
    from scipy.sparse import csr_array

    height, width = mask.shape
    count = int(mask.sum())
    numbers = np.full((height + 2, width + 2), -2, np.int32)  # -2 outside the image, -1 known
    numbers[1:-1, 1:-1] = -1
    numbers[1:-1, 1:-1][mask] = np.arange(count)
    at = np.flatnonzero(numbers >= 0)
    steps = np.array([-(width + 2), -1, 1, width + 2])
    beside = numbers.ravel()[at[:, None] + steps]  # (N, 4)
    degree = (beside > -2).sum(axis=1, keepdims=True).astype(filled.dtype)
    links = beside >= 0
    ends = np.concatenate([[0], np.cumsum(links.sum(axis=1))])
    neighbours = csr_array((np.ones(int(ends[-1]), filled.dtype), beside[links], ends), shape=(count, count))

    values = filled[mask]  # (N, C)
    around = np.zeros((height + 2, width + 2, filled.shape[2]), filled.dtype)
    around[1:-1, 1:-1] = filled * ~mask[..., None]
    flat = around.reshape(-1, filled.shape[2])
    residual = sum(flat[at + step] for step in steps) - (degree * values - neighbours @ values)
    direction = residual / degree  # Jacobi's preconditioner
    energy = (residual * direction).sum(axis=0)
    for _ in range(count):
        if np.abs(residual).max() <= tolerance:
            break
        image = degree * direction - neighbours @ direction
        step = energy / np.maximum((direction * image).sum(axis=0), np.finfo(filled.dtype).tiny)
        values += step * direction
        residual -= step * image
        scaled = residual / degree
        before, energy = energy, (residual * scaled).sum(axis=0)
        direction = scaled + energy / np.maximum(before, np.finfo(filled.dtype).tiny) * direction
    return values
