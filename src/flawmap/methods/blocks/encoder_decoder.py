"""Networks that repair an image and mark what they repaired: encoders, decoders, U-Nets.

Their blocks and the start of their weights are those of Zavrtanik, Kristan and Skočaj, "DRÆM - A discriminatively
trained reconstruction embedding for surface anomaly detection", ICCV 2021, and of their program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Upsampling = Callable[[int, int], nn.Module]
"""(channels, channels after) -> a module that doubles height and width."""


def convolutions(channels: int, *outputs: int, side: int = 3) -> nn.Sequential:
    """Convolution, batch normalisation and ReLU for each of `outputs`."""
    layers: list[nn.Module] = []
    for before, after in pairwise((channels, *outputs)):
        layers += [
            nn.Conv2d(before, after, side, padding=side // 2),
            nn.BatchNorm2d(after),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


def bilinear(channels: int, after: int) -> nn.Module:
    """DRAEM's upsampling: bilinear, then a convolution."""
    return nn.Sequential(
        nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), *convolutions(channels, after)
    )


def transposed(side: int) -> Upsampling:
    """Transposed convolutions of stride 2, with kernels of `side` x `side`."""
    return lambda channels, after: nn.ConvTranspose2d(channels, after, side, stride=2, padding=side // 2 - 1)


class Encoder(nn.Module):
    """Blocks of convolutions, with 2 x 2 max-pooling before each but the first.

    Args:
        channels: of the input.
        levels: for each block the channels after each of its convolutions.
    """

    def __init__(self, channels: int, levels: Sequence[Sequence[int]]) -> None:
        super().__init__()
        befores = [channels, *(outputs[-1] for outputs in levels)]
        self.blocks = nn.ModuleList(
            convolutions(before, *level) for before, level in zip(befores, levels, strict=False)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, C, H, W) -> the map after each block, the finest first."""
        maps: list[Tensor] = []
        for block in self.blocks:
            x = block(F.max_pool2d(x, 2) if maps else x)
            maps.append(x)
        return maps


class Decoder(nn.Module):
    """Upsampling and a block of convolutions, again and again.

    Args:
        channels: of the input.
        levels: for each block the channels after upsampling, then after each of its convolutions.
        upsampling: makes the layers that upsample.
        skips: channels of the maps that are laid beside what was upsampled; none where empty.
    """

    def __init__(
        self, channels: int, levels: Sequence[Sequence[int]], upsampling: Upsampling, skips: Sequence[int] = ()
    ) -> None:
        super().__init__()
        befores = [channels, *(outputs[-1] for outputs in levels)]
        beside = skips or [0] * len(levels)
        self.ups = nn.ModuleList(upsampling(before, up) for before, (up, *_) in zip(befores, levels, strict=False))
        self.blocks = nn.ModuleList(
            convolutions(up + skip, *outputs) for (up, *outputs), skip in zip(levels, beside, strict=True)
        )

    def forward(self, x: Tensor, skips: Sequence[Tensor] = ()) -> list[Tensor]:
        """(B, C, h, w) and maps twice, four times, ... as large -> the map after each block, the coarsest first."""
        maps: list[Tensor] = []
        for i, (up, block) in enumerate(zip(self.ups, self.blocks, strict=True)):
            x = up(x)
            x = block(torch.cat([x, skips[i]], 1) if skips else x)
            maps.append(x)
        return maps


class UNet(nn.Module):
    """An encoder, and a decoder that sees the encoder's maps (Ronneberger et al., MICCAI 2015)."""

    def __init__(
        self,
        channels: int,
        down: Sequence[Sequence[int]],
        up: Sequence[Sequence[int]],
        upsampling: Upsampling,
        outputs: int = 2,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(channels, down)
        self.decoder = Decoder(down[-1][-1], up, upsampling, [level[-1] for level in reversed(down[:-1])])
        self.out = nn.Conv2d(up[-1][-1], outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, outputs, H, W)."""
        *skips, deepest = self.encoder(x)
        logits: Tensor = self.out(self.decoder(deepest, skips[::-1])[-1])
        return logits


class Pair(nn.Module):
    """A network that repairs images, and a U-Net that compares what comes in with what comes out.

    Args:
        reconstruct: images (B, 3, H, W) -> the reconstruction, of the same shape.
        discriminate: (B, 6, H, W) -> logits (B, 2, H, W) of good and defective.
    """

    def __init__(self, reconstruct: nn.Module, discriminate: UNet) -> None:
        super().__init__()
        self.reconstruct = reconstruct
        self.discriminate = discriminate

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in 0..1 -> their reconstruction, and logits (B, 2, H, W)."""
        rebuilt = self.reconstruct(images)
        return rebuilt, self.discriminate(torch.cat([rebuilt, images], 1))


@torch.no_grad()
def redraw(network: nn.Module) -> None:
    """Weights of convolutions from N(0, 0.02), gains of batch normalisation from N(1, 0.02), as DRAEM's start."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.weight.normal_(0, 0.02)
        elif isinstance(module, nn.BatchNorm2d):
            module.weight.normal_(1, 0.02)
