"""CFLOW-AD: Gudovskiy, Ishizaka and Kozuka, "CFLOW-AD: Real-Time Unsupervised Anomaly Detection with Localization via
Conditional Normalizing Flows", WACV 2022.

On each of three feature maps a normalising flow learns how likely a good part's feature vector is, given where it lies;
a position is as abnormal as its vectors are unlikely.

Where this differs from the paper, and the setting that takes the difference back (`--preset paper` takes back all that
can be):

- A step sees all positions of some images, and lowers the summed losses of all flows, which share no parameter: under
  Adam this is an optimiser for each flow. The authors shuffle the positions of an image batch into fibres of 256, and
  step after each fibre of one level (`fibres=256`); as their one Adam finds zero gradients for the other flows, these
  go on by momentum (`shared_adam=true`).
- Vectors are averages over 3 x 3 positions (`pool=1`), and whitened. Flows start as a rotation, so that training sets
  out from the Gaussian density of the features; the paper's set out from random subnets on the features themselves
  (`whiten=false`). The log-determinant of the whitening, a constant, is not part of the likelihood.
- Likelihoods are divided by their maximum over the training images, as in CLS-CNFs (Oh & Kim, IEEE Access 2024, Eq. 4).
  The authors take the maximum over the test images, which nobody has at inspection.
- The image score is half the squared length of z, mean over the channels of all levels and largest over positions,
  before smoothing. It leaves the log-determinant out, which takes back some of what z says: a flow stretches what is
  unusual less. It also reads a deeper level beside those of the map (`deep_levels=` for none). The map's own values are
  flat where defects are strong. `image_score=density` is -log p; `image_score=map` is the paper's, the map's largest.
- Subnets are half as wide (`hidden=2`).
- There are fewer epochs, of smaller batches at a larger learning rate (`epochs`, `max_steps`, `batch_size`,
  `learning_rate`).

Levels meet on the finest's grid, half-pixel centres; the authors' meet at the input size, corners aligned. They pad the
convolutions of their backbone by reflection; timm's pad with zeros, and no setting changes that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from flawmap.backbones import Backbone, default_deep_levels, levels_at
from flawmap.flows import position_code
from flawmap.flows.conditional import conditional_flow, standard_normal
from flawmap.methods.contract import Collect, Config, Method, Optimise, Stage, epochs_within
from flawmap.methods.moments import Moments
from flawmap.methods.smoothing import Enlarge, largest, on_grid, within

_CODE = 128  # channels of the position code
_RIDGE = 1e-2  # of the mean variance: few images leave directions without any
_WARM_UP = 0.08  # of all steps, the authors' 2 of 25 rounds


class CFlowConfig(Config):
    """Settings of CFLOW-AD."""

    levels: tuple[str, ...] | None = Field(None, description="backbone levels; those at 1/8, 1/16 and 1/32 if unset")
    deep_levels: tuple[str, ...] | None = Field(
        None, description="further levels of the image score; known ones if unset"
    )
    pool: int = Field(3, ge=1, description="side of the neighbourhood that is averaged, odd")
    whiten: bool = Field(True, description="whitened vectors and flows that start as a rotation")
    blocks: int = Field(8, ge=1, description="of each flow")
    hidden: float = Field(1.0, gt=0, description="width of the subnets' middle layer over that of their input")
    two_sided: bool = Field(False, description="a block changes both halves of the channels")
    loss: Literal["sigmoid", "plain"] = Field("sigmoid", description="-log sigmoid(log p / C), or -log p / C")
    fibres: int = Field(0, ge=0, description="vectors in a step, of one level; 0: all of a batch, of all levels")
    shared_adam: bool = Field(False, description="between fibres, the other flows go on by momentum")
    scoring: Literal["likelihood", "log"] = Field("likelihood", description="1 - p over its largest, or log of that")
    image_score: Literal["latent", "density", "map"] = Field("latent", description="largest of |z|^2, -log p, the map")
    epochs: int = Field(8, ge=1, description="passes over the training images")
    max_steps: int = Field(600, ge=0, description="fewer passes where they would take more batches; 0: no limit")
    batch_size: int = Field(8, ge=1, description="images in a batch")
    learning_rate: float = Field(1e-3, gt=0, description="of Adam, after warm-up and before its cosine")
    sigma: float = Field(4.0, ge=0, le=1000, description="Gaussian smoothing of the map, in input pixels")


class CFlow(Method):
    """See the module's docstring."""

    Config = CFlowConfig
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
        },
    }
    optimises: ClassVar[bool] = True
    config: CFlowConfig

    def __init__(self, config: CFlowConfig, backbone: Backbone, size: tuple[int, int]) -> None:
        super().__init__(config, backbone, size)
        self.grids = [(round(size[0] / factor), round(size[1] / factor)) for factor in backbone.reductions]
        self.mapped = len(config.levels or backbone.levels)  # levels of the map; those of the image score follow
        self.grid = max(self.grids[: self.mapped])
        self.whitenings = nn.ModuleList(Whitening(c) for c in backbone.channels if config.whiten)
        self.flows = self._flows()
        self.register_buffer("peaks", torch.full((len(self.grids),), -torch.inf))  # u of each level, Eq. 4 of CLS-CNFs
        self.peaks: Tensor
        self.resize = Enlarge(self.grid, size, config.sigma)

    @classmethod
    def resolved(cls, config: CFlowConfig, backbone: str) -> CFlowConfig:
        levels = config.levels or levels_at(backbone, (8, 16, 32))
        deep = config.deep_levels
        if deep is None:
            deep = tuple(level for level in default_deep_levels(backbone) if level not in levels)[:1]
        return config.model_copy(update={"levels": levels, "deep_levels": deep})

    @classmethod
    def levels(cls, config: CFlowConfig) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*(config.levels or ()), *(config.deep_levels or ()))))

    def _flows(self) -> nn.ModuleList:
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
            for channels, grid in zip(self.backbone.channels, self.grids, strict=True)
        )

    def pooled(self, features: list[Tensor]) -> list[Tensor]:
        """Maps (B, C, h, w) averaged over the neighbourhood, on the grids that the flows know."""
        side, maps = self.config.pool, []
        for level, grid in zip(features, self.grids, strict=True):
            if side > 1:
                level = F.avg_pool2d(level, side, 1, side // 2, count_include_pad=False)
            if level.shape[-2:] != grid:
                level = F.interpolate(level, size=grid, mode="bilinear", align_corners=False)
            maps.append(level)
        return maps

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

    def stages(self, images: int) -> Iterator[Stage]:
        config = self.config
        self.flows = self._flows().to(self.peaks.device)
        if config.whiten:
            yield self._whitening()
        epochs = epochs_within(config.max_steps, config.epochs, images, config.batch_size)
        yield Optimise(
            "flows",
            self.fibre_losses if config.fibres else self.loss,
            list(self.flows.parameters()),
            epochs,
            config.batch_size,
            partial(torch.optim.Adam, lr=config.learning_rate),
            schedule=warm_cosine,
            keep_gradients=config.shared_adam,
        )
        yield self._peaks()

    def _whitening(self) -> Collect:
        """Mean and principal axes of each level's vectors."""
        channels = self.backbone.channels
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
        """u, the largest log p / C of each level over the training images (Eq. 4 of CLS-CNFs)."""
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
        """The loss at each position, of log p / C: Eq. 2 of CLS-CNFs, as the authors' code has it."""
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

    def score(self, features: list[Tensor], inside: Tensor | None = None) -> tuple[Tensor, Tensor]:
        found = self.likelihoods(features)
        anomaly_map = torch.zeros(())
        for (log_p, _), peak in zip(found[: self.mapped], self.peaks, strict=False):
            relative = log_p - peak
            values = 1 - relative.exp() if self.config.scoring == "likelihood" else -relative
            anomaly_map = anomaly_map + self._on_grid(values, inside)
        if self.config.image_score == "map":
            return anomaly_map, self.enlarge(anomaly_map, inside).amax((1, 2, 3))
        total, channels = torch.zeros(()), self.backbone.channels
        for (log_p, half_square), count in zip(found, channels, strict=True):
            values = half_square if self.config.image_score == "latent" else -log_p
            total = total + self._on_grid(values, inside) * (count / sum(channels))
        return anomaly_map, largest(total, inside)

    def _on_grid(self, values: Tensor, inside: Tensor | None) -> Tensor:
        """(B, 1, h, w) on the map's grid; what is not scored does not spread."""
        if inside is not None:
            values = within(values, on_grid(inside, values.shape[-2:]))
        if values.shape[-2:] == self.grid:
            return values
        return F.interpolate(values, size=self.grid, mode="bilinear", align_corners=False)


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
        variances, axes = torch.linalg.eigh(covariance)
        variances = variances.clamp_min(0)
        scale = (variances + _RIDGE * variances.mean() + 1e-12).rsqrt()
        self.mean.copy_(mean)
        self.matrix.copy_((axes * scale).T)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x - self.mean[:, None, None], self.matrix[:, :, None, None])


def vectors_inside(level: Tensor, inside: Tensor | None) -> tuple[Tensor, Tensor]:
    """Maps (B, C, h, w) -> the vectors (N, C) that are scored, and the position, below h*w, of each (N,)."""
    grid = level.shape[-2:]
    vectors = level.flatten(2).transpose(1, 2)  # (B, h*w, C)
    scored = torch.ones_like(level[:, :1]) if inside is None else on_grid(inside, grid)
    kept = scored.flatten(1) > 0  # (B, h*w)
    return vectors[kept], kept.nonzero()[:, 1]


def warm_cosine(optimiser: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """The rate rises from a tenth, and then falls along a cosine to a thousandth."""
    warm = max(1, round(_WARM_UP * steps))

    def factor(step: int) -> float:
        if step < warm:
            return 0.1 + 0.9 * step / warm
        return 1e-3 + (1 - 1e-3) * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2

    return torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
