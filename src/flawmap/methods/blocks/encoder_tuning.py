"""An encoder tuned by what a decoder makes of it: telling synthetic defects from good pixels, or redrawing good images.

Oh & Kim, IEEE Access 2024, Section III-A and Algorithm 1, after the authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from flawmap.backbones import Backbone
from flawmap.methods.blocks.decoder import Decoder
from flawmap.methods.contract import Config, Optimise, SyntheticDefects, epochs_within
from flawmap.synthesis import CLS_CNF, soft_label


class EncoderTuningConfig(Config):
    """Settings of the tuning."""

    encoder: Literal["classified", "regressed", "pretrained"] = Field(
        "classified", description="tuned by telling defects from good pixels, by redrawing good images, or not at all"
    )
    stride: Literal[1, 2, 4] = Field(4, description="input pixels to a pixel of the decoder's map")
    soft_label: Literal["abs_pixelwise", "official_signed_scalar", "binary"] = Field(
        "abs_pixelwise", description="what a defect's pixels should be classified as"
    )
    label_slope: float = Field(5.0, gt=0, le=1000, description="how fast soft labels rise with what has changed")
    empty_masks: bool = Field(
        False, description="a defect that misses the part leaves its image good, instead of being drawn anew"
    )
    coloured: bool = Field(False, description="grey images with three channels get coloured defects")
    in_domain: float = Field(0.5, ge=0, le=1, description="share of defects whose source is another training image")
    textures: Path | None = Field(None, description="folder of texture photographs; they are drawn if unset")
    object_mask: Literal["auto", "off"] = Field("auto", description="defects lie on the part where there is a ground")
    freeze_epochs: int = Field(10, ge=0, le=100_000, description="passes in which the decoder alone is trained")
    tune_epochs: int = Field(2, ge=0, le=100_000, description="passes in which the encoder is trained as well")
    tune_steps: int = Field(
        600, ge=0, le=100_000_000, description="fewer passes, in proportion, where they take more; 0: no limit"
    )
    tune_batch_size: int = Field(8, ge=1, le=4096, description="images in a batch of encoder and decoder")
    tune_learning_rate: float = Field(1e-3, gt=0, le=1e6, description="of encoder and decoder, before its cosine")
    weight_decay: float = Field(1e-4, ge=0, le=1e6, description="of encoder and decoder")

    @model_validator(mode="after")
    def _trains(self) -> EncoderTuningConfig:
        if not self.freeze_epochs + self.tune_epochs:
            raise ValueError("freeze_epochs and tune_epochs are both 0: give one of them a pass")
        return self


@dataclass(frozen=True)
class EncoderTuning:
    """The stage that tunes `encoder` and `decoder`, which reads the first `levels` of the encoder's.

    The statistics of the encoder's batch normalisation stay those of its pretraining.
    """

    config: EncoderTuningConfig
    encoder: Backbone
    decoder: Decoder
    levels: int

    def stage(self, images: int) -> Optimise:
        """Algorithm 1 on so many images: the decoder alone first, then encoder and decoder, under one cosine."""
        config = self.config
        planned = config.freeze_epochs + config.tune_epochs
        epochs = epochs_within(config.tune_steps, planned, images, config.tune_batch_size)
        frozen = epochs if config.encoder == "pretrained" else round(epochs * config.freeze_epochs / planned)
        loss = self.redrawing_loss if config.encoder == "regressed" else self.classification_loss

        def before_epoch(epoch: int) -> None:
            self.encoder.requires_grad_(epoch >= frozen)

        kinds = {"texture": 1 - config.in_domain, "image": config.in_domain}
        attempts = 1 if config.empty_masks else CLS_CNF.attempts
        settings = replace(CLS_CNF, kinds=kinds, coloured=config.coloured, attempts=attempts)
        return Optimise(
            "encoder",
            loss,
            [*self.encoder.parameters(), *self.decoder.parameters()],
            epochs,
            config.tune_batch_size,
            partial(torch.optim.Adam, lr=config.tune_learning_rate, weight_decay=config.weight_decay),
            schedule=lambda optimiser, steps: torch.optim.lr_scheduler.CosineAnnealingLR(
                optimiser, steps, 1e-3 * config.tune_learning_rate
            ),
            inputs=SyntheticDefects(settings, textures=config.textures, foreground=config.object_mask == "auto"),
            before_epoch=before_epoch,
        )

    def classification_loss(self, inputs: list[Tensor], inside: Tensor | None) -> Tensor:
        """Eq. 1: cross-entropy with soft labels, mean over pixels."""
        images, defective, masks = inputs
        labels = self._shrunk(self.soft_labels(images, defective, masks))
        logits = self.decoder(self._encoded(defective))
        return self._mean(F.binary_cross_entropy_with_logits(logits, labels, reduction="none"), inside)

    def redrawing_loss(self, inputs: list[Tensor], inside: Tensor | None) -> Tensor:
        """Mean absolute difference of a good image, redrawn, from itself, of the ablation FE_REG."""
        images = inputs[0]
        redrawn = self.decoder(self._encoded(images))
        return self._mean((redrawn - self._shrunk(images)).abs().mean(1, keepdim=True), inside)

    def _encoded(self, images: Tensor) -> list[Tensor]:
        # Channels last, a CPU runs depthwise convolutions nearly twice as fast.
        return self.encoder(images.contiguous(memory_format=torch.channels_last))[: self.levels]  # type: ignore[no-any-return]

    def soft_labels(self, images: Tensor, defective: Tensor, masks: Tensor) -> Tensor:
        """What each pixel (B, 1, H, W) should be classified as: 0 outside the masks, more where more has changed."""
        std = torch.tensor(self.encoder.std)
        plain, changed = ((x.cpu().movedim(1, 3) * std).numpy() for x in (images, defective))  # (B, H, W, 3)
        labels = [
            soft_label(before, after, mask, self.config.soft_label, self.config.label_slope)
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
