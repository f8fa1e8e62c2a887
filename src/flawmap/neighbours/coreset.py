"""Greedy k-center coreset (Gonzalez 1985; Sener & Savarese 2018, Algorithm 1), as PatchCore uses it.

Plain greedy updates the distance of every point to every pick: N x k x D products, one matrix-vector product at a time.
Here distances are brought up to date only where it can matter. A distance that lacks the latest picks is still an upper
bound, since picks only ever lower it; so the farthest of a small block of up-to-date points is the farthest of all
as soon as it exceeds every bound outside the block. Points deep inside the cover are hardly ever looked at again, and
what has to be caught up with is caught up with in one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

_REFRESH_ROWS = 1024  # points a product takes at a time: it stays in the cache until its maxima are taken
_BLOCK = 8192


def k_center_greedy(
    points: NDArray[Any], k: int, *, block: int | None = None, progress: Callable[[int, int], None] | None = None
) -> NDArray[np.int64]:
    """Indices of a greedy k-center cover of `points`, in the order in which greedy picks them.

    The first pick is the point farthest from the mean; each further one is the point farthest from all picks so far,
    the lowest index among equals. Distances are Euclidean in the full space, without a random projection.

    Args:
        points: (N, D) float32 or float64; left as it is.
        k: how many to pick, at least 1. Points no farther apart than the rounding of their type count as one, so fewer
            come back where fewer distinct points exist.
        block: how many of the farthest points are looked at together; chosen from N by default. Changes only speed.
        progress: called as `progress(picks so far, k)`.

    Returns:
        (<= k,) int64. In float64 the indices of plain greedy; in float32 ties within rounding may fall otherwise.

    Raises:
        ValueError: `points` is empty, not two-dimensional, not floating or not finite, or k < 1.
    """
    if points.ndim != 2 or len(points) == 0 or points.dtype.kind != "f":
        raise ValueError(f"points must be floating (N, D) with N >= 1, got {points.dtype} {points.shape}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    count, width = points.shape
    mean = points.mean(0)
    bounds = np.concatenate([_square(points[i : i + 8192] - mean) for i in range(0, count, 8192)])  # (N,)
    if not np.isfinite(bounds).all():
        raise ValueError("points must be finite")
    # Squared distances come from |x|^2 - 2 xc + |c|^2, whose rounding is relative to the norms, not to the distance.
    # A point as the origin, unlike the mean, leaves ties between integer coordinates exact.
    origin = points[0]
    same = 32 * float(np.finfo(points.dtype).eps) * float(bounds.max())
    block = min(count, block or min(max(2048, count // 10), _BLOCK))

    # Picks c are kept as [c, |c|^2 / 2] and points as [x, -1]: one product gives x c - |c|^2 / 2.
    centres = np.empty((min(k, count), width + 1), points.dtype)
    product = np.empty(_REFRESH_ROWS * len(centres), points.dtype)
    applied = np.zeros(count, np.int64)  # how many picks each bound has seen
    picks: list[int] = []

    def pick(index: int) -> None:
        centre = points[index] - origin
        centres[len(picks), :width] = centre
        centres[len(picks), width] = np.dot(centre, centre) / 2
        picks.append(index)

    def refresh(indices: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Brings the bounds of `indices`, sorted by `applied`, up to date; gives [x, -1] (n, D + 1) and |x|^2 (n,)."""
        rows = np.empty((len(indices), width + 1), points.dtype)
        np.subtract(points[indices], origin, out=rows[:, :width])
        rows[:, width] = -1
        norms = _square(rows[:, :width])
        for start in range(0, len(indices), _REFRESH_ROWS):
            part = indices[start : start + _REFRESH_ROWS]
            missed = centres[applied[part[0]] : len(picks)]
            if len(missed):
                out = product[: len(part) * len(missed)].reshape(len(part), len(missed))
                closest = np.matmul(rows[start : start + len(part)], missed.T, out=out).max(1)
                squared = np.maximum(norms[start : start + len(part)] - 2 * closest, 0)
                bounds[part] = np.minimum(bounds[part], squared)
        applied[indices] = len(picks)
        return rows, norms

    pick(int(bounds.argmax()))
    bounds.fill(np.inf)
    while len(picks) < len(centres):
        top = np.argpartition(bounds, count - block)[count - block :]
        outside = _largest_outside(bounds, top)
        top = top[np.argsort(applied[top], kind="stable")]
        rows, norms = refresh(top)
        contenders = np.flatnonzero(bounds[top] > outside)
        if len(contenders) == 0:
            best = bounds[top].max()
            if best < outside:
                continue
            # A tie with points outside the block: all of them must be up to date before the lowest index can win.
            tied = np.flatnonzero(bounds >= best)
            refresh(tied[np.argsort(applied[tied], kind="stable")])
            if best <= same:
                break
            pick(int(bounds.argmax()))
            continue
        contenders = contenders[top[contenders].argsort()]  # by index, so that argmax takes the lowest among equals
        top, rows, norms = top[contenders], rows[contenders], norms[contenders]
        near = bounds[top]
        while len(picks) < len(centres):
            best_at = int(near.argmax())
            if near[best_at] <= max(outside, same):
                break
            pick(int(top[best_at]))
            squared = norms - 2 * (rows @ centres[len(picks) - 1])
            np.minimum(near, np.maximum(squared, 0, out=squared), out=near)
            near[best_at] = 0
        bounds[top] = near
        applied[top] = len(picks)
        if progress is not None:
            progress(len(picks), len(centres))
        if near.max() <= same and outside <= same:
            break
    return np.array(picks, dtype=np.int64)


def _square(rows: NDArray[Any]) -> NDArray[Any]:
    squares: NDArray[Any] = np.einsum("nd,nd->n", rows, rows)
    return squares


def _largest_outside(bounds: NDArray[Any], top: NDArray[np.int64]) -> float:
    """The largest of `bounds` (N,) not among the indices `top`; -inf when nothing is left."""
    inside = bounds[top]
    bounds[top] = -np.inf
    largest = float(bounds.max())
    bounds[top] = inside
    return largest
