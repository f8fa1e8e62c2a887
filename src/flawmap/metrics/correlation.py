"""Rank correlation of a setting with what it reaches, also with another setting held fixed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def spearman(x: ArrayLike, y: ArrayLike) -> tuple[float, float]:
    """Spearman's rank correlation, ties sharing their mean rank.

    Args:
        x, y: (N,) finite real numbers, N >= 3.

    Returns:
        rho in -1..1, and the two-sided p-value of Student's t with N - 2 degrees of freedom. Both nan where either
        input is constant.

    Raises:
        ValueError: the lengths differ, are below 3, or a value is not finite.
    """
    ranks = _ranks(3, x, y)
    return _tested(_correlation(*ranks), len(ranks[0]) - 2)


def partial_spearman(x: ArrayLike, y: ArrayLike, given: ArrayLike) -> tuple[float, float]:
    """Spearman's rank correlation of x and y with that of `given` taken out of both (F2R, Table 5).

    It is the correlation of what is left of the ranks of x and y after regression on the ranks of `given`.

    Args:
        x, y, given: (N,) finite real numbers, N >= 4.

    Returns:
        rho in -1..1, and the two-sided p-value of Student's t with N - 3 degrees of freedom. Both nan where x or y
        is constant or settled by `given`; a constant `given` takes nothing out.

    Raises:
        ValueError: the lengths differ, are below 4, or a value is not finite.
    """
    first, second, held = _ranks(4, x, y, given)
    constant = not np.any(held)
    left = (first, second) if constant else [ranks - held * (ranks @ held) / (held @ held) for ranks in (first, second)]
    for ranks, rest in zip((first, second), left, strict=True):
        if rest @ rest <= 1e-12 * (ranks @ ranks):
            return float("nan"), float("nan")
    return _tested(_correlation(*left), len(first) - 3)


def _ranks(fewest: int, *values: ArrayLike) -> list[NDArray[np.float64]]:
    """Ranks (N,) about their mean."""
    from scipy.stats import rankdata

    arrays: list[NDArray[Any]] = [np.asarray(value, dtype=np.float64) for value in values]
    lengths = {array.shape for array in arrays}
    if len(lengths) > 1 or arrays[0].ndim != 1 or len(arrays[0]) < fewest:
        raise ValueError(f"needs flat inputs of one length, at least {fewest}, got {[a.shape for a in arrays]}")
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError("values must be finite")
    return [rankdata(array) - (len(array) + 1) / 2 for array in arrays]


def _correlation(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Of two centred vectors; nan where either is zero."""
    size = float(np.sqrt((first @ first) * (second @ second)))
    return float(np.clip(first @ second / size, -1, 1)) if size > 0 else float("nan")


def _tested(rho: float, freedom: int) -> tuple[float, float]:
    from scipy.stats import t

    if abs(rho) == 1:
        return rho, 0.0
    return rho, float(2 * t.sf(abs(rho) * np.sqrt(freedom / (1 - rho * rho)), freedom))
