"""The verdict on one image, and the regions of its map."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from flawmap.imaging.placement import Placement

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

    @cached_property
    def anomaly_map(self) -> NDArray[np.float32] | None:
        """(H, W) float32 on the original pixels, NaN where nothing was scored."""
        return None if self.maps is None or self.placement is None else self.placement.lay_back(self.maps)

    @cached_property
    def regions(self) -> list[Region]:
        """Where the map reaches the pixel threshold, largest peak first."""
        if self.maps is None or self.pixel_threshold is None or self.maps.max() < self.pixel_threshold:
            return []
        assert self.anomaly_map is not None
        return find_regions(self.anomaly_map, self.pixel_threshold)

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


def find_regions(anomaly_map: NDArray[np.float32], threshold: float) -> list[Region]:
    """8-connected regions of (H, W) at or above `threshold`, largest peak first."""
    from scipy import ndimage

    labels, _ = ndimage.label(anomaly_map >= threshold, structure=np.ones((3, 3)))
    regions = []
    for label, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        mask = labels[rows, columns] == label
        regions.append(
            Region(
                box=(columns.start, rows.start, columns.stop, rows.stop),
                area=int(mask.sum()),
                peak=float(anomaly_map[rows, columns][mask].max()),
                mask=mask,
            )
        )
    return sorted(regions, key=lambda region: -region.peak)
