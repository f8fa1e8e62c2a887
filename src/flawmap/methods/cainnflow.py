"""CAINNFlow: Yan et al., "CAINNFlow: Convolutional block Attention modules and Invertible Neural Networks Flow",
arXiv 2206.01992, and FastFlow: Yu et al., arXiv 2111.07677, of which it is a variant.

A normalising flow on each feature map, whose couplings read their half by convolutions with attention between them,
learns to turn the maps of good images into Gaussian noise; a position is as abnormal as its noise is improbable.

The score is the likelihood (Section 3.1), here its negative logarithm, which ranks alike and is not flat where defects
are strong; programs of FastFlow read the probability exp(-1/2 mean_c z^2) (`scoring=probability`). Where this differs
from the paper, and the setting that takes the difference back (`--preset paper` takes back all of them, `--preset
fastflow` is that method):

- Levels count by their channels, as they do in the density of all of them at a position (`weights=equal`).
- Half of the log-determinant counts in the map (`score_logdet`; 1: the density itself; 0: z alone), none in the image
  score (`image_logdet`). A flow stretches what is unusual less, so the log-determinant takes back some of what z says:
  on the magnetic tiles images rank best without it, and regions are found best with it.
- The image score is the largest value before smoothing (`image_score=map`: after), and reads a deeper level beside
  those of the map (`deep_levels=` for none).
- The map is smoothed (`sigma=0`), and reads the level at 1/16 alone: flows on finer ones cost more time than they find
  (`stride=8` adds the level at 1/8; `stride=4` takes FastFlow's three).
- Activation normalisation starts from the data and levels the channels, so no trainable LayerNorm precedes the flows
  (`feature_norm=true`). No paper has one; those who programmed FastFlow anew needed it for its figures. It is not part
  of the likelihood.
- Scale and shift come from one network (Eq. 1 has two: `st_shared=false`), ReLU follows the first convolution (Eqs. 9
  to 12 have none: `activation=false`), and log-scales are bounded (Eq. 1 has exp(s): `clamp=none`).
- Levels meet on the finest's grid (`meet=input`: each is enlarged to the input's size).
- Training is short, in small steps (`epochs`, `max_steps`, `learning_rate`, `batch_size`).

Unstated, and read as: steps are flow steps; a permutation is fixed and drawn at random for each (`permutation`); flows
start as the identity (`zero_start=false`); the attention's r is 16 (`reduction`) and convolutions keep the width of
their half (`hidden`); Adam with a decay of 1e-5 and, with `paper`, batches of 32. Eq. 11's third line multiplies F',
which leaves the channel attention out; here the spatial attention multiplies F'', as in CBAM (Eq. 6). Tokens of
transformers are normalised without gain and offset, which the flows have themselves. Equations 3 to 5 belong to inverse
problems and have no part here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from flawmap.backbones import Backbone, default_deep_levels, default_levels, levels_at
from flawmap.flows import ActNorm, Block, Clamp, Coupling, Flow, Mixing, Separate, Subnet, convolutions
from flawmap.methods.blocks.smoothing import Enlarge, largest, on_grid
from flawmap.methods.contract import LevelledConfig, Method, Optimise, Stage, epochs_within
from flawmap.methods.presets import Preset, read_presets


class CAINNFlowConfig(LevelledConfig):
    """Settings of CAINNFlow."""

    levels: tuple[str, ...] | None = Field(None, description="backbone levels of the map; by `stride` if unset")
    deep_levels: tuple[str, ...] | None = Field(
        None, description="further levels of the image score; known ones if unset"
    )
    stride: int = Field(16, ge=1, le=1024, description="input pixels between positions of the finest level, at most 16")
    subnet: Literal["CAC", "CA", "AC", "CC"] = Field(
        "CAC", description="C: convolution, A: CBAM (Eqs. 11, 9, 10 and 12)"
    )
    steps: int = Field(2, ge=1, le=64, description="flow steps on each level")
    alternate: bool = Field(False, description="every second step has 1 x 1 convolutions")
    two_sided: bool = Field(True, description="a step changes both halves of the channels (Eq. 1)")
    st_shared: bool = Field(True, description="scale and shift come from one network")
    hidden: float = Field(1.0, gt=0, le=16, description="channels between convolutions over those before")
    reduction: int = Field(16, ge=1, le=4096, description="r of the channel attention (Eq. 7)")
    spatial_first: bool = Field(False, description="the order of CBAM's two attentions; the paper's is false (Eq. 6)")
    activation: bool = Field(True, description="ReLU between convolutions")
    permutation: Literal["random", "none", "soft"] = Field("random", description="of channels; soft: a random rotation")
    actnorm: Literal["data", "identity", "none"] = Field("data", description="how activation normalisation starts")
    clamp: Clamp = Field("tanh", description="how log-scales are bounded")
    bound: float = Field(1.9, gt=0, le=1e6, description="the bound of log-scales")
    feature_norm: bool = Field(False, description="a trainable LayerNorm over C x H x W before the flows of a CNN")
    scoring: Literal["likelihood", "probability"] = Field("likelihood", description="-log p, or 1 - p")
    score_logdet: float = Field(0.5, ge=0, le=1, description="share of the log-determinant in the map")
    image_logdet: float = Field(0.0, ge=0, le=1, description="share of the log-determinant in the image score")
    image_score: Literal["position", "map"] = Field("position", description="largest value before, or after smoothing")
    weights: Literal["channels", "equal"] = Field("channels", description="what each level counts")
    meet: Literal["finest", "input"] = Field("finest", description="where levels are averaged: finest grid, input size")
    zero_start: bool = Field(True, description="last convolutions start at zero, and so flows as the identity")
    epochs: int = Field(20, ge=1, le=100_000, description="passes over the training images")
    max_steps: int = Field(
        500, ge=0, le=100_000_000, description="fewer passes where they would take more steps; 0: no limit"
    )
    batch_size: int = Field(8, ge=1, le=4096, description="images in a step")
    learning_rate: float = Field(2e-3, gt=0, le=1e6, description="of Adam")
    weight_decay: float = Field(1e-5, ge=0, le=1e6, description="of Adam")
    sigma: float = Field(4.0, ge=0, le=1000, description="Gaussian smoothing of the map, in input pixels")


class CAINNFlow(Method):
    """See the module's docstring."""

    Config = CAINNFlowConfig
    presets: ClassVar[dict[str, Preset]] = read_presets("cainnflow")
    optimises: ClassVar[bool] = True
    config: CAINNFlowConfig

    def __init__(self, config: CAINNFlowConfig, backbone: Backbone, size: tuple[int, int]) -> None:
        super().__init__(config, backbone, size)
        info: Any = backbone.network.feature_info
        self.tokens = len({entry["reduction"] for entry in info}) == 1  # a plain transformer's maps
        self.mapped = len(config.levels or backbone.levels)  # levels of the map; those of the image score follow
        finest = min(backbone.reductions[: self.mapped])
        self.grid = size if config.meet == "input" else (round(size[0] / finest), round(size[1] / finest))
        self.flows = self._flows()
        self.norms = nn.ModuleList()
        if config.feature_norm and not self.tokens:
            device = next(backbone.parameters()).device
            with torch.no_grad():
                maps = backbone(torch.zeros(1, 3, *size, device=device))
            self.norms.extend(nn.LayerNorm(level.shape[1:]) for level in maps)
        self.resize = Enlarge(self.grid, size, config.sigma)

    @classmethod
    def resolved(cls, config: CAINNFlowConfig, backbone: str) -> CAINNFlowConfig:
        levels = config.levels or default_levels(backbone)
        # One level is a transformer's, whose blocks all have one size.
        if not config.levels and len(levels) > 1:
            levels = levels_at(backbone, [factor for factor in (4, 8, 16) if factor >= min(config.stride, 16)])
        deep = config.deep_levels
        if deep is None:
            deep = tuple(level for level in default_deep_levels(backbone) if level not in levels)[:1]
        return config.model_copy(update={"levels": levels, "deep_levels": deep})

    def _flows(self) -> nn.ModuleList:
        """A flow for each level, freshly drawn."""
        return nn.ModuleList(Flow(self._blocks(channels)) for channels in self.backbone.channels)

    def _blocks(self, channels: int) -> Iterator[Block]:
        config = self.config
        for step in range(config.steps):
            if config.actnorm != "none":
                yield ActNorm(channels, start=config.actnorm)
            if config.permutation != "none":
                yield Mixing(channels, "permutation" if config.permutation == "random" else "orthogonal")
            subnet = self._subnet(1 if config.alternate and step % 2 else 3)
            yield Coupling(channels, subnet, two_sided=config.two_sided, clamp=config.clamp, bound=config.bound)

    def _subnet(self, side: int) -> Subnet:
        config = self.config
        subnet = convolutions(
            config.subnet,  # Eqs. 9 to 12
            side=side,
            ratio=config.hidden,
            reduction=config.reduction,
            spatial_first=config.spatial_first,
            activation=config.activation,
            zero=config.zero_start,
        )
        return subnet if config.st_shared else partial(Separate, subnet)

    def inputs(self, features: list[Tensor]) -> list[Tensor]:
        """Maps (B, C, h, w) -> what the flows read, of the same shapes."""
        if self.tokens:
            return [F.layer_norm(level.movedim(1, 3), level.shape[1:2], eps=1e-6).movedim(3, 1) for level in features]
        return [norm(level) for norm, level in zip(self.norms, features, strict=True)] if self.norms else features

    def stages(self, images: int) -> Iterator[Stage]:
        config = self.config
        epochs = epochs_within(config.max_steps, config.epochs, images, config.batch_size)
        device = next(self.flows.parameters()).device
        self.flows = self._flows().to(device)
        for norm in self.norms:
            assert isinstance(norm, nn.LayerNorm)
            norm.reset_parameters()
        yield Optimise(
            "flows",
            self.loss,
            [*self.flows.parameters(), *self.norms.parameters()],
            epochs,
            config.batch_size,
            partial(torch.optim.Adam, lr=config.learning_rate, weight_decay=config.weight_decay),
        )

    def loss(self, features: list[Tensor], inside: Tensor | None) -> Tensor:
        """Maximum likelihood: sum over levels and positions of 1/2 |z|^2 - log |det dz/dx|, the mean over images."""
        loss = torch.zeros((), device=features[0].device)
        for flow, level in zip(self.flows, self.inputs(features), strict=True):
            z, log_det = flow.at_positions(level)  # type: ignore[operator]
            values = z.square().sum(1) / 2 - log_det  # (B, h, w)
            if inside is not None:
                values = values * on_grid(inside, values.shape[-2:])[:, 0]
            loss = loss + values.sum((1, 2)).mean()
        return loss

    def likelihoods(self, features: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """For each level 1/2 mean_c z^2 and the log-determinant over C, both (B, 1, h, w)."""
        found = []
        for flow, level in zip(self.flows, self.inputs(features), strict=True):
            z, log_det = flow.at_positions(level)  # type: ignore[operator]
            found.append((z.square().mean(1, keepdim=True) / 2, log_det[:, None] / z.shape[1]))
        return found

    def score(self, features: list[Tensor], inside: Tensor | None = None) -> tuple[Tensor, Tensor]:
        config = self.config
        found = self.likelihoods(features)
        anomaly_map = self._averaged(found[: self.mapped], config.score_logdet)
        values = self._averaged(found, config.image_logdet)
        if config.image_score == "map":
            return anomaly_map, self.enlarge(values, inside).amax((1, 2, 3))
        return anomaly_map, largest(values, inside)

    def _averaged(self, found: Sequence[tuple[Tensor, Tensor]], share: float) -> Tensor:
        """(B, 1, h, w): levels averaged on the finest grid, with a share of the log-determinant."""
        channels = self.backbone.channels[: len(found)]
        total = torch.zeros(())
        for (half_square, log_det), count in zip(found, channels, strict=True):
            values = half_square - share * log_det if share else half_square
            if self.config.scoring == "probability":
                values = 1 - (-values).exp()
            if values.shape[-2:] != self.grid:
                values = F.interpolate(values, size=self.grid, mode="bilinear", align_corners=False)
            total = total + values * (count / sum(channels) if self.config.weights == "channels" else 1 / len(found))
        return total
