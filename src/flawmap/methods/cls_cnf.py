"""CLS-CNFs: Oh and Kim, "Normalizing Flow-Based Density Estimation and Synthetic Defect Classification for Industrial
Visual Anomaly Detection", IEEE Access 2024.

An encoder learns to tell synthetic defects from good pixels, by way of a decoder. Conditional flows then learn how the
tuned encoder's features of good parts are distributed. The anomaly map adds what the flows find unlikely and what the
decoder takes for a defect; both read the same encoder, which runs once.

Where this differs from the paper, and the setting that takes the difference back (`--preset paper` takes back all that
can be):

- The flows are trained, start and score images as in `cflow`, whose docstring says how that differs from the printed
  training (`pool`, `whiten`, `hidden`, `fibres`, `shared_adam`, `image_score`), and their part of the map is smoothed
  (`sigma=0`). Log-likelihoods are divided by C, as in the authors' program; undivided the sigmoid of Eq. 2 saturates.
- Each flow's part is 1 - exp(log p - u); the paper has exp(log p - u) and subtracts their sum from its maximum over
  the test images (Eq. 8, misprinted with the signs the other way): on good images the same but for a constant.
- u starts at minus infinity; Algorithm 2 prints 0, above which no likelihood may lie (Eq. 4).
- The weight w is 1; the paper chooses one for each class on its test labels. `flawmap tune` chooses it without, and it
  can be moved after training.
- The decoder ends at a quarter of the input's size and enlarges bilinearly (`stride=1`, `upsampling=bicubic`), and no
  stage of it is narrower than the printed last one, 32 channels, whatever the encoder.
- Soft labels are pixelwise, as printed; the authors' program has one for each mask, of the signed difference
  (`soft_label=official_signed_scalar`).
- One schedule serves every product: the authors set batch size, rate, epochs and repeats for each class. Classes are
  not told which mask their parts need: it is found from the images (`object_mask=off` for none).
- Defects are laid on the image by alpha blending as printed; half of the sources are drawn textures where no folder of
  photographs is given (`textures=FOLDER`).
- The encoder pads its convolutions as it was pretrained; the authors reflect (`reflect=true`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from flawmap.backbones import Backbone, default_deep_levels, levels_at
from flawmap.errors import FlawmapError
from flawmap.methods.contract import Method, Optimise, Stage, SyntheticDefects, epochs_within
from flawmap.methods.decoder import Decoder
from flawmap.methods.position_flows import PositionFlows, PositionFlowsConfig, on_common_grid
from flawmap.methods.smoothing import Enlarge, largest, on_grid
from flawmap.synthesis import CLS_CNF, soft_label

_SLOPE = 5.0  # of soft labels


class ClsCnfConfig(PositionFlowsConfig):
    """Settings of CLS-CNFs; those of `PositionFlowsConfig` are the flows'."""

    levels: tuple[str, ...] | None = Field(None, description="backbone levels; those at 1/8, 1/16 and 1/32 if unset")
    deep_levels: tuple[str, ...] | None = Field(
        None, description="further levels of the image score; known ones if unset"
    )
    encoder: Literal["classified", "regressed", "pretrained"] = Field(
        "classified", description="tuned by telling defects from good pixels, by redrawing good images, or not at all"
    )
    shared: bool = Field(True, description="the flows read the tuned encoder, not the pretrained one beside it")
    maps: Literal["joint", "flows", "classifier"] = Field("joint", description="what the anomaly map consists of")
    weight: float = Field(1.0, ge=0, description="w, of the classifier's map; can be moved after training")
    blocks: int = Field(6, ge=1, description="of each flow")
    stride: Literal[1, 2, 4] = Field(4, description="input pixels to a pixel of the decoder's map")
    skips: bool = Field(True, description="the decoder takes in the encoder's shallower levels")
    upsampling: Literal["bilinear", "bicubic"] = Field("bilinear", description="how the decoder enlarges")
    reflect: bool = Field(False, description="the encoder's convolutions pad by reflection")
    soft_label: Literal["abs_pixelwise", "official_signed_scalar", "binary"] = Field(
        "abs_pixelwise", description="what a defect's pixels should be classified as"
    )
    in_domain: float = Field(0.5, ge=0, le=1, description="share of defects whose source is another training image")
    textures: Path | None = Field(None, description="folder of texture photographs; they are drawn if unset")
    object_mask: Literal["auto", "off"] = Field("auto", description="defects lie on the part where there is a ground")
    freeze_epochs: int = Field(10, ge=0, description="passes in which the decoder alone is trained")
    tune_epochs: int = Field(2, ge=0, description="passes in which the encoder is trained as well")
    tune_steps: int = Field(600, ge=0, description="fewer passes, in proportion, where they take more; 0: no limit")
    tune_batch_size: int = Field(8, ge=1, description="images in a batch of encoder and decoder")
    tune_learning_rate: float = Field(1e-3, gt=0, description="of encoder and decoder, before its cosine")
    weight_decay: float = Field(1e-4, ge=0, description="of encoder and decoder")
    sigma: float = Field(4.0, ge=0, le=1000, description="Gaussian smoothing of the flows' map, in input pixels")

    @model_validator(mode="after")
    def _weighs_two_maps(self) -> ClsCnfConfig:
        if self.weight != 1 and self.maps != "joint":
            raise ValueError("weight counts between two maps: set maps=joint")
        return self


class ClsCnf(Method):
    """See the module's docstring."""

    Config = ClsCnfConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {
            "deep_levels": (),
            "pool": 1,
            "whiten": False,
            "hidden": 2.0,
            "fibres": 256,
            "shared_adam": True,
            "image_score": "map",
            "epochs": 200,
            "max_steps": 0,
            "batch_size": 32,
            "learning_rate": 2e-4,
            "stride": 1,
            "upsampling": "bicubic",
            "reflect": True,
            "freeze_epochs": 850,  # 85 of 100 rounds of 10 passes
            "tune_epochs": 150,
            "tune_steps": 0,
            "tune_batch_size": 32,
            "tune_learning_rate": 1e-4,
            "sigma": 0.0,
        },
    }
    optimises: ClassVar[bool] = True
    tunes: ClassVar[bool] = True
    live: ClassVar[tuple[str, ...]] = ("weight",)
    searched: ClassVar[dict[str, tuple[float, ...]]] = {"weight": tuple(np.arange(1, 21) / 20)}
    live_buffers: ClassVar[tuple[str, ...]] = ("w",)
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
        self.coarse = max(grids[: self.read])  # where the flows' maps meet
        self.register_buffer("w", torch.tensor(config.weight), persistent=False)
        self.w: Tensor
        self.smooth = Enlarge(self.coarse, self.grid, config.sigma / config.stride)
        self.resize = Enlarge(self.grid, size, 0)

    @classmethod
    def resolved(cls, config: ClsCnfConfig, backbone: str) -> ClsCnfConfig:
        if config.encoder == "regressed" and config.maps != "flows":
            raise FlawmapError("encoder=regressed redraws images and classifies nothing: set maps=flows")
        levels = config.levels or levels_at(backbone, (8, 16, 32))
        deep = config.deep_levels
        if deep is None:
            deep = tuple(level for level in default_deep_levels(backbone) if level not in levels)[:1]
        return config.model_copy(update={"levels": levels, "deep_levels": deep})

    @classmethod
    def levels(cls, config: ClsCnfConfig) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*(config.levels or ()), *(config.deep_levels or ()))))

    def extracting(self) -> nn.Module:
        return self.backbone if self.tuned is None else Both(self.backbone, self.tuned)

    @property
    def encoder(self) -> Backbone:
        """The encoder that is tuned."""
        return self.tuned or self.backbone

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
            yield self._tuning(images, self.decoder)
            self.encoder.requires_grad_(False)
            self.decoder = None if config.maps == "flows" else self.decoder.eval()
        if self.density is not None:
            yield from self.density.stages(images)

    def _tuning(self, images: int, decoder: Decoder) -> Optimise:
        """Algorithm 1: the decoder alone first, then encoder and decoder, under one cosine."""
        config = self.config
        planned = config.freeze_epochs + config.tune_epochs
        epochs = epochs_within(config.tune_steps, planned, images, config.tune_batch_size)
        frozen = epochs if config.encoder == "pretrained" else round(epochs * config.freeze_epochs / planned)
        loss = self.redrawing_loss if config.encoder == "regressed" else self.classification_loss

        def before_epoch(epoch: int) -> None:
            self.encoder.requires_grad_(epoch >= frozen)

        settings = replace(CLS_CNF, kinds={"texture": 1 - config.in_domain, "image": config.in_domain})
        return Optimise(
            "encoder",
            partial(loss, decoder),
            [*self.encoder.parameters(), *decoder.parameters()],
            epochs,
            config.tune_batch_size,
            partial(torch.optim.Adam, lr=config.tune_learning_rate, weight_decay=config.weight_decay),
            schedule=lambda optimiser, steps: torch.optim.lr_scheduler.CosineAnnealingLR(
                optimiser, steps, 1e-3 * config.tune_learning_rate
            ),
            inputs=SyntheticDefects(settings, textures=config.textures, foreground=config.object_mask == "auto"),
            before_epoch=before_epoch,
        )

    def classification_loss(self, decoder: Decoder, inputs: list[Tensor], inside: Tensor | None) -> Tensor:
        """Eq. 1: cross-entropy with soft labels, mean over pixels."""
        images, defective, masks = inputs
        labels = self._shrunk(self.soft_labels(images, defective, masks))
        logits = decoder(self._encoded(defective))
        return self._mean(F.binary_cross_entropy_with_logits(logits, labels, reduction="none"), inside)

    def redrawing_loss(self, decoder: Decoder, inputs: list[Tensor], inside: Tensor | None) -> Tensor:
        """Mean absolute difference of a good image, redrawn, from itself, of the ablation FE_REG."""
        images = inputs[0]
        redrawn = decoder(self._encoded(images))
        return self._mean((redrawn - self._shrunk(images)).abs().mean(1, keepdim=True), inside)

    def _encoded(self, images: Tensor) -> list[Tensor]:
        # Channels last, a CPU runs depthwise convolutions nearly twice as fast.
        return self.encoder(images.contiguous(memory_format=torch.channels_last))[: self.read]  # type: ignore[no-any-return]

    def soft_labels(self, images: Tensor, defective: Tensor, masks: Tensor) -> Tensor:
        """What each pixel (B, 1, H, W) should be classified as: 0 outside the masks, more where more has changed."""
        std = torch.tensor(self.backbone.std)
        plain, changed = ((x.cpu().movedim(1, 3) * std).numpy() for x in (images, defective))  # (B, H, W, 3)
        labels = [
            soft_label(before, after, mask, self.config.soft_label, _SLOPE)
            for before, after, mask in zip(plain, changed, masks[:, 0].cpu().numpy() > 0, strict=True)
        ]
        return torch.from_numpy(np.stack(labels))[:, None].to(images)

    def _shrunk(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, self.config.stride) if self.config.stride > 1 else x

    def _mean(self, losses: Tensor, inside: Tensor | None) -> Tensor:
        """The mean of (B, 1, h, w) over what is scored."""
        if inside is None:
            return losses.mean()
        scored = self._shrunk(inside)
        return (losses * scored).sum() / scored.sum()

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
        other._buffers = {**self._buffers, "w": torch.full_like(self.w, config.weight)}
        return other

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
