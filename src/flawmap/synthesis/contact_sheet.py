"""Many defects on one picture, each beside itself with its mask's outline, to be looked at."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from flawmap.synthesis.defects import Defect
from flawmap.synthesis.sources import fitted

_OUTLINE = (255, 0, 90)
_GAP, _CAPTION, _LETTERS = 6, 20, 13
_SHOWS = {
    "texture": "a foreign texture",
    "image": "a piece of another good image",
    "rearranged": "its own pieces in other places",
    "merged": "itself under a foreign texture",
    "cutpaste": "a piece copied elsewhere",
    "scar": "a thin strip copied elsewhere",
}
_SEAMLESS = " (seamless)"


def caption(kind: str, number: int | None = None) -> str:
    """What a picture shows: the number in the names of its files, the kind, and what that is."""
    name = kind if number is None else f"{number:05d} {kind}"
    return f"{name}: {_SHOWS[kind.removesuffix(_SEAMLESS)]}"


def contact_sheet(
    defects: Iterable[Defect],
    *,
    columns: int = 4,
    side: int = 192,
    numbers: Sequence[int] | None = None,
    white: int = 65535,
) -> Image.Image:
    """Rows of pairs: the image as it is, and with the outline of its mask; below, what kind of defect it is.

    Args:
        defects: at least one.
        side: the longer side of each image, in pixels.
        numbers: of the defects, for their captions.
        white: the value that counts as white in 16-bit images.
    """
    pairs = [(_pair(defect.image, defect.mask, side, white), defect.kind) for defect in defects]
    columns = min(columns, len(pairs))
    rows = math.ceil(len(pairs) / columns)
    width, height = 2 * side + 2 + _GAP, side + _CAPTION + _GAP
    sheet = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_LETTERS)
    for place, (pair, kind) in enumerate(pairs):
        left, top = _GAP + place % columns * width, _GAP + place // columns * height
        sheet.paste(pair, (left, top))
        text = caption(kind, None if numbers is None else numbers[place])
        draw.text((left, top + side + 2), text, fill="black", font=font)
    return sheet


def _pair(image: NDArray[Any], mask: NDArray[np.bool_], side: int, white: int) -> Image.Image:
    scale = side / max(mask.shape)
    size = (max(1, round(mask.shape[0] * scale)), max(1, round(mask.shape[1] * scale)))
    plain = fitted(image, size, white)
    # A defect of a few pixels must not vanish where the image is shrunk: a covered pixel is marked.
    covered = Image.fromarray(mask.astype(np.float32)).resize((size[1], size[0]), Image.Resampling.BOX)
    shown = np.pad(np.asarray(covered) > 0, 1)
    near = shown[1:-1, :-2] | shown[1:-1, 2:] | shown[:-2, 1:-1] | shown[2:, 1:-1]
    outlined = plain.copy()
    outlined[near & ~shown[1:-1, 1:-1]] = _OUTLINE
    pair = Image.new("RGB", (2 * side + 2, side), "white")
    pair.paste(Image.fromarray(plain), (0, 0))
    pair.paste(Image.fromarray(outlined), (side + 2, 0))
    return pair
