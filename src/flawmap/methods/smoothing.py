"""Enlarging an anomaly map: bilinear, then Gaussian, as two small matrix products."""

from __future__ import annotations

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

    def forward(self, anomaly_map: Tensor) -> Tensor:
        return self.rows @ anomaly_map @ self.columns
