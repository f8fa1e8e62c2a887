"""Whether the parts of a set lie alike: what levelling has to know, decided from the good images' pixels alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from flawmap.synthesis import Foreground, find_foreground
from flawmap.synthesis.foreground import LEAST_DISTINCTNESS

LOOKED_AT = 32
"""Images; the share of so many is known to a few per cent."""
LEAST_EXPLAINED = 0.5
"""Between parts that lie alike (training prints 0.74 for cookie, 0.91 for boards) and in any pose (0.21 for screws)."""
_STEP = 4  # every so many pixels of a foreground mask are enough

Lie = Literal["texture", "alike", "any pose"]


@dataclass(frozen=True)
class Alignment:
    """How parts lie in their images.

    Attributes:
        lie: "texture" has no ground and no pose, "alike" parts lie in one place, "any pose" they do not.
        explained: the share of the variance of where the part is, over places and images, that the place explains;
            1 of a texture.
        distinctness: of the part from its ground, see `find_foreground`.
    """

    lie: Lie
    explained: float
    distinctness: float

    def describe(self) -> str:
        """The evidence, in one line."""
        if self.lie == "texture":
            return (
                f"the images show a texture (a part stands out by {self.distinctness:.2f}, "
                f"{LEAST_DISTINCTNESS:.2f} is needed)"
            )
        what = "the parts lie alike" if self.lie == "alike" else "the parts lie in any pose"
        return f"{what}: the place explains {self.explained:.0%} of where the part is"


def find_alignment(pictures: Sequence[NDArray[np.float32]]) -> Alignment:
    """Judges by some good model inputs.

    Args:
        pictures: (h, w, 3) in 0..1, all of one size.
    """
    foreground = find_foreground(pictures)
    if foreground.polarity is None:
        return Alignment("texture", 1.0, foreground.distinctness)
    explained = _explained(foreground, pictures)
    return Alignment("alike" if explained >= LEAST_EXPLAINED else "any pose", explained, foreground.distinctness)


def _explained(foreground: Foreground, pictures: Sequence[NDArray[np.float32]]) -> float:
    masks = np.stack([foreground.mask(picture)[::_STEP, ::_STEP] for picture in pictures]).astype(np.float64)
    n, share, overall = len(masks), masks.mean(0), masks.mean()
    total = overall * (1 - overall)
    if n < 2 or total == 0:
        return 1.0
    within = (share * (1 - share)).mean() * n / (n - 1)
    return float(np.clip(1 - within / total, 0, 1))
