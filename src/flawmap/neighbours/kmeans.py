"""K-means: Lloyd's algorithm from a k-means++ start (Arthur & Vassilvitskii, SODA 2007)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flawmap.neighbours.search import nearest, search_index

_START = 16  # points per centre that the start chooses from; Lloyd's steps see them all


def k_means(
    points: Tensor,
    k: int,
    *,
    generator: torch.Generator,
    iterations: int = 50,
    tolerance: float = 1e-4,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """The centres of k clusters.

    A step assigns each point to its nearest centre and moves each centre to the mean of its points; a centre without
    points moves to the point that lies farthest from its own. The steps end when the sum of squared distances
    falls by less than the share `tolerance`. The same generator state and thread count give the same centres.

    Args:
        points: (N, D) float32 or float64.
        k: how many centres, at least 1; N points are returned as they are where k >= N.
        generator: of the start, on the CPU.
        iterations: the most steps.
        progress: told (steps done, `iterations`).

    Returns:
        (min(k, N), D), of the points' type.
    """
    if k >= len(points):
        return points.clone()
    mean = points.mean(0)
    centred = points - mean  # sums keep their digits
    start = torch.randperm(len(points), generator=generator)[: _START * k]
    centres = _plus_plus(centred[start.to(points.device)], k, generator)
    before = float("inf")
    for step in range(iterations):
        distances, labels = nearest(centred, search_index(centres))
        inertia = float(distances.double().square().sum())
        if progress is not None:
            progress(step + 1, iterations)
        if before - inertia <= tolerance * before and inertia < float("inf") and step > 0:
            break
        before = inertia
        counts = torch.bincount(labels, minlength=k)
        centres = torch.zeros_like(centres).index_add_(0, labels, centred) / counts.clamp_min(1)[:, None]
        empty = (counts == 0).nonzero()[:, 0]
        centres[empty] = centred[distances.topk(len(empty)).indices]
    return centres + mean


def _plus_plus(points: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k of the points (N, D), each drawn with a chance proportional to its squared distance to those before it."""
    norms = points.square().sum(1)
    picks: list[int] = []
    drawn = int(torch.randint(len(points), (), generator=generator))
    squares = torch.full_like(norms, torch.inf)
    while True:
        picks.append(drawn)
        squares = torch.minimum(squares, (norms - 2 * (points @ points[drawn]) + norms[drawn]).clamp_min(0))
        squares[drawn] = 0
        if len(picks) == k:
            return points[picks]
        steps = squares.double().cumsum(0)
        at = torch.rand((), generator=generator, dtype=torch.float64).to(steps.device) * steps[-1]
        drawn = min(int(torch.searchsorted(steps, at, right=True)), len(points) - 1)
