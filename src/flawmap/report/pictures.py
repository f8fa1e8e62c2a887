"""Pictures of a page: small enough to keep many, and embedded in it."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flawmap.errors import ImageError
from flawmap.imaging.decoding import read_image
from flawmap.judging.inspection import LARGE, Inspection
from flawmap.report.overlays import HeatScale, overlay_rows, rgb_rows

_SIDE = 360  # pixels, of a picture's longest side
_QUALITY = 85  # of JPEG
TRUTH = (255, 0, 200)  # the outline of the ground truth
_BETWEEN = 6  # pixels between two pictures side by side
_GAP, _WIDTH = 1, 2  # pixels between a defect and its outline, and of the outline


@dataclass(frozen=True)
class Picture:
    """What a page shows of one image. `take_picture` makes one that is small enough to keep many.

    Attributes:
        original: uint8 (H, W, 3).
        overlay: uint8 (H, W, 3), the heatmap over it; None without a map.
        mask: bool (H, W), True on defects, outlined on the original; None where there is none.
    """

    original: NDArray[np.uint8]
    overlay: NDArray[np.uint8] | None = None
    mask: NDArray[np.bool_] | None = None


def take_picture(
    pixels: NDArray[Any], inspection: Inspection, scale: HeatScale | None, mask: NDArray[np.bool_] | None = None
) -> Picture:
    """An image with its heatmap at the size a page shows it.

    Args:
        pixels: as `read_image` gives them, (H, W) or (H, W, 3).
        inspection: of the same image.
        scale: the detector's; None for methods without a map.
        mask: bool (H, W) of its ground truth.
    """
    size = pixels.shape[:2]
    heat = None if scale is None or inspection.maps is None else shrunk(size, overlay_rows(pixels, inspection, scale))
    original = shrunk(size, rgb_rows(pixels))
    return Picture(original, heat, None if mask is None else _shrunk_mask(mask, original.shape[:2]))


def picture_uris(picture: Picture | None) -> tuple[str | None, str | None]:
    """Original with its ground truth outlined, and overlay, as data URIs; None for what there is not."""
    if picture is None:
        return None, None
    original = _shrunk(picture.original)
    if picture.mask is not None:
        original = _outlined(original, _shrunk_mask(picture.mask, original.shape[:2]))
    heat = None if picture.overlay is None else jpeg_uri(Image.fromarray(_shrunk(picture.overlay)))
    return jpeg_uri(Image.fromarray(original)), heat


def side_by_side(picture: Picture) -> NDArray[np.uint8]:
    """Original and overlay in one picture, (H, 2 W + a gap, 3); the original alone where there is no overlay."""
    if picture.overlay is None:
        return picture.original
    gap = np.full((len(picture.original), _BETWEEN, 3), 255, np.uint8)
    return np.concatenate([picture.original, gap, picture.overlay], axis=1)


def file_uri(path: Path) -> str | None:
    """An image file as a small picture; None where it cannot be read."""
    try:
        pixels = read_image(path)
        return jpeg_uri(Image.fromarray(shrunk(pixels.shape[:2], rgb_rows(pixels))))
    except ImageError:
        return None


def jpeg_uri(image: Image.Image) -> str:
    """A picture as a data URI."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=_QUALITY, subsampling=0)  # thin coloured outlines would blur with fewer colours
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode("ascii")


class Shrinking:
    """A picture that comes in bands of rows, made small enough to keep many.

    Args:
        size: (height, width) of the whole.
    """

    def __init__(self, size: tuple[int, ...]) -> None:
        large = size[0] * size[1] > LARGE
        self._factor = max(1, max(size) // (4 * _SIDE)) if large else 1
        self._rows: list[NDArray[np.uint8]] = []
        self._rest = np.empty((0, size[1], 3), np.uint8)  # fewer rows than become one

    def add(self, rows: NDArray[np.uint8]) -> None:
        """The next rows (r, W, 3)."""
        if self._factor == 1:
            self._rows.append(rows)
            return
        rows = np.concatenate([self._rest, rows])
        whole = len(rows) // self._factor * self._factor
        self._rest = rows[whole:].copy()
        self._reduce(rows[:whole])

    def _reduce(self, rows: NDArray[np.uint8]) -> None:
        if len(rows):
            self._rows.append(np.asarray(Image.fromarray(rows).reduce(self._factor)))

    def picture(self) -> NDArray[np.uint8]:
        """At the size a page shows it, (h, w, 3), once all rows have come."""
        self._reduce(self._rest)
        return _shrunk(np.concatenate(self._rows))


def shrunk(size: tuple[int, ...], bands: Iterable[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """A picture of (height, width), given in bands of rows, at the size a page shows it."""
    shrinking = Shrinking(size)
    for rows in bands:
        shrinking.add(rows)
    return shrinking.picture()


def _shrunk(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    image = Image.fromarray(pixels)
    image.thumbnail((_SIDE, _SIDE))
    return np.asarray(image)


def _shrunk_mask(mask: NDArray[np.bool_], size: tuple[int, ...]) -> NDArray[np.bool_]:
    """At another (height, width): true wherever any of it was, so that a hairline stays."""
    height, width = size
    covered = Image.fromarray(mask.astype(np.float32)).resize((width, height), Image.Resampling.BOX)
    return np.asarray(covered) > 0


def _outlined(pixels: NDArray[np.uint8], mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """A line around the mask, with a gap, so that the defect itself stays to be seen."""
    from scipy import ndimage

    square = np.ones((3, 3))
    inner = ndimage.binary_dilation(mask, square, iterations=_GAP)
    ring = ndimage.binary_dilation(inner, square, iterations=_WIDTH) & ~inner
    return np.where(ring[..., None], np.array(TRUTH, np.uint8), pixels)
