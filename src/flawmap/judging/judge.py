"""Scores held against what good images reach: thresholds that may be moved, and the verdict on one image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flawmap.errors import FlawmapError
from flawmap.imaging.placement import Placement
from flawmap.judging.calibration import GUARANTEES, Calibration, Threshold
from flawmap.judging.inspection import Inspection


@dataclass(frozen=True)
class Judge:
    """Gives verdicts. Made by `of`; without a calibration there are maps and scores, but no verdicts.

    Attributes:
        max_false_reject, guarantee: what the threshold is to keep.
        calibration: scores of good images.
        threshold: the threshold and what it promises.
        pixel_threshold: where regions are cut; None for methods without a map.
    """

    max_false_reject: float
    guarantee: str
    calibration: Calibration | None = None
    threshold: Threshold | None = None
    pixel_threshold: float | None = None

    @classmethod
    def of(cls, calibration: Calibration, max_false_reject: float, guarantee: str) -> Judge:
        """With the threshold that keeps a rate, and the pixel threshold that keeps it for the maps of good images."""
        pixel = calibration.pixel_threshold(max_false_reject).value if len(calibration.peaks) else None
        threshold = calibration.threshold(max_false_reject, guarantee)
        return cls(max_false_reject, guarantee, calibration, threshold, pixel)

    def with_threshold(
        self, *, max_false_reject: float | None = None, guarantee: str | None = None, threshold: float | None = None
    ) -> Judge:
        """With another threshold: one that keeps a rate, or one the user names, which leaves the regions as they are.

        Raises:
            FlawmapError: both or neither are given, a rate outside (0, 1), an unknown guarantee, a threshold that is no
                number, or there is no calibration.
        """
        if (max_false_reject is None) == (threshold is None):
            raise FlawmapError("give either a false-reject rate or a threshold")
        if max_false_reject is not None and not 0 < max_false_reject < 1:
            raise FlawmapError(f"--max-false-reject must lie between 0 and 1, got {max_false_reject}")
        if guarantee not in (None, *GUARANTEES):
            raise FlawmapError(f"unknown guarantee {guarantee}: choose {' or '.join(GUARANTEES)}")
        if threshold is not None and math.isnan(threshold):  # which no score would reach
            raise FlawmapError(f"--threshold must be a number, got {threshold}")
        if self.calibration is None:
            raise FlawmapError("a setting was moved without calibrating anew, so no threshold can be had: calibrate")
        if max_false_reject is not None:
            return Judge.of(self.calibration, max_false_reject, guarantee or self.guarantee)
        assert threshold is not None
        return replace(self, threshold=self.calibration.threshold_at(threshold))

    def judge(
        self,
        path: Path | None,
        scores: Sequence[float],
        maps: NDArray[np.float32] | None,
        placement: Placement,
        milliseconds: float,
        unjudgeable: str | None = None,
    ) -> Inspection:
        """The verdict on an image from what came of its T windows: the highest score counts.

        Args:
            path: the image; None for an array.
            scores: T of them.
            maps: (T, h, w) float32; None for methods without a map.
            placement: the windows.
            milliseconds: what it took.
            unjudgeable: why the capture cannot be judged, if so.
        """
        score = float(np.max(scores))
        if not np.isfinite(score) or (maps is not None and not bool(np.isfinite(maps).all())):
            unjudgeable = "its score is not a finite number"
        if unjudgeable is not None:
            return Inspection(path, "error", size=placement.size, error=f"{path or 'the array'}: {unjudgeable}")
        known: dict[str, Any] = {
            "score": score,
            "size": placement.size,
            "milliseconds": milliseconds,
            "maps": maps,
            "placement": placement,
        }
        if self.calibration is None or self.threshold is None:
            return Inspection(path, None, **known)
        return Inspection(
            path,
            "defect" if score >= self.threshold.value else "good",
            p_value=self.calibration.p_value(score),
            threshold=self.threshold.value,
            pixel_threshold=self.pixel_threshold,
            **known,
        )
