"""Whole images as vectors: a backbone's levels, averaged over turned and shrunk copies of each image."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flawmap.backbones.trunk import Backbone
from flawmap.errors import FlawmapError

_LEAST = 1e-6  # variance, so that the root has a slope where a channel is flat


class Pyramid(nn.Module):
    """Pools a backbone's levels over every copy of an image that is turned by one of R angles and shrunk.

    Angles are 360 r / R degrees. Scale s is the image shrunk by 2^s. Quarter turns move pixels and nothing else, and an
    oblong image is stretched back to its shape after one; other turns are bilinear, the border carried on outwards.

    Args:
        backbone: whose levels are read.
        rotations: R, at least 1.
        scales: S, at least 1.
        deviations: also the standard deviation of each channel, after the means of all scales.

    Raises:
        FlawmapError: several scales of a backbone that takes images of one size only.
    """

    def __init__(self, backbone: Backbone, *, rotations: int, scales: int, deviations: bool) -> None:
        super().__init__()
        self.backbone = backbone
        self.angles = [360 * turn / rotations for turn in range(rotations)]
        self.scales = scales
        self.deviations = deviations
        known = getattr(backbone.network, "pretrained_cfg", {})
        if scales > 1 and known.get("fixed_input_size"):
            raise FlawmapError(f"backbone {backbone.name} takes images of one size only: --set scales=1")

    def forward(self, images: Tensor, inside: Tensor | None = None) -> list[Tensor]:
        """images (B, 3, H, W) -> maps (B, C, R, 1): each level's means at scale 0, then 1, ..., then its deviations.

        What lies outside `inside` (B, 1, H, W), of 0 and 1, is blanked before and not counted after.
        """
        if inside is not None:
            images = torch.cat([images * inside, inside], 1)
        copies = torch.stack([turned(images, angle) for angle in self.angles], 1).flatten(0, 1)  # (B R, 3 or 4, H, W)
        means, deviations = [], []
        for scale in range(self.scales):
            copies = F.avg_pool2d(copies, 2) if scale else copies
            for level in self.backbone(copies[:, :3]):
                weights = torch.ones_like(level[:, :1])
                if inside is not None:
                    weights = F.interpolate(copies[:, 3:], size=level.shape[-2:], mode="bilinear", align_corners=False)
                weights = weights / weights.sum((2, 3), keepdim=True).clamp_min(_LEAST)
                mean = (level * weights).sum((2, 3), keepdim=True)  # (B R, C, 1, 1)
                means.append(self._of_images(mean))
                if self.deviations:
                    variance = ((level - mean).square() * weights).sum((2, 3), keepdim=True)
                    deviations.append(self._of_images((variance + _LEAST).sqrt()))
        return means + deviations

    def _of_images(self, pooled: Tensor) -> Tensor:
        """(B R, C, 1, 1) -> (B, C, R, 1)."""
        return pooled.view(-1, len(self.angles), pooled.shape[1], 1).transpose(1, 2)


def turned(images: Tensor, degrees: float) -> Tensor:
    """Images (B, C, H, W) turned counterclockwise about their middle, of the same size."""
    quarters, rest = divmod(degrees, 90)
    if rest:
        return _turned_by_sampling(images, degrees)
    size = images.shape[-2:]
    if quarters % 2:
        images = images.transpose(2, 3)
    flipped = {0: (), 1: (2,), 2: (2, 3), 3: (3,)}[int(quarters) % 4]
    images = images.flip(flipped) if flipped else images
    if images.shape[-2:] == size:
        return images
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)


def _turned_by_sampling(images: Tensor, degrees: float) -> Tensor:
    height, width = images.shape[-2:]
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    y = torch.arange(height, device=images.device)[:, None] - (height - 1) / 2
    x = torch.arange(width, device=images.device)[None] - (width - 1) / 2
    columns, rows = cosine * x - sine * y, sine * x + cosine * y  # where each pixel comes from, (H, W)
    grid = torch.stack([2 * columns / width, 2 * rows / height], 2)[None].to(images)  # (1, H, W, 2) from -1 to 1
    return F.grid_sample(images, grid.expand(images.shape[0], -1, -1, -1), padding_mode="border", align_corners=False)
