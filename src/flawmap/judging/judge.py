"""Scores held against what good images reach: thresholds that may be moved, and the verdict on one image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flawmap.errors import FlawmapError
from flawmap.imaging.placement import Placement
from flawmap.imaging.window_maps import each
from flawmap.judging.calibration import GUARANTEES, Calibration, Threshold, uncalibrated
from flawmap.judging.inspection import Inspection, Verdict
from flawmap.ranges import SCORES, finite, rate


@dataclass(frozen=True)
class Judge:
    """Gives verdicts. Made by `of`; without a calibration there are maps and scores, but no verdicts, unless the user
    names a threshold.

    Attributes:
        max_false_reject, guarantee: what the threshold is to keep.
        calibration: scores of good images.
        threshold: the threshold and what it promises.
        pixel_threshold: where regions are cut; None for methods without a map.
        unsure: whether a score between the conformal threshold and the tail's gets the verdict "unsure".
        other: the one of the two that `threshold` is not; None without `unsure`.
    """

    max_false_reject: float
    guarantee: str
    calibration: Calibration | None = None
    threshold: Threshold | None = None
    pixel_threshold: float | None = None
    unsure: bool = False
    other: Threshold | None = None

    @classmethod
    def of(cls, calibration: Calibration, max_false_reject: float, guarantee: str, *, unsure: bool = False) -> Judge:
        """With the threshold that keeps a rate, and the pixel threshold that keeps it for the maps of good images.

        Raises:
            FlawmapError: the tail of the scores is asked for, by "tail" or by `unsure`, and cannot be had.
        """
        pixel = calibration.pixel_threshold(max_false_reject).value if len(calibration.peaks) else None
        threshold = calibration.threshold(max_false_reject, guarantee)
        against = "marginal" if guarantee == "tail" else "tail"
        other = calibration.threshold(max_false_reject, against) if unsure else None
        return cls(max_false_reject, guarantee, calibration, threshold, pixel, unsure, other)

    def with_threshold(
        self,
        *,
        max_false_reject: float | None = None,
        guarantee: str | None = None,
        threshold: float | None = None,
        tail: bool = False,
        unsure: bool | None = None,
    ) -> Judge:
        """With another threshold: one that keeps a rate, or one the user names, which leaves the regions as they are.

        Args:
            max_false_reject: the rate; with `tail` or `unsure` the one kept so far by default.
            guarantee: "marginal", "confidence" or "tail"; the one given so far by default.
            threshold: the user's own.
            tail: the same as the guarantee "tail".
            unsure: whether scores between the conformal threshold and the tail's get the verdict "unsure"; as so far by
                default. A threshold of the user's own ends it.

        Raises:
            FlawmapError: both or neither are given, a rate outside (0, 1), an unknown guarantee, a threshold that is no
                number, another guarantee with `tail`, `tail` or `unsure` with a threshold, a rate without a
                calibration, or the tail cannot be fitted to its scores.
        """
        if tail and guarantee not in (None, "tail"):
            raise FlawmapError("a tail promises nothing: give --tail or --guarantee, not both")
        if (tail or unsure) and threshold is not None:
            raise FlawmapError("--tail and --unsure need thresholds of the calibration: leave --threshold out")
        if max_false_reject is None and threshold is None and (tail or unsure is not None):
            max_false_reject = self.max_false_reject
        if (max_false_reject is None) == (threshold is None):
            raise FlawmapError("give either a false-reject rate or a threshold")
        if max_false_reject is not None:
            max_false_reject = rate("--max-false-reject", max_false_reject)
        if guarantee not in (None, *GUARANTEES):
            raise FlawmapError(f"unknown guarantee {guarantee}: choose {' or '.join(GUARANTEES)}")
        if threshold is not None:
            threshold = finite("--threshold", threshold, SCORES)
        if max_false_reject is not None:
            if self.calibration is None:
                raise FlawmapError(
                    "there are no scores of good images to take a threshold from: give --threshold, or calibrate"
                )
            kept = "tail" if tail else guarantee or self.guarantee
            return Judge.of(self.calibration, max_false_reject, kept, unsure=self.unsure if unsure is None else unsure)
        assert threshold is not None
        held = uncalibrated(threshold) if self.calibration is None else self.calibration.threshold_at(threshold)
        return replace(self, threshold=held, unsure=False, other=None)

    @property
    def between(self) -> tuple[float, float] | None:
        """Scores from the first to below the second are unsure; None without `unsure`."""
        if self.threshold is None or self.other is None:
            return None
        low, high = sorted((self.threshold.value, self.other.value))
        return low, high

    def describe(self) -> str:
        """What the threshold promises, and what is unsure, in a line each."""
        if self.threshold is None:
            return (
                "no threshold, so no verdicts: all good images were learnt from (--calibration none), and none of them "
                "tells what new ones score"
            )
        lines = [self.threshold.describe()]
        if self.between is not None:
            low, high = self.between
            lines.append(f"unsure from {low:.6g} to below {high:.6g}: between the conformal threshold and the tail's")
        return "\n".join(lines)

    def verdict(self, score: float) -> Verdict:
        """What a score is called.

        Raises:
            ValueError: there is no threshold.
        """
        if self.threshold is None:
            raise ValueError("there is no threshold to hold a score against")
        low, high = self.between or (self.threshold.value, self.threshold.value)
        return "defect" if score >= high else "good" if score < low else "unsure"

    def judge(
        self,
        path: Path | None,
        scores: Sequence[float],
        maps: NDArray[np.float32] | None,
        placement: Placement,
        milliseconds: float,
        refused: str | None = None,
        *,
        checked: bool = True,
        pixels: NDArray[Any] | None = None,
        digest: str | None = None,
        statistics: NDArray[np.float64] | None = None,
    ) -> Inspection:
        """The verdict on an image from what came of its T windows: the highest score counts.

        Args:
            path: the image; None for an array.
            scores: T of them.
            maps: (T, h, w) float32; None for methods without a map.
            placement: the windows.
            milliseconds: what it took.
            refused: why the capture check refuses it, if so.
            checked: whether that means that it is not judged.
            pixels, digest, statistics: of the image, for whoever wants to show, or to prove, what was judged.
        """
        score = float(np.max(scores))
        seen: dict[str, Any] = {
            "size": placement.size,
            "refused": refused,
            "pixels": pixels,
            "digest": digest,
            "statistics": statistics,
        }
        reason = refused if checked else None
        if not np.isfinite(score) or (maps is not None and not all(np.isfinite(one).all() for one in each(maps))):
            reason = "its score is not a finite number"
        if reason is not None:
            told = f"{path or 'the array'}: {reason}"
            return Inspection(path, "error", error=told, **seen)
        known: dict[str, Any] = {
            **seen,
            "score": score,
            "milliseconds": milliseconds,
            "maps": maps,
            "placement": placement,
        }
        if self.threshold is None:
            return Inspection(path, None, **known)
        return Inspection(
            path,
            self.verdict(score),
            p_value=None if self.calibration is None else self.calibration.p_value(score),
            threshold=self.threshold.value,
            pixel_threshold=self.pixel_threshold,
            unsure_between=self.between,
            **known,
        )
