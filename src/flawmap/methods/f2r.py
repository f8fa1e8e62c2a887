"""F2R: Zhu, Dai, Dong and Li, "Factorized Industrial Anomaly Detection and Localization", IEEE Access 2023.

An invertible network T turns each patch feature f into z = [z_l, z_g], trained so that z_l tells what is there and z_g
where it is. Either part is then scaled, alpha z_l and beta z_g, and turned back into a feature; a patch is as abnormal
as its reverted feature is far from those of good parts.

Where this differs from the paper, and the setting that takes the difference back (`--preset paper` takes them):

- The default backbone is read at 1/8, 1/16 and 1/32 (`levels`), a WideResNet-50-2 as in the paper at `layer2,layer3`.
  Levels are not averaged over neighbours (`patch_pool=3`), which blurs the deepest.
- Channels are standardised (`standardise=false`), and scaled down in levels that have many of them, halfway to equal
  weight of all levels (`balance=0`); f is their first principal components (`components=0`), since T costs the square
  of their number.
- Training is shorter, in larger and smaller steps, each of which sees some patches of every image (`epochs`,
  `max_steps`, `learning_rate`, `batch_size`, `positions=0`: all). Every image has a set number of rotated views
  (`views`), whose features are computed once, where the paper draws a rotation anew each time (`views=0`).
- The likelihood weighs `gamma` 0.01: it is a sum over channels, and the paper's 0.001 belongs to 1536 of them. It is
  that of a standard Gaussian, the square halved, which Eq. 2 leaves out (`nll_half=false`).
- Term 1 is taken about the mean (`centred=false`), and its entries' sizes are averaged: in 1536 channels it hardly
  counts so (`covariance_as=norm`, or `sum`). Term 2's square is a mean over channels (`square_as=sum`).
- Couplings bound their log-scales by a tangent; Glow's, which the paper cites, by a sigmoid (`coupling=sigmoid`).
- Weight decay is on linear layers (`decay_all=true`).
- The map is smoothed, and the image score its largest value after that; the paper has raw distances and their largest
  (`sigma=0`, `image_score=patch`).
- The gallery keeps 10 % of the patches, as one quoted run of PatchCore does, but no more than `max_vectors`.
- alpha and beta are one fixed choice, where the paper takes the best of 169 on each object's test labels.
- Training chooses the gallery among the features; `reselect=true` chooses it among the reverted ones of its alpha and
  beta. Moved after training, it keeps the patches that were chosen, since no model file holds all of them: only
  `evaluate --oracle` chooses anew. Distances for the choice are whole, not randomly projected as PatchCore's are.

Where the paper says nothing: c is what the levels give together; T is Glow's, with one-sided couplings of three layers
whose width (`hidden`) makes the whole as large as the paper's count, capacity-matched and not the paper's own; z is cut
in halves (`split`); auxiliary networks are as wide as f; a rotation comes after the crop, reflection fills what it
leaves empty, and positions are those of the grid that results.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from flawmap.backbones import Backbone, default_levels, levels_at
from flawmap.backbones.catalogue import DEFAULT_BACKBONE
from flawmap.errors import FlawmapError
from flawmap.flows import Glow
from flawmap.methods.blocks.factorisation import Factorisation, FactorisationConfig
from flawmap.methods.blocks.gallery import GalleryCandidates, GalleryConfig, coreset
from flawmap.methods.blocks.patch_projection import PatchProjection, PatchProjectionConfig
from flawmap.methods.blocks.patches import sampled
from flawmap.methods.blocks.rotation import turned
from flawmap.methods.blocks.smoothing import Enlarge, largest, scored_positions
from flawmap.methods.blocks.weight_decay import decaying_linear
from flawmap.methods.contract import Collect, Method, Optimise, Stage, epochs_within
from flawmap.methods.presets import Preset, read_presets
from flawmap.neighbours import nearest, search_index

_ROWS = 16_384  # patches that T takes at a time


class F2RConfig(FactorisationConfig, PatchProjectionConfig, GalleryConfig):
    """Settings of F2R."""

    levels: tuple[str, ...] | None = Field(None, description="levels that are fused; the backbone's own if unset")
    steps: int = Field(6, ge=1, le=64, description="flow steps of T")
    actnorm: bool = Field(True, description="activation normalisation in each step")
    coupling: Literal["tanh", "sigmoid"] = Field("tanh", description="how couplings bound log-scales; sigmoid: Glow's")
    mixing: Literal["plain", "lu", "permutation"] = Field("plain", description="the matrix W of each step")
    hidden: float = Field(1.125, gt=0, le=16, description="width of the couplings' networks over the channels of f")
    split: float = Field(0.5, gt=0, lt=1, description="share of z that is z_l")
    alpha: float = Field(1.0, ge=0, le=10, description="factor of z_l, what is there")
    beta: float = Field(0.8, ge=0, le=10, description="factor of z_g, where it is")
    image_score: Literal["map", "patch"] = Field("map", description="largest value after, or before smoothing")
    epochs: int = Field(30, ge=0, le=100_000, description="passes over the training images")
    max_steps: int = Field(
        600, ge=0, le=100_000_000, description="fewer passes where they would take more steps; 0: no limit"
    )
    positions: int = Field(256, ge=0, le=1_000_000, description="patches of each image that a step sees; 0: all")
    batch_size: int = Field(8, ge=1, le=4096, description="images in a step")
    learning_rate: float = Field(1e-3, gt=0, le=1e6, description="of AdamW, at the start of a cosine")
    weight_decay: float = Field(0.05, ge=0, le=1e6, description="of AdamW")
    decay_all: bool = Field(False, description="weight decay on everything, not on linear layers alone")
    views: int = Field(
        4, ge=0, le=64, description="rotated views of each image, itself counted; 0: a fresh rotation in each epoch"
    )
    rotation: float = Field(30.0, ge=0, le=180, description="degrees by which views are turned at most")
    sigma: float = Field(4.0, ge=0, le=1000, description="Gaussian smoothing of the map, in input pixels")


class F2R(Method):
    """See the module's docstring."""

    Config = F2RConfig
    presets: ClassVar[dict[str, Preset]] = read_presets("f2r")
    live: ClassVar[tuple[str, ...]] = ("alpha", "beta")
    searched: ClassVar[dict[str, tuple[float, ...]]] = dict.fromkeys(live, tuple(i / 10 for i in range(13)))
    reselects: ClassVar[bool] = True
    live_buffers: ClassVar[tuple[str, ...]] = ("factors", "index")
    costly_buffers: ClassVar[tuple[str, ...]] = ("index",)
    optimises: ClassVar[bool] = True
    config: F2RConfig

    def __init__(self, config: F2RConfig, backbone: Backbone, size: tuple[int, int]) -> None:
        super().__init__(config, backbone, size)
        finest = max(config.stride, min(backbone.reductions))
        self.grid = (round(size[0] / finest), round(size[1] / finest))  # h, w
        self.patches = PatchProjection(
            range(len(backbone.channels)),
            backbone.channels,
            self.grid,
            pool=config.patch_pool,
            standardise=config.standardise,
            balance=config.balance,
            components=config.components,
        )
        self.channels = self.patches.outputs  # c
        local = min(max(1, round(config.split * self.channels)), self.channels - 1)
        self.parts = (local, self.channels - local)  # of z_l and z_g
        factors = self._factors(*torch.tensor([config.alpha, config.beta]))
        self.register_buffer("factors", factors, persistent=False)
        self.register_buffer("vectors", torch.zeros(0, self.channels))  # f of the gallery's patches
        self.register_buffer("index", torch.zeros(0, self.channels + 1))  # of their reverted features
        self.factors: Tensor
        self.vectors: Tensor
        self.index: Tensor
        self.flow = self._drawn()  # T
        self.auxiliary: Factorisation | None = None  # while T is trained
        self.resize = Enlarge(self.grid, size, config.sigma)

    @classmethod
    def resolved(cls, config: F2RConfig, backbone: str) -> F2RConfig:
        if config.components == 1:
            raise FlawmapError("components=1 cannot be parted in two: set 2 or more, or 0 for all channels")
        if config.levels:
            return config
        own = levels_at(backbone, (8, 16, 32)) if backbone == DEFAULT_BACKBONE else default_levels(backbone)
        return config.model_copy(update={"levels": own})

    @classmethod
    def views(cls, config: F2RConfig) -> tuple[int, float]:
        return max(1, config.views), config.rotation if config.views else 0.0

    def _drawn(self) -> Glow:
        config, c = self.config, self.channels
        hidden = max(1, round(config.hidden * c))
        return Glow(c, config.steps, hidden, mixing=config.mixing, actnorm=config.actnorm, clamp=config.coupling)

    def latents(self, features: list[Tensor], inside: Tensor | None = None) -> Tensor:
        """z = T(f) of every patch (B, h*w, c)."""
        patches = self.patches(features)
        return self.flow.transform(patches.flatten(0, 1)).view(patches.shape)

    def _reverted(self, z: Tensor) -> Tensor:
        """(N, c) -> (N, c): f' = T^-1([alpha z_l, beta z_g])."""
        return self.flow.revert(z * self.factors)

    def _factors(self, alpha: Tensor, beta: Tensor) -> Tensor:
        """(c,): by what z is multiplied."""
        local, position = self.parts
        return torch.cat([alpha.expand(local), beta.expand(position)])

    @property
    def _intact(self) -> bool:
        """Whether T^-1 undoes T, so that neither has to be computed."""
        return self.config.alpha == self.config.beta == 1

    def stages(self, images: int) -> Iterator[Stage]:
        config, device = self.config, self.factors.device
        self.flow = self._drawn().to(device)
        if self.patches.learns:
            yield self.patches.moments()
        if config.epochs:
            self.auxiliary = Factorisation(config, self.parts, self.grid[0] * self.grid[1]).to(device)
            yield Optimise(
                "flow",
                self.loss if config.views else self.loss_of_rotated,
                [*self.flow.parameters(), *self.auxiliary.parameters()],
                epochs_within(config.max_steps, config.epochs, images, config.batch_size),
                config.batch_size,
                self._optimiser,
                lambda optimiser, steps: torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps),
                inputs="features" if config.views else "images",
                views=config.views > 0,
                after_epoch=lambda: f"condition number of the mixing {self.flow.condition_number():.4g}",
            )
            self.auxiliary = None
        yield self._gallery(images)

    def _optimiser(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        rate, decay = self.config.learning_rate, self.config.weight_decay
        of = parameters if self.config.decay_all else decaying_linear(self, parameters, decay)
        return torch.optim.AdamW(of, rate, weight_decay=decay)

    def loss_of_rotated(self, images: list[Tensor], inside: Tensor | None) -> Tensor:
        """The same over images [(B, 3, H, W)], each turned by an angle of its own; positions stay those of the grid."""
        (plain,) = images
        angles = (torch.rand(len(plain)) * 2 - 1) * math.radians(self.config.rotation)
        scored = None if inside is None else turned(inside, angles, nearest=True)
        with torch.no_grad():
            features = self.features(turned(plain, angles), scored)
        return self.loss(features, scored)

    def loss(self, features: list[Tensor], inside: Tensor | None) -> Tensor:
        """L_total (Eq. 6) over a batch of maps."""
        assert self.auxiliary is not None
        patches = self.patches(features)  # (B, h*w, c)
        f, scored, places = sampled(patches, scored_positions(inside, self.grid), self.config.positions)  # of n each
        f, places = f[scored > 0], places[scored > 0]  # (N, c), (N,)
        if len(f) == 1:  # batch normalisation needs two
            f, places = f.repeat(2, 1), places.repeat(2)
        z, log_det = self.flow(f)  # (N, c), (N,): z = T(f)
        total: Tensor = self.auxiliary(f, z, log_det, places)
        return total

    def _gallery(self, images: int) -> Collect:
        candidates = GalleryCandidates(self.config, images, self.grid, self.channels, self.factors.device)

        def update(features: list[Tensor], inside: Tensor | None) -> None:
            candidates.add(self.patches(features), scored_positions(inside, self.grid))

        def close(progress: Callable[[int, int], None]) -> None:
            self._hold(candidates.chosen(self._held, progress))

        return Collect("gallery", update, close, peak_bytes=candidates.peak_bytes)

    def _hold(self, f: Tensor) -> None:
        """Makes the gallery of patches f (M, c)."""
        self.vectors, self.index = f, search_index(self._held(f))

    def _held(self, f: Tensor) -> Tensor:
        """f (M, c) -> f' (M, c)."""
        if self._intact or not len(f):
            return f
        return torch.cat([self._reverted(self.flow.transform(part)) for part in f.split(_ROWS)])

    @torch.no_grad()
    def reselect(self, latents: Tensor) -> None:
        f = torch.cat([self.flow.inverse(part) for part in latents.split(_ROWS)])
        reverted = torch.cat([self._reverted(part) for part in latents.split(_ROWS)])
        self._hold(coreset(self.config, f, reverted, len(f)))

    def score(self, features: list[Tensor], inside: Tensor | None = None) -> tuple[Tensor, Tensor]:
        # An exported graph holds T whatever alpha and beta are, since it takes them as inputs.
        if self._intact and not torch.onnx.is_in_onnx_export():
            return self._matched(self.patches(features).flatten(0, 1), inside)
        return self.score_latents(self.latents(features), inside)

    def score_latents(self, latents: Tensor, inside: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._matched(self._reverted(latents.flatten(0, 1)), inside)

    def _matched(self, queries: Tensor, inside: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B*h*w, c) -> map (B, 1, h, w) of distances to the gallery, and image score (B,)."""
        anomaly_map = nearest(queries, self.index)[0].view(-1, 1, *self.grid)
        if self.config.image_score == "map":
            return anomaly_map, self.enlarge(anomaly_map, inside).amax((1, 2, 3))
        return anomaly_map, largest(anomaly_map, inside)

    @torch.no_grad()
    def with_settings(self, config: F2RConfig) -> F2R:
        """The gallery's patches stay those chosen in training, and are reverted anew."""
        other = copy.copy(self)
        other._buffers, other._modules = dict(self._buffers), dict(self._modules)
        other.config = config
        other.factors = self._factors(*torch.tensor([config.alpha, config.beta]).to(self.factors))
        other.index = search_index(other._held(other.vectors))
        return other

    def live_state(self, settings: Mapping[str, Tensor]) -> dict[str, Tensor]:
        factors = self._factors(settings["alpha"], settings["beta"])
        reverted = self.flow.revert(self.flow.transform(self.vectors) * factors)
        return {"factors": factors, "index": search_index(reverted)}
