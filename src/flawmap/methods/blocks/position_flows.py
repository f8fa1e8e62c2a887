"""Conditional flows on a backbone's levels: how likely a good part's feature vector is where it lies.

What CFLOW-AD (Gudovskiy et al., WACV 2022) and CLS-CNFs (Oh & Kim, IEEE Access 2024) share; equations are the latter's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from flawmap.backbones import default_deep_levels, levels_at
from flawmap.flows import position_code
from flawmap.flows.conditional import conditional_flow, standard_normal
from flawmap.methods.blocks.moments import Moments, whitening_axes
from flawmap.methods.blocks.patches import averaged, resized
from flawmap.methods.blocks.smoothing import on_grid, within
from flawmap.methods.contract import Collect, Config, Optimise, epochs_within

_CODE = 128  # channels of the position code
_RIDGE = 1e-2  # of the mean variance: few images leave directions without any
_WARM_UP = 0.08  # of all steps, the authors' 2 of 25 rounds


class PositionFlowsConfig(Config):
    """Settings of the flows, of their training, and of what their likelihoods become."""

    levels: tuple[str, ...] | None = Field(None, description="backbone levels; those at 1/8, 1/16 and 1/32 if unset")
    deep_levels: tuple[str, ...] | None = Field(
        None, description="further levels of the image score; known ones if unset"
    )
    pool: int = Field(3, ge=1, le=63, description="side of the neighbourhood that is averaged, odd")
    whiten: bool = Field(True, description="whitened vectors and flows that start as a rotation")
    blocks: int = Field(8, ge=1, le=64, description="of each flow")
    hidden: float = Field(1.0, gt=0, le=16, description="width of the subnets' middle layer over that of their input")
    two_sided: bool = Field(False, description="a block changes both halves of the channels")
    loss: Literal["sigmoid", "plain"] = Field("sigmoid", description="-log sigmoid(log p / C), or -log p / C")
    cosine: Literal["after", "whole"] = Field(
        "after", description="the rate's cosine begins after the warm-up, or runs over all steps, the warm-up's too"
    )
    fibres: int = Field(
        0, ge=0, le=1_000_000, description="vectors in a step, of one level; 0: all of a batch, of all levels"
    )
    shared_adam: bool = Field(False, description="between fibres, the other flows go on by momentum")
    scoring: Literal["likelihood", "log"] = Field("likelihood", description="1 - p over its largest, or log of that")
    image_score: Literal["latent", "density", "map"] = Field("latent", description="largest of |z|^2, -log p, the map")
    epochs: int = Field(8, ge=1, le=100_000, description="passes of the flows over the training images")
    max_steps: int = Field(
        600, ge=0, le=100_000_000, description="fewer passes where they would take more batches; 0: no limit"
    )
    batch_size: int = Field(8, ge=1, le=4096, description="images in a batch of the flows")
    learning_rate: float = Field(
        1e-3, gt=0, le=1e6, description="of the flows' Adam, after warm-up and before its cosine"
    )


AnyConfig = TypeVar("AnyConfig", bound=PositionFlowsConfig)


def with_levels(config: AnyConfig, backbone: str) -> AnyConfig:
    """The settings with the backbone's own levels in place of what was left open."""
    levels = config.levels or levels_at(backbone, (8, 16, 32))
    deep = config.deep_levels
    if deep is None:
        deep = tuple(level for level in default_deep_levels(backbone) if level not in levels)[:1]
    return config.model_copy(update={"levels": levels, "deep_levels": deep})


class PositionFlows(nn.Module):
    """A flow for each level, with the position of each vector as its condition.

    Args:
        config: see its fields.
        channels, grids: of each level; the grid is its height and width.
    """

    def __init__(self, config: PositionFlowsConfig, channels: Sequence[int], grids: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.config = config
        self.channels = list(channels)
        self.grids = list(grids)
        self.whitenings = nn.ModuleList(Whitening(c) for c in channels if config.whiten)
        self.flows = self._drawn()
        self.register_buffer("peaks", torch.full((len(channels),), -torch.inf))  # u of each level, Eq. 4
        self.peaks: Tensor

    def _drawn(self) -> nn.ModuleList:
        """A flow for each level, freshly drawn."""
        config = self.config
        return nn.ModuleList(
            conditional_flow(
                channels,
                grid,
                config.blocks,
                code=_CODE,
                hidden=config.hidden,
                two_sided=config.two_sided,
                zero=config.whiten,
            )
            for channels, grid in zip(self.channels, self.grids, strict=True)
        )

    def pooled(self, features: list[Tensor]) -> list[Tensor]:
        """Maps (B, C, h, w) averaged over the neighbourhood, on the grids that the flows know; no further ones."""
        read = averaged(features[: len(self.grids)], self.config.pool)
        return [resized(level, grid) for level, grid in zip(read, self.grids, strict=True)]

    def inputs(self, features: list[Tensor]) -> list[Tensor]:
        """What the flows read, maps of the same shapes."""
        maps = self.pooled(features)
        if not self.config.whiten:
            return maps
        return [whitening(level) for whitening, level in zip(self.whitenings, maps, strict=True)]

    def likelihoods(self, features: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """For each level log p / C, in nats, and mean_c z^2 / 2, both (B, 1, h, w)."""
        found = []
        for flow, level in zip(self.flows, self.inputs(features), strict=True):
            z, log_det = flow.at_positions(level)  # type: ignore[operator]
            found.append((standard_normal(z, log_det)[:, None], z.square().mean(1, keepdim=True) / 2))
        return found

    def relative(self, log_p: Tensor, level: int) -> Tensor:
        """log p / C of one level, of any shape, -> its abnormality: 1 - exp(log p / C - u), or the log of that."""
        relative = log_p - self.peaks[level]
        return 1 - relative.exp() if self.config.scoring == "likelihood" else -relative

    def unlikely(self, found: list[tuple[Tensor, Tensor]], grid: tuple[int, int], inside: Tensor | None) -> Tensor:
        """What `likelihoods` found -> (B, 1, h, w) on one grid: what `image_score` names, mean over all channels."""
        total = torch.zeros(())
        for (log_p, half_square), channels in zip(found, self.channels, strict=True):
            values = half_square if self.config.image_score == "latent" else -log_p
            total = total + on_common_grid(values, grid, inside) * (channels / sum(self.channels))
        return total

    def stages(self, images: int) -> Iterator[Collect | Optimise]:
        """All that the flows need of features of `images` model inputs, from a fresh start."""
        config = self.config
        self.flows = self._drawn().to(self.peaks.device)
        if config.whiten:
            yield self._whitening()
        yield Optimise(
            "flows",
            self.fibre_losses if config.fibres else self.loss,
            list(self.flows.parameters()),
            epochs_within(config.max_steps, config.epochs, images, config.batch_size),
            config.batch_size,
            partial(torch.optim.Adam, lr=config.learning_rate),
            schedule=partial(warm_cosine, whole=config.cosine == "whole"),
            keep_gradients=config.shared_adam,
        )
        yield self._peaks()

    def _whitening(self) -> Collect:
        """Mean and principal axes of each level's vectors."""
        channels = self.channels
        moments = [Moments(c) for c in channels]

        def update(features: list[Tensor], inside: Tensor | None) -> None:
            for of, level in zip(moments, self.pooled(features), strict=True):
                of.update(vectors_inside(level, inside)[0])  # (N, C)

        def close(progress: Callable[[int, int], None]) -> None:
            for done, (whitening, of) in enumerate(zip(self.whitenings, moments, strict=True), start=1):
                whitening.fit(of.mean(), of.covariance())  # type: ignore[operator]
                progress(done, len(moments))

        return Collect("whitening", update, close, peak_bytes=4 * 8 * sum(c * c for c in channels))

    def _peaks(self) -> Collect:
        """u, the largest log p / C of each level over the training images (Eq. 4)."""
        peaks = torch.full_like(self.peaks, -torch.inf)

        def update(features: list[Tensor], inside: Tensor | None) -> None:
            self.eval()
            for i, (log_p, _) in enumerate(self.likelihoods(features)):
                scored = log_p if inside is None else log_p[on_grid(inside, log_p.shape[-2:]) > 0]
                peaks[i] = torch.maximum(peaks[i], scored.max())

        def close(progress: Callable[[int, int], None]) -> None:
            self.peaks.copy_(peaks)
            progress(1, 1)

        return Collect("largest likelihoods", update, close, peak_bytes=peaks.nbytes)

    def _losses(self, log_p: Tensor) -> Tensor:
        """The loss at each position, of log p / C: Eq. 2, as the authors' code has it."""
        return -F.logsigmoid(log_p) if self.config.loss == "sigmoid" else -log_p

    def loss(self, features: list[Tensor], inside: Tensor | None) -> Tensor:
        """The mean over all positions of each level, summed over levels."""
        total = torch.zeros((), device=self.peaks.device)
        for log_p, _ in self.likelihoods(features):
            values = self._losses(log_p)
            if inside is None:
                total = total + values.mean()
            else:
                scored = on_grid(inside, values.shape[-2:])
                total = total + (values * scored).sum() / scored.sum()
        return total

    def fibre_losses(self, features: list[Tensor], inside: Tensor | None) -> Iterator[Tensor]:
        """The mean over each fibre: vectors of one level, from any place of any image; the last may be smaller."""
        for flow, level, grid in zip(self.flows, self.inputs(features), self.grids, strict=True):
            vectors, places = vectors_inside(level, inside)
            code = position_code(_CODE, *grid).flatten(1).T.to(vectors)  # (h*w, K)
            for fibre in torch.randperm(len(vectors)).split(self.config.fibres):
                z, log_det = flow.at_positions(vectors[fibre], code[places[fibre]])  # type: ignore[operator]
                yield self._losses(standard_normal(z, log_det)).mean()


class Whitening(nn.Module):
    """(B, C, h, w) -> the same shape: mean zero, and channels uncorrelated and of about unit variance."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("matrix", torch.eye(channels))
        self.mean: Tensor
        self.matrix: Tensor

    def fit(self, mean: Tensor, covariance: Tensor) -> None:
        """Takes the moments (C,) and (C, C) in float64; channels become principal components, the smallest first."""
        self.mean.copy_(mean)
        self.matrix.copy_(whitening_axes(covariance, _RIDGE).flip(1).T)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x - self.mean[:, None, None], self.matrix[:, :, None, None])


def vectors_inside(level: Tensor, inside: Tensor | None) -> tuple[Tensor, Tensor]:
    """Maps (B, C, h, w) -> the vectors (N, C) that are scored, and the position, below h*w, of each (N,)."""
    grid = level.shape[-2:]
    vectors = level.flatten(2).transpose(1, 2)  # (B, h*w, C)
    scored = torch.ones_like(level[:, :1]) if inside is None else on_grid(inside, grid)
    kept = scored.flatten(1) > 0  # (B, h*w)
    return vectors[kept], kept.nonzero()[:, 1]


def warm_cosine(
    optimiser: torch.optim.Optimizer, steps: int, *, whole: bool = False
) -> torch.optim.lr_scheduler.LRScheduler:
    """The rate rises from a tenth, and then falls along a cosine to a thousandth.

    The cosine begins where the rise ends; with `whole` at the first step, and the rise ends on it, as in the authors'
    programs.
    """
    warm = max(1, round(_WARM_UP * steps))
    begins = 0 if whole else warm

    def cosine(step: int) -> float:
        return 1e-3 + (1 - 1e-3) * (1 + math.cos(math.pi * (step - begins) / max(1, steps - begins))) / 2

    def factor(step: int) -> float:
        return 0.1 + (cosine(warm) - 0.1) * step / warm if step < warm else cosine(step)

    return torch.optim.lr_scheduler.LambdaLR(optimiser, factor)


def on_common_grid(values: Tensor, grid: tuple[int, int], inside: Tensor | None) -> Tensor:
    """(B, 1, h, w) of a level -> the grid of another; what is not scored does not spread."""
    if inside is not None:
        values = within(values, on_grid(inside, values.shape[-2:]))
    return resized(values, grid)
