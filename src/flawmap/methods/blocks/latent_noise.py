"""Noise placed into what flows make of feature maps, and how far it moves these when it is carried back.

Yan et al., arXiv 2206.01992, Section 4.6 and Fig. 11.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


@torch.no_grad()
def with_noise(
    flows: Iterable[nn.Module],
    levels: Sequence[Tensor],
    places: Sequence[tuple[float, float]],
    *,
    strength: float = 3.0,
    seed: int = 0,
) -> list[Tensor]:
    """z of each level (B, C, h, w), with noise added at some places.

    Args:
        flows: one for each level.
        levels: what the flows read, maps (B, C, h, w).
        places: (row, column) of each noise point, from 0 to 1 over the image.
        strength: standard deviation of the noise, in those of z.
        seed: of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    noisy = []
    for flow, level in zip(flows, levels, strict=True):
        z: Tensor = flow(level)[0]
        height, width = z.shape[-2:]
        for row, column in places:
            y, x = min(int(row * height), height - 1), min(int(column * width), width - 1)
            z[:, :, y, x] += strength * torch.randn(z.shape[1], generator=generator).to(z)
        noisy.append(z)
    return noisy


@torch.no_grad()
def disturbed(flows: Iterable[nn.Module], levels: Sequence[Tensor], noisy: Sequence[Tensor]) -> list[Tensor]:
    """How far noise in z, as `with_noise` gives it, carried back by the inverse, moves what the flows read.

    For each level (B, h, w): the root mean square over channels of what each position has moved.
    """
    moved = []
    for flow, level, z in zip(flows, levels, noisy, strict=True):
        moved.append((flow.inverse(z) - level).square().mean(1).sqrt())  # type: ignore[operator]
    return moved
