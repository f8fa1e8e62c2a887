"""What an invertible block is, those that act on each position alone, and the stack of blocks.

Everything takes vectors (N, C) as well as maps (B, C, H, W): channels are dimension 1 in both.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

MixingKind = Literal["plain", "lu", "orthogonal", "permutation"]


class Block(nn.Module):
    """The contract: `z, log_det = block(x, condition)` and `x = block.inverse(z, condition)`.

    x and z are (N, C) or (B, C, H, W), a condition (N, K) or (B, K, H, W). The log-determinant of the Jacobian dz/dx is
    that of a whole sample, (N,) or (B,).
    """

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_det = self.at_positions(x, condition)
        return z, log_det.flatten(1).sum(1) if log_det.ndim > 1 else log_det

    def at_positions(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z, and what each position adds to the log-determinant: (N,) or (B, H, W)."""
        raise NotImplementedError

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        raise NotImplementedError


class Flow(Block):
    """Blocks one after the other."""

    def __init__(self, blocks: Iterable[Block]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def at_positions(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_det = torch.zeros_like(x[:, 0])
        for block in self.blocks:
            x, added = block.at_positions(x, condition)  # type: ignore[operator]
            log_det = log_det + added
        return x, log_det

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        for block in reversed(self.blocks):
            z = block.inverse(z, condition)  # type: ignore[operator]
        return z

    def condition_number(self) -> float:
        """The largest of its mixing matrices': how many digits the inverse may lose."""
        return max((part.condition_number() for part in self.modules() if isinstance(part, Mixing)), default=1.0)


class ActNorm(Block):
    """z = scale * x + offset for each channel (Kingma & Dhariwal 2018, Section 3.1).

    Args:
        channels: C.
        start: "data" gives the first training batch zero mean and unit variance; "identity" starts at z = x.
        scale: "exp" is Glow's; "softplus" is that of FrEIA's AllInOneBlock, 0.1 softplus(theta), with beta = 1/2.
    """

    def __init__(
        self, channels: int, *, start: Literal["data", "identity"] = "data", scale: Literal["exp", "softplus"] = "exp"
    ) -> None:
        super().__init__()
        self.softplus = scale == "softplus"
        self.theta = nn.Parameter(self._theta(torch.ones(channels)))
        self.offset = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialised", torch.tensor(start == "identity"))
        self.initialised: Tensor

    def _theta(self, scale: Tensor) -> Tensor:
        """The parameter that gives a positive scale."""
        # 2 log(exp(5 scale) - 1), whose exponential would overflow from a scale of 18 on
        return 10 * scale + 2 * (-torch.expm1(-5 * scale)).log() if self.softplus else scale.log()

    def log_scale(self) -> Tensor:
        """(C,): the logarithm of each channel's scale."""
        return (0.1 * F.softplus(self.theta, beta=0.5)).log() if self.softplus else self.theta

    @torch.no_grad()
    def _initialise(self, x: Tensor) -> None:
        values = x.transpose(0, 1).flatten(1)  # (C, N)
        std, mean = torch.std_mean(values, 1, correction=0)
        # Channels that are silent in one batch would be blown up in the next, and so would all where all are.
        scale = 1 / std.clamp_min(1e-2 * float(std.mean())) if float(std.mean()) > 1e-6 else torch.ones_like(std)
        self.theta.copy_(self._theta(scale))
        self.offset.copy_(-mean * scale)
        self.initialised.fill_(True)

    def at_positions(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.training and not bool(self.initialised):
            self._initialise(x)
        log_scale = self.log_scale()
        return x * _of(x, log_scale.exp()) + _of(x, self.offset), log_scale.sum().expand_as(x[:, 0])

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        return (z - _of(z, self.offset)) * _of(z, (-self.log_scale()).exp())


class Mixing(Block):
    """An invertible 1 x 1 convolution z = W x (Kingma & Dhariwal 2018, Section 3.2).

    Args:
        channels: C.
        kind: "plain" learns W (C, C); "lu" learns W = P L (U + diag(s)), P and the signs of s fixed; "orthogonal" and
            "permutation" are fixed and random. All start as a random rotation, or as a permutation.
    """

    def __init__(self, channels: int, kind: MixingKind = "plain") -> None:
        super().__init__()
        self.kind = kind
        self._kept: tuple[Tensor, Tensor] | None = None  # weight and inverse
        if kind == "permutation":
            self.register_buffer("order", torch.randperm(channels))
            self.order: Tensor
            return
        factor, upper = torch.linalg.qr(torch.randn(channels, channels))
        rotation = factor * upper.diagonal().sign()  # uniform over rotations and reflections (Mezzadri 2007)
        if kind == "lu":
            permutation, lower, upper = torch.linalg.lu(rotation)
            diagonal = upper.diagonal()
            self.register_buffer("permutation", permutation)
            self.register_buffer("sign", diagonal.sign())
            self.lower = nn.Parameter(lower.tril(-1))
            self.upper = nn.Parameter(upper.triu(1))
            self.log_diagonal = nn.Parameter(diagonal.abs().log())
            self.permutation: Tensor
            self.sign: Tensor
        elif kind == "plain":
            self.matrix: Tensor = nn.Parameter(rotation)
        else:
            self.register_buffer("matrix", rotation)

    def weight(self) -> Tensor:
        """W (C, C)."""
        if self.kind == "permutation":
            return torch.eye(len(self.order), device=self.order.device)[self.order]
        if self.kind != "lu":
            return self.matrix
        identity = torch.eye(len(self.sign)).to(self.lower)
        lower = self.lower.tril(-1) + identity
        upper = self.upper.triu(1) + identity * (self.sign * self.log_diagonal.exp())  # ONNX has no diag
        return self.permutation @ lower @ upper

    def condition_number(self) -> float:
        """Of W; nan where W is not finite."""
        weight = self.weight().detach().cpu().double().numpy()
        return float(np.linalg.cond(weight)) if np.isfinite(weight).all() else float("nan")

    def at_positions(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.kind == "permutation":
            return x[:, self.order], torch.zeros_like(x[:, 0])
        log_det = torch.zeros((), dtype=x.dtype, device=x.device)
        if self.kind == "lu":
            log_det = self.log_diagonal.sum()
        elif self.kind == "plain" and not torch.onnx.is_in_onnx_export():
            log_det = torch.linalg.slogdet(self.matrix).logabsdet
        elif self.kind == "plain":  # a constant of the graph, which has no determinants
            log_det += float(np.linalg.slogdet(self.matrix.detach().double().numpy())[1])
        return _product(self.weight(), x), log_det.expand_as(x[:, 0])

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        if self.kind == "permutation":
            return z[:, self.order.argsort()]
        return _product(self.inverse_weight().to(z), z)

    def inverse_weight(self) -> Tensor:
        """W^-1 (C, C); of learnt weights in float64."""
        if self.kind in ("permutation", "orthogonal"):
            return self.weight().T
        weight = self.weight().double()
        if torch.onnx.is_in_onnx_export():  # as above
            return torch.from_numpy(np.linalg.inv(weight.detach().cpu().numpy()))
        # That of weights that nobody trains is kept: a large one takes longer than all else.
        if self._kept is not None and not weight.requires_grad and torch.equal(self._kept[0], weight):
            return self._kept[1]
        inverse: Tensor = torch.linalg.inv(weight)
        self._kept = None if weight.requires_grad else (weight.clone(), inverse)
        return inverse


def _of(x: Tensor, channels: Tensor) -> Tensor:
    """(C,) in the shape that multiplies x."""
    return channels.view(1, -1, *(1,) * (x.ndim - 2))


def _product(matrix: Tensor, x: Tensor) -> Tensor:
    return x @ matrix.T if x.ndim == 2 else F.conv2d(x, matrix[:, :, None, None])
