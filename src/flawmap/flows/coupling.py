"""Affine coupling: Dinh et al., "Density estimation using Real NVP", ICLR 2017."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flawmap.flows.blocks import Block

Clamp = Literal["tanh", "tenth", "atan", "sigmoid", "none"]
"""How a subnet's output a bounds the log-scale s.

"tanh": c tanh(a / c). "tenth": c tanh(a / 10), the shift a tenth too, as FrEIA's AllInOneBlock. "atan":
0.636 c atan(a / c), as FrEIA's older couplings. "sigmoid": log sigmoid(a + 2), as Glow. "none": a.
"""

Subnet = Callable[[int, int], nn.Module]
"""(input channels, output channels) -> the network that gives scale and shift."""


class Coupling(Block):
    """One half of the channels scales and shifts the other.

    The first half u1 sets scale and shift of the second: v2 = u2 exp(s(u1)) + t(u1). Two-sided, the first is changed
    before that: v1 = u1 exp(s(u2)) + t(u2), and v2 follows from v1 (CAINNFlow, Eq. 1).

    Args:
        channels: C; of an odd number the first half has one more.
        subnet: makes the networks, whose output is s and t, one after the other.
        condition: channels of the condition, which every subnet reads behind its half.
        two_sided: change both halves.
        clamp, bound: how s is bounded, and c.
    """

    def __init__(
        self,
        channels: int,
        subnet: Subnet,
        *,
        condition: int = 0,
        two_sided: bool = False,
        clamp: Clamp = "tanh",
        bound: float = 1.9,
    ) -> None:
        super().__init__()
        second = channels // 2
        first = channels - second
        self.halves = (first, second)
        self.clamp: Clamp = clamp
        self.bound = bound
        self.of_first = subnet(first + condition, 2 * second)
        self.of_second = subnet(second + condition, 2 * first) if two_sided else None

    def at_positions(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        first, second = x.split(self.halves, 1)
        log_det = torch.zeros_like(x[:, 0])
        if self.of_second is not None:
            scale, shift = self._affine(self.of_second, second, condition)
            first = first * scale.exp() + shift
            log_det = log_det + scale.sum(1)
        scale, shift = self._affine(self.of_first, first, condition)
        return torch.cat([first, second * scale.exp() + shift], 1), log_det + scale.sum(1)

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        first, second = z.split(self.halves, 1)
        scale, shift = self._affine(self.of_first, first, condition)
        second = (second - shift) * (-scale).exp()
        if self.of_second is not None:
            scale, shift = self._affine(self.of_second, second, condition)
            first = (first - shift) * (-scale).exp()
        return torch.cat([first, second], 1)

    def _affine(self, subnet: nn.Module, half: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """Log-scale and shift of the other half."""
        scale, shift = subnet(half if condition is None else torch.cat([half, condition], 1)).chunk(2, 1)
        c = self.bound
        if self.clamp == "tanh":
            return c * torch.tanh(scale / c), shift
        if self.clamp == "tenth":
            return c * torch.tanh(0.1 * scale), 0.1 * shift
        if self.clamp == "atan":
            return 0.636 * c * torch.atan(scale / c), shift
        if self.clamp == "sigmoid":
            return F.logsigmoid(scale + 2), shift
        return scale, shift
