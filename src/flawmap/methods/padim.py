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

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from flawmap.backbones import Backbone, levels_at
from flawmap.methods.blocks.smoothing import Enlarge, on_grid
from flawmap.methods.contract import Collect, Config, Method, Stage

_POSITIONS = 512  # positions whose sums are one allocation, large enough that freeing it gives memory back
_AT_ONCE = 64  # positions whose products stay in the cache


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

    @classmethod
    def levels(cls, config: PaDiMConfig) -> tuple[str, ...]:
        return config.levels or ()

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
        yield self._moments()

    def further_stages(self, images: int) -> Iterator[Stage]:
        """The moments go on from the sums that mean and covariance stand for."""
        yield self._moments()

    def _moments(self) -> Collect:
        full = self.config.covariance == "full"
        positions, width = self.mean.shape
        half = width // 2
        # A covariance is symmetric: its upper rows and the lower right quarter are all of it.
        shapes = ((half, width), (width - half, width - half)) if full else ((width,),)
        parts = [slice(start, min(start + _POSITIONS, positions)) for start in range(0, positions, _POSITIONS)]
        known = bool(self.images.any())
        sums: dict[str, Tensor] = {}
        second: list[list[Tensor]] = []  # for each part; closing frees one after the other

        def update(features: list[Tensor], inside: Tensor | None) -> None:
            x = self.embed(features)  # (P, B, C)
            scored = None if inside is None else on_grid(inside, self.grid).flatten(1).T[..., None]  # (P, B, 1)
            if scored is not None:
                x *= scored
            if not sums:
                # (P, C): keeps the sums small, so that their difference keeps its digits.
                count = x.shape[1] if scored is None else scored.sum(1).clamp_min(1)
                sums["shift"] = self.mean.clone() if known else x.sum(1) / count
                sums["first"] = torch.zeros(positions, width, dtype=torch.float64, device=x.device)
                second.extend(
                    [torch.zeros(p.stop - p.start, *s, dtype=torch.float64, device=x.device) for s in shapes]
                    for p in parts
                )
                if known:
                    self._resume_sums(parts, second)
            x -= sums["shift"][:, None]
            if scored is None:
                self.images += x.shape[1]
            else:
                x *= scored
                self.images += scored.sum((1, 2))
            sums["first"] += x.sum(1)
            for part, totals in zip(parts, second, strict=True):
                chunks = (tensor.split(_AT_ONCE) for tensor in (x[part], *totals))
                for few, *into in zip(*chunks, strict=True):
                    if full:
                        into[0] += few[:, :, :half].transpose(1, 2) @ few
                        into[1] += few[:, :, half:].transpose(1, 2) @ few[:, :, half:]
                    else:
                        into[0] += few.square().sum(1)

        def close(progress: Callable[[int, int], None]) -> None:
            n = self.images.double().clamp_min(1)[:, None]  # (P, 1)
            first = sums.pop("first") / n
            self.mean.copy_(sums.pop("shift") + first)
            halves = ((half, half), (width - half, width)) if full else ((width,),)
            kept = [torch.empty(positions, *shape, device=first.device) for shape in halves]
            for part in parts:
                rows = zip(
                    n[part].split(_AT_ONCE),
                    first[part].split(_AT_ONCE),
                    zip(*(tensor[part].split(_AT_ONCE) for tensor in kept), strict=True),
                    zip(*(total.split(_AT_ONCE) for total in second.pop(0)), strict=True),
                    strict=True,
                )
                for count, d, into, totals in rows:
                    for tensor, whitening in zip(into, self._whitening(d, totals, count), strict=True):
                        tensor.copy_(whitening)
                progress(part.stop, positions)
            if full:
                self.whiten_upper, self.whiten_lower = kept
            else:
                (self.whiten,) = kept

        stored = sum(math.prod(shape) for shape in shapes)
        return Collect("Gaussians", update, close, peak_bytes=8 * positions * stored)

    def _resume_sums(self, parts: Sequence[slice], second: list[list[Tensor]]) -> None:
        """Adds the sums of squares around the mean that the kept covariance stands for: undoes `_whitening`."""
        half = self.width // 2
        for part, totals in zip(parts, second, strict=True):
            degrees = (self.images[part].double() - 1).clamp_min(0)[:, None]
            if self.config.covariance == "diagonal":
                totals[0] += degrees * (self.whiten[part].double().square().reciprocal() - self.config.epsilon)
                continue
            pairs = (kept[part].double().split(_AT_ONCE) for kept in (self.whiten_upper, self.whiten_lower))
            rows = zip(*pairs, degrees.split(_AT_ONCE), *(total.split(_AT_ONCE) for total in totals), strict=True)
            for upper, lower, degree, rows_above, quarter in rows:
                whiten = torch.cat([F.pad(upper, (0, lower.shape[1])), lower], 1)  # inverse of the Cholesky factor
                identity = torch.eye(self.width, dtype=torch.float64, device=whiten.device).expand_as(whiten)
                factor = torch.linalg.solve_triangular(whiten, identity, upper=False)
                covariance = factor @ factor.transpose(1, 2) - self.config.epsilon * identity
                covariance *= degree[..., None]
                rows_above += covariance[:, :half]
                quarter += covariance[:, half:, half:]

    def _whitening(self, d: Tensor, totals: Sequence[Tensor], n: Tensor) -> tuple[Tensor, ...]:
        """Inverse root of the unbiased covariance plus epsilon I (Eq. 1), from shifted sums over n (p, 1) images."""
        if self.config.covariance == "diagonal":
            return (((totals[0] - n * d.square()) / (n - 1).clamp_min(1) + self.config.epsilon).rsqrt(),)
        upper, quarter = totals  # (p, C/2, C), (p, C/2, C/2)
        half, width = upper.shape[1:]
        total = torch.cat([upper, torch.cat([upper[:, :, half:].transpose(1, 2), quarter], 2)], 1)  # (p, C, C)
        n = n[..., None]  # (p, 1, 1)
        covariance = (total - n * d[:, :, None] * d[:, None]) / (n - 1).clamp_min(1)
        covariance.diagonal(dim1=1, dim2=2).add_(self.config.epsilon)
        factor = torch.linalg.cholesky(covariance)
        identity = torch.eye(width, dtype=torch.float64, device=d.device).expand_as(factor)
        whiten = torch.linalg.solve_triangular(factor, identity, upper=False)
        return whiten[:, :half, :half], whiten[:, half:]

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
