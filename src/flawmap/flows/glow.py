"""Glow's steps on vectors (Kingma & Dhariwal 2018, Fig. 2), with a quick way through, once they are trained."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flawmap.flows.blocks import ActNorm, Block, Flow, Mixing, MixingKind
from flawmap.flows.coupling import Clamp, Coupling
from flawmap.flows.subnets import mlp


class Glow(Flow):
    """Steps of activation normalisation, mixing and a one-sided coupling, on vectors (N, C).

    Args:
        channels: C.
        steps: how many.
        hidden: width of the couplings' networks, which have three layers.
        mixing: the matrix of each step.
        actnorm: whether steps normalise.
        clamp: how log-scales are bounded; Glow's own is "sigmoid".
    """

    def __init__(
        self,
        channels: int,
        steps: int,
        hidden: int,
        *,
        mixing: MixingKind = "plain",
        actnorm: bool = True,
        clamp: Clamp = "tanh",
    ) -> None:
        blocks = list[Block]()
        for _ in range(steps):
            blocks += [ActNorm(channels)] if actnorm else []
            blocks += [Mixing(channels, mixing), Coupling(channels, mlp(hidden, layers=3), clamp=clamp)]
        super().__init__(blocks)
        self.channels = channels

    def transform(self, x: Tensor) -> Tensor:
        """(N, C) -> (N, C): z, without its determinant; what comes before a coupling is one product."""
        for scale, offset, mixing, coupling in self._steps():
            weight = mixing.weight().to(x)
            x = coupling.at_positions(F.linear(x, weight * scale, weight @ offset))[0]
        return x

    def revert(self, z: Tensor) -> Tensor:
        """(N, C) -> (N, C): the inverse; what comes after a coupling's is one product."""
        for scale, offset, mixing, coupling in reversed(self._steps()):
            inverse = mixing.inverse_weight().to(z)
            z = F.linear(coupling.inverse(z), inverse / scale[:, None], -offset / scale)
        return z

    def _steps(self) -> list[tuple[Tensor, Tensor, Mixing, Coupling]]:
        """Of each step: scale and offset (C,) of its normalisation, its mixing, its coupling."""
        steps = []
        like = next(self.parameters())
        scale, offset = torch.ones(self.channels).to(like), torch.zeros(self.channels).to(like)
        for block in self.blocks:
            if isinstance(block, ActNorm):
                scale, offset = block.log_scale().exp(), block.offset
            elif isinstance(block, Mixing):
                mixing = block
            else:
                assert isinstance(block, Coupling)
                steps.append((scale, offset, mixing, block))
        return steps
