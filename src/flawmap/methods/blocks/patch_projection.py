"""Patches of several levels, standardised and projected onto their principal components."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from flawmap.methods.blocks.moments import Moments
from flawmap.methods.blocks.patches import averaged, fused, resized
from flawmap.methods.blocks.smoothing import on_grid
from flawmap.methods.contract import Collect, Config


class PatchProjectionConfig(Config):
    """Settings of the patches."""

    stride: int = Field(
        8, ge=1, le=1024, description="input pixels between patches, or those of the finest level if more"
    )
    patch_pool: int = Field(1, ge=1, le=63, description="side of the neighbourhood that is averaged, odd")
    standardise: bool = Field(True, description="each channel to zero mean and unit variance over good patches")
    balance: float = Field(0.5, ge=0, le=1, description="standardised channels weigh alike at 0, levels at 1")
    components: int = Field(80, ge=0, le=4096, description="principal components of f that are kept; 0: f itself")


class PatchProjection(nn.Module):
    """Maps (B, C_i, h_i, w_i) of the levels -> patches (B, h*w, c) on one grid.

    Args:
        levels: which of the features are read.
        channels: C_i of each of these; D in all.
        grid: (h, w).
        pool: side of the neighbourhood that each position is averaged with, odd.
        standardise: each channel to zero mean and unit variance over good patches.
        balance: standardised channels weigh alike at 0, levels at 1.
        components: principal components that are kept; all channels as they are, c = D, where both numbers are 0 or
            they would not be fewer.
        folded: sums of the other components, so many of them. Components are uncorrelated over good patches, so that
            the square of a sum is on average the sum of the squares: distances keep the share of what was left out.
    """

    def __init__(
        self,
        levels: Sequence[int],
        channels: Sequence[int],
        grid: tuple[int, int],
        *,
        pool: int,
        standardise: bool,
        balance: float,
        components: int,
        folded: int = 0,
    ) -> None:
        super().__init__()
        width = sum(channels)
        self.levels, self.channels, self.grid = tuple(levels), tuple(channels), grid
        self.pool, self.standardise, self.balance = pool, standardise, balance
        self.components = components
        self.outputs = components + folded if 0 < components + folded < width else width  # c
        self.register_buffer("shift", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.register_buffer("axes", torch.zeros(width, self.outputs) if self.outputs < width else None)
        self.shift: Tensor
        self.scale: Tensor
        self.axes: Tensor | None

    @property
    def learns(self) -> bool:
        """Whether `moments` has to be run before anything is projected."""
        return self.standardise or self.axes is not None

    def patches(self, features: Sequence[Tensor]) -> Tensor:
        """-> (B, h*w, D), before anything is learnt."""
        return fused(self._pooled(features), self.grid)

    def standardised(self, patches: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return (patches - self.shift) * self.scale

    def projected(self, patches: Tensor) -> Tensor:
        """Standardised (..., D) -> (..., c)."""
        return patches if self.axes is None else patches @ self.axes

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        if self.axes is None:
            return self.standardised(self.patches(features))
        # Averages of neighbours and of places are linear too: each level is projected where it has the fewest places,
        # and all levels side by side never exist.
        projection = self.scale[:, None] * self.axes  # (D, c)
        parts = projection.T[..., None, None].split(self.channels, 1)
        bias: Tensor | None = -self.shift @ projection
        total = torch.zeros((), device=self.shift.device)
        for level, part in zip(self._pooled(features), parts, strict=True):
            coarsest = resized(level, self.grid) if level.shape[-1] > self.grid[1] else level
            total = total + resized(F.conv2d(coarsest, part, bias), self.grid)
            bias = None
        return total.flatten(2).transpose(1, 2)

    def _pooled(self, features: Sequence[Tensor]) -> list[Tensor]:
        return averaged([features[i] for i in self.levels], self.pool)

    def moments(self) -> Collect:
        """A pass over all patches that learns from their moments."""
        width = len(self.shift)
        moments = Moments(width)

        def update(features: list[Tensor], inside: Tensor | None) -> None:
            patches = self.patches(features).flatten(0, 1)  # (B*h*w, D)
            moments.update(patches if inside is None else patches[on_grid(inside, self.grid).flatten() > 0])

        def close(progress: Callable[[int, int], None]) -> None:
            self.learn(moments)
            progress(1, 1)

        return Collect("moments", update, close, peak_bytes=4 * 8 * width * width)

    def learn(self, moments: Moments) -> None:
        """Shift and scale of the channels, and the axes on which most of the patches (N, D) lie."""
        covariance = moments.covariance()
        self.shift.copy_(moments.mean())
        if self.standardise:
            width = len(self.shift)
            shares = torch.tensor(
                [n * len(self.channels) / width for n in self.channels for _ in range(n)], dtype=torch.float64
            )
            weights = shares ** (-self.balance / 2)  # (D,)
            std = covariance.diagonal().clamp_min(0).sqrt()
            # A channel that good parts hardly use must not drown the others as soon as a part does use it.
            scale = weights / std.clamp_min(0.1 * float(std.mean()) + 1e-12)
            self.scale.copy_(scale.to(self.scale))
            covariance = covariance * scale[:, None] * scale
        if self.axes is not None:
            axes = torch.linalg.eigh(covariance).eigenvectors.flip(1)  # (D, D), largest variance first
            kept, others = axes[:, : self.components], axes[:, self.components :]
            if sums := self.outputs - self.components:
                # Which way an axis points is left to the library, but a sum depends on it.
                others = others * others.gather(0, others.abs().argmax(0, keepdim=True)).sign()
                others = F.pad(others, (0, -others.shape[1] % sums)).unflatten(1, (-1, sums)).sum(1)  # (D, sums)
                kept = torch.cat([kept, others], 1)
            self.axes.copy_(kept.to(self.axes))
