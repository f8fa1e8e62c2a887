"""The U-Net decoder of CLS-CNFs: what an encoder made of an image, turned back into a map of the image's size.

Oh & Kim, "Normalizing flow-based density estimation and synthetic defect classification", IEEE Access 2024, after the
authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_BOTTLENECKS = (3, 6, 4, 3)  # of each stage, deepest first
_NARROWEST = 32  # channels, those of the last stage
_HEAD = 8  # channels before the last convolution


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions of one width around a shortcut (ResNet, He et al. 2016)."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, padding_mode="reflect", bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.shortcut: nn.Module = nn.Identity()
        if inputs != width:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x) + self.shortcut(x)
        return y.relu()


class Decoder(nn.Module):
    """Maps of three levels, each half the size of the one before -> logits at 1/`stride` of the input size.

    Each stage doubles the size, takes in the level of that size, and is a quarter as wide as it; the last two, for
    which no level is left, halve the width.

    Args:
        channels: of the levels at 1/8, 1/16 and 1/32 of the input.
        size: (H, W) of the input.
        outputs: channels of the logits.
        stride: 1 as printed; at 2 and 4 the last enlargement, or the last two and the stage between, are left out.
        skips: the two shallower levels are taken in; else the deepest alone is read.
        upsampling: how sizes double, corners aligned.
    """

    def __init__(
        self,
        channels: Sequence[int],
        size: tuple[int, int],
        outputs: int = 1,
        *,
        stride: int = 1,
        skips: bool = True,
        upsampling: Literal["bicubic", "bilinear"] = "bicubic",
    ) -> None:
        super().__init__()
        shallow, middle, deep = channels
        self.skips, self.upsampling = skips, upsampling
        self.sizes = [(size[0] // factor, size[1] // factor) for factor in (4, 2, 1) if factor >= stride]
        self.transition = nn.Sequential(
            nn.Conv2d(deep, middle, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(middle, middle, 1, bias=False),
            nn.ReLU(),
        )
        widths = [max(middle // 4, _NARROWEST), max(shallow // 4, _NARROWEST)]
        widths += [max(widths[1] // 2, _NARROWEST), max(widths[1] // 4, _NARROWEST)]
        joined = (middle, shallow, 0, 0) if skips else (0, 0, 0, 0)
        stages = []
        before = middle
        for width, further, count in list(zip(widths, joined, _BOTTLENECKS, strict=True))[: 3 if stride == 4 else 4]:
            inputs = [before + further] + [width] * (count - 1)
            stages.append(nn.Sequential(*(Bottleneck(n, width) for n in inputs)))
            before = width
        self.stages = nn.ModuleList(stages)
        self.head = nn.Sequential(
            nn.Conv2d(before, _HEAD, 3, padding=1, padding_mode="reflect", bias=False),
            nn.BatchNorm2d(_HEAD),
            nn.ReLU(),
            nn.Conv2d(_HEAD, outputs, 3, padding=1, padding_mode="reflect", bias=False),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Maps (B, C_i, h_i, w_i), the shallowest first -> (B, outputs, H / stride, W / stride)."""
        shallow, middle, deep = levels
        sizes = [middle.shape[-2:], shallow.shape[-2:], *self.sizes]
        x = self.transition(deep)
        for number, stage in enumerate(self.stages):
            x = self._enlarged(x, sizes[number])
            if self.skips and number < 2:
                x = torch.cat([x, (middle, shallow)[number]], 1)
            x = stage(x)
        logits: Tensor = self.head(self._enlarged(x, sizes[-1]))
        return logits

    def _enlarged(self, x: Tensor, size: Sequence[int]) -> Tensor:
        if tuple(x.shape[-2:]) == tuple(size):
            return x
        return F.interpolate(x, size=tuple(size), mode=self.upsampling, align_corners=True)
