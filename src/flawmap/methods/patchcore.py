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

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from flawmap.backbones import Backbone
from flawmap.errors import FlawmapError
from flawmap.methods.blocks.memory_bank import (
    MemoryBankConfig,
    collect_banks,
    forget_owners,
    make_banks,
    resolved_levels,
)
from flawmap.methods.blocks.patches import resized
from flawmap.methods.blocks.smoothing import Enlarge, largest, on_grid, within
from flawmap.methods.contract import Method, Stage
from flawmap.methods.presets import Preset, read_presets
from flawmap.neighbours import k_nearest


class PatchCoreConfig(MemoryBankConfig):
    """Settings of PatchCore."""

    map_share: float = Field(0.3, ge=0, le=1, description="share of the deep levels in the map")
    image_share: float = Field(0.35, ge=0, le=1, description="share of the deep levels in the image score")
    reweight: bool = Field(False, description="the paper's reweighting of the image score (Eq. 7)")
    neighbours: int = Field(9, ge=2, le=1000, description="b of Eq. 7")
    sigma: float = Field(4.0, ge=0, le=1000, description="Gaussian smoothing of the map, in input pixels")


class PatchCore(Method):
    """See the module's docstring."""

    Config = PatchCoreConfig
    presets: ClassVar[dict[str, Preset]] = read_presets("patchcore")
    updates = True
    config: PatchCoreConfig

    def __init__(self, config: PatchCoreConfig, backbone: Backbone, size: tuple[int, int]) -> None:
        super().__init__(config, backbone, size)
        self.bank, self.deep_bank = make_banks(config, backbone, size)
        self.resize = Enlarge(self.bank.grid, size, config.sigma)

    @classmethod
    def resolved(cls, config: PatchCoreConfig, backbone: str) -> PatchCoreConfig:
        if config.deep_levels and config.reweight:
            raise FlawmapError(
                "reweight=true scores a single bank: leave deep_levels unset, or set deep_levels= (none)"
            )
        return resolved_levels(config, backbone, single=config.reweight)

    def stages(self, images: int) -> Iterator[Stage]:
        yield collect_banks((self.bank, self.deep_bank), images, self.groups)

    def further_stages(self, images: int) -> Iterator[Stage]:
        """The banks' vectors and the new patches are thinned together; projections and units stay."""
        yield collect_banks((self.bank, self.deep_bank), images, None)

    def score(self, features: list[Tensor], inside: Tensor | None = None) -> tuple[Tensor, Tensor]:
        distances, indices, queries = self.bank.distances(features)  # of each patch to the bank (Eq. 6)
        if self.deep_bank is not None:
            return self._mixed(distances, self.deep_bank.distances(features)[0], inside)
        anomaly_map = distances[:, None]  # (B, 1, h, w)
        scored = None if inside is None else on_grid(inside, self.bank.grid)
        scores, farthest = within(anomaly_map, scored).flatten(1).max(1)  # s* and its patch (Eq. 6)
        if self.config.reweight:
            farthest = farthest[:, None]  # (B, 1)
            query = queries.gather(1, farthest[..., None].expand(-1, 1, queries.shape[2]))[:, 0]  # (B, C), m^test,*
            vectors = self.bank.index[:, :-1]
            nearest_vector = vectors[indices.gather(1, farthest)[:, 0]]  # (B, C), m*
            _, around = k_nearest(nearest_vector, self.bank.index, self.config.neighbours)
            to_neighbours = (query[:, None] - vectors[around]).square().sum(2).sqrt()  # (B, b)
            scores = (1 - to_neighbours.softmax(1)[:, 0]) * scores  # Eq. 7
        return anomaly_map, scores

    def leave_one_out(
        self, features: list[Tensor], inside: Tensor | None, groups: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """By the banks without the group's vectors; None with `reweight`, whose neighbours would have to be others."""
        if self.config.reweight:
            return None
        distances = self.bank.left_out(features, groups)
        if distances is None:
            return None
        if self.deep_bank is None:
            return distances[:, None], largest(distances[:, None], inside)
        deep = self.deep_bank.left_out(features, groups)
        return None if deep is None else self._mixed(distances, deep, inside)

    def forget(self) -> None:
        super().forget()
        forget_owners(self.bank, self.deep_bank)

    def _mixed(self, distances: Tensor, deep: Tensor, inside: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both banks' distances (B, h, w), each in its unit, with the map's shares and the image score's."""
        assert self.deep_bank is not None
        shallow = distances[:, None] / self.bank.unit  # (B, 1, h, w)
        deep = resized(deep[:, None] / self.deep_bank.unit, self.bank.grid)
        anomaly_map, mixed = (
            (1 - share) * shallow + share * deep for share in (self.config.map_share, self.config.image_share)
        )
        return anomaly_map, largest(mixed, inside)
