"""The networks inside couplings, none of which has to be invertible, and the position code they read."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from flawmap.flows.coupling import Subnet


def mlp(hidden: int | float, *, layers: int = 2, zero: bool = True) -> Subnet:
    """Linear layers with ReLU between them, on vectors.

    Args:
        hidden: width, or, as a float, a multiple of the input's.
        layers: linear layers, at least 1.
        zero: the last starts at zero, and so the coupling at the identity.
    """

    def make(inputs: int, outputs: int) -> nn.Module:
        width = hidden if isinstance(hidden, int) else max(1, round(hidden * inputs))
        sizes = [inputs, *[width] * (layers - 1), outputs]
        parts: list[nn.Module] = []
        for before, after in pairwise(sizes):
            parts += [nn.Linear(before, after), nn.ReLU()]
        return nn.Sequential(*_zeroed(parts[:-1], zero))

    return make


def convolutions(
    layers: str = "CC",
    *,
    side: int = 3,
    ratio: float = 1.0,
    reduction: int = 16,
    spatial_first: bool = False,
    activation: bool = True,
    zero: bool = True,
) -> Subnet:
    """Convolutions on maps, and CBAM among them.

    Args:
        layers: in order, C for a convolution, at least one, and A for CBAM, as CAINNFlow names its couplings.
        side: of the convolutions' kernels.
        ratio: width between convolutions over the input's.
        reduction: of the channel attention.
        spatial_first: the order of CBAM's two attentions.
        activation: ReLU behind every convolution but the last.
        zero: the last convolution starts at zero.
    """

    def make(inputs: int, outputs: int) -> nn.Module:
        between = max(1, int(ratio * inputs))
        width = inputs  # so far
        parts: list[nn.Module] = []
        for i, layer in enumerate(layers):
            if layer == "A":
                parts.append(CBAM(width, reduction, spatial_first=spatial_first))
            elif "C" in layers[i + 1 :]:
                parts.append(nn.Conv2d(width, between, side, padding=side // 2))
                parts += [nn.ReLU()] if activation else []
                width = between
            else:
                parts.append(nn.Conv2d(width, outputs, side, padding=side // 2))
                width = outputs
        return nn.Sequential(*_zeroed(parts, zero))

    return make


def _zeroed(parts: list[nn.Module], zero: bool) -> list[nn.Module]:
    last = next(part for part in reversed(parts) if isinstance(part, (nn.Linear, nn.Conv2d)))
    if zero:
        nn.init.zeros_(last.weight)
        assert last.bias is not None
        nn.init.zeros_(last.bias)
    return parts


class Separate(nn.Module):
    """Scale and shift from a network each, where a paper draws two: `subnet` makes both."""

    def __init__(self, subnet: Subnet, inputs: int, outputs: int) -> None:
        super().__init__()
        self.scale = subnet(inputs, outputs // 2)
        self.shift = subnet(inputs, outputs // 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.scale(x), self.shift(x)], 1)


class CBAM(nn.Module):
    """Channel attention, then spatial attention, or the other way round: Woo et al., "CBAM", ECCV 2018.

    (B, C, H, W) -> (B, C, H, W), each value times two factors in (0, 1).
    """

    def __init__(self, channels: int, reduction: int = 16, *, spatial_first: bool = False) -> None:
        super().__init__()
        self.spatial_first = spatial_first
        width = max(1, channels // reduction)
        self.channel = nn.Sequential(
            nn.Conv2d(channels, width, 1, bias=False), nn.ReLU(), nn.Conv2d(width, channels, 1, bias=False)
        )
        self.spatial = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.spatial_first:
            return self._over_channels(self._over_positions(x))
        return self._over_positions(self._over_channels(x))

    def _over_channels(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.channel(x.mean((2, 3), keepdim=True)) + self.channel(x.amax((2, 3), keepdim=True))
        return x * pooled.sigmoid()

    def _over_positions(self, x: Tensor) -> Tensor:
        described = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)  # (B, 2, H, W)
        attention: Tensor = self.spatial(described)
        return x * attention.sigmoid()


def position_code(channels: int, height: int, width: int) -> Tensor:
    """(channels, height, width): sines and cosines of the column, then of the row, interleaved (CFLOW-AD, Section 4.2).

    Each has channels / 4 frequencies, which fall from 1 towards 1e-4; `channels` is a multiple of four.
    """
    half = channels // 2
    frequencies = torch.exp(torch.arange(0, half, 2, dtype=torch.float64) * -(math.log(1e4) / half))  # (half / 2,)

    def code(length: int) -> Tensor:
        angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies  # (length, half / 2)
        return torch.stack([angles.sin(), angles.cos()], 2).flatten(1).T  # (half, length)

    columns = code(width)[:, None].expand(half, height, width)
    rows = code(height)[:, :, None].expand(half, height, width)
    return torch.cat([columns, rows]).float()
