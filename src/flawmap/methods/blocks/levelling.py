"""Level maps: each place's values against what good images show at that place.

Some places are high in every good image: rims, edges, textured regions. A defect elsewhere has to outdo them to be the
largest value. So a map is taken in units of the spread that good images' maps have at each place, and on a texture also
from their mean there.

On a part before a ground the means stay in: taken from its mean, the ground, which hardly changes, would be raised to
the level of the part, and every speck of dust on it with it. Where parts lie in any pose nothing is known of a place.
Which of these holds is not decided here: see `flawmap.learning.alignment`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEWEST = 8
"""Good maps; of fewer a place's spread is not known."""
ENOUGH = 40
"""Good maps; of fewer the maps are levelled, and the image scores are not: their threshold is set by the oddest good
image, and it is all the odder in units of a spread that the few others show."""
_KERNEL = (0.054, 0.242, 0.408, 0.242, 0.054)  # a Gaussian of one cell: neighbours tell of a place too
_LEAST_SPREAD = 0.05  # of the usual one: places that never change are not blown up without bound


class Levelling(nn.Module):
    """Maps (B, 1, h, w) -> (map - shift) / spread, place by place. Does nothing until `learn` is called."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.empty(0))  # (h*w,)
        self.register_buffer("gain", torch.empty(0))
        self.register_buffer("ranks", torch.empty(0))  # (1,) where image scores are those of level maps
        self.shift: Tensor
        self.gain: Tensor
        self.ranks: Tensor

    @property
    def levels(self) -> bool:
        """Whether there is anything to level by."""
        return self.shift.numel() > 0

    @property
    def scores(self) -> bool:
        """Whether an image's score is the largest value of its level map."""
        return self.ranks.numel() > 0

    def forward(self, maps: Tensor) -> Tensor:
        size = maps.shape[-2:]
        return (maps - self.shift.view(size)) * self.gain.view(size)

    def learn(self, maps: GoodMaps, *, means: bool) -> None:
        """From the maps of good images that the method had not learnt; `means` takes each place from its mean."""
        self.ranks = self.ranks.new_ones(int(len(maps) >= ENOUGH))
        shift, gain = maps.level(means=means)
        self.shift, self.gain = (kept.flatten().to(self.shift.device) for kept in (shift, gain))


class GoodMaps:
    """Running sums of good images' maps (N, 1, h, w), by which maps are levelled, also without some of them.

    Args:
        maps: (N, 1, h, w) float32.
        scored: where they count, (N, 1, h, w) of 0 and 1; None is everywhere.
    """

    def __init__(self, maps: Tensor, scored: Tensor | None = None) -> None:
        self._maps = maps[:, 0]
        self._scored = torch.ones_like(self._maps) if scored is None else scored[:, 0].to(self._maps)
        self._sums = self._of(slice(None))

    def __len__(self) -> int:
        return len(self._maps)

    def _of(self, some: slice | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Count, sum and sum of squares (h, w), float64, of some maps."""
        maps, scored = self._maps[some].double(), self._scored[some].double()
        return scored.sum(0), (maps * scored).sum(0), (maps.square() * scored).sum(0)

    def level(self, left_out: Tensor | None = None, *, means: bool) -> tuple[Tensor, Tensor]:
        """Shift and gain (h, w) float32, of all maps but those at the positions `left_out` (K,)."""
        sums = self._sums
        if left_out is not None:
            sums = tuple(total - part for total, part in zip(sums, self._of(left_out), strict=True))  # type: ignore[assignment]
        count, first, second = sums
        known = (count >= 2).double()
        mean = first / count.clamp_min(1)
        variance = (second - first * mean).clamp_min(0) / (count - 1).clamp_min(1)
        weight = _smoothed(known).clamp_min(1e-12)
        places = known.sum().clamp_min(1)
        usual, usual_spread = (mean * known).sum() / places, ((variance * known).sum() / places).sqrt()
        spread = (_smoothed(variance * known) / weight).sqrt().maximum(_LEAST_SPREAD * usual_spread).clamp_min(1e-12)
        near = weight > 1e-6  # elsewhere there is no good image to tell
        gain = torch.where(near, 1 / spread, 1 / usual_spread.clamp_min(1e-12))
        shift = torch.where(near, _smoothed(mean * known) / weight, usual) if means else usual.expand_as(mean)
        return shift.float().contiguous(), gain.float()

    def explained(self) -> float:
        """The share of the maps' variance that their place explains, 0..1, less what chance would explain."""
        count, first, second = self._sums
        held = count >= 2
        mean = first[held] / count[held]
        within = float(((second[held] - first[held] * mean) / (count[held] - 1)).mean())
        between = float(mean.var(correction=0)) - within / float(count[held].mean())
        return max(0.0, between) / max(between + within, 1e-30) if within > 0 or between > 0 else 0.0


def _smoothed(values: Tensor) -> Tensor:
    """(h, w), averaged with its neighbours; the rim's values go on beyond it."""
    kernel = torch.tensor(_KERNEL, dtype=values.dtype, device=values.device)
    padded = F.pad(values[None, None], (2, 2, 2, 2), mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, 5)), kernel.view(1, 1, 5, 1))[0, 0]
