"""Which patches F2R's gallery keeps: a greedy coreset, as PatchCore's bank is one (Roth et al., CVPR 2022)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor

from flawmap.methods.blocks.patches import PatchSample
from flawmap.methods.contract import Config
from flawmap.neighbours import k_center_greedy


class GalleryConfig(Config):
    """Settings of the choice."""

    coreset: float = Field(0.1, gt=0, le=1, description="share of the patches that the gallery keeps")
    max_vectors: int = Field(1500, ge=1, le=10_000_000, description="most vectors that the gallery keeps")
    max_candidates: int = Field(
        500_000, ge=1, le=1_000_000_000, description="most patches that the gallery is chosen from"
    )
    reselect: bool = Field(False, description="the gallery is chosen among reverted patches, for each alpha and beta")


class GalleryCandidates:
    """Patches f of good parts, among which the gallery is chosen.

    Args:
        config: see its fields.
        images: how many will be added.
        grid: (h, w), an image's patches.
        channels: c.
        device: where they are kept.
    """

    def __init__(
        self, config: GalleryConfig, images: int, grid: tuple[int, int], channels: int, device: torch.device
    ) -> None:
        self._config = config
        self._sample = PatchSample(images, grid[0] * grid[1], channels, most=config.max_candidates, device=device)
        self.peak_bytes = self._sample.nbytes * (2 if config.reselect else 1)

    def add(self, patches: Tensor, scored: Tensor | None) -> None:
        """Patches (B, h*w, c), those where `scored` (B, h*w) is 0 left out."""
        self._sample.add(patches, scored)

    def chosen(self, reverted: Callable[[Tensor], Tensor], progress: Callable[[int, int], None]) -> Tensor:
        """(M, c): the gallery's f; `reverted` is what makes f' (N, c) of f."""
        f = self._sample.rows
        return coreset(self._config, f, reverted(f) if self._config.reselect else f, self._sample.seen, progress)


def coreset(
    config: GalleryConfig,
    f: Tensor,
    among: Tensor,
    patches: int,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """(M, c): those of the candidates f (N, c) that cover `among` (N, c), f or f', out of so many patches."""
    size = min(max(1, round(config.coreset * patches)), config.max_vectors)
    picks = k_center_greedy(among.cpu().numpy(), size, progress=progress)
    return f[torch.from_numpy(picks).to(f.device)]
