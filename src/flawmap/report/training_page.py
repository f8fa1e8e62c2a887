"""The HTML report of a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flawmap.judging.calibration import Calibration, Threshold
from flawmap.report.charts import ScoreRow
from flawmap.report.overlays import HeatScale
from flawmap.report.page import Card, histograms, legend, write_page
from flawmap.report.pictures import Picture, file_uri, picture_uris
from flawmap.report.wording import facts, promise, settings_rows, short_path

_GROUPS_WITH_PICTURES = 12
_PICTURES_OF_A_GROUP = 6


@dataclass(frozen=True)
class LeftOut:
    """A training file that was not learnt from, and why, in one line."""

    path: Path
    reason: str


@dataclass(frozen=True)
class AtypicalPicture:
    """A good training image that looks unlike the others: its cross-fitted score and p-value."""

    path: Path
    score: float
    p_value: float
    picture: Picture | None = None


@dataclass(frozen=True)
class Learnt:
    """What a model was trained on.

    Attributes:
        sizes: (height, width) in pixels of every image it was fitted on.
        left_out: files that were not.
        atypical: good images unlike the others, the most unusual first.
        near_duplicates: groups of two or more nearly equal training images.
        in_train_and_test: pairs of a training image and the test image it equals or nearly equals.
    """

    sizes: Sequence[tuple[int, int]]
    left_out: Sequence[LeftOut] = ()
    atypical: Sequence[AtypicalPicture] = ()
    near_duplicates: Sequence[Sequence[Path]] = ()
    in_train_and_test: Sequence[tuple[Path, Path]] = ()


def write_training_page(
    path: Path,
    settings: Mapping[str, Any],
    learnt: Learnt,
    calibration: Calibration | None,
    threshold: Threshold | None,
    *,
    scale: HeatScale | None,
    pixel_threshold: float | None,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Writes the report of a training as one HTML file.

    Args:
        path: the file.
        settings: what was asked, under the names that `EvaluationReport.settings` has.
        learnt: what it was trained on; files named there are read for their pictures where they still can be.
        calibration, threshold: of the trained detector; None where all good images were learnt from.
        scale, pixel_threshold, config: as `write_evaluation_page`.

    Raises:
        FlawmapError: the file cannot be written.
    """
    charts = None
    if calibration is not None:
        rows = [ScoreRow(f"Good images ({len(calibration.scores)})", calibration.scores.astype(np.float64), False)]
        charts = histograms(rows, threshold)
    write_page(
        path,
        "training.html",
        facts=facts(settings, pixels=False),
        config=settings_rows(config),
        data=settings.get("data", "good images"),
        images=len(learnt.sizes),
        sizes=_sizes(learnt.sizes),
        left_out=[(short_path(item.path), item.reason.removeprefix(f"{item.path}: ")) for item in learnt.left_out],
        describe=None if threshold is None else threshold.describe(),
        promise=promise(threshold),
        histograms=charts,
        threshold=None if threshold is None else threshold.value,
        atypical=[
            Card(
                short_path(item.path),
                "",
                item.score,
                item.p_value,
                *picture_uris(item.picture),
                threshold is not None and item.score >= threshold.value,
            )
            for item in learnt.atypical
        ],
        near_duplicates=_groups(learnt.near_duplicates),
        in_train_and_test=_groups(learnt.in_train_and_test),
        legend=legend(scale, pixel_threshold),
    )


def _groups(groups: Sequence[Sequence[Path]]) -> list[list[tuple[str, str | None]]]:
    """Names with pictures; without them where there are very many, so that the file stays small."""
    return [
        [
            (short_path(path), file_uri(path) if g < _GROUPS_WITH_PICTURES and i < _PICTURES_OF_A_GROUP else None)
            for i, path in enumerate(group)
        ]
        for g, group in enumerate(groups)
    ]


def _sizes(sizes: Sequence[tuple[int, int]]) -> str:
    if not sizes:
        return "of unknown size"
    heights, widths = zip(*sizes, strict=True)
    if len(set(sizes)) == 1:
        return f"of {widths[0]} × {heights[0]} pixels (width × height)"
    return (
        f"of {len(set(sizes))} different sizes, {min(widths)} to {max(widths)} pixels wide "
        f"and {min(heights)} to {max(heights)} pixels high"
    )
