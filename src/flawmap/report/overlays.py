"""Heatmaps over the original pixels, on one fixed scale taken from good images, and maps as 16-bit files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from flawmap.files import replacing
from flawmap.imaging.own_files import OWN
from flawmap.imaging.png import png_of_rows
from flawmap.judging.inspection import Inspection, Region, find_regions

# Anchors of the heat colours, from just above what good parts show to far beyond it: yellow, orange, red, dark red.
_COLOURS = np.array([(255, 236, 120), (253, 174, 60), (227, 40, 30), (128, 0, 38)], dtype=np.float32)
_OPACITY = 0.65
CONTOUR = (0, 220, 255)
OVERRULED = (255, 255, 255)  # the outline of regions of an image that its score calls good
_PIXELS = 1 << 18  # drawn at a time: in floating point a picture is a hundred times as large


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
    return np.concatenate(list(overlay_rows(pixels, inspection, scale)))


def overlay_rows(pixels: NDArray[Any], inspection: Inspection, scale: HeatScale) -> Iterator[NDArray[np.uint8]]:
    """`overlay` in bands of rows (r, W, 3), from the top, of which a large image need not hold all."""
    width = max(1, round(max(pixels.shape[:2]) / (600 if inspection.overruled else 300)))
    colour = OVERRULED if inspection.overruled else CONTOUR
    outlines = [_outline(region, width) for region in inspection.regions]
    brightest = _brightest(pixels)
    start = 0
    for heat in _thin(inspection.map_rows()) if inspection.maps is not None else _thin([pixels]):
        band = as_rgb(pixels[start : start + len(heat)], brightest)
        drawn = band.copy() if inspection.maps is None else _heated(band, scale.heat(heat))
        for outline in outlines:
            outline.draw(drawn, start, colour)
        start += len(drawn)
        yield drawn


def _thin(bands: Iterable[NDArray[Any]]) -> Iterator[NDArray[Any]]:
    """The same rows in bands of at most `_PIXELS`, or of one row."""
    for band in bands:
        rows = max(1, _PIXELS // band.shape[1])
        for start in range(0, len(band), rows):
            yield band[start : start + rows]


def _heated(picture: NDArray[np.uint8], heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Rows (r, W, 3) of a picture with their heat (r, W) laid over them."""
    colour, opacity = _coloured(heat)
    laid: NDArray[np.uint8] = (picture * (1 - opacity) + colour * opacity).round().astype(np.uint8)
    return laid


def _coloured(heat: NDArray[np.float32]) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Colours (r, W, 3), 0 to 255, and opacities (r, W, 1), 0 to 1, of heat (r, W)."""
    position = heat * (len(_COLOURS) - 1)
    index = np.minimum(position.astype(int), len(_COLOURS) - 2)
    part = (position - index)[..., None]
    colour = _COLOURS[index] * (1 - part) + _COLOURS[index + 1] * part
    opacity = _OPACITY * np.minimum(heat[..., None] * 2, 1)  # fades in: nothing has an edge that is not in the map
    return colour, opacity


@dataclass(frozen=True)
class _Outline:
    """The line around a region, whose upper left corner lies at (left, top), perhaps outside the image."""

    ring: NDArray[np.bool_]
    left: int
    top: int

    def draw(self, rows: NDArray[np.uint8], first: int, colour: tuple[int, ...]) -> None:
        """What lies on rows (r, W, 3) of the image, the first of which is `first`."""
        upper, lower = max(self.top, first), min(self.top + len(self.ring), first + len(rows))
        left, right = max(self.left, 0), min(self.left + self.ring.shape[1], rows.shape[1])
        if upper < lower and left < right:
            ring = self.ring[upper - self.top : lower - self.top, left - self.left : right - self.left]
            rows[upper - first : lower - first, left:right][ring] = colour


def _outline(region: Region, width: int) -> _Outline:
    from scipy import ndimage

    left, top = region.box[:2]
    padded = np.pad(region.mask, width)
    # A dilation by a square, whose two sides can be gone along one after the other.
    wider = ndimage.maximum_filter(padded.view(np.uint8), size=2 * width + 1, mode="constant").view(np.bool_)
    return _Outline(wider & ~padded, left - width, top - width)


def heat_layer(
    values: NDArray[np.float32], scale: HeatScale, *, heat: bool = True, outlines: bool = True, quiet: bool = False
) -> NDArray[np.uint8]:
    """What is laid over a picture, uint8 (H, W, 4): the heat of a map (H, W), as opaque as `overlay` lays it, and the
    outlines of its regions, `quiet` for an image that its score calls good."""
    layer = np.zeros((*values.shape, 4), np.uint8)
    if heat:
        start = 0
        for band in _thin([values]):
            colour, opacity = _coloured(scale.heat(band))
            rows = layer[start : start + len(band)]
            rows[..., :3] = colour.round()
            rows[..., 3] = (255 * opacity[..., 0]).round()
            start += len(band)
    if outlines:
        width = max(1, round(max(values.shape) / (600 if quiet else 300)))
        for region in find_regions([values], (scale.low + scale.high) / 2):  # the pixel threshold, see `HeatScale`
            _outline(region, width).draw(layer, 0, (*(OVERRULED if quiet else CONTOUR), 255))
    return layer


def captioned(picture: NDArray[np.uint8], inspection: Inspection) -> NDArray[np.uint8]:
    """With verdict and score in a strip above the picture (H, W, 3)."""
    return np.concatenate([_caption(picture.shape[:2], inspection), picture])


def _caption(picture: tuple[int, ...], inspection: Inspection) -> NDArray[np.uint8]:
    """A strip that tells verdict and score, (h, W, 3), for a picture of (height, width)."""
    size = max(11, round(max(picture) / 36))
    font = ImageFont.load_default(size)
    words = [f"score {inspection.score:.4g}"]
    if inspection.verdict is not None:
        words = [inspection.verdict, *words, f"threshold {inspection.threshold:.4g}"]
    if inspection.overruled:
        words.append("a region is above its own threshold")
    lines: list[str] = []
    for word in words:  # as many to a line as the picture is wide
        longer = f"{lines[-1]} \N{MIDDLE DOT} {word}" if lines else word
        if lines and font.getlength(longer) > picture[1] - size:
            lines.append(word)
        else:
            lines[-1:] = [longer]
    strip = Image.new("RGB", (picture[1], round(1.35 * size * len(lines) + 0.4 * size)), (20, 24, 28))
    draw = ImageDraw.Draw(strip)
    for i, line in enumerate(lines):
        draw.text((size // 2, round((0.2 + 1.35 * i) * size)), line, font=font, fill=(240, 240, 240))
    return np.asarray(strip)


def as_rgb(pixels: NDArray[Any], brightest: float | None = None) -> NDArray[np.uint8]:
    """Any image flawmap reads as uint8 (H, W, 3); 16-bit images are stretched to their own brightest pixel, or so."""
    if pixels.dtype != np.uint8:
        top = _brightest(pixels) if brightest is None else brightest
        pixels = (pixels * (255.0 / top)).round().astype(np.uint8)
    return np.repeat(pixels[..., None], 3, axis=2) if pixels.ndim == 2 else pixels


def _brightest(pixels: NDArray[Any]) -> float:
    return 255.0 if pixels.dtype == np.uint8 else float(pixels.max()) or 1.0


def rgb_rows(pixels: NDArray[Any]) -> Iterator[NDArray[np.uint8]]:
    """`as_rgb` in bands of rows, from the top."""
    brightest = _brightest(pixels)
    return (as_rgb(band, brightest) for band in _thin([pixels]))


def write_overlay(
    path: Path,
    pixels: NDArray[Any],
    inspection: Inspection,
    scale: HeatScale,
    *,
    caption: bool = False,
    seen: Callable[[NDArray[np.uint8]], None] = lambda rows: None,
) -> None:
    """Writes the overlay as PNG, with `caption` below a strip that tells verdict and score.

    `seen` is called with each band of its rows, without the strip.
    """
    height, width = pixels.shape[:2]
    strips = [_caption((height, width), inspection)] if caption else []

    def drawn() -> Iterator[NDArray[np.uint8]]:
        for rows in overlay_rows(pixels, inspection, scale):
            seen(rows)
            yield rows

    _write_png(path, (height + sum(map(len, strips)), width), chain(strips, drawn()))


def write_map(path: Path, inspection: Inspection, scale: HeatScale) -> None:
    """Writes the map as a 16-bit grey PNG on the original pixels, see `map_levels`."""
    assert inspection.placement is not None
    _write_png(path, inspection.placement.size, _levels(inspection, scale))


def map_levels(inspection: Inspection, scale: HeatScale) -> NDArray[np.uint16]:
    """The map on the original pixels, uint16 (H, W): 0 is map value 0, 65535 twice the scale's end.

    The value of a pixel is `pixel / 65535 * 2 * scale.high`; larger values are clipped, and 0 stands
    where nothing was scored, and where a level map lies below what is usual for the place.
    """
    return np.concatenate(list(_levels(inspection, scale)))


def _levels(inspection: Inspection, scale: HeatScale) -> Iterator[NDArray[np.uint16]]:
    """`map_levels`, some rows at a time."""
    for rows in _thin(inspection.map_rows()):
        share = np.nan_to_num(np.clip(rows / (2 * scale.high), 0, 1), nan=0.0)
        yield (share * 65535).round().astype(np.uint16)


def _write_png(path: Path, size: tuple[int, int], rows: Iterable[NDArray[Any]]) -> None:
    with replacing(path, durable=False) as file:
        file.writelines(png_of_rows(size, rows, software=OWN))


class Coco:
    """The regions as a COCO object: images, one category `defect`, annotations with box, area and run-length mask.

    Of each image its run lengths are kept, and nothing else.
    """

    def __init__(self) -> None:
        self._number = 0
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []

    def add(self, inspection: Inspection) -> None:
        """The next image, whose number in the object is its place among all that were added."""
        self._number += 1
        if inspection.size is None:
            return
        height, width = inspection.size
        self._images.append({"id": self._number, "file_name": str(inspection.path), "height": height, "width": width})
        for region in inspection.regions:
            left, top, right, bottom = region.box
            self._annotations.append(
                {
                    "id": len(self._annotations) + 1,
                    "image_id": self._number,
                    "category_id": 1,
                    "bbox": [left, top, right - left, bottom - top],
                    "area": region.area,
                    "score": region.peak,
                    "iscrowd": 0,
                    "segmentation": run_lengths(region, (height, width)),
                }
            )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "info": {"description": "flawmap regions"},
            "images": self._images,
            "categories": [{"id": 1, "name": "defect"}],
            "annotations": self._annotations,
        }


def run_lengths(region: Region, size: tuple[int, int]) -> dict[str, Any]:
    """COCO's uncompressed run-length encoding: runs down the columns, background first."""
    height, width = size
    left, top = region.box[:2]
    # Where each column of the box begins and ends a run, as places in the columns of the whole image.
    columns = np.pad(region.mask.T, ((0, 0), (1, 1))).view(np.int8)
    column, row = np.nonzero(np.diff(columns, axis=1))
    places = (column + left) * height + row + top
    # A run that ends with a column and one that begins the next are one.
    kept = places[np.isin(places, places[:-1][places[1:] == places[:-1]], invert=True)]
    runs = np.diff(np.concatenate([[0], kept, [height * width]])).tolist()
    return {"size": list(size), "counts": runs if runs[-1] else runs[:-1]}
