"""PatchCore: Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022.

Patch features of good images, averaged over their neighbourhood, are kept in a memory bank thinned by a greedy coreset;
a new patch is as abnormal as it is far from the nearest of them.

Where this differs from the paper, and the setting that takes the difference back (`--preset paper` takes back all):

- Channels are standardised over the good patches (`standardise=false`).
- Patches are compared by fewer numbers than they have channels (`components=0`, `deep_components=0`): half of them
  principal components of the good patches, half sums of the other components, without which a defect that lies outside
  the first would not be seen. Distances are kept on average, and the search is faster by as much as it is narrower.
- A second, coarser bank on `deep_levels` has a share in map and image score, each bank's distances in units of the mean
  distance of its own training patches. `deep_levels=` leaves one bank, as in the paper.
- The image score is the largest patch distance; `reweight=true` adds the paper's factor (Eq. 7), which is defined for a
  single bank: it is refused beside `deep_levels`.
- A bank keeps at least `min_vectors`, since 1 % of a few dozen images is too little to cover them.
- Levels are averaged over the neighbourhood channel by channel. The authors' code instead pools each neighbourhood of
  C x 3 x 3 values to 1024 numbers across channels, which mixes channels in memory order; the paper's text (Eq. 2) does
  not ask for it.
- The coreset works in the full space; the paper's random projection (Section 3.2) served speed alone. Only where images
  are learnt later does it work on the same numbers as the search.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from flawmap.backbones import Backbone, default_deep_levels, default_levels
from flawmap.errors import FlawmapError
from flawmap.methods.blocks.moments import Moments
from flawmap.methods.blocks.patch_projection import PatchProjection
from flawmap.methods.blocks.patches import PatchSample, resized
from flawmap.methods.blocks.smoothing import Enlarge, on_grid, scored_positions, within
from flawmap.methods.contract import Collect, Config, Method, Stage
from flawmap.neighbours import k_center_greedy, k_nearest, nearest, search_index

_UNIT_SAMPLE = 4096
_MOMENT_SAMPLE = 65536


class PatchCoreConfig(Config):
    """Settings of PatchCore."""

    levels: tuple[str, ...] | None = Field(None, description="levels of the bank; the backbone's own if unset")
    deep_levels: tuple[str, ...] | None = Field(None, description="levels of a second, coarser bank; empty: none")
    map_share: float = Field(0.3, ge=0, le=1, description="share of the deep levels in the map")
    image_share: float = Field(0.35, ge=0, le=1, description="share of the deep levels in the image score")
    stride: int = Field(8, ge=1, description="input pixels between patches, or those of the finest level if more")
    pool: int = Field(3, ge=1, description="side of the neighbourhood that is averaged, odd")
    standardise: bool = Field(True, description="each channel to zero mean and unit variance over good patches")
    components: int = Field(96, ge=0, description="half principal components, half sums of the others; 0: all channels")
    deep_components: int = Field(128, ge=0, description="the same of the deep levels, which have more channels")
    coreset: float = Field(0.01, gt=0, le=1, description="share of the patches that the bank keeps")
    deep_coreset: float = Field(0.02, gt=0, le=1, description="share of the patches that the deep levels' bank keeps")
    min_vectors: int = Field(1500, ge=1, description="fewest vectors that the bank keeps, if it has as many patches")
    max_vectors: int = Field(10_000, ge=1, description="most vectors that a bank keeps")
    max_candidates: int = Field(1_000_000, ge=1, description="most patches that the coreset chooses from")
    reweight: bool = Field(False, description="the paper's reweighting of the image score (Eq. 7)")
    neighbours: int = Field(9, ge=2, description="b of Eq. 7")
    sigma: float = Field(4.0, ge=0, le=1000, description="Gaussian smoothing of the map, in input pixels")


class MemoryBank(nn.Module):
    """Patches of some levels: their embedding, the vectors that are kept, and the distance to them."""

    def __init__(
        self,
        config: PatchCoreConfig,
        backbone: Backbone,
        levels: Sequence[str],
        components: int,
        share: float,
        fewest: int,
        size: tuple[int, int],
    ) -> None:
        """`share` is the part of its patches that the bank keeps, but no fewer than `fewest`."""
        super().__init__()
        self.config, self.share, self.fewest = config, share, fewest
        read = [backbone.levels.index(level) for level in levels]
        finest = max(config.stride, min(backbone.reductions[i] for i in read))
        self.grid = (round(size[0] / finest), round(size[1] / finest))
        self.patches = PatchProjection(
            read,
            [backbone.channels[i] for i in read],
            self.grid,
            pool=config.pool,  # Eq. 2
            standardise=config.standardise,
            balance=0,
            components=components - components // 2,
            folded=components // 2,
        )
        self.register_buffer("index", torch.empty(0, self.patches.outputs + 1))
        self.register_buffer("unit", torch.ones(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))  # patches that the bank was chosen from
        self.index: Tensor
        self.unit: Tensor
        self.seen: Tensor
        self.sample: PatchSample | None = None  # while patches are collected

    def distances(self, features: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """-> distances (B, h, w), bank indices (B, h*w), patches (B, h*w, c)."""
        queries = self.patches(features)
        distances, indices = nearest(queries.flatten(0, 1), self.index)
        return distances.view(-1, *self.grid), indices.view(queries.shape[:2]), queries

    def reserve(self, images: int, generator: torch.Generator) -> int:
        """Makes room for the candidates of `images` images; returns the bytes."""
        positions, width, device = self.grid[0] * self.grid[1], len(self.patches.shift), self.index.device
        most = self.config.max_candidates
        self.sample = PatchSample(images, positions, width, most=most, device=device, generator=generator)
        return self.sample.nbytes

    def add(self, features: list[Tensor], inside: Tensor | None) -> None:
        assert self.sample is not None
        self.sample.add(self.patches.patches(features), scored_positions(inside, self.grid))

    def close(self, generator: torch.Generator, progress: Callable[[int, int], None]) -> None:
        """Learns the projection from the candidates and keeps a coreset of them (Algorithm 1)."""
        assert self.sample is not None
        candidates = self.sample.rows
        self.seen += self.sample.seen
        if len(candidates) == 0:
            raise FlawmapError("the region of interest leaves no patch to learn from: draw a larger region")
        wanted = round(self.share * int(self.seen))
        size = min(max(wanted, self.fewest), self.config.max_vectors)
        known = len(self.index) > 0
        if not known and self.patches.learns:
            moments = Moments(candidates.shape[1])
            for part in candidates[:: max(1, len(candidates) // _MOMENT_SAMPLE)].split(8192):
                moments.update(part)
            self.patches.learn(moments)
        candidates.sub_(self.patches.shift).mul_(self.patches.scale)
        if known:  # of the bank's vectors only their projections are left
            candidates = torch.cat([self.index[:, :-1], self.patches.projected(candidates)])
        picks = torch.from_numpy(k_center_greedy(candidates.cpu().numpy(), size, progress=progress))
        vectors = candidates[picks.to(candidates.device)]
        self.index = search_index(vectors if known else self.patches.projected(vectors))
        self.sample = None
        if known:
            return
        sample = candidates[torch.randperm(len(candidates), generator=generator)[:_UNIT_SAMPLE]]
        sample = self.patches.projected(sample)
        # A patch that the bank keeps is at distance zero from itself: its nearest other counts, lest the unit vanish
        # where few images leave nearly all patches in the bank.
        near = torch.cat([k_nearest(part, self.index, 2)[0] for part in sample.split(512)])
        self.unit = torch.where(near[:, 0] > 0, near[:, 0], near[:, -1]).mean().clamp_min(1e-12)


class PatchCore(Method):
    """See the module's docstring."""

    Config = PatchCoreConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"deep_levels": (), "standardise": False, "components": 0, "deep_components": 0, "reweight": True},
    }
    updates = True
    config: PatchCoreConfig

    def __init__(self, config: PatchCoreConfig, backbone: Backbone, size: tuple[int, int]) -> None:
        super().__init__(config, backbone, size)
        assert config.levels
        self.bank = MemoryBank(
            config, backbone, config.levels, config.components, config.coreset, config.min_vectors, size
        )
        self.deep_bank: MemoryBank | None = None
        if config.deep_levels:
            fewest = config.min_vectors // 2  # there are fewer, coarser patches to cover
            self.deep_bank = MemoryBank(
                config, backbone, config.deep_levels, config.deep_components, config.deep_coreset, fewest, size
            )
        self.resize = Enlarge(self.bank.grid, size, config.sigma)

    @classmethod
    def resolved(cls, config: PatchCoreConfig, backbone: str) -> PatchCoreConfig:
        levels, deep_levels = config.levels, config.deep_levels
        if deep_levels is None:  # levels of the user's own choice stand alone, and so does what is reweighted
            deep_levels = default_deep_levels(backbone) if levels is None and not config.reweight else ()
        if deep_levels and config.reweight:
            raise FlawmapError(
                "reweight=true scores a single bank: leave deep_levels unset, or set deep_levels= (none)"
            )
        return config.model_copy(update={"levels": levels or default_levels(backbone), "deep_levels": deep_levels})

    def stages(self, images: int) -> Iterator[Stage]:
        yield self._collect(images)

    def further_stages(self, images: int) -> Iterator[Stage]:
        """The banks' vectors and the new patches are thinned together; projections and units stay."""
        yield self._collect(images)

    def _collect(self, images: int) -> Collect:
        generator = torch.Generator().manual_seed(torch.initial_seed())
        banks = [bank for bank in (self.bank, self.deep_bank) if bank is not None]

        def update(features: list[Tensor], inside: Tensor | None) -> None:
            for bank in banks:
                bank.add(features, inside)

        def close(progress: Callable[[int, int], None]) -> None:
            for bank in banks:
                bank.close(generator, progress)

        return Collect("memory bank", update, close, peak_bytes=sum(bank.reserve(images, generator) for bank in banks))

    def score(self, features: list[Tensor], inside: Tensor | None = None) -> tuple[Tensor, Tensor]:
        distances, indices, queries = self.bank.distances(features)  # of each patch to the bank (Eq. 6)
        scored = None if inside is None else on_grid(inside, self.bank.grid)
        if self.deep_bank is not None:
            shallow = distances[:, None] / self.bank.unit  # (B, 1, h, w)
            deep = self.deep_bank.distances(features)[0][:, None] / self.deep_bank.unit
            deep = resized(deep, self.bank.grid)
            mixed = self._mixed(shallow, deep, self.config.image_share)
            return self._mixed(shallow, deep, self.config.map_share), within(mixed, scored).amax((1, 2, 3))
        scores, farthest = within(distances[:, None], scored).flatten(1).max(1)  # s* and its patch (Eq. 6)
        if self.config.reweight:
            farthest = farthest[:, None]  # (B, 1)
            query = queries.gather(1, farthest[..., None].expand(-1, 1, queries.shape[2]))[:, 0]  # (B, C), m^test,*
            vectors = self.bank.index[:, :-1]
            nearest_vector = vectors[indices.gather(1, farthest)[:, 0]]  # (B, C), m*
            _, around = k_nearest(nearest_vector, self.bank.index, self.config.neighbours)
            to_neighbours = (query[:, None] - vectors[around]).square().sum(2).sqrt()  # (B, b)
            scores = (1 - to_neighbours.softmax(1)[:, 0]) * scores  # Eq. 7
        return distances[:, None], scores

    @staticmethod
    def _mixed(shallow: Tensor, deep: Tensor, share: float) -> Tensor:
        return (1 - share) * shallow + share * deep
