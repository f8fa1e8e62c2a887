"""Feature maps of several levels as patches of one grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def fused(maps: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
    """Maps (B, C_i, h_i, w_i) -> patches (B, h*w, sum of C_i), each level bilinearly on the grid (h, w)."""
    return torch.cat([resized(level, grid) for level in maps], 1).flatten(2).transpose(1, 2)


def resized(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Maps (B, C, h, w), bilinearly on another grid."""
    return maps if maps.shape[-2:] == grid else F.interpolate(maps, size=grid, mode="bilinear", align_corners=False)


def averaged(maps: Sequence[Tensor], side: int) -> list[Tensor]:
    """Each vector of maps (B, C, h, w) averaged with those of the square around it, of an odd side, that exist."""
    if side == 1:
        return list(maps)
    return [F.avg_pool2d(level, side, 1, side // 2, count_include_pad=False) for level in maps]


class PatchSample:
    """Patches of so many images, drawn from each alike, on the device of the method.

    Attributes:
        seen: how many there were to draw from.
        origins: (N,) int64, the number of the image that each row came from, in the order in which they were added.

    Args:
        images: how many will be added.
        positions: patches of an image.
        channels: C.
        most: patches in all, but one of each image at least.
        device: where they are kept.
        generator: draws them; torch's own if None.
    """

    def __init__(
        self,
        images: int,
        positions: int,
        channels: int,
        *,
        most: int,
        device: torch.device,
        generator: torch.Generator | None = None,
    ) -> None:
        self.seen = 0
        self._each = min(positions, max(1, most // images))
        self._rows = torch.empty(images * self._each, channels, device=device)
        self._filled = 0
        self._counts: list[int] = []
        self._generator = generator

    @property
    def nbytes(self) -> int:
        return self._rows.nbytes

    @property
    def rows(self) -> Tensor:
        """(N, C), what was drawn; changes to it stay."""
        return self._rows[: self._filled]

    @property
    def origins(self) -> Tensor:
        counts = torch.tensor(self._counts, device=self._rows.device)
        return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)

    def add(self, patches: Tensor, scored: Tensor | None) -> None:
        """Draws from the patches (B, T, C) of each image, those where `scored` (B, T) is 0 left out."""
        for i, own in enumerate(patches):
            kept = own if scored is None else own[scored[i] > 0]
            self.seen += len(kept)
            if len(kept) > self._each:
                kept = kept[torch.randperm(len(kept), generator=self._generator)[: self._each].to(kept.device)]
            self._rows[self._filled : self._filled + len(kept)] = kept
            self._filled += len(kept)
            self._counts.append(len(kept))


def sampled(patches: Tensor, scored: Tensor | None, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Patches drawn for each image, without repetition, those that are scored first.

    Args:
        patches: (B, T, C).
        scored: (B, T) of 0 and 1; None is everywhere.
        count: of each image, or all there are if fewer; 0: all, in their order.

    Returns:
        n = `count` or all patches (B, n, C), whether they are scored (B, n), and their positions (B, n), below T.
    """
    if scored is None:
        scored = torch.ones_like(patches[..., 0])
    if not count:
        return patches, scored, torch.arange(patches.shape[1], device=patches.device).expand(len(patches), -1)
    drawn = torch.rand(scored.shape).to(scored) + scored
    places = drawn.topk(min(count, scored.shape[1]), dim=1).indices  # (B, n)
    patches = patches.gather(1, places[..., None].expand(-1, -1, patches.shape[2]))
    return patches, scored.gather(1, places), places
