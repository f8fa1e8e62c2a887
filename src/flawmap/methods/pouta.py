"""POUTA: Wang, Li, Luo, Lv and Zhang, "Produce Once, Utilize Twice for Anomaly Detection", IEEE TCSVT 2024,
arXiv 2312.12913.

A network learns to repair synthetic defects. Its encoder sees the image and its decoder the repaired image, so a small
second network compares the maps of the two, scale by scale, and marks the defects; deep maps guide shallow ones.
Nothing is pretrained: the backbone serves only to tell captures of something else.

Where the defaults, which are also `--preset quick`, differ from the paper, and the setting that takes the difference
back (`--preset paper` takes back all that can be):

- The network is narrow (`width=64`, `head_width=128`), and learns in few steps (`max_steps=0`) that are larger
  (`learning_rate=2e-4`).
- The convolution that guides has batch normalisation and ReLU; Section III-B prints a convolution (`hsg_act=false`).
- Defects are laid in opaque; the paper blends "seamlessly" (`seamless=1`: by their gradients, or `opacity` below 1).
- Where no folder of texture photographs is given, textures are drawn (`textures=FOLDER`; the paper's is DTD).

The paper gives neither widths nor layers, only 15.02 M parameters, 35.37 GFLOPs, and for its Vanilla 28.68 M and
39.38 G. The layout here is the simplest that meets the first two, within 0.1 %, Vanilla's within 1 %: a fit, no proof.
`recon_style=bilinear` with `head_width=0` is another, within 0.5 %. Also unstated, and read as: gates are sigmoids
(`hsg_gate=none`: three maps are multiplied as they are); comparisons are batch-normalised, with ReLU (`fcm_act`); maps
are enlarged bilinearly; half of the samples have no defect (`clean`); defects lie anywhere (`foreground`), and are the
image itself and a foreign texture, mixed as DRAEM's are (`own_share`): "translation" moves the image round its edges,
"rotation" turns it by 180 degrees, so that nothing has to be filled; the focal loss has DRAEM's gamma and no alpha
(`focal_gamma`); the L1 losses compare the probability
of a defect with the mask; images are read in 0..1. The square of the image score is scaled with the input, from the 224
pixels of the paper.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from flawmap.methods.blocks.encoder_decoder import (
    Decoder,
    Encoder,
    Pair,
    UNet,
    bilinear,
    convolutions,
    redraw,
    transposed,
)
from flawmap.methods.blocks.pixel_losses import focal, mean_inside, ssim
from flawmap.methods.blocks.reconstruction import Reconstructive, ReconstructiveConfig
from flawmap.methods.contract import Stage
from flawmap.methods.presets import Preset, read_presets
from flawmap.synthesis import POUTA as DEFECTS
from flawmap.synthesis import SynthesisSettings

Gate = Literal["sigmoid", "none"]


class POUTAConfig(ReconstructiveConfig):
    """Settings of POUTA."""

    variant: Literal["vanilla", "base", "hsg", "mss", "full"] = Field(
        "full", description="vanilla: images are compared; base: maps; hsg: with guidance; mss: with supervision"
    )
    width: int = Field(16, ge=2, le=256, description="channels at full size")
    recon_style: Literal["transposed", "bilinear"] = Field("transposed", description="how the decoder upsamples")
    fcm_act: bool = Field(True, description="batch normalisation and ReLU after the convolutions that compare")
    hsg_act: bool = Field(True, description="batch normalisation and ReLU after the convolution that guides")
    hsg_gate: Gate = Field("sigmoid", description="how the guiding maps are bounded")
    head_width: int = Field(32, ge=0, le=1024, description="channels before the last convolution; 0: none before it")
    reconstruction_loss: Literal["mse+ssim", "mse", "ssim", "none"] = Field("mse+ssim", description="terms of L_rec")
    prediction_loss: Literal["focal+l1", "focal", "l1"] = Field("focal+l1", description="terms of L_pre and L_SS")
    lambda_1: float = Field(0.4, ge=0, le=1e6, description="weight of the loss at full size")
    lambda_2: float = Field(0.3, ge=0, le=1e6, description="at half size")
    lambda_3: float = Field(0.2, ge=0, le=1e6, description="at a quarter")
    lambda_4: float = Field(0.1, ge=0, le=1e6, description="at an eighth")
    seamless: float = Field(0.0, ge=0, le=1, description="share of defects laid in by their gradients (Section III-A)")
    own_share: float = Field(0.8, ge=0, le=1, description="most of the image itself in what is laid in")
    opacity: float = Field(1.0, ge=0, le=1, description="least opacity of what is laid in otherwise")
    epochs: int = Field(600, ge=1, le=100_000, description="passes over the training images")


class Reconstruction(nn.Module):
    """F_E1..4, the mapping to F_M and F_D4..1, without skips, so that what is repaired has passed F_M."""

    def __init__(self, width: int, style: Literal["transposed", "bilinear"]) -> None:
        super().__init__()
        a, b, c, d = width, 2 * width, 4 * width, 8 * width
        self.encoder = Encoder(3, [(a, a), (b, b), (c, c), (d, d)])
        self.mapping: nn.Module = convolutions(d, d)
        if style == "transposed":
            self.deepest: nn.Module = convolutions(d, d, d)  # F_D4 is as large as F_E4
            self.decoder = Decoder(d, [(c, c, c), (b, b, b), (a, a, a)], transposed(2))
        else:
            self.mapping = nn.Sequential(nn.MaxPool2d(2), self.mapping)
            self.deepest = nn.Sequential(bilinear(d, d), convolutions(d, d))
            self.decoder = Decoder(d, [(c, c), (b, b), (a, a)], bilinear)
        self.out = nn.Conv2d(a, 3, 3, padding=1)

    def maps(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Images (B, 3, H, W) -> F_E and F_D at 1/1, 1/2, 1/4 and 1/8 of their size."""
        encoded = self.encoder(images)
        deepest = self.deepest(self.mapping(encoded[-1]))
        return encoded, [deepest, *self.decoder(deepest)][::-1]

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> I_r, of the same shape."""
        rebuilt: Tensor = self.out(self.maps(images)[1][0])
        return rebuilt


class Contrast(nn.Module):
    """FCM: F_E and F_D -> F_C, with half their channels."""

    def __init__(self, channels: int, activation: bool) -> None:
        super().__init__()
        self.encoded, self.decoded = (_pointwise(channels, channels // 2, activation) for _ in range(2))
        self.both = _pointwise(channels // 2 * 2, channels // 2, activation)

    def forward(self, encoded: Tensor, decoded: Tensor) -> Tensor:
        contrast: Tensor = self.both(torch.cat([self.encoded(encoded), self.decoded(decoded)], 1))
        return contrast


def _pointwise(channels: int, after: int, activation: bool) -> nn.Module:
    return convolutions(channels, after, side=1) if activation else nn.Conv2d(channels, after, 1)


class Guidance(nn.Module):
    """HSG: F_C is weighed, position by position and channel by channel, by what the next deeper map says."""

    def __init__(self, deeper: int, channels: int, gate: Gate, activation: bool = True) -> None:
        super().__init__()
        self.gate = gate
        self.lift = convolutions(deeper, channels) if activation else nn.Conv2d(deeper, channels, 3, padding=1)
        self.space = nn.Conv2d(channels, 1, 1)
        self.channel = nn.Conv2d(channels, channels, 1)
        if gate == "none":  # products of unbounded maps start near F_C
            nn.init.ones_(self.space.bias)  # type: ignore[arg-type]
            nn.init.ones_(self.channel.bias)  # type: ignore[arg-type]

    def forward(self, contrast: Tensor, deeper: Tensor) -> Tensor:
        lifted = self.lift(_enlarged(deeper, 2))
        space, channel = self.space(lifted), self.channel(lifted.mean((2, 3), keepdim=True))
        if self.gate == "sigmoid":
            space, channel = space.sigmoid(), channel.sigmoid()
        guided: Tensor = space * contrast * channel  # Eq. 4
        return guided


class Head(nn.Module):
    """Maps of all scales -> logits (B, 2, H, W), as if the maps had been enlarged and concatenated.

    A 1 x 1 convolution and bilinear enlarging commute, so each scale is convolved at its own size.
    """

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.channels = list(channels)
        self.mix = nn.Conv2d(sum(channels), width or 2, 1)
        self.predict = (
            nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.Conv2d(width, 2, 1))
            if width
            else nn.Identity()
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        weights = self.mix.weight.split(self.channels, 1)
        mixed = F.conv2d(maps[0], weights[0], self.mix.bias)
        for i in range(1, len(maps)):
            mixed = mixed + _enlarged(F.conv2d(maps[i], weights[i]), 2**i)
        logits: Tensor = self.predict(mixed)
        return logits


def _enlarged(maps: Tensor, factor: int) -> Tensor:
    return F.interpolate(maps, scale_factor=float(factor), mode="bilinear", align_corners=False)


class Network(nn.Module):
    """The reconstructive network and the discriminative one, which reads its maps."""

    def __init__(self, config: POUTAConfig) -> None:
        super().__init__()
        widths = [config.width * 2**i for i in range(4)]
        channels = [width // 2 for width in widths]
        self.reconstruct = Reconstruction(config.width, config.recon_style)
        self.contrasts = nn.ModuleList(Contrast(width, config.fcm_act) for width in widths)
        guided = config.variant in ("hsg", "full")
        self.guides = nn.ModuleList(
            Guidance(channels[i + 1], channels[i], config.hsg_gate, config.hsg_act) for i in range(3 if guided else 0)
        )
        self.head = Head(channels, config.head_width)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Images (B, 3, H, W) in 0..1 -> I_r, logits (B, 2, H, W), and F'_C1..4, F'_C4 being F_C4."""
        encoded, decoded = self.reconstruct.maps(images)
        maps = [contrast(e, d) for contrast, e, d in zip(self.contrasts, encoded, decoded, strict=True)]
        for i in reversed(range(len(self.guides))):
            maps[i] = self.guides[i](maps[i], maps[i + 1])
        return self.reconstruct.out(decoded[0]), self.head(maps), maps


def vanilla(config: POUTAConfig) -> Pair:
    """The same reconstructive network, whose image a U-Net compares with its input."""
    a, b, c, d, e = (config.width // 2 * 2**i for i in range(5))
    down = [(a, a), (b, b), (c, c), (d, d), (e, e, e, e)]
    unet = UNet(6, down, [(d, d, d), (c, c, c), (b, b, b), (a, a, a)], transposed(4))
    return Pair(Reconstruction(config.width, config.recon_style), unet)


class POUTA(Reconstructive):
    """See the module's docstring."""

    Config = POUTAConfig
    presets: ClassVar[dict[str, Preset]] = {"quick": Preset(), **read_presets("pouta")}
    defects = DEFECTS
    printed_size: ClassVar[int] = 224
    config: POUTAConfig

    @classmethod
    def halvings(cls, config: POUTAConfig) -> int:
        return 4 if config.variant == "vanilla" or config.recon_style == "bilinear" else 3

    def create(self) -> nn.Module:
        network = vanilla(self.config) if self.config.variant == "vanilla" else Network(self.config)
        redraw(network)
        return network

    def synthesis(self) -> SynthesisSettings:
        config = self.config
        return replace(
            DEFECTS, seamless=config.seamless, own_share=(0.0, config.own_share), opacity=(config.opacity, 1.0)
        )

    def stages(self, images: int) -> Iterator[Stage]:
        supervised = self.config.variant in ("mss", "full")
        widths = [self.config.width // 2 * 2**i for i in range(4 if supervised else 0)]
        self.heads = nn.ModuleList(nn.Conv2d(width, 2, 1) for width in widths).to(self.mean.device)  # MSS
        redraw(self.heads)
        yield from super().stages(images)
        del self.heads

    def loss(self, tensors: list[Tensor], inside: Tensor | None) -> Tensor:
        good, defective, masks = self.unit(tensors[0]), self.unit(tensors[1]), tensors[2]
        rebuilt, logits, *maps = self.network(defective)
        loss = self.reconstruction(rebuilt, good, inside) + self.prediction(logits, masks, inside)
        return loss + self.supervision(maps[0], masks, inside) if self.heads else loss  # Eq. 8

    def reconstruction(self, rebuilt: Tensor, good: Tensor, inside: Tensor | None) -> Tensor:
        """L_rec (Eq. 1)."""
        loss, terms = torch.zeros((), device=good.device), self.config.reconstruction_loss
        if "mse" in terms:
            loss = loss + mean_inside((rebuilt - good).square(), inside)
        if "ssim" in terms:
            loss = loss + 1 - mean_inside(ssim(rebuilt, good), inside)
        return loss

    def prediction(self, logits: Tensor, masks: Tensor, inside: Tensor | None) -> Tensor:
        """L_pre (Eq. 7), or L_SS of one scale (Eq. 5)."""
        probability, terms = logits.softmax(1)[:, 1:], self.config.prediction_loss
        loss = torch.zeros((), device=masks.device)
        if "focal" in terms:
            loss = loss + mean_inside(focal(logits, masks, self.config.focal_gamma), inside)
        if "l1" in terms:
            loss = loss + mean_inside((probability - masks).abs(), inside)
        return loss

    def supervision(self, maps: Sequence[Tensor], masks: Tensor, inside: Tensor | None) -> Tensor:
        """L_MSS (Eq. 6), of F'_C1..4."""
        config, loss = self.config, torch.zeros((), device=masks.device)
        weights = (config.lambda_1, config.lambda_2, config.lambda_3, config.lambda_4)
        for i, (weight, head, level) in enumerate(zip(weights, self.heads, maps, strict=True)):
            logits = head(level)
            loss = loss + weight * self.prediction(_enlarged(logits, 2**i) if i else logits, masks, inside)
        return loss
