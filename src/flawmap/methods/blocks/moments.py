"""Mean and covariance of more vectors than fit into memory, and the axes that whiten them."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Running sums of vectors (N, C), in float64 about the first batch's mean, which keeps their difference's digits.

    Attributes:
        count: vectors so far.
    """

    def __init__(self, channels: int) -> None:
        self.count = 0
        self._shift = torch.zeros(channels)
        self._first = torch.zeros(channels, dtype=torch.float64)
        self._second = torch.zeros(channels, channels, dtype=torch.float64)

    def update(self, vectors: Tensor) -> None:
        """Counts further vectors (N, C) float32, on any device."""
        if not len(vectors):
            return
        if not self.count:
            self._shift = vectors.mean(0)
        vectors = vectors - self._shift
        self._first += vectors.sum(0).cpu()
        self._second += (vectors.T @ vectors).cpu()
        self.count += len(vectors)

    def mean(self) -> Tensor:
        """(C,) float64."""
        return self._shift.double().cpu() + self._first / self.count

    def covariance(self) -> Tensor:
        """(C, C) float64, the sum of squares divided by the number of vectors."""
        first = self._first / self.count
        return self._second / self.count - first[:, None] * first


def whitening_axes(covariance: Tensor, ridge: float) -> Tensor:
    """(C, C) float64 -> (C, C): columns are principal axes, the largest variance first, over its root.

    Args:
        covariance: of vectors (N, C).
        ridge: times the mean variance is added to each, so that directions of hardly any are not blown up.
    """
    variances, axes = torch.linalg.eigh(covariance)
    variances, axes = variances.flip(0).clamp_min(0), axes.flip(1)
    whitening: Tensor = axes * (variances + ridge * variances.mean() + 1e-12).rsqrt()
    return whitening
