"""What a threshold gets wrong on a line: defects that escape, good parts that are scrapped."""

from __future__ import annotations

import math

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


def best_escape_rate(scores: ArrayLike, labels: ArrayLike, overkill: float) -> float:
    """The lowest escape rate of any threshold that rejects at most a share `overkill` of the good ones.

    The threshold is chosen with the labels in view, so this is an *oracle*: no threshold set without them can be
    expected to reach it. Of n good ones at most floor(overkill * n) are rejected, so 1/n is the least that can be told.

    Args:
        scores, labels: as `escape_rate`.
        overkill: a fraction in 0..1.

    Returns:
        A fraction in 0..1; nan where either class is missing.

    Raises:
        ValueError: as `escape_rate`, or overkill lies outside 0..1.
    """
    escaped = ~_caught_at_best(scores, labels, overkill)
    return float(np.mean(escaped)) if escaped.size else float("nan")


def caught_at_overkill(scores: ArrayLike, labels: ArrayLike, overkill: float) -> float:
    """The largest share of defects that any threshold catches within an overkill rate: see `best_escape_rate`."""
    caught = _caught_at_best(scores, labels, overkill)
    return float(np.mean(caught)) if caught.size else float("nan")


def _caught_at_best(scores: ArrayLike, labels: ArrayLike, overkill: float) -> NDArray[np.bool_]:
    """(D,) which defects the lowest threshold within an overkill rate catches; empty where either class is missing."""
    scores, labels = checked(scores, labels)
    good, defective = np.sort(scores[~labels]), scores[labels]
    allowed = allowed_rejects(overkill, good.size)
    if good.size == 0:
        return np.empty(0, bool)
    return defective > (-np.inf if allowed == good.size else good[-1 - allowed])


def allowed_rejects(overkill: float, good: int) -> int:
    """How many of so many good ones may be rejected.

    Raises:
        ValueError: overkill lies outside 0..1.
    """
    if not 0 <= overkill <= 1:
        raise ValueError(f"an overkill rate lies in 0..1, not {overkill}")
    # A hair of slack, so that 0.07 of 100 counts as 7 in spite of binary fractions.
    return min(math.floor(overkill * good * (1 + 1e-12)), good)


def _rejected(scores: ArrayLike, labels: ArrayLike, threshold: float) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    scores, labels = checked(scores, labels)
    if np.isnan(threshold):
        raise ValueError("threshold is NaN")
    return scores >= np.float64(threshold), labels
