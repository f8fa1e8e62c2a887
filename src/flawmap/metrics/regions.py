"""Per-region overlap (PRO): every connected defect counts the same, however large it is.

Source: Bergmann et al., "Uninformed Students: Student-Teacher Anomaly Detection with Discriminative Latent
Embeddings", CVPR 2020, which integrates up to a false positive rate of 0.3.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flawmap.metrics.ranking import roc_points, sweep


def aupro(maps: ArrayLike, masks: ArrayLike, limit: float = 0.3) -> float:
    """Area under the PRO curve from a false positive rate of 0 to `limit`, divided by `limit`.

    PRO is the fraction of a defect region that is found, averaged over all regions of all images; regions are
    8-connected. The false positive rate is taken over all normal pixels, of good and defective images alike. The curve
    is linear between thresholds, and is cut at the limit by interpolation.

    Args:
        maps: `(N, H, W)` anomaly maps of any real dtype and range, higher is more abnormal.
        masks: `(N, H, W)` bool, True on defects.
        limit: upper end of the false positive rate, in (0, 1].

    Returns:
        A fraction in 0..1; nan where there is no defect pixel or no normal pixel.

    Raises:
        ValueError: a map holds NaN or infinity, the shapes differ or are not `(N, H, W)`, masks are not bool, or the
            limit is outside (0, 1].
    """
    check_limit(limit)
    maps, masks = checked_maps(maps, masks)
    if masks.all() or not masks.any():
        return float("nan")
    _, false_positives, overlap = _sweep_regions(maps, masks)
    return float(area_under_pro(false_positives, overlap, limit))


def pro_curve(
    maps: ArrayLike, masks: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.floating[Any]]]:
    """False positive rate and per-region overlap of "defect where score >= threshold", for every distinct score.

    Args:
        maps: `(N, H, W)` anomaly maps of any real dtype and range, higher is more abnormal.
        masks: `(N, H, W)` bool, True on defects.

    Returns:
        `(fpr, pro, thresholds)`, each `(K + 1,)` for K distinct scores, thresholds descending from inf, where both
        are 0. `fpr` is nan throughout without a normal pixel, `pro` without a defect.

    Raises:
        ValueError: a map holds NaN or infinity, the shapes differ or are not `(N, H, W)`, or masks are not bool.
    """
    return roc_points(*_sweep_regions(*checked_maps(maps, masks)))


def checked_maps(maps: ArrayLike, masks: ArrayLike) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Maps and masks as arrays, the maps in their own dtype.

    Raises:
        ValueError: a map holds NaN or infinity, the shapes differ or are not `(N, H, W)`, or masks are not bool.
    """
    maps, masks = np.asarray(maps), np.asarray(masks)
    if maps.ndim != 3 or maps.shape != masks.shape:
        raise ValueError(f"maps {maps.shape} and masks {masks.shape} must both be (N, H, W)")
    if masks.dtype != np.bool_:
        raise ValueError(f"masks must be bool, not {masks.dtype}")
    if not np.isfinite(maps).all():
        raise ValueError("maps hold NaN or infinity")
    return maps, masks


def check_limit(limit: float) -> None:
    if not 0 < limit <= 1:
        raise ValueError(f"limit must lie in (0, 1], not {limit}")


def defect_regions(mask: NDArray[np.bool_]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The 8-connected regions of one mask.

    Args:
        mask: `(H, W)`.

    Returns:
        `(regions, areas)`: the region number, from 0, of each of the D defect pixels in row-major order `(D,)`, and
        the area of each region in pixels `(R,)`.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return np.zeros(0, np.intp), np.zeros(0, np.intp)
    from scipy import ndimage

    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    labels, _ = ndimage.label(box, structure=np.ones((3, 3)))
    regions = labels[box].astype(np.intp) - 1
    return regions, np.bincount(regions)


def area_under_pro(false_positives: NDArray[Any], overlap: NDArray[Any], limit: float) -> NDArray[np.float64]:
    """`(..., K)` sums by descending threshold, unscaled -> `(...)`. Both must end above 0."""
    fpr, pro = false_positives / false_positives[..., -1:], overlap / overlap[..., -1:]
    run, rise = np.diff(fpr, prepend=0), np.diff(pro, prepend=0)
    kept = np.clip(limit - (fpr - run), 0, run)
    share = np.divide(kept, run, out=np.zeros(run.shape), where=run > 0)
    return np.asarray(np.sum(kept * (pro - rise + rise * share / 2), axis=-1) / limit)


def _sweep_regions(maps: NDArray[Any], masks: NDArray[np.bool_]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    overlap = np.zeros(masks.shape)
    for image, mask in zip(overlap, masks, strict=True):
        regions, areas = defect_regions(mask)
        image[mask] = 1 / areas[regions]
    thresholds, false_positives, found = sweep(maps.ravel(), ~masks.ravel(), overlap.ravel())
    return thresholds, false_positives, found
