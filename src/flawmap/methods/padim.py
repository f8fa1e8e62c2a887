"""PaDiM: Defard et al., "PaDiM: a Patch Distribution Modeling Framework", ICPR 2021.

Each position of the feature grid has a Gaussian of its own, estimated over good images; a patch is as abnormal as its
Mahalanobis distance to it.

Where this differs from the paper, and the setting that takes the difference back:

- Moments are running float64 sums around the first batch's mean: memory does not grow with the number of images. The
  result is the paper's (Eq. 1) to rounding.
- Channels are reduced by a random choice, as in the paper; `reduction=orthogonal` projects on random orthogonal
  directions instead (Kim et al. 2021).
- `covariance=diagonal` keeps variances only: an hundredth of the memory.
- The paper's map is smoothed by a Gaussian of sigma 4 and its largest value is the image score; so it is here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from flawmap.backbones import Backbone, levels_at
from flawmap.methods.blocks.position_moments import PositionMoments
from flawmap.methods.blocks.smoothing import Enlarge, scored_positions
from flawmap.methods.contract import Collect, Config, Method, Stage


class PaDiMConfig(Config):
    """Settings of PaDiM."""

    levels: tuple[str, ...] | None = Field(None, description="backbone levels; the backbone's own if unset")
    channels: int = Field(100, ge=1, description="channels after the reduction (Section III-C)")
    reduction: Literal["random", "orthogonal"] = Field("random", description="how channels are reduced")
    covariance: Literal["full", "diagonal"] = Field("full", description="shape of each position's Gaussian")
    epsilon: float = Field(0.01, gt=0, description="regularisation of the covariance (Eq. 1)")
    sigma: float = Field(4.0, ge=0, le=1000, description="Gaussian smoothing of the map, in input pixels")


class PaDiM(Method):
    """See the module's docstring."""

    Config = PaDiMConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {"paper": {}}
    updates = True
    positional = True
    config: PaDiMConfig

    def __init__(self, config: PaDiMConfig, backbone: Backbone, size: tuple[int, int]) -> None:
        super().__init__(config, backbone, size)
        finest = min(backbone.reductions)
        self.grid = (round(size[0] / finest), round(size[1] / finest))
        positions, available = self.grid[0] * self.grid[1], sum(backbone.channels)
        self.width = min(config.channels, available)
        half = self.width // 2
        self.register_buffer("reduce", torch.zeros(self.width, available))
        self.register_buffer("mean", torch.zeros(positions, self.width))
        if config.covariance == "full":
            # The inverse Cholesky factor is lower triangular: its upper right quarter is not kept.
            self.register_buffer("whiten_upper", torch.zeros(0, half, half))
            self.register_buffer("whiten_lower", torch.zeros(0, self.width - half, self.width))
        else:
            self.register_buffer("whiten", torch.zeros(0, self.width))
        self.register_buffer("images", torch.zeros(positions))  # that were scored there
        self.reduce: Tensor
        self.mean: Tensor
        self.whiten_upper: Tensor
        self.whiten_lower: Tensor
        self.whiten: Tensor
        self.images: Tensor
        self.resize = Enlarge(self.grid, size, config.sigma)

    @classmethod
    def resolved(cls, config: PaDiMConfig, backbone: str) -> PaDiMConfig:
        return config if config.levels else config.model_copy(update={"levels": levels_at(backbone, (4, 8, 16))})

    def embed(self, features: list[Tensor]) -> Tensor:
        """-> (P, B, C): reduced patch embeddings, positions first."""
        embedded = torch.zeros((), device=self.reduce.device)
        start = 0
        for maps in features:  # reducing before enlarging: both are linear, and there is less to enlarge
            part = self.reduce[:, start : start + maps.shape[1]]
            start += maps.shape[1]
            reduced = (part @ maps.flatten(2)).unflatten(2, maps.shape[-2:])
            if maps.shape[-2:] != self.grid:
                reduced = F.interpolate(reduced, size=self.grid, mode="bilinear", align_corners=False)
            embedded = embedded + reduced
        return embedded.flatten(2).permute(2, 0, 1)

    def stages(self, images: int) -> Iterator[Stage]:
        """One pass over the images; the moments are the whole state."""
        generator = torch.Generator().manual_seed(torch.initial_seed())
        available = self.reduce.shape[1]
        if self.config.reduction == "random":
            chosen = torch.randperm(available, generator=generator)[: self.width].sort().values
            self.reduce.copy_(torch.eye(available)[chosen])
        else:
            self.reduce.copy_(torch.linalg.qr(torch.randn(available, self.width, generator=generator))[0].T)
        yield self._gaussians()

    def further_stages(self, images: int) -> Iterator[Stage]:
        """The moments go on from those that mean and whitening stand for."""
        yield self._gaussians(resume=True)

    def _gaussians(self, *, resume: bool = False) -> Collect:
        """Mean and covariance of each position's embeddings, and what whitens them."""
        moments = PositionMoments(*self.mean.shape, diagonal=self.config.covariance == "diagonal")

        def update(features: list[Tensor], inside: Tensor | None) -> None:
            if resume and not moments.begun:
                moments.resume(self.images, self.mean, lambda at: self._covariance(self._kept(at)))
            x = self.embed(features)  # (P, B, C)
            scored = scored_positions(inside, self.grid)
            moments.update(x, None if scored is None else scored.T)

        def close(progress: Callable[[int, int], None]) -> None:
            self.images.copy_(moments.count)
            self.mean.copy_(moments.mean())
            self._reserve()
            for at, covariance in moments.covariances():  # (p, C, C), or (p, C)
                self._keep(at, self._whitening(covariance))
                progress(at.stop, len(self.mean))

        return Collect("Gaussians", update, close, peak_bytes=moments.peak_bytes)

    def _whitening(self, covariance: Tensor) -> Tensor:
        """S (p, C, C) -> W, lower triangular, with W^T W = (S + epsilon I)^-1 (Eq. 1); (p, C) of a diagonal."""
        if self.config.covariance == "diagonal":
            return (covariance + self.config.epsilon).rsqrt()
        identity = torch.eye(self.width).to(covariance)
        factor = torch.linalg.cholesky(covariance + self.config.epsilon * identity)
        whitening: Tensor = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
        return whitening

    def _covariance(self, whitening: Tensor) -> Tensor:
        """W -> S: undoes `_whitening`."""
        if self.config.covariance == "diagonal":
            return whitening.square().reciprocal() - self.config.epsilon
        identity = torch.eye(self.width).to(whitening)
        factor = torch.linalg.solve_triangular(whitening, identity.expand_as(whitening), upper=False)
        covariance: Tensor = factor @ factor.transpose(1, 2) - self.config.epsilon * identity
        return covariance

    def _reserve(self) -> None:
        """Makes room for W of all positions, in new buffers."""
        for name in ("whiten",) if self.config.covariance == "diagonal" else ("whiten_upper", "whiten_lower"):
            kept = self.get_buffer(name)
            setattr(self, name, kept.new_empty(len(self.mean), *kept.shape[1:]))

    def _keep(self, at: slice, whitening: Tensor) -> None:
        if self.config.covariance == "diagonal":
            self.whiten[at] = whitening
        else:
            half = self.width // 2
            self.whiten_upper[at], self.whiten_lower[at] = whitening[:, :half, :half], whitening[:, half:]

    def _kept(self, at: slice) -> Tensor:
        """W of some positions, in float64."""
        if self.config.covariance == "diagonal":
            return self.whiten[at].double()
        lower = self.whiten_lower[at].double()
        return torch.cat([F.pad(self.whiten_upper[at].double(), (0, lower.shape[1])), lower], 1)

    def score(self, features: list[Tensor], inside: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._score(features, inside, left_out=False)

    def leave_one_out(self, features: list[Tensor], inside: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
        """The distance of x to the mean and covariance of the other n - 1 images, by a rank-one downdate.

        With q the squared distance to all n, leaving x out makes it (n / (n - 1))^2 (n - 2) / (n - 1) q / (1 - c q),
        c = n / (n - 1)^2 (Sherman & Morrison 1950). Epsilon becomes epsilon (n - 1) / (n - 2); all else is exact.
        """
        scored = self.images[self.images > 0]
        return self._score(features, inside, left_out=True) if scored.numel() and int(scored.min()) > 2 else None

    def _score(self, features: list[Tensor], inside: Tensor | None, left_out: bool) -> tuple[Tensor, Tensor]:
        full = self.config.covariance == "full"
        x = self.embed(features) - self.mean[:, None]  # (P, B, C)
        if full:
            upper = x[:, :, : self.width // 2] @ self.whiten_upper.transpose(1, 2)
            lower = x @ self.whiten_lower.transpose(1, 2)
            squares = torch.cat([upper, lower], 2).square().sum(2, keepdim=True)  # (P, B, 1): Eq. 2, squared
        else:
            squares = (x * self.whiten[:, None]).square()  # (P, B, C): a diagonal has one Gaussian a channel
        if left_out:
            n = self.images.clamp_min(3)[:, None, None]
            squares = (
                (n / (n - 1)) ** 2 * (n - 2) / (n - 1) * squares / (1 - n / (n - 1) ** 2 * squares).clamp_min(1e-6)
            )
        anomaly_map = squares.sum(2).sqrt().T.unflatten(1, (1, *self.grid))  # (B, 1, h, w)
        return anomaly_map, self.enlarge(anomaly_map, inside).amax((1, 2, 3))
