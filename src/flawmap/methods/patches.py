"""Feature maps of several levels as patches of one grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def fused(maps: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
    """Maps (B, C_i, h_i, w_i) -> patches (B, h*w, sum of C_i), each level bilinearly on the grid (h, w)."""
    resized = [
        level if level.shape[-2:] == grid else F.interpolate(level, size=grid, mode="bilinear", align_corners=False)
        for level in maps
    ]
    return torch.cat(resized, 1).flatten(2).transpose(1, 2)


def sampled(scored: Tensor, count: int) -> Tensor:
    """Positions (B, n) drawn for each image, without repetition, n = `count` or all; `scored` (B, T) ones first."""
    drawn = torch.rand(scored.shape).to(scored) + scored
    return drawn.topk(min(count, scored.shape[1]), dim=1).indices
