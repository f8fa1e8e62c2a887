"""Vectors around which CFA draws its hyperspheres, made of the patches of good images in one of three ways."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from flawmap.neighbours import k_means

_PER_CENTRE, _MOST = 100, 100_000  # patches that K-means sees: of each centre, and in all


class HypersphereCentres:
    """Collects embedded patches, and makes centres of them.

    Args:
        kind: "kmeans" clusters patches of all images, "mean" the mean patches of each position (the authors' code),
            "ema" is Algorithm 1.
        count: of centres.
        images: how many will be added.
        positions: patches of an image, T.
        width: of a patch, C.
        beta: rate of Algorithm 1's moving average; 0 is a running mean.
        sample: patches to return beside the centres, at least.
    """

    def __init__(
        self,
        kind: Literal["kmeans", "mean", "ema"],
        count: int,
        images: int,
        positions: int,
        width: int,
        *,
        beta: float,
        sample: int,
    ) -> None:
        self._kind, self._count, self._beta = kind, count, beta
        self._wanted = max(count, min(_PER_CENTRE * count, _MOST)) if kind == "kmeans" else sample
        self._each = min(positions, math.ceil(self._wanted / images))
        self._sample: list[Tensor] = []
        self._sums = torch.zeros(positions, width + 1, dtype=torch.float64)  # of each position, and how many
        self._centres = torch.zeros(0, width)  # of Algorithm 1
        self._seen = 0
        # K-means holds its points several times.
        self.peak_bytes = 4 * width * (6 * self._each * images + 2 * count + 2 * positions)

    def add(self, embedded: Tensor, weights: Tensor) -> None:
        """Patches (B, T, C), of which those with a weight (B, T) of 1 count and those with 0 do not."""
        if self._kind == "mean":
            counted = weights[..., None]  # (B, T, 1)
            self._sums += torch.cat([embedded * counted, counted], 2).double().sum(0).cpu()
        for own, counts in zip(embedded, weights, strict=True):
            patches = own[counts > 0]  # (N, C)
            if len(self._sample) * self._each < self._wanted:
                self._sample.append(patches[torch.randperm(len(patches))[: self._each]])
            if self._kind == "ema":
                beta = self._beta or 1 / (self._seen + 1)
                self._centres = moving_average(self._centres, patches, beta) if self._seen else self._clustered(patches)
                self._seen += 1

    def close(self, progress: Callable[[int, int], None]) -> tuple[Tensor, Tensor]:
        """The centres (M, C), and a sample of the patches (N, C)."""
        sample = torch.cat(self._sample)
        if self._kind == "kmeans":
            return self._clustered(sample, progress), sample
        if self._kind == "ema":
            return self._centres, sample
        known = self._sums[self._sums[:, -1] > 0]
        return self._clustered((known[:, :-1] / known[:, -1:]).to(sample), progress), sample

    def _clustered(self, patches: Tensor, progress: Callable[[int, int], None] | None = None) -> Tensor:
        """K-means centres of patches (N, C); the patches themselves where they are no more than the centres."""
        generator = torch.Generator().manual_seed(torch.initial_seed())
        return k_means(patches, self._count, generator=generator, tolerance=1e-3, progress=progress)


def moving_average(bank: Tensor, patches: Tensor, beta: float) -> Tensor:
    """One step of Algorithm 1: each vector of the bank (M, D'), in turn, moves to its nearest unused patch (T, D').

    Where a region of interest leaves fewer patches than vectors, the last vectors stay.
    """
    distances = torch.cdist(bank, patches)
    chosen = []
    for row in distances[: len(patches)]:
        chosen.append(int(row.argmin()))
        distances[:, chosen[-1]] = torch.inf
    moved = (1 - beta) * bank[: len(chosen)] + beta * patches[chosen]
    return torch.cat([moved, bank[len(chosen) :]])
