"""What DRAEM and POUTA share: networks that repair an image and mark what they repaired, their losses, their training.

The layout of blocks, the losses and the start of the weights are those of Zavrtanik, Kristan and Skočaj, "DRÆM - A
discriminatively trained reconstruction embedding for surface anomaly detection", ICCV 2021, and of their program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from flawmap.backbones import Backbone, levels_at
from flawmap.errors import FlawmapError
from flawmap.methods.blocks.smoothing import largest, within
from flawmap.methods.contract import Config, Method, Optimise, Stage, SyntheticDefects, epochs_within
from flawmap.synthesis import SynthesisSettings

Upsampling = Callable[[int, int], nn.Module]
"""(channels, channels after) -> a module that doubles height and width."""

_WINDOW, _SIGMA = 11, 1.5  # of SSIM, in pixels
_C1, _C2 = 0.01**2, 0.03**2  # of SSIM, for values in 0..1
_LEAST = 1e-5  # probabilities are kept that far from 0 and 1


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


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity of images (B, C, H, W) in 0..1 at each pixel, of the same shape.

    Wang et al., IEEE TIP 2004: 11 x 11 windows, Gaussian of 1.5 pixels. Beyond the border lie zeros, as in DRAEM.
    """
    offsets = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    line = torch.exp(-0.5 * (offsets / _SIGMA) ** 2)
    channels = x.shape[1]
    kernel = (line / line.sum()).to(x.device, torch.float32).expand(5 * channels, 1, 1, _WINDOW)
    x, y = x.float(), y.float()  # variances are small differences
    moments = torch.cat([x, y, x * x, y * y, x * y], 1)  # (B, 5 C, H, W)
    moments = F.conv2d(moments, kernel, padding=(0, _WINDOW // 2), groups=5 * channels)
    moments = F.conv2d(moments, kernel.mT, padding=(_WINDOW // 2, 0), groups=5 * channels)
    mean_x, mean_y, xx, yy, xy = moments.split(channels, 1)
    product, squares = mean_x * mean_y, mean_x.square() + mean_y.square()
    covariance, variances = xy - product, xx + yy - squares
    found: Tensor = (2 * product + _C1) * (2 * covariance + _C2) / ((squares + _C1) * (variances + _C2))
    return found


def focal(probability: Tensor, mask: Tensor, gamma: float = 2.0) -> Tensor:
    """-(1 - p)^gamma log p of each pixel's true class (Lin et al., ICCV 2017), of the arguments' shape.

    Args:
        probability: of a defect, 0..1.
        mask: 1 where there is one, 0 elsewhere.
    """
    true = torch.where(mask > 0, probability, 1 - probability).float().clamp(_LEAST, 1 - _LEAST)
    return -((1 - true).pow(gamma)) * true.log()


def mean_inside(values: Tensor, inside: Tensor | None) -> Tensor:
    """The mean of (B, C, H, W) where `inside` (B, 1, H, W) is 1; None is everywhere."""
    if inside is None:
        return values.mean()
    return (values * inside).sum() / (inside.sum() * values.shape[1]).clamp_min(1)


class ReconstructiveConfig(Config):
    """Settings that both methods have."""

    levels: tuple[str, ...] | None = Field(
        None, description="backbone level whose mean tells captures of something else; one at 1/16 if unset"
    )
    clean: float = Field(0.5, ge=0, lt=1, description="share of the training images that get no defect")
    foreground: bool = Field(False, description="defects lie on the part, where images show parts on a ground")
    textures: Path | None = Field(None, description="folder of texture photographs; they are drawn if unset")
    max_steps: int = Field(600, ge=0, description="fewer passes where they would take more steps; 0: no limit")
    batch_size: int = Field(8, ge=1, description="images in a step")
    learning_rate: float = Field(1e-3, gt=0, description="of Adam; a fifth after 80 % of the steps, again after 90 %")
    pool: int = Field(21, ge=1, description="side of the square whose mean is the image score, scaled with the input")


class _WithImages(nn.Module):
    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> list[Tensor]:
        return [*self.backbone(images), images]


class Reconstructive(Method):
    """A method whose network repairs images with defects and says where it saw them.

    The backbone takes no part in that: the mean of one of its levels tells captures of something else.

    Attributes:
        defects: the synthetic defects that are trained on.
        printed_size: the input size for which `pool` is meant.
        network: images (B, 3, H, W) in 0..1 -> reconstruction (B, 3, H, W), logits (B, 2, H, W), and maybe more.
    """

    optimises: ClassVar[bool] = True
    trained_on: ClassVar[frozenset[str]] = frozenset({"texture", "merged"})
    defects: ClassVar[SynthesisSettings]
    printed_size: ClassVar[int]
    config: Any

    def __init__(self, config: Any, backbone: Backbone, size: tuple[int, int]) -> None:
        super().__init__(config, backbone, size)
        self.register_buffer("mean", torch.tensor(backbone.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(backbone.std)[:, None, None], persistent=False)
        self.mean: Tensor
        self.std: Tensor
        self.network = self.create()
        self.padding = [int(config.pool * side / self.printed_size / 2) for side in size]

    @classmethod
    def resolved(cls, config: Any, backbone: str) -> Any:
        return config if config.levels else config.model_copy(update={"levels": levels_at(backbone, (16,))[:1]})

    @classmethod
    def halvings(cls, config: Any) -> int:
        """How many times the network halves its input."""
        raise NotImplementedError

    @classmethod
    def extractor(cls, config: Any, backbone: Backbone, size: tuple[int, int]) -> nn.Module:
        factor = 2 ** cls.halvings(config)
        if any(side % factor or side < 2 * factor for side in size):
            raise FlawmapError(
                f"the network halves its input {cls.halvings(config)} times and cannot read {size[1]} x {size[0]} "
                f"pixels: choose an --image-size of at least {2 * factor} that {factor} divides"
            )
        return _WithImages(backbone)

    def create(self) -> nn.Module:
        """The network, freshly drawn."""
        raise NotImplementedError

    def unit(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) as the backbone takes them -> in 0..1."""
        # CPUs convolve few channels faster where these lie side by side.
        return (images * self.std + self.mean).contiguous(memory_format=torch.channels_last)

    def stages(self, images: int) -> Iterator[Stage]:
        config = self.config
        self.network = self.create().to(self.mean.device)
        yield Optimise(
            "network",
            self.loss,
            [parameter for name, parameter in self.named_parameters() if not name.startswith("backbone.")],
            epochs_within(config.max_steps, config.epochs, images, config.batch_size),
            config.batch_size,
            self._optimiser,
            _steps_down,
            inputs=SyntheticDefects(
                self.defects,
                clean=config.clean,
                textures=config.textures,
                foreground=config.foreground,
            ),
        )

    def loss(self, tensors: list[Tensor], inside: Tensor | None) -> Tensor:
        """Of good images and copies with defects (B, 3, H, W), as the backbone takes them, and masks (B, 1, H, W)."""
        raise NotImplementedError

    def _optimiser(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=self.config.learning_rate)

    def score(self, features: list[Tensor], inside: Tensor | None = None) -> tuple[Tensor, Tensor]:
        probability = self.network(self.unit(features[-1]))[1].softmax(1)[:, 1:]
        return probability, self.image_score(probability, inside)

    def image_score(self, probability: Tensor, inside: Tensor | None) -> Tensor:
        """The largest mean (B,) over a square of a map (B, 1, H, W); outside `inside` and the border lie zeros."""
        if inside is not None:
            probability = probability * inside
        height, width = self.padding
        pooled = F.avg_pool2d(probability, (2 * height + 1, 2 * width + 1), stride=1, padding=(height, width))
        return largest(pooled, inside)

    def enlarge(self, anomaly_map: Tensor, inside: Tensor | None = None) -> Tensor:
        return within(anomaly_map, inside)


def _steps_down(optimiser: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    milestones = [round(0.8 * steps), round(0.9 * steps)]
    return torch.optim.lr_scheduler.MultiStepLR(optimiser, milestones, gamma=0.2)
