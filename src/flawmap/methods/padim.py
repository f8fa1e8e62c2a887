"""PaDiM: Defard et al., "PaDiM: a Patch Distribution Modeling Framework", ICPR 2021.

Each position of the feature grid has a Gaussian of its own, estimated over good images; a patch is as abnormal as its
Mahalanobis distance to it.

Where this differs from the paper, and the setting that takes the difference back:

- Moments are running float64 sums around the first batch's mean: memory does not grow with the number of images. The
  result is the paper's (Eq. 1) to rounding.
- Channels are reduced by a random choice, as in the paper; `reduction=orthogonal` projects on random orthogonal
  directions instead (Kim et al. 2021).
- `covariance=diagonal` keeps variances only: an hundredth of the memory.
- Deeper levels reach the finest grid bilinearly (`enlarge=nearest`: replicated, as in the paper). Images are resized,
  and maps enlarged, bilinearly, where the paper does so bicubically; no setting changes that.
- The paper's map is smoothed by a Gaussian of sigma 4 and its largest value is the image score; so it is here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from flawmap.backbones import Backbone, levels_at
from flawmap.methods.blocks.position_gaussians import PositionGaussians, triangular_inverse, whitening_of
from flawmap.methods.blocks.position_moments import PositionMoments
from flawmap.methods.blocks.smoothing import Enlarge, scored_positions
from flawmap.methods.contract import Collect, LevelledConfig, Method, Stage
from flawmap.methods.presets import Preset, read_presets


class PaDiMConfig(LevelledConfig):
    """Settings of PaDiM."""

    levels: tuple[str, ...] | None = Field(None, description="backbone levels; the backbone's own if unset")
    channels: int = Field(100, ge=1, le=4096, description="channels after the reduction (Section III-C)")
    reduction: Literal["random", "orthogonal"] = Field("random", description="how channels are reduced")
    covariance: Literal["full", "diagonal"] = Field("full", description="shape of each position's Gaussian")
    epsilon: float = Field(0.01, gt=0, le=1e6, description="regularisation of the covariance (Eq. 1)")
    enlarge: Literal["bilinear", "nearest"] = Field("bilinear", description="how deeper levels reach the finest grid")
    sigma: float = Field(4.0, ge=0, le=1000, description="Gaussian smoothing of the map, in input pixels")


class PaDiM(Method):
    """See the module's docstring."""

    Config = PaDiMConfig
    presets: ClassVar[dict[str, Preset]] = read_presets("padim")
    updates = True
    positional = True
    config: PaDiMConfig

    def __init__(self, config: PaDiMConfig, backbone: Backbone, size: tuple[int, int]) -> None:
        super().__init__(config, backbone, size)
        finest = min(backbone.reductions)
        self.grid = (round(size[0] / finest), round(size[1] / finest))
        diagonal = config.covariance == "diagonal"
        self.gaussians = PositionGaussians(
            backbone.channels, self.grid, config.channels, diagonal=diagonal, enlarge=config.enlarge
        )
        self.resize = Enlarge(self.grid, size, config.sigma)

    @classmethod
    def resolved(cls, config: PaDiMConfig, backbone: str) -> PaDiMConfig:
        return config if config.levels else config.model_copy(update={"levels": levels_at(backbone, (4, 8, 16))})

    def stages(self, images: int) -> Iterator[Stage]:
        """One pass over the images; the moments are the whole state."""
        generator = torch.Generator().manual_seed(torch.initial_seed())
        width, available = self.gaussians.reduce.shape
        if self.config.reduction == "random":
            chosen = torch.randperm(available, generator=generator)[:width].sort().values
            self.gaussians.reduce.copy_(torch.eye(available)[chosen])
        else:
            self.gaussians.reduce.copy_(torch.linalg.qr(torch.randn(available, width, generator=generator))[0].T)
        yield self._gaussians()

    def further_stages(self, images: int) -> Iterator[Stage]:
        """The moments go on from those that mean and whitening stand for."""
        yield self._gaussians(resume=True)

    def _gaussians(self, *, resume: bool = False) -> Collect:
        """Mean and covariance of each position's embeddings, and what whitens them."""
        gaussians = self.gaussians
        moments = PositionMoments(*gaussians.mean.shape, diagonal=gaussians.diagonal)

        def update(features: list[Tensor], inside: Tensor | None) -> None:
            if resume and not moments.begun:
                moments.resume(gaussians.images, gaussians.mean, lambda at: self._covariance(gaussians.kept(at)))
            x = gaussians.embed(features)  # (P, B, C)
            scored = scored_positions(inside, self.grid)
            moments.update(x, None if scored is None else scored.T)

        def close(progress: Callable[[int, int], None]) -> None:
            gaussians.images.copy_(moments.count)
            gaussians.mean.copy_(moments.mean())
            gaussians.reserve()
            for at, covariance in moments.covariances():  # (p, C, C), or (p, C)
                gaussians.keep(at, self._whitening(covariance))
                progress(at.stop, len(gaussians.mean))

        return Collect("Gaussians", update, close, peak_bytes=moments.peak_bytes)

    def _whitening(self, covariance: Tensor) -> Tensor:
        """S (p, C, C) -> W, lower triangular, with W^T W = (S + epsilon I)^-1 (Eq. 1); (p, C) of a diagonal."""
        if self.config.covariance == "diagonal":
            return (covariance + self.config.epsilon).rsqrt()
        identity = torch.eye(covariance.shape[1]).to(covariance)
        return whitening_of(covariance + self.config.epsilon * identity)

    def _covariance(self, whitening: Tensor) -> Tensor:
        """W -> S: undoes `_whitening`."""
        if self.config.covariance == "diagonal":
            return whitening.square().reciprocal() - self.config.epsilon
        identity = torch.eye(whitening.shape[1]).to(whitening)
        factor = triangular_inverse(whitening)
        covariance: Tensor = factor @ factor.transpose(1, 2) - self.config.epsilon * identity
        return covariance

    def score(self, features: list[Tensor], inside: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._scored(self.gaussians(features), inside)

    def leave_one_out(
        self, features: list[Tensor], inside: Tensor | None, groups: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Distances to the Gaussians of the other groups' images; epsilon grows to epsilon (n - 1) / (n - k - 1)."""
        scored = scored_positions(inside, self.grid)
        squares = self.gaussians.left_out(features, groups, None if scored is None else scored.T)
        return None if squares is None else self._scored(squares, inside)

    def _scored(self, squares: Tensor, inside: Tensor | None) -> tuple[Tensor, Tensor]:
        anomaly_map = squares.sqrt().T.unflatten(1, (1, *self.grid))  # (B, 1, h, w): Eq. 2
        return anomaly_map, self.enlarge(anomaly_map, inside).amax((1, 2, 3))
