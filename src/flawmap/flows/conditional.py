"""The conditional flow of CFLOW-AD: how likely a feature vector is where in the map it lies.

Gudovskiy, Ishizaka and Kozuka, "CFLOW-AD", WACV 2022, Section 4.2, after the authors' code.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from flawmap.flows.blocks import ActNorm, Flow, Mixing
from flawmap.flows.coupling import Coupling
from flawmap.flows.subnets import position_code


class PositionalMLP(nn.Module):
    """Linear, ReLU, Linear on some channels and, behind them, the code of their position.

    Vectors (N, inputs) bring their code with them. Maps (B, inputs - code, h, w) of the whole grid do without: half of
    the code is alike throughout a column and half throughout a row, so that it adds one vector for each column and one
    for each row to what the first layer makes of the channels. That takes a third of the work.

    Args:
        inputs, outputs: channels, those of the code included.
        hidden: width of the layer between, over `inputs`.
        code: (K, h, w), as `position_code` gives it.
        zero: the last layer starts at zero.
    """

    def __init__(self, inputs: int, outputs: int, code: Tensor, *, hidden: float, zero: bool) -> None:
        super().__init__()
        width = max(1, round(hidden * inputs))
        self.first = nn.Linear(inputs, width)
        self.last = nn.Linear(width, outputs)
        if zero:
            nn.init.zeros_(self.last.weight)
            nn.init.zeros_(self.last.bias)
        half = len(code) // 2
        self.sizes = (inputs - 2 * half, half, half)
        self.register_buffer("columns", code[:half, 0], persistent=False)  # (K / 2, w)
        self.register_buffer("rows", code[half:, :, 0], persistent=False)  # (K / 2, h)
        self.columns: Tensor
        self.rows: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs) -> (N, outputs), or (B, inputs - K, h, w) -> (B, outputs, h, w)."""
        if x.ndim == 2:
            flat: Tensor = self.last(self.first(x).relu())
            return flat
        channels, columns, rows = self.first.weight.split(self.sizes, 1)
        places = (columns @ self.columns)[:, None] + (rows @ self.rows)[:, :, None]  # (width, h, w)
        hidden = F.conv2d(x, channels[:, :, None, None], self.first.bias) + places
        return F.conv2d(hidden.relu(), self.last.weight[:, :, None, None], self.last.bias)


def conditional_flow(
    channels: int,
    grid: tuple[int, int],
    blocks: int = 8,
    *,
    code: int = 128,
    hidden: float = 2.0,
    two_sided: bool = False,
    zero: bool = False,
) -> Flow:
    """A flow on vectors (N, C) with their position codes (N, K) as condition, or on maps (B, C, h, w) without.

    Both give the same, and maps have the size of `grid`. Each block is FrEIA's AllInOneBlock as CFLOW-AD sets it up: a
    coupling, a scale and an offset for each channel, a fixed random rotation.

    Args:
        channels: C.
        grid: (h, w).
        blocks: 8 in CFLOW-AD, 6 in CLS-CNFs.
        code: K, channels of the position code, a multiple of four.
        hidden: width of the subnets' middle layer over that of their input.
        two_sided: couplings change both halves, as Fig. 3 of CLS-CNFs draws them.
        zero: the couplings start as the identity, and so the flow as a rotation.
    """
    places = position_code(code, *grid)

    def subnet(inputs: int, outputs: int) -> nn.Module:
        return PositionalMLP(inputs, outputs, places, hidden=hidden, zero=zero)

    return Flow(
        block
        for _ in range(blocks)
        for block in (
            Coupling(channels, subnet, condition=code, two_sided=two_sided, clamp="tenth"),
            ActNorm(channels, start="identity", scale="softplus"),
            Mixing(channels, "orthogonal"),
        )
    )


def standard_normal(z: Tensor, log_det: Tensor) -> Tensor:
    """log p(x) / C, in nats, where z (N, C) or (B, C, h, w) has a standard normal density: (N,) or (B, h, w)."""
    return log_det / z.shape[1] - z.square().mean(1) / 2 - math.log(2 * math.pi) / 2
