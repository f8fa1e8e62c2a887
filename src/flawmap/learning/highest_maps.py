"""The anomaly maps of the few images that score highest, while the maps of all others pass by."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

KEPT = 12  # images
_MOST_BYTES = 128_000_000


class HighestMaps:
    """Takes maps in batches and keeps those of the images that score highest, within a bounded memory.

    The maps of one image follow each other. An image of too many windows to be kept may come back incomplete.
    """

    def __init__(self) -> None:
        self._scores: dict[int, float] = {}
        self._maps: dict[int, list[NDArray[np.float32]]] = {}

    def add(self, owners: Sequence[int], scores: Sequence[float], maps: Tensor) -> None:
        """Some maps (B, 1, H, W): the image of each, its score."""
        for owner, score, one in zip(owners, scores, maps, strict=True):
            self._scores[owner] = max(score, self._scores.get(owner, score))
            self._maps.setdefault(owner, []).append(one[0].cpu().numpy().copy())
        going_on = owners[-1]  # its next maps may score higher
        order = sorted(self._maps, key=lambda owner: (owner != going_on, -self._scores[owner], owner))
        held = 0
        for place, owner in enumerate(order):
            held += sum(one.nbytes for one in self._maps[owner])
            if place > KEPT or held > _MOST_BYTES:
                del self._maps[owner]

    def of(self) -> dict[int, NDArray[np.float32]]:
        """(T, H, W) of each image kept, T its windows."""
        order = sorted(self._maps, key=lambda owner: (-self._scores[owner], owner))
        return {owner: np.stack(self._maps[owner]) for owner in order[:KEPT]}
