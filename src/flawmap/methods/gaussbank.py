"""Gaussbank: a Gaussian at each place and a bank of patches, one map. Not from a paper; its parts are.

The Gaussians know what belongs where, and see little in parts that lie in any pose; the bank knows what good parts are
made of, and not where it belongs. Each distance is taken in units of its usual size, and the map is their sum:

    m = d_Gauss / sqrt(C) + bank_share * ((1 - deep_share) d_bank / u + deep_share d_deep / u_deep)

- The Gaussians are those of PaDiM (Defard et al., ICPR 2021) with two changes. Instead of a random choice of channels,
  embeddings are whitened by the covariance within positions, pooled over all of them, and `channels` random orthogonal
  directions of that space are kept: each carries as much of what is not usual as any other. Instead of a fixed ridge,
  each position's covariance is shrunk towards the pooled one, by as much as the images can tell them apart (Ledoit &
  Wolf, J. Multivariate Anal. 2004, Lemma 3.1 with the pooled covariance as the target).
- The banks are PatchCore's (Roth et al., CVPR 2022), as `patchcore` has them.
- The map is levelled where the parts lie alike (`level=auto`), by good images scored as if they had not been learnt.
- The largest value of the map, before it is enlarged, is the image score.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

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
from flawmap.methods.blocks.smoothing import Enlarge, largest, scored_positions
from flawmap.methods.contract import Method, Stage


class GaussbankConfig(MemoryBankConfig):
    """Settings of Gaussbank."""

    channels: int = Field(128, ge=2, le=4096, description="directions that the Gaussians keep")
    ridge: float = Field(
        0.01, gt=0, le=1, description="of the pooled covariance, as a share of each channel's variance"
    )
    bank_share: float = Field(2.0, ge=0, le=100, description="weight of the banks beside the Gaussians")
    deep_share: float = Field(0.2, ge=0, le=1, description="share of the deep levels in the banks' distance")
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

    @classmethod
    def resolved(cls, config: GaussbankConfig, backbone: str) -> GaussbankConfig:
        return resolved_levels(config, backbone)

    def stages(self, images: int) -> Iterator[Stage]:
        yield collect_banks((self.bank, self.deep_bank), images, self.groups)
        yield self.gaussians.pooled_covariance()
        yield self.gaussians.covariances(self.groups)

    def score(self, features: list[Tensor], inside: Tensor | None = None) -> tuple[Tensor, Tensor]:
        deep = None if self.deep_bank is None else self.deep_bank.distances(features)[0]
        return self._summed(self.gaussians(features), self.bank.distances(features)[0], deep, inside)

    def leave_one_out(
        self, features: list[Tensor], inside: Tensor | None, groups: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """By Gaussians and banks without the group's images."""
        scored = scored_positions(inside, self.bank.grid)
        squares = self.gaussians.left_out(features, groups, None if scored is None else scored.T)
        distances = self.bank.left_out(features, groups)
        deep = None if self.deep_bank is None else self.deep_bank.left_out(features, groups)
        if squares is None or distances is None or (deep is None and self.deep_bank is not None):
            return None
        return self._summed(squares, distances, deep, inside)

    def forget(self) -> None:
        super().forget()
        forget_owners(self.bank, self.deep_bank)
        self.gaussians.forget()

    def _summed(
        self, squares: Tensor, distances: Tensor, deep: Tensor | None, inside: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Squared distances to the Gaussians (P, B), and the banks' (B, h, w), each on its grid."""
        gaussian = (squares / self.gaussians.width).sqrt().T.unflatten(1, (1, *self.bank.grid))  # (B, 1, h, w)
        banks = distances[:, None] / self.bank.unit
        if self.deep_bank is not None and deep is not None:
            deep = resized(deep[:, None] / self.deep_bank.unit, self.bank.grid)
            banks = (1 - self.config.deep_share) * banks + self.config.deep_share * deep
        anomaly_map = gaussian + self.config.bank_share * banks
        return anomaly_map, largest(anomaly_map, inside)
