"""Images turned about their centres on the device, as augmentation that is drawn anew at every step."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def turned(
    maps: Tensor, angles: Tensor, *, nearest: bool = False, beyond: Literal["zeros", "reflection"] = "reflection"
) -> Tensor:
    """Maps (B, C, H, W), each turned counter-clockwise by its angle (B,) in radians.

    Args:
        maps: what is turned.
        angles: one for each of the B.
        nearest: values are taken from the nearest pixel, for masks; else bilinearly.
        beyond: what comes in from outside.
    """
    height, width = maps.shape[2:]
    cos, sin, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    # grid_sample's coordinates run from -1 to 1 on both axes: a rotation of pixels has to undo that scaling.
    rows = [torch.stack([cos, -sin * height / width, zero], 1), torch.stack([sin * width / height, cos, zero], 1)]
    grid = F.affine_grid(torch.stack(rows, 1).to(maps.device), list(maps.shape), align_corners=False)
    return F.grid_sample(maps, grid, "nearest" if nearest else "bilinear", beyond, align_corners=False)
