"""CLS-CNFs: Oh and Kim, "Normalizing Flow-Based Density Estimation and Synthetic Defect Classification for Industrial
Visual Anomaly Detection", IEEE Access 2024.

An encoder learns to tell synthetic defects from good pixels, by way of a decoder. Conditional flows then learn how the
tuned encoder's features of good parts are distributed. The anomaly map adds what the flows find unlikely and what the
decoder takes for a defect; both read the same encoder, which runs once.

Where this differs from the paper, and the setting that takes the difference back (`--preset paper` takes back all that
can be):

- The flows are trained, start and score images as in `cflow`, whose docstring says how that differs from the printed
  training (`pool`, `whiten`, `hidden`, `fibres`, `shared_adam`, `image_score`), and their part of the map is smoothed
  (`sigma=0`). Log-likelihoods are divided by C, as in the authors' program; undivided the sigmoid of Eq. 2 saturates
  and Eq. 3 underflows, so that no setting has them.
- Each flow's part is 1 - exp(log p - u); the paper has exp(log p - u) and subtracts their sum from its maximum over
  the test images (Eq. 8, misprinted with the signs the other way): on good images the same but for a constant.
- u starts at minus infinity; Algorithm 2 prints 0, above which no likelihood may lie (Eq. 4).
- The weight w is 1; the paper chooses one for each class on its test labels. `flawmap tune` chooses it without, and it
  can be moved after training.
- The decoder ends at a quarter of the input's size and enlarges bilinearly (`stride=1`, `upsampling=bicubic`), and no
  stage of it is narrower than the printed last one, 32 channels, whatever the encoder.
- Blocks are one-sided, which alone fits the sizes of Table 3; Section III-B3 and Fig. 3 print s1, t1, s2 and t2
  (`two_sided=true`).
- The flows' maps are summed on the finest grid and enlarged together (`meet=input`: each is enlarged once, Eq. 6), half
  pixels centred; the authors' program aligns corners, and no setting does.
- Soft labels are pixelwise, as printed, of the difference's size, with a slope of 5 that is the program's and not
  printed (`label_slope`); the program has one label for each mask, of the signed difference
  (`soft_label=official_signed_scalar`).
- A defect that misses the part is drawn anew, up to ten times; the program keeps such an image as a good one
  (`empty_masks=true`). Grey images get grey defects; the program lays coloured textures on them (`coloured=true`).
- Defects are always drawn anew; Algorithm 1 does so every N_s epochs, and names no N_s.
- The rate's cosine begins after the warm-up; the program's runs from the start (`cosine=whole`).
- One schedule serves every product: the authors set batch size, rate, epochs and repeats for each class. Classes are
  not told which mask their parts need: it is found from the images (`object_mask=off` for none).
- Defects are laid on the image by alpha blending as printed; half of the sources are drawn textures where no folder of
  photographs is given (`textures=FOLDER`).
- The encoder pads its convolutions as it was pretrained; the authors reflect (`reflect=true`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from flawmap.backbones import Backbone
from flawmap.errors import FlawmapError
from flawmap.methods.blocks.decoder import Decoder
from flawmap.methods.blocks.encoder_tuning import EncoderTuning, EncoderTuningConfig
from flawmap.methods.blocks.position_flows import (
    PositionFlows,
    PositionFlowsConfig,
    on_common_grid,
    with_levels,
)
from flawmap.methods.blocks.smoothing import Enlarge, largest, on_grid
from flawmap.methods.contract import Method, Stage
from flawmap.methods.presets import Preset, read_presets


class ClsCnfConfig(EncoderTuningConfig, PositionFlowsConfig):
    """Settings of CLS-CNFs, with those of the encoder's tuning and of the flows."""

    shared: bool = Field(True, description="the flows read the tuned encoder, not the pretrained one beside it")
    maps: Literal["joint", "flows", "classifier"] = Field("joint", description="what the anomaly map consists of")
    weight: float = Field(1.0, ge=0, le=1e6, description="w, of the classifier's map; can be moved after training")
    blocks: int = Field(6, ge=1, le=64, description="of each flow")
    skips: bool = Field(True, description="the decoder takes in the encoder's shallower levels")
    upsampling: Literal["bilinear", "bicubic"] = Field("bilinear", description="how the decoder enlarges")
    meet: Literal["finest", "input"] = Field(
        "finest", description="where the flows' maps are summed: finest grid, input"
    )
    reflect: bool = Field(False, description="the encoder's convolutions pad by reflection")
    sigma: float = Field(4.0, ge=0, le=1000, description="Gaussian smoothing of the flows' map, in input pixels")

    @model_validator(mode="after")
    def _weighs_two_maps(self) -> ClsCnfConfig:
        if self.weight != 1 and self.maps != "joint":
            raise ValueError("weight counts between two maps: set maps=joint")
        return self


class ClsCnf(Method):
    """See the module's docstring."""

    Config = ClsCnfConfig
    presets: ClassVar[dict[str, Preset]] = read_presets("cls_cnf")
    optimises: ClassVar[bool] = True
    tunes: ClassVar[bool] = True
    trained_on: ClassVar[frozenset[str]] = frozenset({"texture", "image"})
    live: ClassVar[tuple[str, ...]] = ("weight",)
    searched: ClassVar[dict[str, tuple[float, ...]]] = {"weight": tuple(np.arange(1, 21) / 20)}
    live_buffers: ClassVar[tuple[str, ...]] = ("w",)
    symbols: ClassVar[dict[str, str]] = {"weight": "w"}
    config: ClsCnfConfig

    def __init__(self, config: ClsCnfConfig, backbone: Backbone, size: tuple[int, int]) -> None:
        backbone = copy.deepcopy(backbone)  # its weights will be this method's own
        super().__init__(config, backbone, size)
        if config.reflect:
            _reflect(backbone)
        self.tuned = None if config.shared else copy.deepcopy(backbone)
        self.read = len(config.levels or backbone.levels)  # levels of map and decoder; further ones: the image score's
        grids = [(round(size[0] / factor), round(size[1] / factor)) for factor in backbone.reductions]
        self.decoder = None if config.maps == "flows" else self._drawn()
        self.density = None if config.maps == "classifier" else PositionFlows(config, backbone.channels, grids)
        self.grid = size[0] // config.stride, size[1] // config.stride
        self.coarse = max(grids[: self.read]) if config.meet == "finest" else self.grid  # where the flows' maps meet
        self.register_buffer("w", torch.tensor(config.weight), persistent=False)
        self.w: Tensor
        self.smooth = Enlarge(self.coarse, self.grid, config.sigma / config.stride)
        self.resize = Enlarge(self.grid, size, 0)

    @classmethod
    def resolved(cls, config: ClsCnfConfig, backbone: str) -> ClsCnfConfig:
        if config.encoder == "regressed" and config.maps != "flows":
            raise FlawmapError("encoder=regressed redraws images and classifies nothing: set maps=flows")
        return with_levels(config, backbone)

    @classmethod
    def extractor(cls, config: ClsCnfConfig, backbone: Backbone, size: tuple[int, int]) -> nn.Module:
        if (found := len(config.levels or backbone.levels)) != 3:
            raise FlawmapError(f"the decoder reads three levels, not {found}: --set levels=A,B,C, the finest first")
        return backbone

    def extracting(self) -> nn.Module:
        return self.backbone if self.tuned is None else Both(self.backbone, self.tuned)

    def _drawn(self) -> Decoder:
        config, channels = self.config, self.backbone.channels[: self.read]
        outputs = 3 if config.encoder == "regressed" else 1
        skips = config.skips and config.encoder != "regressed"
        return Decoder(channels, self.size, outputs, stride=config.stride, skips=skips, upsampling=config.upsampling)

    # Training

    def stages(self, images: int) -> Iterator[Stage]:
        config = self.config
        if config.encoder != "pretrained" or config.maps != "flows":
            self.decoder = self._drawn().to(self.w.device)
            tuning = EncoderTuning(config, self.tuned or self.backbone, self.decoder, self.read)
            yield tuning.stage(images)
            tuning.encoder.requires_grad_(False)
            self.decoder = None if config.maps == "flows" else self.decoder.eval()
        if self.density is not None:
            yield from self.density.stages(images)

    # Scoring

    def parts(self, features: list[Tensor], inside: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 1, h, w) each: the flows' map A_nf, what their image score is read from, and the classifier's map A_p.

        Zero where the map is not among `maps`. A_nf lies in 0..3 on what resembles good parts, A_p in 0..1.
        """
        levels = len(self.backbone.levels)
        scored = None if inside is None else on_grid(inside, self.grid)
        a_nf = latent = a_p = torch.zeros_like(features[0][:, :1, :1, :1]).expand(-1, -1, *self.grid)
        if self.density is not None:
            found = self.density.likelihoods(features[:levels])
            unlikely = torch.zeros(())
            for level, (log_p, _) in enumerate(found[: self.read]):
                unlikely = unlikely + on_common_grid(self.density.relative(log_p, level), self.coarse, inside)
            a_nf = self.smooth(unlikely, scored)  # Eq. 3-8
            latent = on_common_grid(self.density.unlikely(found, self.coarse, inside), self.grid, inside)
        if self.decoder is not None:
            tuned = features[:levels] if self.tuned is None else features[levels:]
            a_p = torch.sigmoid(self.decoder(tuned[: self.read]))
        return a_nf, latent, a_p

    def score(self, features: list[Tensor], inside: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._joined(*self.parts(features, inside), inside)

    def _joined(self, a_nf: Tensor, latent: Tensor, a_p: Tensor, inside: Tensor | None) -> tuple[Tensor, Tensor]:
        """Eq. 9: A = A_nf + w A_p, and the image score."""
        anomaly_map = a_nf + self.w * a_p
        if self.config.image_score == "map":
            return anomaly_map, largest(anomaly_map, inside)
        return anomaly_map, largest(latent, inside) + self.w * largest(a_p, inside)

    @torch.no_grad()
    def with_settings(self, config: ClsCnfConfig) -> ClsCnf:
        other = copy.copy(self)
        other.config = config
        other._buffers = {**self._buffers, **self.live_state({"weight": torch.full_like(self.w, config.weight)})}
        return other

    def live_state(self, settings: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"w": settings["weight"]}

    def latents(self, features: list[Tensor], inside: Tensor | None = None) -> Tensor:
        return torch.cat([part.flatten(2) for part in self.parts(features, inside)], 1).transpose(1, 2)  # (B, h*w, 3)

    def score_latents(self, latents: Tensor, inside: Tensor | None = None) -> tuple[Tensor, Tensor]:
        a_nf, latent, a_p = latents.transpose(1, 2).unflatten(2, self.grid).split(1, 1)
        return self._joined(a_nf, latent, a_p, inside)


class Both(nn.Module):
    """The maps of a pretrained encoder, and behind them those of a tuned copy of it."""

    def __init__(self, pretrained: Backbone, tuned: Backbone) -> None:
        super().__init__()
        self.pretrained, self.tuned = pretrained, tuned

    def forward(self, images: Tensor) -> list[Tensor]:
        """images (B, 3, H, W) -> maps of both, one level after the other."""
        maps: list[Tensor] = self.pretrained(images) + self.tuned(images)
        return maps


def _reflect(network: nn.Module) -> None:
    """Convolutions that pad pad by reflection; those of TensorFlow's networks that pad one side more stay."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and any(module.padding):
            module.padding_mode = "reflect"
