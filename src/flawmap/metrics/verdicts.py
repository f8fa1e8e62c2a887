"""What a threshold gets wrong on a line: defects that escape, good parts that are scrapped."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flawmap.metrics.ranking import checked


def escape_rate(scores: ArrayLike, labels: ArrayLike, threshold: float) -> float:
    """The fraction of defects that pass as good: score < threshold.

    Args:
        scores: real numbers of any shape and range, higher is more abnormal.
        labels: same shape, 0 or False for good, 1 or True for defect.
        threshold: scores at or above it are called defects.

    Returns:
        A fraction in 0..1; nan without any defect.

    Raises:
        ValueError: a score is NaN or infinite, the threshold is NaN, a label is neither 0 nor 1, or the shapes differ.
    """
    rejected, labels = _rejected(scores, labels, threshold)
    return float(np.mean(~rejected[labels])) if labels.any() else float("nan")


def overkill_rate(scores: ArrayLike, labels: ArrayLike, threshold: float) -> float:
    """The fraction of good ones called defects: score >= threshold. As `escape_rate`; nan without any good one."""
    rejected, labels = _rejected(scores, labels, threshold)
    return float("nan") if labels.all() else float(np.mean(rejected[~labels]))


def _rejected(scores: ArrayLike, labels: ArrayLike, threshold: float) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    scores, labels = checked(scores, labels)
    if np.isnan(threshold):
        raise ValueError("threshold is NaN")
    return scores >= np.float64(threshold), labels
