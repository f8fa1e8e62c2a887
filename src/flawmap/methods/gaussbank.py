"""Gaussbank: a Gaussian at each place and a bank of patches, one map. Not from a paper; its parts are.

The Gaussians know what belongs where, and see little in parts that lie in any pose; the bank knows what good parts are
made of, and not where it belongs. The map is the sum of the distances, each in units of the spread s that it has on
good images that were not learnt:

    m = d_Gauss / s_Gauss + bank_share * ((1 - deep_share) d_bank / s_bank + deep_share d_deep / s_deep)

- The Gaussians are those of PaDiM (Defard et al., ICPR 2021) with two changes. Instead of a random choice of channels,
  embeddings are whitened by the covariance within positions, pooled over all of them, and `channels` random orthogonal
  directions of that space are kept: each carries as much of what is not usual as any other. Instead of a fixed ridge,
  each position's covariance is shrunk towards the pooled one, by as much as the images can tell them apart (Ledoit &
  Wolf, J. Multivariate Anal. 2004, Lemma 3.1 with the pooled covariance as the target).
- The banks are PatchCore's (Roth et al., CVPR 2022), as `patchcore` has them.
- The spreads are standard deviations over the places of all training images, each scored as if it, and what stands
  beside it of its near-duplicates, had been left out.
- The map is levelled where the parts lie alike (`level=auto`), by good images scored as if they had not been learnt.
- The largest value of the map, before it is enlarged, is the image score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from flawmap.backbones import Backbone
from flawmap.methods.blocks.memory_bank import (
    MemoryBankConfig,
    collect_banks,
    forget_owners,
    make_banks,
    resolved_levels,
)
from flawmap.methods.blocks.patches import resized
from flawmap.methods.blocks.pooled_gaussians import PooledGaussians
from flawmap.methods.blocks.smoothing import Enlarge, largest, on_grid, scored_positions
from flawmap.methods.contract import Collect, Method, Stage


class GaussbankConfig(MemoryBankConfig):
    """Settings of Gaussbank."""

    channels: int = Field(128, ge=2, le=4096, description="directions that the Gaussians keep")
    ridge: float = Field(
        0.01, gt=0, le=1, description="of the pooled covariance, as a share of each channel's variance"
    )
    bank_share: float = Field(1.0, ge=0, le=100, description="weight of the banks beside the Gaussians")
    deep_share: float = Field(0.5, ge=0, le=1, description="share of the deep levels in the banks' distance")
    sigma: float = Field(4.0, ge=0, le=1000, description="Gaussian smoothing of the map, in input pixels")
    level: Literal["none", "auto"] = Field(
        "auto", description="auto levels maps by good images' own, where parts lie alike"
    )


class Gaussbank(Method):
    """See the module's docstring."""

    Config = GaussbankConfig
    positional = True
    config: GaussbankConfig

    def __init__(self, config: GaussbankConfig, backbone: Backbone, size: tuple[int, int]) -> None:
        super().__init__(config, backbone, size)
        assert config.levels
        self.bank, self.deep_bank = make_banks(config, backbone, size)
        read = [backbone.levels.index(level) for level in config.levels]
        self.gaussians = PooledGaussians(read, backbone, self.bank.grid, config.channels, config.ridge)
        self.resize = Enlarge(self.bank.grid, size, config.sigma)
        self.register_buffer("spreads", torch.ones(3))  # of the Gaussians', the bank's and the deep bank's distances
        self.spreads: Tensor

    @classmethod
    def resolved(cls, config: GaussbankConfig, backbone: str) -> GaussbankConfig:
        return resolved_levels(config, backbone)

    def stages(self, images: int) -> Iterator[Stage]:
        groups = torch.arange(images) if self.groups is None else self.groups
        yield collect_banks((self.bank, self.deep_bank), images, groups)
        yield self.gaussians.pooled_covariance()
        yield self.gaussians.covariances(groups)
        yield self._learn_spreads(groups)

    def _learn_spreads(self, groups: Tensor) -> Collect:
        sums = torch.zeros(3, 3, dtype=torch.float64)  # count, sum and sum of squares of each distance
        banks = (self.bank, self.deep_bank)
        begun = 0

        def update(features: list[Tensor], inside: Tensor | None) -> None:
            nonlocal begun
            numbers = groups[begun : begun + len(features[0])].to(features[0].device)
            begun += len(numbers)
            distances = self._left_out(features, inside, numbers)
            for of, values in zip(sums, distances or (), strict=False):
                if values is not None:
                    held = (values if inside is None else values[on_grid(inside, values.shape[-2:])[:, 0] > 0]).double()
                    of += torch.tensor([held.numel(), float(held.sum()), float(held.square().sum())])

        def close(progress: Callable[[int, int], None]) -> None:
            count, first, second = sums.T
            n = count.clamp_min(1)
            spread = (second / n - (first / n).square()).clamp_min(0).sqrt()
            # Of two images none can be left out: the distances' usual sizes then.
            usual = torch.tensor([1.0, *(1.0 if bank is None else float(bank.unit) for bank in banks)])
            self.spreads.copy_(torch.where(spread > 0, spread.float(), usual))
            progress(1, 1)

        return Collect("spreads", update, close, peak_bytes=0)

    def score(self, features: list[Tensor], inside: Tensor | None = None) -> tuple[Tensor, Tensor]:
        deep = None if self.deep_bank is None else self.deep_bank.distances(features)[0]
        return self._summed(self._gaussian(self.gaussians(features)), self.bank.distances(features)[0], deep, inside)

    def leave_one_out(
        self, features: list[Tensor], inside: Tensor | None, groups: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """By Gaussians and banks without the group's images."""
        distances = self._left_out(features, inside, groups)
        return None if distances is None else self._summed(*distances, inside)

    def _left_out(
        self, features: list[Tensor], inside: Tensor | None, groups: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """The three distances (B, h, w), each on its grid, without the groups' images."""
        scored = scored_positions(inside, self.bank.grid)
        squares = self.gaussians.left_out(features, groups, None if scored is None else scored.T)
        distances = self.bank.left_out(features, groups)
        deep = None if self.deep_bank is None else self.deep_bank.left_out(features, groups)
        if squares is None or distances is None or (deep is None and self.deep_bank is not None):
            return None
        return self._gaussian(squares), distances, deep

    def forget(self) -> None:
        super().forget()
        forget_owners(self.bank, self.deep_bank)
        self.gaussians.forget()

    def _gaussian(self, squares: Tensor) -> Tensor:
        """Squared distances (P, B) -> distances (B, h, w), near 1 on good images."""
        return (squares / self.gaussians.width).sqrt().T.view(-1, *self.bank.grid)

    def _summed(
        self, gaussian: Tensor, distances: Tensor, deep: Tensor | None, inside: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Distances (B, h, w) to the Gaussians and to the banks, each on its grid."""
        banks = distances[:, None] / self.spreads[1]
        if deep is not None:
            deep = resized(deep[:, None] / self.spreads[2], self.bank.grid)
            banks = (1 - self.config.deep_share) * banks + self.config.deep_share * deep
        anomaly_map = gaussian[:, None] / self.spreads[0] + self.config.bank_share * banks  # (B, 1, h, w)
        return anomaly_map, largest(anomaly_map, inside)
