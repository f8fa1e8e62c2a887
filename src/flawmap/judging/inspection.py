"""The verdict on one image, and the regions of its map."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from flawmap.imaging.placement import Placement
from flawmap.imaging.window_maps import each

LARGE = 1 << 24
"""Pixels; the maps of larger images are worked on in bands of rows."""

Verdict = Literal["good", "defect", "unsure", "error"]


@dataclass(frozen=True)
class Region:
    """A connected part of the map at or above the pixel threshold, on the original pixels.

    Attributes:
        box: (left, top, right, bottom) in pixels, right and bottom exclusive.
        area: pixels.
        peak: the largest value of the map in it.
        mask: bool, of the box's size.
    """

    box: tuple[int, int, int, int]
    area: int
    peak: float
    mask: NDArray[np.bool_] = field(repr=False)

    @property
    def rows_and_columns(self) -> tuple[slice, slice]:
        """The box as an index into arrays of the image's size."""
        left, top, right, bottom = self.box
        return slice(top, bottom), slice(left, right)


@dataclass(frozen=True)
class Inspection:
    """What a detector says of one image.

    Attributes:
        path: the file; None for an array.
        verdict: "defect" where score >= threshold, else "good"; "unsure" between two thresholds, only where that was
            asked for; "error" where it could not be judged; None where there is no threshold: after
            `with_settings(calibrate=False)`, and of a detector fitted with calibration "none".
        score: raw, in the method's own units, higher is more abnormal. None with "error".
        p_value: the share of good images expected to score as high; None with "error" and where there is no verdict.
        threshold, pixel_threshold: what score and map were held against.
        size: (height, width) of the original.
        milliseconds: from pixels to verdict, this image's share of its batch.
        error: one line, with verdict "error".
        refused: why the capture check refuses the image, without its name; None where it does not.
        maps: (T, h, w) float32, of each window at the model's input size; None where there are none.
        placement: the windows.
        unsure_between: (low, high), scores from low to below high are unsure; None where that was not asked for.
        pixels: those that were judged, (H, W) or (H, W, 3), uint8 or uint16; None where they were not asked for.
        digest: SHA-256, in hexadecimal, of the bytes of the file that was judged; None for an array.
        statistics: of the capture, see `flawmap.imaging.captures`; None where it could not be read.
    """

    path: Path | None
    verdict: Verdict | None
    score: float | None = None
    p_value: float | None = None
    threshold: float | None = None
    pixel_threshold: float | None = None
    size: tuple[int, int] | None = None
    milliseconds: float = 0.0
    error: str | None = None
    refused: str | None = None
    maps: NDArray[np.float32] | None = field(default=None, repr=False)
    placement: Placement | None = field(default=None, repr=False)
    unsure_between: tuple[float, float] | None = None
    pixels: NDArray[Any] | None = field(default=None, repr=False)
    digest: str | None = None
    statistics: NDArray[np.float64] | None = field(default=None, repr=False)

    @cached_property
    def anomaly_map(self) -> NDArray[np.float32] | None:
        """(H, W) float32 on the original pixels, NaN where nothing was scored."""
        return None if self.maps is None or self.placement is None else self.placement.lay_back(self.maps)

    def map_rows(self) -> Iterator[NDArray[np.float32]]:
        """`anomaly_map` in bands of rows (r, W), from the top; nothing where there is none.

        Those of a large image are made anew each time, so that it is never held whole.
        """
        if self.maps is None or self.placement is None:
            return
        height, width = self.placement.size
        if height * width > LARGE and "anomaly_map" not in self.__dict__:
            yield from self.placement.lay_back_rows(each(self.maps))
        elif self.anomaly_map is not None:
            yield self.anomaly_map

    @cached_property
    def regions(self) -> list[Region]:
        """Where the map reaches the pixel threshold, largest peak first."""
        if self.maps is None or self.pixel_threshold is None:
            return []
        if max(float(one.max()) for one in each(self.maps)) < self.pixel_threshold:
            return []
        return find_regions(self.map_rows(), self.pixel_threshold)

    @property
    def overruled(self) -> bool:
        """Whether a region reaches the pixel threshold in an image that is called good.

        The two thresholds are taken from good images apart, each for its own rate, and the verdict is the score's.
        """
        return self.verdict == "good" and bool(self.regions)

    def without_map(self) -> Inspection:
        """The same, with its regions but without map and pixels, for keeping many."""
        regions, light = self.regions, replace(self, maps=None, pixels=None)
        light.__dict__["regions"] = regions
        return light

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, without the pixels."""
        return {
            "path": None if self.path is None else str(self.path),
            "verdict": self.verdict,
            "score": self.score,
            "p_value": self.p_value,
            "threshold": self.threshold,
            "unsure_between": None if self.unsure_between is None else list(self.unsure_between),
            "regions": [{"box": list(r.box), "area": r.area, "peak": r.peak} for r in self.regions],
            "milliseconds": round(self.milliseconds, 2),
            "digest": self.digest,
            "error": self.error,
        }


def find_regions(bands: Iterable[NDArray[np.float32]], threshold: float) -> list[Region]:
    """8-connected regions of a map at or above `threshold`, largest peak first.

    Args:
        bands: of the map's rows (r, W), from the top.
        threshold: of the map's values.
    """
    from scipy import ndimage

    pieces: list[Region] = []  # of regions, each within a band
    joined: list[int] = []  # of each piece an earlier one of the same region, or itself
    top = 0
    before: NDArray[np.int64] | None = None  # the row above, with the number of each pixel's piece from 1 on
    for band in _cut(bands):
        hot = band >= threshold
        if not hot.any():
            top, before = top + len(band), None
            continue
        labels, _ = ndimage.label(hot, structure=np.ones((3, 3)))
        first = len(pieces)
        for label, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
            mask = labels[rows, columns] == label
            box = (columns.start, top + rows.start, columns.stop, top + rows.stop)
            peak = float(band[rows, columns][mask].max())
            joined.append(len(pieces))
            pieces.append(Region(box, int(mask.sum()), peak, mask))
        if before is not None:
            _join(joined, before, _numbered(labels[0], first))
        top, before = top + len(band), _numbered(labels[-1], first)
    regions: dict[int, list[Region]] = {}
    for number, piece in enumerate(pieces):
        regions.setdefault(_root(joined, number), []).append(piece)
    return sorted(map(_whole, regions.values()), key=lambda region: -region.peak)


def _cut(bands: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
    for band in bands:
        rows = max(1, LARGE // max(1, band.shape[1]))
        for start in range(0, len(band), rows):
            yield band[start : start + rows]


def _numbered(labels: NDArray[np.int32], first: int) -> NDArray[np.int64]:
    return np.where(labels > 0, labels + np.int64(first), 0)


def _join(joined: list[int], above: NDArray[np.int64], below: NDArray[np.int64]) -> None:
    """Joins the pieces that touch across two rows, each with the number of its pixels' pieces."""
    width = len(above)
    for aside in (-1, 0, 1):
        pairs = np.stack([above[max(0, -aside) : width - max(0, aside)], below[max(0, aside) : width + min(0, aside)]])
        for one, other in np.unique(pairs[:, pairs.all(axis=0)], axis=1).T.tolist():
            low, high = sorted((_root(joined, one - 1), _root(joined, other - 1)))
            joined[high] = low


def _root(joined: list[int], number: int) -> int:
    while joined[number] != number:
        joined[number] = joined[joined[number]]
        number = joined[number]
    return number


def _whole(pieces: list[Region]) -> Region:
    if len(pieces) == 1:
        return pieces[0]
    lefts, tops, rights, bottoms = zip(*(piece.box for piece in pieces), strict=True)
    left, top, right, bottom = box = (min(lefts), min(tops), max(rights), max(bottoms))
    mask = np.zeros((bottom - top, right - left), np.bool_)
    for piece in pieces:
        x, y = piece.box[0] - left, piece.box[1] - top
        mask[y : y + piece.mask.shape[0], x : x + piece.mask.shape[1]] |= piece.mask
    return Region(box, sum(piece.area for piece in pieces), max(piece.peak for piece in pieces), mask)
