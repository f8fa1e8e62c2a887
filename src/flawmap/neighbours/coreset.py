"""Greedy k-center coreset (Gonzalez 1985; Sener & Savarese 2018, Algorithm 1), as PatchCore uses it.

Plain greedy updates the distance of every point to every pick: N x k x D products, one matrix-vector product at a time.
Here distances are brought up to date only where it can matter. A distance that lacks the latest picks is still an upper
bound, since picks only ever lower it; so the farthest of a small block of up-to-date points is the farthest of all
as soon as it exceeds every bound outside the block. Points deep inside the cover are hardly ever looked at again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_REFRESH_ROWS = 1024


def k_center_greedy(
    points: Tensor, k: int, *, block: int | None = None, progress: Callable[[int, int], None] | None = None
) -> Tensor:
    """Indices of a greedy k-center cover of `points`, in the order in which greedy picks them.

    The first pick is the point farthest from the mean; each further one is the point farthest from all picks so far,
    the lowest index among equals. Distances are Euclidean in the full space, without a random projection.

    Args:
        points: (N, D) float32 or float64, on any device; left as it is.
        k: how many to pick, at least 1. Points no farther apart than the rounding of their type count as one, so fewer
            come back where fewer distinct points exist.
        block: how many of the farthest points are looked at together; chosen from N by default. Changes only speed.
        progress: called as `progress(picks so far, k)`.

    Returns:
        (<= k,) int64. In float64 the indices of plain greedy; in float32 ties within rounding may fall otherwise.

    Raises:
        ValueError: `points` is empty, not two-dimensional or not finite, or k < 1.
    """
    if points.ndim != 2 or len(points) == 0:
        raise ValueError(f"points must be (N, D) with N >= 1, got {tuple(points.shape)}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    count = len(points)
    mean = points.mean(0)
    bounds = torch.cat([(rows - mean).square().sum(1) for rows in points.split(65536)])  # (N,)
    if not bool(torch.isfinite(bounds).all()):
        raise ValueError("points must be finite")
    # Squared distances come from |x|^2 - 2 xc + |c|^2, whose rounding is relative to the norms, not to the distance.
    # A point as the origin, unlike the mean, leaves ties between integer coordinates exact.
    origin = points[0]
    same = 32 * torch.finfo(points.dtype).eps * float(bounds.max())
    block = min(count, block or max(2048, count // 100))

    centres = torch.empty(min(k, count), points.shape[1], dtype=points.dtype, device=points.device)
    half_norms = torch.empty(len(centres), dtype=points.dtype, device=points.device)
    applied = torch.zeros(count, dtype=torch.int64, device=points.device)  # how many picks each bound has seen
    picks: list[int] = []

    def pick(index: int) -> None:
        centres[len(picks)] = points[index] - origin
        half_norms[len(picks)] = centres[len(picks)].square().sum() / 2
        picks.append(index)

    def refresh(indices: Tensor) -> Tensor:
        """Brings the bounds of `indices`, ordered by `applied`, up to date; returns their centred points (n, D)."""
        rows = points[indices] - origin
        for start in range(0, len(indices), _REFRESH_ROWS):
            part = indices[start : start + _REFRESH_ROWS]
            oldest = int(applied[part[0]])
            if oldest < len(picks):
                x = rows[start : start + _REFRESH_ROWS]
                missed = slice(oldest, len(picks))
                nearest = (x @ centres[missed].T).sub_(half_norms[missed]).amax(1)  # (n,) x c - |c|^2 / 2
                bounds[part] = torch.minimum(bounds[part], (x.square().sum(1) - 2 * nearest).clamp_min_(0))
        applied[indices] = len(picks)
        return rows

    pick(int(bounds.argmax()))
    bounds.fill_(torch.inf)
    while len(picks) < len(centres):
        top = bounds.topk(block, sorted=False).indices
        outside = _largest_outside(bounds, top)
        top = top[applied[top].argsort(stable=True)]
        rows = refresh(top)
        contenders = (bounds[top] > outside).nonzero().squeeze(1)
        if len(contenders) == 0:
            best = float(bounds[top].max())
            if best < outside:
                continue
            # A tie with points outside the block: all of them must be up to date before the lowest index can win.
            tied = (bounds >= best).nonzero().squeeze(1)
            refresh(tied[applied[tied].argsort(stable=True)])
            if best <= same:
                break
            pick(int(bounds.argmax()))
            continue
        contenders = contenders[top[contenders].argsort()]  # by index, so that argmax takes the lowest among equals
        top, rows = top[contenders], rows[contenders]
        near, norms = bounds[top], rows.square().sum(1)
        while len(picks) < len(centres):
            best_at = int(near.argmax())
            if float(near[best_at]) <= max(outside, same):
                break
            pick(int(top[best_at]))
            c = len(picks) - 1
            distances = torch.addmv(norms + 2 * half_norms[c], rows, centres[c], alpha=-2)
            near = torch.minimum(near, distances.clamp_min_(0))
            near[best_at] = 0
        bounds[top] = near
        applied[top] = len(picks)
        if progress is not None:
            progress(len(picks), len(centres))
        if float(near.max()) <= same and outside <= same:
            break
    return torch.tensor(picks, dtype=torch.int64, device=points.device)


def _largest_outside(bounds: Tensor, top: Tensor) -> float:
    """The largest of `bounds` (N,) not among the indices `top`; -inf when nothing is left."""
    if len(top) == len(bounds):
        return -torch.inf
    inside = bounds[top]
    bounds[top] = -torch.inf
    largest = float(bounds.max())
    bounds[top] = inside
    return largest
