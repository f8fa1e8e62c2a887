"""A bank of good patches, thinned by a greedy coreset (Roth et al. 2022, Algorithm 1), and the distance to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from flawmap.backbones import Backbone, default_deep_levels, default_levels
from flawmap.errors import FlawmapError
from flawmap.methods.blocks.moments import Moments
from flawmap.methods.blocks.patch_projection import PatchProjection
from flawmap.methods.blocks.patches import PatchSample
from flawmap.methods.blocks.smoothing import scored_positions
from flawmap.methods.contract import Collect, LevelledConfig
from flawmap.neighbours import k_center_greedy, k_nearest, nearest, search_index

_UNIT_SAMPLE = 4096
_MOMENT_SAMPLE = 65536


class MemoryBankConfig(LevelledConfig):
    """Settings of banks at two depths."""

    levels: tuple[str, ...] | None = Field(None, description="levels of the bank; the backbone's own if unset")
    deep_levels: tuple[str, ...] | None = Field(None, description="levels of a second, coarser bank; empty: none")
    stride: int = Field(
        8, ge=1, le=1024, description="input pixels between patches, or those of the finest level if more"
    )
    pool: int = Field(3, ge=1, le=63, description="side of the neighbourhood that is averaged, odd")
    standardise: bool = Field(True, description="each channel to zero mean and unit variance over good patches")
    components: int = Field(
        96, ge=0, le=4096, description="half principal components, half sums of the others; 0: all channels"
    )
    deep_components: int = Field(
        128, ge=0, le=4096, description="the same of the deep levels, which have more channels"
    )
    coreset: float = Field(0.01, gt=0, le=1, description="share of the patches that the bank keeps")
    deep_coreset: float = Field(0.02, gt=0, le=1, description="share of the patches that the deep levels' bank keeps")
    min_vectors: int = Field(
        1500, ge=1, le=10_000_000, description="fewest vectors that the bank keeps, if it has as many patches"
    )
    max_vectors: int = Field(10_000, ge=1, le=10_000_000, description="most vectors that a bank keeps")
    max_candidates: int = Field(
        1_000_000, ge=1, le=1_000_000_000, description="most patches that the coreset chooses from"
    )


Resolved = TypeVar("Resolved", bound=MemoryBankConfig)


def resolved_levels(config: Resolved, backbone: str, *, single: bool = False) -> Resolved:
    """The backbone's own levels where none are set; deep ones only beside those, and not for a `single` bank."""
    levels, deep_levels = config.levels, config.deep_levels
    if deep_levels is None:  # levels of the user's own choice stand alone
        deep_levels = default_deep_levels(backbone) if levels is None and not single else ()
    return config.model_copy(update={"levels": levels or default_levels(backbone), "deep_levels": deep_levels})


class MemoryBank(nn.Module):
    """Patches of some levels: their embedding, the vectors that are kept, and the distance to them."""

    def __init__(
        self,
        config: MemoryBankConfig,
        backbone: Backbone,
        levels: Sequence[str],
        size: tuple[int, int],
        *,
        deep: bool = False,
    ) -> None:
        """`size` is the input's (height, width); `deep` takes the settings of the coarser bank."""
        super().__init__()
        components = config.deep_components if deep else config.components
        self.share = config.deep_coreset if deep else config.coreset
        self.fewest = config.min_vectors // 2 if deep else config.min_vectors  # fewer, coarser patches to cover
        self.config = config
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
        self.owners: Tensor | None = None  # (M,) the group of images that each vector came from, after a training
        self.stand_ins: dict[int, Tensor] = {}  # what the bank would hold instead of a group's vectors, (m, c) of each

    def distances(self, features: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """-> distances (B, h, w), bank indices (B, h*w), patches (B, h*w, c)."""
        queries = self.patches(features)
        distances, indices = nearest(queries.flatten(0, 1), self.index)
        return distances.view(-1, *self.grid), indices.view(queries.shape[:2]), queries

    def left_out(self, features: list[Tensor], groups: Tensor) -> Tensor | None:
        """Distances (B, h, w) to the bank without the vectors of each input's group (B,), stand-ins in their place.

        None where that leaves nothing, or where it is not known whose the vectors are.
        """
        if self.owners is None:
            return None
        found = []
        for queries, group in zip(self.patches(features), groups.tolist(), strict=True):
            others = self.index[self.owners != group]
            if group in self.stand_ins:
                others = torch.cat([others, search_index(self.stand_ins[group])])
            if not len(others):
                return None
            found.append(nearest(queries, others)[0].view(self.grid))
        return torch.stack(found)

    def reserve(self, images: int, generator: torch.Generator) -> int:
        """Makes room for the candidates of `images` images; returns the bytes."""
        positions, width, device = self.grid[0] * self.grid[1], len(self.patches.shift), self.index.device
        most = self.config.max_candidates
        self.sample = PatchSample(images, positions, width, most=most, device=device, generator=generator)
        return self.sample.nbytes

    def add(self, features: list[Tensor], inside: Tensor | None) -> None:
        assert self.sample is not None
        self.sample.add(self.patches.patches(features), scored_positions(inside, self.grid))

    def close(
        self, generator: torch.Generator, progress: Callable[[int, int], None], groups: Tensor | None = None
    ) -> None:
        """Learns the projection from the candidates and keeps a coreset of them (Algorithm 1).

        With the `groups` (N,) of the inputs, in the order in which they came, it is kept what `left_out` needs.
        """
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
        picks = picks.to(candidates.device)
        self.owners, self.stand_ins = None, {}
        if known:
            self.index = search_index(candidates[picks])
            self.sample = None
            return
        projected = self.patches.projected(candidates)
        self.index = search_index(projected[picks])
        if groups is not None:
            self._stand_in(projected, groups.to(candidates.device)[self.sample.origins], picks)
        self.sample = None
        sample = projected[torch.randperm(len(projected), generator=generator)[:_UNIT_SAMPLE]]
        # A patch that the bank keeps is at distance zero from itself: its nearest other counts, lest the unit vanish
        # where few images leave nearly all patches in the bank.
        near = torch.cat([k_nearest(part, self.index, 2)[0] for part in sample.split(512)])
        self.unit = torch.where(near[:, 0] > 0, near[:, 0], near[:, -1]).mean().clamp_min(1e-12)

    def _stand_in(self, candidates: Tensor, owners: Tensor, picks: Tensor) -> None:
        """What greedy would have picked of the others' candidates (N, c) had each group's not been there.

        A bank from which a group's vectors are only taken has holes that no bank has, since what those vectors covered
        was never picked from others: the group's patches would look too abnormal. So where other groups' candidates
        lie farther from what is left than any candidate lies from the bank, the farthest are added, one after the
        other, no more than were taken.
        """
        self.owners = owners[picks]
        distances, covered_by = nearest(candidates, self.index)
        radius = distances.max()
        by = self.owners[covered_by]
        for group in self.owners.unique().tolist():
            kept = self.index[self.owners != group]
            orphans = candidates[(by == group) & (owners != group)]
            if not len(kept) or not len(orphans):
                continue
            far, added = nearest(orphans, kept)[0], []
            for _ in range(int((self.owners == group).sum())):
                farthest = far.argmax()
                if far[farthest] <= radius:
                    break
                added.append(orphans[farthest])
                far = torch.minimum(far, (orphans - orphans[farthest]).square().sum(1).sqrt())
            if added:
                self.stand_ins[group] = torch.stack(added)


def make_banks(
    config: MemoryBankConfig, backbone: Backbone, size: tuple[int, int]
) -> tuple[MemoryBank, MemoryBank | None]:
    """The bank of `levels`, and that of `deep_levels` if there are any, of resolved settings."""
    assert config.levels
    deep = MemoryBank(config, backbone, config.deep_levels, size, deep=True) if config.deep_levels else None
    return MemoryBank(config, backbone, config.levels, size), deep


def forget_owners(*banks: MemoryBank | None) -> None:
    """Drops what `left_out` needs."""
    for bank in banks:
        if bank is not None:
            bank.owners, bank.stand_ins = None, {}


def collect_banks(banks: Sequence[MemoryBank | None], images: int, groups: Tensor | None) -> Collect:
    """One pass that fills the banks that there are; `groups` as `Method.groups`."""
    generator = torch.Generator().manual_seed(torch.initial_seed())
    filled = [bank for bank in banks if bank is not None]

    def update(features: list[Tensor], inside: Tensor | None) -> None:
        for bank in filled:
            bank.add(features, inside)

    def close(progress: Callable[[int, int], None]) -> None:
        for bank in filled:
            bank.close(generator, progress, groups)

    return Collect("memory bank", update, close, peak_bytes=sum(bank.reserve(images, generator) for bank in filled))
