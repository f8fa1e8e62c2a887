"""Anomaly maps: enlarging, as two small matrix products, and what is left of them inside a region."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def enlarging_matrix(source: int, target: int, sigma: float) -> Tensor:
    """(target, source) float32: bilinear resize (half-pixel centres), then a Gaussian of `sigma` target pixels.

    The Gaussian is cut at 4 sigma and reflects at the border, as scipy.ndimage.gaussian_filter1d does. Rows sum to one.
    """
    identity = torch.eye(source, dtype=torch.float64)[None]  # (1, source, source): one impulse a channel
    bilinear = F.interpolate(identity, size=target, mode="linear", align_corners=False)[0].T  # (target, source)
    if sigma > 0:
        radius = int(4 * sigma + 0.5)
        offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
        kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
        kernel /= kernel.sum()
        rows = torch.arange(target)[:, None] + torch.arange(-radius, radius + 1)[None]  # (target, 2 radius + 1)
        rows = rows.remainder(2 * target)
        rows = torch.where(rows >= target, 2 * target - 1 - rows, rows)
        bilinear = (kernel[None, :, None] * bilinear[rows]).sum(1)
    return bilinear.float()


class Enlarge(nn.Module):
    """(B, 1, h, w) -> (B, 1, H, W): both steps are linear and separable, so each axis is one matrix."""

    def __init__(self, source: tuple[int, int], target: tuple[int, int], sigma: float) -> None:
        super().__init__()
        self.register_buffer("rows", enlarging_matrix(source[0], target[0], sigma), persistent=False)
        self.register_buffer("columns", enlarging_matrix(source[1], target[1], sigma).T, persistent=False)
        self.rows: Tensor
        self.columns: Tensor

    def forward(self, anomaly_map: Tensor, inside: Tensor | None = None) -> Tensor:
        """With `inside` (B, 1, H, W), values outside neither spread into it nor are kept: see `within`."""
        if inside is None:
            return self._product(anomaly_map)
        scored = on_grid(inside, anomaly_map.shape[-2:])
        weights = self._product(scored).clamp_min(1e-6)
        return within(self._product(within(anomaly_map, scored) * scored) / weights, inside)

    def _product(self, maps: Tensor) -> Tensor:
        return self.rows @ maps @ self.columns


def on_grid(inside: Tensor, grid: Sequence[int]) -> Tensor:
    """(B, 1, H, W) of 0 and 1 at the input size -> the cells (B, 1, h, w) whose centre is inside, or is most so."""
    share = F.interpolate(inside, size=(grid[0], grid[1]), mode="bilinear", align_corners=False)
    most = share.amax((2, 3), keepdim=True).clamp_max(0.5)
    return (share >= most).to(inside.dtype)


def scored_positions(inside: Tensor | None, grid: Sequence[int]) -> Tensor | None:
    """The cells that `on_grid` gives, (B, h*w); None is everywhere."""
    return None if inside is None else on_grid(inside, grid).flatten(1)


def within(maps: Tensor, inside: Tensor | None) -> Tensor:
    """Maps (B, 1, h, w) with the smallest value inside in every place outside `inside`, which has their size."""
    if inside is None:
        return maps
    largest = torch.finfo(maps.dtype).max
    lowest = torch.where(inside > 0, maps, torch.full_like(maps, largest)).amin((2, 3), keepdim=True)
    return torch.where(inside > 0, maps, lowest)


def largest(maps: Tensor, inside: Tensor | None) -> Tensor:
    """The largest value (B,) of maps (B, 1, h, w) in the cells that `inside` (B, 1, H, W), at the input size, holds."""
    return within(maps, None if inside is None else on_grid(inside, maps.shape[-2:])).amax((1, 2, 3))
