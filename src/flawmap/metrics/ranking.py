"""Figures of a ranking: how well scores order defects above good ones, over every threshold at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def roc_curve(
    scores: ArrayLike, labels: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.floating[Any]]]:
    """False and true positive rates of "defect where score >= threshold", for every distinct score.

    Args:
        scores: real numbers of any shape and range, higher is more abnormal.
        labels: same shape, 0 or False for good, 1 or True for defect.

    Returns:
        `(fpr, tpr, thresholds)`, each `(K + 1,)` for K distinct scores, thresholds descending from inf, where both
        rates are 0. A rate whose class is missing is nan throughout.

    Raises:
        ValueError: a score is NaN or infinite, a label is neither 0 nor 1, or the shapes differ.
    """
    scores, labels = checked(scores, labels)
    return roc_points(*sweep(scores, ~labels, labels))


def precision_recall_curve(
    scores: ArrayLike, labels: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.floating[Any]]]:
    """Precision and recall of "defect where score >= threshold", for every distinct score.

    Args:
        scores: real numbers of any shape and range, higher is more abnormal.
        labels: same shape, 0 or False for good, 1 or True for defect.

    Returns:
        `(precision, recall, thresholds)` in scikit-learn's order: thresholds `(K,)` ascending over the K distinct
        scores; precision and recall `(K + 1,)`, closed by the point (1, 0), which has no threshold. Recall is nan
        throughout where there is no defect.

    Raises:
        ValueError: a score is NaN or infinite, a label is neither 0 nor 1, or the shapes differ.
    """
    scores, labels = checked(scores, labels)
    return precision_recall_points(*sweep(scores, ~labels, labels))


def auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the ROC curve: the probability that a defect scores above a good one, ties counting half.

    Arguments and errors as for `roc_curve`. A fraction in 0..1; nan where either class is missing.
    """
    return _figure(area_under_roc, scores, labels)


def average_precision(scores: ArrayLike, labels: ArrayLike) -> float:
    """Precision averaged over the steps in recall, without interpolation, as scikit-learn defines it.

    Arguments and errors as for `roc_curve`. A fraction in 0..1; nan where either class is missing (without good ones
    any ranking would get 1).
    """
    return _figure(mean_precision, scores, labels)


def f1_max(scores: ArrayLike, labels: ArrayLike) -> float:
    """The best F1 score that any threshold reaches.

    An oracle figure: its threshold is the best one for the very labels it is measured on, so no threshold chosen
    beforehand can be expected to reach it. Report it under that name.

    Arguments and errors as for `roc_curve`. A fraction in 0..1; nan where either class is missing.
    """
    return _figure(best_f1, scores, labels)


def _figure(
    of: Callable[[NDArray[Any], NDArray[Any]], NDArray[np.float64]], scores: ArrayLike, labels: ArrayLike
) -> float:
    scores, labels = checked(scores, labels)
    if one_class(labels):
        return float("nan")
    _, false_positives, true_positives = sweep(scores, ~labels, labels)
    return float(of(false_positives, true_positives))


def checked(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Scores and labels as flat arrays, the scores in their own dtype.

    Raises:
        ValueError: a score is NaN or infinite, a label is neither 0 nor 1, or the shapes differ.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.shape != labels.shape:
        raise ValueError(f"scores {scores.shape} and labels {labels.shape} differ in shape")
    if not np.isfinite(scores).all():
        raise ValueError("scores hold NaN or infinity")
    truth = labels.astype(np.bool_)
    if labels.dtype != np.bool_ and not np.array_equal(labels, truth):
        raise ValueError("labels must be 0 (good) or 1 (defect)")
    return scores.ravel(), truth.ravel()


def one_class(labels: NDArray[np.bool_]) -> bool:
    return bool(labels.all() or not labels.any())


def sweep(scores: NDArray[Any], *masses: NDArray[Any]) -> tuple[NDArray[Any], ...]:
    """Lower a threshold through every distinct score and add up what it takes in.

    Args:
        scores: `(N,)`.
        masses: arrays `(N,)` of what each score counts for.

    Returns:
        The K distinct scores in descending order, then for each mass its sum over scores >= threshold, `(K,)`.
    """
    order = np.argsort(scores)[::-1]
    scores = scores[order]
    ends = np.flatnonzero(np.append(scores[1:] != scores[:-1], True)[: scores.size])
    return scores[ends], *(np.cumsum(mass[order])[ends] for mass in masses)


# What follows takes counts accumulated by descending threshold along the last axis, so that the exact functions, the
# streaming histograms and whole stacks of bootstrap replicates share it. Both classes must be present.


def area_under_roc(false_positives: NDArray[Any], true_positives: NDArray[Any]) -> NDArray[np.float64]:
    """`(..., K)` -> `(...)`."""
    rise = np.diff(true_positives, prepend=0)
    run = np.diff(false_positives, prepend=0).astype(np.float64)
    area = np.sum(run * (true_positives - rise / 2), axis=-1)
    return np.asarray(area / (false_positives[..., -1].astype(np.float64) * true_positives[..., -1]))


def mean_precision(false_positives: NDArray[Any], true_positives: NDArray[Any]) -> NDArray[np.float64]:
    """`(..., K)` -> `(...)`."""
    rise = np.diff(true_positives, prepend=0)
    total = np.sum(rise * _precision(false_positives, true_positives), axis=-1)
    return np.asarray(total / true_positives[..., -1])


def best_f1(false_positives: NDArray[Any], true_positives: NDArray[Any]) -> NDArray[np.float64]:
    """`(..., K)` -> `(...)`."""
    f1 = 2 * true_positives / (true_positives + false_positives + true_positives[..., -1:])
    return np.asarray(f1.max(axis=-1))


def roc_points(
    thresholds: NDArray[Any], false_positives: NDArray[Any], true_positives: NDArray[Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.floating[Any]]]:
    """The curve from (0, 0) on, as `roc_curve` returns it; for region overlaps, as `pro_curve` does."""
    return _fractions(false_positives), _fractions(true_positives), np.append(np.inf, thresholds)


def precision_recall_points(
    thresholds: NDArray[Any], false_positives: NDArray[Any], true_positives: NDArray[Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.floating[Any]]]:
    """The curve as `precision_recall_curve` returns it."""
    precision = np.append(1.0, _precision(false_positives, true_positives))
    return precision[::-1], _fractions(true_positives)[::-1], thresholds[::-1]


def _precision(false_positives: NDArray[Any], true_positives: NDArray[Any]) -> NDArray[np.float64]:
    # A resample of images may leave the highest thresholds without any pixel.
    taken = true_positives + false_positives
    precision: NDArray[np.float64] = np.divide(true_positives, taken, out=np.zeros(taken.shape), where=taken > 0)
    return precision


def _fractions(sums: NDArray[Any]) -> NDArray[np.float64]:
    sums = np.append(0, sums)
    return np.asarray(sums / sums[-1] if sums[-1] else np.full(sums.shape, np.nan))
