"""DRAEM: Zavrtanik, Kristan and Skočaj, "DRÆM - A discriminatively trained reconstruction embedding for surface anomaly
detection", ICCV 2021.

A network learns to repair synthetic defects; a second one looks at an image and its repaired copy together, and learns
to mark the defects. Nothing is pretrained: the backbone serves only to tell captures of something else.

Where the defaults, which are also `--preset quick`, differ from the paper, and the setting that takes the difference
back (`--preset paper` takes back all that can be):

- The networks are narrow (`width=128`), learn in few steps (`max_steps=0`) that are larger (`learning_rate=1e-4`).
- Good images are not rotated (`rotate=0.3`): parts mostly lie as they lie.
- Where no folder of texture photographs is given, textures are drawn (`textures=FOLDER`; the paper's is DTD).

The paper and the authors' program part: the text lowers the rate to a tenth after 400 and 600 of 700 epochs
(`schedule=text`), turns good images by up to 45 degrees (`angle=45`), and makes defects of a random threshold, an
opacity of 0.1 to 1 and three of seven operations (`defects=text`); the program, which the defaults follow, lowers it to
a fifth at 80 and 90 %, turns by up to 90, and has a threshold of 0.5, an opacity of 0.2 to 1 and three of nine
operations. `--preset paper` is the text, `--preset authors` the program. Eq. 2's lambda is 1 (`lambda_ssim`).

An epoch is one pass over the training images; the authors' program draws as many with replacement. Where rotation is
on, an image is turned together with its defect; the authors turn it before the defect is made. The square of the image
score is scaled with the input, from the 256 pixels of the paper.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from flawmap.methods.blocks.encoder_decoder import Decoder, Encoder, Pair, UNet, bilinear, redraw
from flawmap.methods.blocks.pixel_losses import focal, mean_inside, ssim
from flawmap.methods.blocks.reconstruction import Reconstructive, ReconstructiveConfig
from flawmap.methods.blocks.rotation import turned
from flawmap.methods.presets import Preset, read_presets
from flawmap.synthesis import DRAEM as DEFECTS
from flawmap.synthesis import DRAEM_TEXT, SynthesisSettings


class DRAEMConfig(ReconstructiveConfig):
    """Settings of DRAEM."""

    width: int = Field(16, ge=2, le=256, description="channels at full size that repair; half as many compare")
    epochs: int = Field(700, ge=1, le=100_000, description="passes over the training images")
    rotate: float = Field(0.0, ge=0, le=1, description="share of the training images that are turned")
    angle: float = Field(90.0, ge=0, le=180, description="degrees by which they are turned at most")
    lambda_ssim: float = Field(1.0, ge=0, le=1e6, description="lambda, of the SSIM in L_rec (Eq. 2)")
    schedule: Literal["program", "text"] = Field(
        "program", description="the rate falls to a fifth at 80 and 90 % of the steps, or to a tenth at 4/7 and 6/7"
    )
    defects: Literal["program", "text"] = Field("program", description="how defects are made where the two part")


class Autoencoder(nn.Module):
    """The reconstructive network: five blocks down, four up, no skips."""

    def __init__(self, width: int) -> None:
        super().__init__()
        a, b, c, d = width, 2 * width, 4 * width, 8 * width
        self.encoder = Encoder(3, [(a, a), (b, b), (c, c), (d, d), (d, d)])
        self.decoder = Decoder(d, [(d, d, c), (c, c, b), (b, b, a), (a, a, a)], bilinear)
        self.out = nn.Conv2d(a, 3, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 3, H, W)."""
        rebuilt: Tensor = self.out(self.decoder(self.encoder(images)[-1])[-1])
        return rebuilt


def discriminative(width: int) -> UNet:
    """The discriminative network: six blocks down, five up."""
    a, b, c, d = width, 2 * width, 4 * width, 8 * width
    down = [(a, a), (b, b), (c, c), (d, d), (d, d), (d, d)]
    return UNet(6, down, [(d, d, d), (c, c, c), (b, b, b), (a, a, a), (a, a, a)], bilinear)


class DRAEM(Reconstructive):
    """See the module's docstring."""

    Config = DRAEMConfig
    presets: ClassVar[dict[str, Preset]] = {"quick": Preset(), **read_presets("draem")}
    defects = DEFECTS
    printed_size: ClassVar[int] = 256
    config: DRAEMConfig

    @classmethod
    def halvings(cls, config: DRAEMConfig) -> int:
        return 5

    def create(self) -> nn.Module:
        network = Pair(Autoencoder(self.config.width), discriminative(self.config.width // 2))
        redraw(network)
        return network

    def loss(self, tensors: list[Tensor], inside: Tensor | None) -> Tensor:
        good, defective, masks = self.unit(tensors[0]), self.unit(tensors[1]), tensors[2]
        config = self.config
        if config.rotate:
            angle = math.radians(config.angle)
            good, defective, masks, inside = rotated(config.rotate, good, defective, masks, inside, angle)
        rebuilt, logits = self.network(defective)
        unlike = 1 - mean_inside(ssim(rebuilt, good), inside)
        reconstruction = config.lambda_ssim * unlike + mean_inside((rebuilt - good).square(), inside)  # Eq. 2
        return reconstruction + mean_inside(focal(logits, masks, config.focal_gamma), inside)  # Eq. 3

    def synthesis(self) -> SynthesisSettings:
        return DRAEM_TEXT if self.config.defects == "text" else DEFECTS

    def milestones(self) -> tuple[tuple[float, float], float]:
        return ((400 / 700, 600 / 700), 0.1) if self.config.schedule == "text" else super().milestones()


def rotated(
    share: float,
    good: Tensor,
    defective: Tensor,
    masks: Tensor,
    inside: Tensor | None,
    most: float = math.pi / 2,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Some of the images turned by up to `most` radians, all that belongs to one alike; black is what comes in."""
    angles = (torch.rand(len(good)) * 2 - 1) * (torch.rand(len(good)) < share) * most
    return (
        turned(good, angles, beyond="zeros"),
        turned(defective, angles, beyond="zeros"),
        turned(masks, angles, nearest=True, beyond="zeros"),
        None if inside is None else turned(inside, angles, nearest=True, beyond="zeros"),
    )
