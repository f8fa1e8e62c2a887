"""What DRAEM and POUTA share beside their networks: the settings, the training on synthetic defects and the score.

Zavrtanik, Kristan and Skočaj, "DRÆM - A discriminatively trained reconstruction embedding for surface anomaly
detection", ICCV 2021, and their program.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from flawmap.backbones import Backbone, levels_at
from flawmap.errors import FlawmapError
from flawmap.methods.blocks.smoothing import largest, within
from flawmap.methods.contract import LevelledConfig, Method, Optimise, Stage, SyntheticDefects, epochs_within
from flawmap.synthesis import SynthesisSettings


class ReconstructiveConfig(LevelledConfig):
    """Settings that both methods have."""

    levels: tuple[str, ...] | None = Field(
        None, description="backbone level whose mean tells captures of something else; one at 1/16 if unset"
    )
    clean: float = Field(0.5, ge=0, lt=1, description="share of the training images that get no defect")
    foreground: bool = Field(False, description="defects lie on the part, where images show parts on a ground")
    textures: Path | None = Field(None, description="folder of texture photographs; they are drawn if unset")
    max_steps: int = Field(
        600, ge=0, le=100_000_000, description="fewer passes where they would take more steps; 0: no limit"
    )
    batch_size: int = Field(8, ge=1, le=4096, description="images in a step")
    learning_rate: float = Field(1e-3, gt=0, le=1e6, description="of Adam; it falls twice")
    focal_gamma: float = Field(2.0, ge=0, le=100, description="how much less the focal loss counts what is told right")
    pool: int = Field(
        21, ge=1, le=63, description="side of the square whose mean is the image score, scaled with the input"
    )


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

    def synthesis(self) -> SynthesisSettings:
        """How defects are made."""
        return self.defects

    def milestones(self) -> tuple[tuple[float, float], float]:
        """After which shares of the steps the learning rate falls, and to what share of itself."""
        return (0.8, 0.9), 0.2

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
            self._steps_down,
            inputs=SyntheticDefects(
                self.synthesis(),
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

    def _steps_down(self, optimiser: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
        shares, factor = self.milestones()
        return torch.optim.lr_scheduler.MultiStepLR(optimiser, [round(s * steps) for s in shares], gamma=factor)

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
