"""Heatmaps over the original pixels, on one fixed scale taken from good images, and maps as 16-bit files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from flawmap.files import replacing
from flawmap.imaging.own_files import png_mark
from flawmap.judging.inspection import Inspection, Region

# Anchors of the heat colours, from just above what good parts show to far beyond it: yellow, orange, red, dark red.
_COLOURS = np.array([(255, 236, 120), (253, 174, 60), (227, 40, 30), (128, 0, 38)], dtype=np.float32)
_OPACITY = 0.65
CONTOUR = (0, 220, 255)
OVERRULED = (255, 255, 255)  # the outline of regions of an image that its score calls good
_ROWS = 256  # drawn at a time: a large picture in floating point is many times as large


@dataclass(frozen=True)
class HeatScale:
    """What the colours mean, the same for every image a model inspects.

    Attributes:
        low: map values up to it stay uncoloured: half of all good images never exceed it.
        high: map values from it on have the last colour.
        learnt: whether those images were learnt from, so that new good ones may exceed it oftener.
    """

    low: float
    high: float
    learnt: bool = False

    @classmethod
    def from_good(cls, peaks: NDArray[np.float32], pixel_threshold: float) -> HeatScale:
        """From the map maxima (n,) of good images: the pixel threshold lies halfway up the scale."""
        low = float(np.median(peaks))
        reach = max(float(pixel_threshold) - low, 1e-6 * max(abs(low), 1.0))
        return cls(low, low + 2 * reach)

    @classmethod
    def from_learnt(cls, peaks: NDArray[np.float32]) -> HeatScale:
        """From the map maxima (n,) of images that were learnt from: the largest lies halfway up the scale."""
        scale = cls.from_good(peaks, float(peaks.max()))
        return cls(scale.low, scale.high, learnt=True)

    def heat(self, anomaly_map: NDArray[np.float32]) -> NDArray[np.float32]:
        """(H, W) in the method's units -> 0..1; 0 where nothing was scored (NaN)."""
        heat = np.clip((anomaly_map - self.low) / (self.high - self.low), 0, 1)
        return np.nan_to_num(heat, nan=0.0).astype(np.float32)  # type: ignore[no-any-return]


def overlay(pixels: NDArray[Any], inspection: Inspection, scale: HeatScale) -> NDArray[np.uint8]:
    """The image with its heat laid over it and its regions outlined, uint8 (H, W, 3).

    The outlines are white and thinner where the score calls the image good all the same, see `Inspection.overruled`.
    """
    drawn: NDArray[np.uint8] = as_rgb(pixels).copy()
    if inspection.anomaly_map is not None:
        for start in range(0, len(drawn), _ROWS):
            rows = slice(start, start + _ROWS)
            drawn[rows] = _heated(drawn[rows], scale.heat(inspection.anomaly_map[rows]))
    width = max(1, round(max(drawn.shape[:2]) / (600 if inspection.overruled else 300)))
    for region in inspection.regions:
        _outline(drawn, region, width, OVERRULED if inspection.overruled else CONTOUR)
    return drawn


def _heated(picture: NDArray[np.uint8], heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Rows (r, W, 3) of a picture with their heat (r, W) laid over them."""
    position = heat * (len(_COLOURS) - 1)
    index = np.minimum(position.astype(int), len(_COLOURS) - 2)
    part = (position - index)[..., None]
    colour = _COLOURS[index] * (1 - part) + _COLOURS[index + 1] * part
    opacity = _OPACITY * np.minimum(heat[..., None] * 2, 1)  # fades in: nothing has an edge that is not in the map
    laid: NDArray[np.uint8] = (picture * (1 - opacity) + colour * opacity).round().astype(np.uint8)
    return laid


def _outline(picture: NDArray[np.uint8], region: Region, width: int, colour: tuple[int, int, int]) -> None:
    from scipy import ndimage

    left, top = region.box[:2]
    padded = np.pad(region.mask, width)
    ring = ndimage.binary_dilation(padded, iterations=width, structure=np.ones((3, 3))) & ~padded
    rows, columns = np.nonzero(ring)
    rows, columns = rows + top - width, columns + left - width
    inside = (rows >= 0) & (rows < picture.shape[0]) & (columns >= 0) & (columns < picture.shape[1])
    picture[rows[inside], columns[inside]] = colour


def captioned(picture: NDArray[np.uint8], inspection: Inspection) -> NDArray[np.uint8]:
    """With verdict and score in a strip above the picture (H, W, 3)."""
    size = max(11, round(max(picture.shape[:2]) / 36))
    font = ImageFont.load_default(size)
    words = [f"score {inspection.score:.4g}"]
    if inspection.verdict is not None:
        words = [inspection.verdict, *words, f"threshold {inspection.threshold:.4g}"]
    if inspection.overruled:
        words.append("a region is above its own threshold")
    lines: list[str] = []
    for word in words:  # as many to a line as the picture is wide
        longer = f"{lines[-1]} \N{MIDDLE DOT} {word}" if lines else word
        if lines and font.getlength(longer) > picture.shape[1] - size:
            lines.append(word)
        else:
            lines[-1:] = [longer]
    strip = Image.new("RGB", (picture.shape[1], round(1.35 * size * len(lines) + 0.4 * size)), (20, 24, 28))
    draw = ImageDraw.Draw(strip)
    for i, line in enumerate(lines):
        draw.text((size // 2, round((0.2 + 1.35 * i) * size)), line, font=font, fill=(240, 240, 240))
    return np.concatenate([np.asarray(strip), picture])


def as_rgb(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    """Any image flawmap reads as uint8 (H, W, 3); 16-bit images are stretched to their own brightest pixel."""
    if pixels.dtype != np.uint8:
        top = float(pixels.max()) or 1.0
        pixels = (pixels * (255.0 / top)).round().astype(np.uint8)
    return np.repeat(pixels[..., None], 3, axis=2) if pixels.ndim == 2 else pixels


def write_overlay(
    path: Path, pixels: NDArray[Any], inspection: Inspection, scale: HeatScale, *, caption: bool = False
) -> None:
    """Writes the overlay as PNG, with `caption` below a strip that tells verdict and score."""
    drawn = overlay(pixels, inspection, scale)
    _write_png(path, Image.fromarray(captioned(drawn, inspection) if caption else drawn))


def write_map(path: Path, inspection: Inspection, scale: HeatScale) -> None:
    """Writes the map as a 16-bit grey PNG on the original pixels: 0 is map value 0, 65535 twice the scale's end.

    The value of a pixel is `pixel / 65535 * 2 * scale.high`; larger values are clipped, and 0 stands
    where nothing was scored, and where a level map lies below what is usual for the place.
    """
    found = inspection.anomaly_map
    assert found is not None
    values = np.empty(found.shape, np.uint16)
    for start in range(0, len(found), _ROWS):
        rows = slice(start, start + _ROWS)
        share = np.nan_to_num(np.clip(found[rows] / (2 * scale.high), 0, 1), nan=0.0)
        values[rows] = (share * 65535).round()
    _write_png(path, Image.fromarray(values))


def _write_png(path: Path, image: Image.Image) -> None:
    with replacing(path) as file:
        image.save(file, format="PNG", compress_level=3, pnginfo=png_mark())


def coco(inspections: Sequence[Inspection]) -> dict[str, Any]:
    """The regions as a COCO object: images, one category `defect`, annotations with box, area and run-length mask."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, inspection in enumerate(inspections, start=1):
        if inspection.size is None:
            continue
        height, width = inspection.size
        images.append({"id": number, "file_name": str(inspection.path), "height": height, "width": width})
        for region in inspection.regions:
            left, top, right, bottom = region.box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": 1,
                    "bbox": [left, top, right - left, bottom - top],
                    "area": region.area,
                    "score": region.peak,
                    "iscrowd": 0,
                    "segmentation": run_lengths(region, (height, width)),
                }
            )
    return {
        "info": {"description": "flawmap regions"},
        "images": images,
        "categories": [{"id": 1, "name": "defect"}],
        "annotations": annotations,
    }


def run_lengths(region: Region, size: tuple[int, int]) -> dict[str, Any]:
    """COCO's uncompressed run-length encoding: runs down the columns, background first."""
    mask = np.zeros(size, dtype=bool)
    left, top, right, bottom = region.box
    mask[top:bottom, left:right] = region.mask
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat.astype(np.int8))) + 1
    runs = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    return {"size": list(size), "counts": ([0, *runs] if flat[0] else runs)}
