"""A model held against new good images: whether what it promised is kept, on the machine that it runs on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flawmap.errors import FlawmapError, ImageError
from flawmap.imaging.captures import STATISTICS, capture_statistics
from flawmap.imaging.decoding import read_image
from flawmap.imaging.image_files import digest
from flawmap.judging.calibration import Threshold, binomial_interval
from flawmap.line.inspector import Inspector

_SURE = 0.01  # a test below it is told as a difference


@dataclass(frozen=True)
class Statistic:
    """One capture statistic of the new images beside what was learnt: ranges, and limits (None: not looked at)."""

    name: str
    low: float
    high: float
    good_low: float
    good_high: float


@dataclass(frozen=True)
class Validation:
    """What `validate` found.

    Attributes:
        images: how many were judged.
        known: how many were left out because the model has learnt from them, or because they came before.
        unjudged: one line for each that could not be.
        rejected: how many of the judged reach the threshold.
        interval: of their share, with 95 % confidence (Clopper-Pearson).
        threshold: what was promised.
        probability: of scores that differ so much from the calibration scores, if both are of like parts: the
            two-sample Kolmogorov-Smirnov test. P-values are uniform where they do not differ.
        statistics: of the captures.
        milliseconds: 50, 95 and 99 % of the single images took at most so long, decoding not counted, after a warm-up.
        engine: what ran the model.
    """

    images: int
    known: int
    unjudged: list[str]
    rejected: int
    interval: tuple[float, float]
    threshold: Threshold
    probability: float
    statistics: list[Statistic]
    milliseconds: tuple[float, float, float]
    engine: str

    @property
    def kept(self) -> bool:
        """Whether the promised rate, or the upper end of an estimate's interval, lies within or above the interval."""
        return self.interval[0] <= self.threshold.highest

    @property
    def alike(self) -> bool:
        """Whether nothing speaks against scores of the same kind."""
        return self.probability >= _SURE

    def describe(self) -> str:
        """Some lines."""
        if not self.images:
            return "no image could be judged"
        low, high = self.interval
        share = self.rejected / self.images
        known = f"; {self.known} left out: learnt from, or there twice" if self.known else ""
        stated = "estimated" if self.threshold.guarantee == "tail" else "promised"
        kept = "nothing speaks against it" if self.kept else f"NOT KEPT: more are rejected than {stated}"
        lines = [
            f"images judged   {self.images}{known}",
            f"rejected        {self.rejected} ({share:.2%}, 95 % interval {low:.2%} to {high:.2%})",
            f"{stated:<14}  {self.threshold.describe()}",
            f"                {kept}",
            f"p-values        {'uniform as far as can be told' if self.alike else 'NOT UNIFORM'} (two-sample "
            f"Kolmogorov-Smirnov test against the calibration scores, p = {self.probability:.3g})",
        ]
        if not self.alike:
            lines.append("                these parts, or their light and camera, are not those of the calibration")
        width = max(len(one.name) for one in self.statistics)
        for number, one in enumerate(self.statistics):
            outside = one.low < one.good_low or one.high > one.good_high
            found = f"{one.low:.3g} to {one.high:.3g}, learnt {one.good_low:.3g} to {one.good_high:.3g}"
            head = "captures" if number == 0 else ""
            lines.append(f"{head:<14}  {one.name:<{width}}  {found}{', outside' if outside else ''}")
        p50, p95, p99 = self.milliseconds
        lines.append(
            f"latency         p50 {p50:.1f} ms, p95 {p95:.1f} ms, p99 {p99:.1f} ms ({self.engine}, one at a time)"
        )
        return "\n".join(lines)


def validate(
    inspector: Inspector,
    paths: Sequence[Path],
    *,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Validation:
    """Inspects good images that the model has not seen.

    Images that it has learnt from are left out, and of byte-identical ones all but the first.

    Raises:
        FlawmapError: the model is not calibrated, or none of the images is new to it.
    """
    from scipy.stats import ks_2samp

    calibration, threshold = inspector.judge.calibration, inspector.judge.threshold
    if calibration is None or threshold is None:
        raise FlawmapError(
            "the model is not calibrated, and promises nothing that could be kept: train without --calibration none"
        )
    fitted = inspector.card.training.get("fitted", [])
    short = len(fitted[0]) if fitted else 16
    seen, known = set(fitted), 0
    scores, times, statistics, unjudged, rejected = [], [], [], [], 0
    inspector.warm_up()
    for number, path in enumerate(paths, start=1):
        progress("validation", number, len(paths))
        try:
            own = digest(path)[:short]
            pixels = read_image(path)
        except ImageError as error:
            unjudged.append(str(error))
            continue
        if own in seen:
            known += 1
            continue
        seen.add(own)
        start = time.perf_counter()
        inspection = inspector.predict(pixels)
        taken = 1000 * (time.perf_counter() - start)
        if inspection.score is None:
            unjudged.append(f"{path}: {(inspection.error or '').removeprefix('the array: ')}")
            continue
        times.append(taken)
        scores.append(inspection.score)
        rejected += inspection.score >= threshold.value
        statistics.append(capture_statistics(pixels, inspector.card.preparation.preprocessing.white))
    if not scores and not unjudged:
        raise FlawmapError("all of these images were learnt from: give good images that the model has not seen")
    shown = np.array(statistics).reshape(-1, len(STATISTICS))
    learnt = inspector.card.captures
    p50, p95, p99 = np.quantile(times, (0.5, 0.95, 0.99)).tolist() if times else (0.0, 0.0, 0.0)
    return Validation(
        len(scores),
        known,
        unjudged,
        rejected,
        binomial_interval(rejected, len(scores)) if scores else (0.0, 1.0),
        threshold,
        float(ks_2samp(np.array(scores, np.float32), calibration.scores).pvalue) if scores else 1.0,
        [
            Statistic(name, float(column.min()), float(column.max()), learnt.good_low[i], learnt.good_high[i])
            for i, (name, column) in enumerate(zip(STATISTICS, shown.T, strict=True))
            if len(column)
        ],
        (p50, p95, p99),
        inspector.engine.name,
    )
