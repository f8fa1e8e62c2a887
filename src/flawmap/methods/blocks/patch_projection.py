"""Patches of several levels, standardised and projected onto their principal components."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from flawmap.methods.blocks.moments import Moments
from flawmap.methods.blocks.patches import averaged, fused
from flawmap.methods.blocks.smoothing import on_grid
from flawmap.methods.contract import Collect, Config


class PatchProjectionConfig(Config):
    """Settings of the patches."""

    stride: int = Field(8, ge=1, description="input pixels between patches, or those of the finest level if more")
    patch_pool: int = Field(1, ge=1, description="side of the neighbourhood that is averaged, odd")
    standardise: bool = Field(True, description="each channel to zero mean and unit variance over good patches")
    balance: float = Field(0.5, ge=0, le=1, description="standardised channels weigh alike at 0, levels at 1")
    components: int = Field(80, ge=0, description="principal components of f that are kept; 0: f itself")


class PatchProjection(nn.Module):
    """Maps (B, C_i, h_i, w_i) of the levels -> patches (B, h*w, c) on one grid.

    Attributes:
        grid: (h, w).
        outputs: c.

    Args:
        config: see its fields.
        channels, reductions: C_i of each level, D in all, and input pixels between its positions.
        size: of the input, height and width.
    """

    def __init__(
        self,
        config: PatchProjectionConfig,
        channels: Sequence[int],
        reductions: Sequence[float],
        size: tuple[int, int],
    ) -> None:
        super().__init__()
        finest, width = max(config.stride, min(reductions)), sum(channels)
        self.grid = (round(size[0] / finest), round(size[1] / finest))
        self.config, self.channels = config, tuple(channels)
        self.outputs = min(config.components, width) or width
        self.register_buffer("shift", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.register_buffer("axes", torch.zeros(width, self.outputs) if config.components else None)
        self.shift: Tensor
        self.scale: Tensor
        self.axes: Tensor | None

    @property
    def learns(self) -> bool:
        """Whether `moments` has to be run before anything is projected."""
        return self.config.standardise or self.axes is not None

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        pooled = averaged(features, self.config.patch_pool)
        if self.axes is None:
            return (fused(pooled, self.grid) - self.shift) * self.scale
        # Enlarging is linear too, and cheaper after the projection than before.
        projection = self.scale[:, None] * self.axes  # (D, c)
        parts = projection.T[..., None, None].split(self.channels, 1)
        projected = [F.conv2d(level, part) for level, part in zip(pooled, parts, strict=True)]
        return sum((fused([level], self.grid) for level in projected), -self.shift @ projection)

    def moments(self) -> Collect:
        """Shift and scale of the channels, and the axes on which most of the patches lie."""
        width = len(self.shift)
        shares = torch.tensor(
            [n * len(self.channels) / width for n in self.channels for _ in range(n)], dtype=torch.float64
        )
        weights = shares ** (-self.config.balance / 2)  # (D,)
        moments = Moments(width)

        def update(features: list[Tensor], inside: Tensor | None) -> None:
            patches = fused(averaged(features, self.config.patch_pool), self.grid).flatten(0, 1)  # (B*h*w, D)
            moments.update(patches if inside is None else patches[on_grid(inside, self.grid).flatten() > 0])

        def close(progress: Callable[[int, int], None]) -> None:
            covariance = moments.covariance()
            self.shift.copy_(moments.mean())
            if self.config.standardise:
                std = covariance.diagonal().clamp_min(0).sqrt()
                # A channel that good parts hardly use must not drown the others as soon as a part does use it.
                scale = weights / std.clamp_min(0.1 * float(std.mean()) + 1e-12)
                self.scale.copy_(scale.to(self.scale))
                covariance = covariance * scale[:, None] * scale
            if self.axes is not None:
                axes = torch.linalg.eigh(covariance).eigenvectors.flip(1)  # largest variance first
                self.axes.copy_(axes[:, : self.outputs].to(self.axes))
            progress(1, 1)

        return Collect("moments", update, close, peak_bytes=4 * 8 * width * width)
