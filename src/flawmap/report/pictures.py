"""Pictures of a page: small enough to keep many, and embedded in it."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flawmap.errors import ImageError
from flawmap.imaging.decoding import read_image
from flawmap.judging.inspection import Inspection
from flawmap.report.overlays import HeatScale, as_rgb, overlay

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
    heat = None if scale is None or inspection.maps is None else _shrunk(overlay(pixels, inspection, scale))
    original = _shrunk(as_rgb(pixels))
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
        return jpeg_uri(Image.fromarray(_shrunk(as_rgb(read_image(path)))))
    except ImageError:
        return None


def jpeg_uri(image: Image.Image) -> str:
    """A picture as a data URI."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=_QUALITY, subsampling=0)  # thin coloured outlines would blur with fewer colours
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode("ascii")


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
