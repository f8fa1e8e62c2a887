"""CFA: Lee, Lee and Song, "CFA: Coupled-hypersphere-based Feature Adaptation", IEEE Access 2022.

A patch descriptor, one 1 x 1 CoordConv, is trained to draw the patches of good images into small hyperspheres around
the vectors of a fixed memory bank, and out of the spheres next to them; a patch is as abnormal as it is far from the
bank.

Where this differs from the paper, and the setting that takes the difference back (`--preset paper` takes them):

- Patches are whitened before the descriptor, which starts as the identity on their first principal components and the
  coordinates; the paper puts a random projection on raw features (`whiten=false`).
- The score is the distance itself (`scoring=certainty` for Eq. 5). Eq. 5 holds exp(-distance), so it means something
  only where distances are about one: on raw features, where they are above ten, the certainty drowns the distance.
- The bank holds K-means centres of patches of all images (`bank=mean` for the authors' code, the mean patch of each
  position; `bank=ema` for Algorithm 1). Where images are not aligned the position means are nearly alike.
- The radius is a quantile of the good patches' distances before training, and fixed: what lies within is left as it is.
  The paper sets r = 1e-5 (`radius=1e-5`), so every patch is drawn in and none is pushed away, which shrinks the very
  differences that the score needs; in the authors' code that r is trained (`r_mode=trainable`), and grows until some
  are pushed. `alpha` is 0, as distances are of another size.
- The image score is the largest patch score (`image_score=map` for the largest of the smoothed map).
- Bank and descriptor are compressed as in Table 6 (`gamma_c`, `gamma_d`); a step sees some patches of each image
  (`positions=0`: all) and is smaller, and there are fewer of them (`learning_rate`, `epochs`, `max_steps`). Training
  raises the image figures and lowers AUPRO, so that more steps are not better.

Where the paper and the authors' code part, this follows the code: distances in the loss are squared (`distance=plain`),
maps are averaged over 3 x 3 neighbours, zeros beyond the border counted (`pool=1`), and losses are divided by `nu`
(`nu=1`). `--preset paper` is the text, `--preset authors` their code. A descriptor of raw patches starts as He's, as
the text says; the code leaves PyTorch's, which is smaller by the root of six (`start=torch`). Their maps are leaky
ReLUs of each level's sum; those of timm's networks have passed a plain ReLU, and no setting changes that.

EfficientNets' maps are divided by their channels (`divided=true`) in the paper, which takes several maps of each scale;
timm names one level a stage, and so one of each scale is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from flawmap.backbones import Backbone, levels_at
from flawmap.methods.blocks.hypersphere_centres import HypersphereCentres
from flawmap.methods.blocks.moments import Moments, whitening_axes
from flawmap.methods.blocks.patches import fused, sampled
from flawmap.methods.blocks.smoothing import Enlarge, largest, scored_positions
from flawmap.methods.contract import Collect, LevelledConfig, Method, Optimise, Stage, epochs_within
from flawmap.methods.presets import Preset, read_presets
from flawmap.neighbours import k_nearest, nearest, search_index

_RADIUS_SAMPLE = 4096
_RIDGE = 0.1  # of the mean variance: directions that good parts hardly use must not drown the others
_ROWS = 2048  # queries whose products with the bank are held at a time


class CFAConfig(LevelledConfig):
    """Settings of CFA."""

    levels: tuple[str, ...] | None = Field(None, description="backbone levels; those at 1/4, 1/8 and 1/16 if unset")
    stride: int = Field(
        4, ge=1, le=1024, description="input pixels between patches, or those of the finest level if more"
    )
    pool: int = Field(3, ge=1, le=63, description="side of the neighbourhood that is averaged, odd")
    divided: bool = Field(False, description="each map is divided by the number of its channels (Section 4.1)")
    whiten: bool = Field(True, description="whitened patches and a descriptor that starts as the identity")
    start: Literal["he", "torch"] = Field(
        "he", description="a descriptor of raw patches starts as He's, or as PyTorch starts linear layers"
    )
    coordinates: bool = Field(True, description="CoordConv: the descriptor also reads row and column")
    gamma_d: float = Field(0.5, gt=0, le=1, description="channels after the descriptor over those before it")
    bank: Literal["kmeans", "mean", "ema"] = Field("kmeans", description="how the memory bank is made")
    gamma_c: float = Field(0.2, gt=0, le=1, description="vectors of the bank over positions of the grid")
    beta: float = Field(0.0, ge=0, le=1, description="rate of Algorithm 1's moving average; 0: a running mean")
    attraction: bool = Field(True, description="the loss of Eq. 1")
    repulsion: bool = Field(True, description="the loss of Eq. 2")
    k: int = Field(3, ge=1, le=1000, description="K, nearest vectors that attract (Eq. 1) and that score (Eq. 5)")
    j: int = Field(3, ge=1, le=1000, description="J, next nearest vectors that repel (Eq. 2)")
    radius: float = Field(0.0, ge=0, le=1e6, description="r; 0: the quantile of the good patches' distances")
    radius_quantile: float = Field(0.8, ge=0, le=1, description="share of those distances within the radius")
    r_mode: Literal["fixed", "trainable"] = Field("fixed", description="whether r is trained with the descriptor")
    alpha: float = Field(0.0, ge=0, le=1e6, description="margin of the repulsion")
    nu: float = Field(1e-3, gt=0, le=1e6, description="both losses are divided by it")
    distance: Literal["squared", "plain"] = Field("squared", description="the distance of Eqs. 1 and 2")
    scoring: Literal["naive", "certainty"] = Field("naive", description="Eq. 4, or Eq. 5")
    image_score: Literal["patch", "map"] = Field("patch", description="largest value before, or after smoothing")
    epochs: int = Field(10, ge=0, le=100_000, description="passes over the training images")
    max_steps: int = Field(
        400, ge=0, le=100_000_000, description="fewer passes where they would take more steps; 0: no limit"
    )
    positions: int = Field(256, ge=0, le=1_000_000, description="patches of each image that a step sees; 0: all")
    batch_size: int = Field(4, ge=1, le=4096, description="images in a step")
    learning_rate: float = Field(3e-4, gt=0, le=1e6, description="of AdamW with amsgrad")
    weight_decay: float = Field(5e-4, ge=0, le=1e6, description="of AdamW")
    sigma: float = Field(4.0, ge=0, le=1000, description="Gaussian smoothing of the map, in input pixels")


class CFA(Method):
    """See the module's docstring."""

    Config = CFAConfig
    presets: ClassVar[dict[str, Preset]] = read_presets("cfa")
    optimises: ClassVar[bool] = True
    config: CFAConfig

    def __init__(self, config: CFAConfig, backbone: Backbone, size: tuple[int, int]) -> None:
        super().__init__(config, backbone, size)
        finest = max(config.stride, min(backbone.reductions))
        self.grid = (round(size[0] / finest), round(size[1] / finest))
        width = sum(backbone.channels)  # D
        adapted = max(1, int(config.gamma_d * width))  # D'
        self.vectors = max(1, int(config.gamma_c * self.grid[0] * self.grid[1]))
        self.descriptor = nn.Linear(width + 2 * config.coordinates, adapted)  # a 1 x 1 convolution, channels last
        self.radius = nn.Parameter(torch.zeros(()), requires_grad=config.r_mode == "trainable")
        self.register_buffer("shift", torch.zeros(width))
        self.register_buffer("rotation", torch.zeros(width, width) if config.whiten else None)
        self.register_buffer("index", torch.zeros(0, adapted + 1))
        self.register_buffer("coordinates", coordinates(*self.grid), persistent=False)
        self.shift: Tensor
        self.rotation: Tensor | None
        self.index: Tensor
        self.coordinates: Tensor
        self.resize = Enlarge(self.grid, size, config.sigma)

    @classmethod
    def resolved(cls, config: CFAConfig, backbone: str) -> CFAConfig:
        return config if config.levels else config.model_copy(update={"levels": levels_at(backbone, (4, 8, 16))})

    def patches(self, features: list[Tensor]) -> Tensor:
        """-> (B, h*w, D): all levels, averaged over the neighbourhood, on one grid."""
        side = self.config.pool
        maps = [F.avg_pool2d(level, side, 1, side // 2) if side > 1 else level for level in features]
        if self.config.divided:
            maps = [level / level.shape[1] for level in maps]
        return fused(maps, self.grid)

    def inputs(self, patches: Tensor, places: Tensor) -> Tensor:
        """Patches (B, N, D) and their coordinates (1 or B, N, 2) -> (B, N, D + 2): what the descriptor reads."""
        if self.rotation is not None:
            patches = (patches - self.shift) @ self.rotation
        if not self.config.coordinates:
            return patches
        return torch.cat([patches, places.expand(patches.shape[0], -1, -1)], 2)

    def embed(self, features: list[Tensor]) -> Tensor:
        """-> (B, h*w, D'): phi(p) of every patch."""
        embedded: Tensor = self.descriptor(self.inputs(self.patches(features), self.coordinates))
        return embedded

    def stages(self, images: int) -> Iterator[Stage]:
        nn.init.zeros_(self.descriptor.bias)
        if self.config.whiten:
            self._start()
            yield self._whitening()
        elif self.config.start == "he":
            nn.init.kaiming_normal_(self.descriptor.weight)
        else:
            self.descriptor.reset_parameters()
        yield self._memory(images)
        epochs = epochs_within(self.config.max_steps, self.config.epochs, images, self.config.batch_size)
        if epochs:
            trainable = [*self.descriptor.parameters(), self.radius]
            yield Optimise(
                "patch descriptor",
                self.loss,
                [parameter for parameter in trainable if parameter.requires_grad],
                epochs,
                self.config.batch_size,
                lambda parameters: torch.optim.AdamW(
                    parameters, self.config.learning_rate, weight_decay=self.config.weight_decay, amsgrad=True
                ),
                after_epoch=lambda: f"r = {float(self.radius.detach()):.4g}",
            )

    @torch.no_grad()
    def _start(self) -> None:
        """The descriptor passes on the first principal components, and the coordinates where it reads them."""
        weight = nn.init.eye_(self.descriptor.weight)
        if self.config.coordinates:
            weight[-2:] = 0
            weight[-2:, -2:] = torch.eye(2)[-len(weight) :]

    def _whitening(self) -> Collect:
        """Patches turned onto their principal axes, and scaled so that their mean square length is one."""
        width = len(self.shift)
        moments = Moments(width)

        def update(features: list[Tensor], inside: Tensor | None) -> None:
            patches = self.patches(features)  # (B, T, D)
            moments.update(patches[self._weights(inside, patches) > 0])

        def close(progress: Callable[[int, int], None]) -> None:
            assert self.rotation is not None
            self.shift.copy_(moments.mean())
            # Largest variances first: gamma_d keeps those.
            self.rotation.copy_(whitening_axes(moments.covariance(), _RIDGE) / math.sqrt(width))
            progress(1, 1)

        return Collect("whitening", update, close, peak_bytes=4 * 8 * width * width)

    def _memory(self, images: int) -> Collect:
        """The memory bank, in the space of the untrained descriptor, and the radius where the data give it."""
        config, positions = self.config, self.grid[0] * self.grid[1]
        bank = HypersphereCentres(
            config.bank,
            self.vectors,
            images,
            positions,
            self.index.shape[1] - 1,
            beta=config.beta,
            sample=_RADIUS_SAMPLE,
        )

        def update(features: list[Tensor], inside: Tensor | None) -> None:
            embedded = self.embed(features)  # (B, T, D')
            bank.add(embedded, self._weights(inside, embedded))

        def close(progress: Callable[[int, int], None]) -> None:
            centres, patches = bank.close(progress)
            self.index = search_index(centres)
            if config.radius:
                self.radius.fill_(config.radius)
            else:
                some = patches[torch.randperm(len(patches))[:_RADIUS_SAMPLE]]
                distances = self._distances(some, min(config.k, len(centres)))
                self.radius.copy_(distances.flatten().quantile(config.radius_quantile).sqrt())

        return Collect("memory bank", update, close, peak_bytes=bank.peak_bytes)

    def _weights(self, inside: Tensor | None, embedded: Tensor) -> Tensor:
        """(B, T): one for the positions that are scored, zero for the others."""
        scored = scored_positions(inside, self.grid)
        return torch.ones_like(embedded[..., 0]) if scored is None else scored

    def _distances(self, embedded: Tensor, count: int) -> Tensor:
        """(N, D') -> (N, count): D, to the nearest vectors of the bank, as the loss measures them."""
        with torch.no_grad():
            rows = F.pad(embedded, (0, 1), value=1.0)
            indices = torch.cat([(part @ self.index.T).topk(count, dim=1).indices for part in rows.split(_ROWS)])
        squared = (embedded[:, None] - self.index[indices, :-1]).square().sum(2)
        # The root has no slope at zero, where a patch is a vector of the bank.
        return squared if self.config.distance == "squared" else squared.clamp_min(1e-12).sqrt()

    def loss(self, features: list[Tensor], inside: Tensor | None) -> Tensor:
        """Eq. 3 over a batch of maps."""
        config = self.config
        patches = self.patches(features)  # (B, T, D)
        patches, weights, chosen = sampled(patches, scored_positions(inside, self.grid), config.positions)  # of N each
        places = self.coordinates[0, chosen]  # (B, N, 2)
        k = min(config.k, len(self.index))
        j = min(config.j, len(self.index) - k)
        distances = self._distances(self.descriptor(self.inputs(patches, places)).flatten(0, 1), k + j)  # (B*N, K + J)
        weights, square = weights.flatten()[:, None], self.radius.square()
        count = weights.sum()
        loss = 0 * distances.sum()
        if config.attraction:
            loss = loss + (weights * (distances[:, :k] - square).clamp_min(0)).sum() / (k * count)  # Eq. 1
        if config.repulsion and j:
            outside = (square - distances[:, k:] - config.alpha).clamp_min(0)
            loss = loss + (weights * outside).sum() / (j * count)  # Eq. 2
        return loss / config.nu

    def score(self, features: list[Tensor], inside: Tensor | None = None) -> tuple[Tensor, Tensor]:
        embedded = self.embed(features).flatten(0, 1)  # (B*h*w, D')
        if self.config.scoring == "naive":
            scores = nearest(embedded, self.index)[0]  # Eq. 4
        else:
            # An exported graph takes any number of rows, which a loop over parts does not.
            parts = [embedded] if torch.onnx.is_in_onnx_export() else embedded.split(_ROWS)
            distances = torch.cat([k_nearest(part, self.index, self.config.k)[0] for part in parts])  # (B*h*w, K)
            scores = (-distances).softmax(1)[:, 0] * distances[:, 0]  # Eq. 5
        anomaly_map = scores.view(-1, 1, *self.grid)
        if self.config.image_score == "map":
            return anomaly_map, self.enlarge(anomaly_map, inside).amax((1, 2, 3))
        return anomaly_map, largest(anomaly_map, inside)


def coordinates(height: int, width: int) -> Tensor:
    """(1, h*w, 2): row and column of each position, from -1 to 1 (CoordConv, Liu et al. 2018)."""
    rows, columns = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), 2).view(1, -1, 2)
