"""PatchCore: Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022.

Patch features of good images, averaged over their neighbourhood, are kept in a memory bank thinned by a greedy coreset;
a new patch is as abnormal as it is far from the nearest of them.

Where this differs from the paper, and the setting that takes the difference back (`--preset paper` takes back all):

- Channels are standardised over the good patches (`standardise=false`).
- With `image_levels` a second bank on deeper levels gives the image score and a share `image_share` of the map; without
  them one bank gives both, as in the paper.
- The image score is the largest patch distance; `reweight=true` adds the paper's factor (Eq. 7).
- Levels are averaged over the neighbourhood channel by channel. The authors' code instead pools each neighbourhood of
  C x 3 x 3 values to 1024 numbers across channels, which mixes channels in memory order; the paper's text (Eq. 2) does
  not ask for it.
- The coreset works in the full space; the paper's random projection (Section 3.2) served speed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from flawmap.backbones import Backbone, default_image_levels, default_levels
from flawmap.methods.contract import Collect, Config, Method, Stage
from flawmap.methods.smoothing import Enlarge
from flawmap.neighbours import half_squared_norms, k_center_greedy, k_nearest, nearest

_UNIT_SAMPLE = 4096


class PatchCoreConfig(Config):
    """Settings of PatchCore."""

    map_levels: tuple[str, ...] | None = Field(
        None, description="levels of the map's bank; the backbone's own if unset"
    )
    image_levels: tuple[str, ...] | None = Field(
        None, description="levels of the image score's bank; empty: the map's bank gives both"
    )
    image_share: float = Field(0.4, ge=0, le=1, description="share of the image levels' distances in the map")
    pool: int = Field(3, ge=1, description="side of the neighbourhood that is averaged, odd")
    standardise: bool = Field(True, description="each channel to zero mean and unit variance over good patches")
    coreset: float = Field(0.01, gt=0, le=1, description="share of the patches that the map's bank keeps")
    image_coreset: float = Field(0.02, gt=0, le=1, description="share of the patches that the image levels' bank keeps")
    max_vectors: int = Field(10_000, ge=1, description="most vectors that a bank keeps")
    max_candidates: int = Field(1_000_000, ge=1, description="most patches that the coreset chooses from")
    reweight: bool = Field(False, description="the paper's reweighting of the image score (Eq. 7)")
    neighbours: int = Field(9, ge=2, description="b of Eq. 7")
    sigma: float = Field(4.0, ge=0, description="Gaussian smoothing of the map, in input pixels")


class MemoryBank(nn.Module):
    """Patches of some levels: their embedding, the vectors that are kept, and the distance to them."""

    def __init__(
        self,
        config: PatchCoreConfig,
        backbone: Backbone,
        levels: Sequence[str],
        share: float,
        size: tuple[int, int],
    ) -> None:
        """`share` is the part of its patches that the bank keeps."""
        super().__init__()
        self.config, self.share = config, share
        self.index = [backbone.levels.index(level) for level in levels]
        finest = min(backbone.reductions[i] for i in self.index)
        self.grid = (round(size[0] / finest), round(size[1] / finest))
        width = sum(backbone.channels[i] for i in self.index)
        self.register_buffer("shift", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.register_buffer("vectors", torch.empty(0, width))
        self.register_buffer("half_norms", torch.empty(0))
        self.register_buffer("unit", torch.ones(()))
        self.shift: Tensor
        self.scale: Tensor
        self.vectors: Tensor
        self.half_norms: Tensor
        self.unit: Tensor
        self.candidates = torch.empty(0)
        self.filled = 0

    def patches(self, features: list[Tensor]) -> Tensor:
        """-> (B, h, w, C): locally aware patch features (Eq. 2), all levels on the finest one's grid."""
        maps = []
        for i in self.index:
            pooled = features[i]
            if self.config.pool > 1:
                pooled = F.avg_pool2d(pooled, self.config.pool, 1, self.config.pool // 2, count_include_pad=False)
            if pooled.shape[-2:] != self.grid:
                pooled = F.interpolate(pooled, size=self.grid, mode="bilinear", align_corners=False)
            maps.append(pooled)
        return torch.cat(maps, 1).permute(0, 2, 3, 1)

    def embed(self, features: list[Tensor]) -> Tensor:
        """-> (B, h, w, C), standardised as the bank's vectors are."""
        return (self.patches(features) - self.shift) * self.scale

    def distances(self, features: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """-> distances (B, h, w), bank indices (B, h, w), queries (B, h, w, C)."""
        queries = self.embed(features)
        distances, indices = nearest(queries.flatten(0, 2), self.vectors, self.half_norms)
        return distances.view(queries.shape[:3]), indices.view(queries.shape[:3]), queries

    def reserve(self, images: int) -> int:
        """Makes room for the candidates of `images` images; returns the bytes."""
        per_image = min(self.grid[0] * self.grid[1], max(1, self.config.max_candidates // images))
        self.candidates = torch.empty(images * per_image, len(self.shift))
        self.filled, self.per_image = 0, per_image
        return self.candidates.numel() * 4

    def add(self, features: list[Tensor], generator: torch.Generator) -> None:
        for patches in self.patches(features).flatten(1, 2):  # (h*w, C) of one image
            if len(patches) > self.per_image:
                patches = patches[torch.randperm(len(patches), generator=generator)[: self.per_image]]
            self.candidates[self.filled : self.filled + len(patches)] = patches
            self.filled += len(patches)

    def close(self, images: int, generator: torch.Generator, progress: Callable[[int, int], None]) -> None:
        """Standardises the candidates and keeps a coreset of them (Algorithm 1)."""
        candidates = self.candidates[: self.filled]
        wanted = round(self.share * images * self.grid[0] * self.grid[1])
        size = max(1, min(wanted, self.config.max_vectors))
        if self.config.standardise:
            std, mean = torch.std_mean(candidates, 0, correction=0)
            self.shift.copy_(mean)
            self.scale.copy_(1 / std.clamp_min(1e-6 * float(std.max()) + 1e-12))
        candidates.sub_(self.shift).mul_(self.scale)
        self.vectors = candidates[k_center_greedy(candidates, size, progress=progress)].clone()
        self.half_norms = half_squared_norms(self.vectors)
        sample = candidates[torch.randperm(len(candidates), generator=generator)[:_UNIT_SAMPLE]]
        self.unit = nearest(sample, self.vectors, self.half_norms)[0].mean().clamp_min(1e-12)
        self.candidates = torch.empty(0)


class PatchCore(Method):
    """See the module's docstring."""

    Config = PatchCoreConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"image_levels": (), "standardise": False, "reweight": True},
    }
    config: PatchCoreConfig

    def __init__(self, config: PatchCoreConfig, backbone: Backbone, size: tuple[int, int]) -> None:
        super().__init__(config, backbone, size)
        assert config.map_levels
        assert config.image_levels is not None
        self.bank = MemoryBank(config, backbone, config.map_levels, config.coreset, size)
        self.image_bank = (
            MemoryBank(config, backbone, config.image_levels, config.image_coreset, size)
            if config.image_levels
            else None
        )
        self.resize = Enlarge(self.bank.grid, size, config.sigma)

    @classmethod
    def resolved(cls, config: PatchCoreConfig, backbone: str) -> PatchCoreConfig:
        map_levels, image_levels = config.map_levels, config.image_levels
        if image_levels is None:  # with levels of the user's own choice for the map, one bank gives both
            image_levels = default_image_levels(backbone) if map_levels is None else ()
        return config.model_copy(
            update={"map_levels": map_levels or default_levels(backbone), "image_levels": image_levels}
        )

    @classmethod
    def levels(cls, config: PatchCoreConfig) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*(config.map_levels or ()), *(config.image_levels or ()))))

    def stages(self, images: int) -> Iterator[Stage]:
        generator = torch.Generator().manual_seed(torch.initial_seed())
        banks = [bank for bank in (self.bank, self.image_bank) if bank is not None]

        def update(features: list[Tensor]) -> None:
            for bank in banks:
                bank.add(features, generator)

        def close(progress: Callable[[int, int], None]) -> None:
            for bank in banks:
                bank.close(images, generator, progress)

        yield Collect("memory bank", update, close, peak_bytes=sum(bank.reserve(images) for bank in banks))

    def score(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        distances, indices, queries = self.bank.distances(features)  # distance of each patch to the bank (Eq. 6)
        bank, anomaly_map = self.bank, distances[:, None]  # (B, 1, h, w)
        if self.image_bank is not None:
            bank, share = self.image_bank, self.config.image_share
            distances, indices, queries = bank.distances(features)
            deep = F.interpolate(distances[:, None], size=self.bank.grid, mode="bilinear", align_corners=False)
            anomaly_map = (1 - share) * anomaly_map / self.bank.unit + share * deep / bank.unit
        scores, farthest = distances.flatten(1).max(1)  # s* and its patch (Eq. 6)
        if self.config.reweight:
            rows = torch.arange(len(scores), device=scores.device)
            query = queries.flatten(1, 2)[rows, farthest]  # (B, C), m^test,*
            nearest_vector = bank.vectors[indices.flatten(1)[rows, farthest]]  # (B, C), m*
            _, around = k_nearest(nearest_vector, bank.vectors, bank.half_norms, self.config.neighbours)
            to_neighbours = (query[:, None] - bank.vectors[around]).square().sum(2).sqrt()  # (B, b)
            scores = (1 - to_neighbours.softmax(1)[:, 0]) * scores  # Eq. 7
        return anomaly_map, scores

    def enlarge(self, anomaly_map: Tensor) -> Tensor:
        enlarged: Tensor = self.resize(anomaly_map)
        return enlarged
