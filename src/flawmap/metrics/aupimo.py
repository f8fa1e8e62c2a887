"""AUPIMO: recall per defective image where good images raise almost no false positive.

Source: Bertoldo et al., "AUPIMO: Redefining Visual Anomaly Detection Benchmarks with High Speed and Low Tolerance",
BMVC 2024.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flawmap.metrics.regions import checked_maps


def aupimo(
    maps: ArrayLike, masks: ArrayLike, fpr_bounds: tuple[float, float] = (1e-5, 1e-4)
) -> tuple[NDArray[np.float64], float]:
    """Area under the per-image overlap curve of every defective image, and the mean over them.

    The shared false positive rate F(t) is the fraction of pixels with score >= t in an image without a defect,
    averaged over those images alone. An image's score is its recall T at the lowest threshold whose F does not exceed
    z, averaged over log z between the bounds:

        AUPIMO = 1 / log(U / L) * integral of T(F^-1(z)) d log z from L to U

    The integral is exact: between two values that F can take, T is constant. With M pixels in the images without a
    defect, F moves in steps of 1 / M; where z lies below 1 / M, or ties make the first step larger than z, T is the
    recall above the highest of those pixels, that is, without any false positive. Bounds finer than the data therefore
    give a stricter figure, not an error: (1e-5, 1e-4) needs M >= 100,000 to mean what it says.

    Args:
        maps: `(N, H, W)` anomaly maps of any real dtype and range, higher is more abnormal.
        masks: `(N, H, W)` bool, True on defects.
        fpr_bounds: L and U, with 0 < L < U <= 1.

    Returns:
        `(per_image, mean)`: `(N,)` fractions in 0..1, nan for images without a defect, and their mean over the
        defective images. All are nan where no image is defective, or none is without a defect.

    Raises:
        ValueError: a map holds NaN or infinity, the shapes differ or are not `(N, H, W)`, masks are not bool, or the
            bounds are out of order or range.
    """
    maps, masks = checked_maps(maps, masks)
    low, high = fpr_bounds
    if not 0 < low < high <= 1:
        raise ValueError(f"fpr_bounds must satisfy 0 < lower < upper <= 1, not {fpr_bounds}")
    defective = masks.any(axis=(1, 2))
    per_image = np.full(len(maps), np.nan)
    # Images of one size: the mean of their rates is the rate over all their pixels.
    normal = maps[~defective].ravel()
    if not normal.size or not defective.any():
        return per_image, float("nan")

    # While z is in [k / M, (k + 1) / M), k false positives are allowed: the threshold is just above the next score.
    first, last = int(low * normal.size), math.ceil(high * normal.size)
    highest = np.sort(np.partition(normal, normal.size - last)[normal.size - last :])[::-1]
    steps = np.clip(np.arange(first, last + 1) / normal.size, low, high)
    weights = np.diff(np.log(steps)) / math.log(high / low)
    for image in np.flatnonzero(defective):
        defect = np.sort(maps[image][masks[image]])
        recall = 1 - np.searchsorted(defect, highest[first:], side="right") / defect.size
        per_image[image] = weights @ recall
    return per_image, float(per_image[defective].mean())
