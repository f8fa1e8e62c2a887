"""Scored images with known labels -> figures with intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flawmap.judging.calibration import binomial_interval
from flawmap.metrics import (
    PixelCurves,
    auroc,
    average_precision,
    best_escape_rate,
    bootstrap_caught,
    bootstrap_intervals,
    caught_at_overkill,
    f1_max,
    precision_recall_curve,
    roc_curve,
)

IMAGE_FIGURES = {"image_auroc": auroc, "image_ap": average_precision, "image_f1_max": f1_max}
PIXEL_FIGURES = {
    "pixel_auroc": "auroc",
    "pixel_ap": "average_precision",
    "pixel_f1_max": "f1_max",
    "aupro": "aupro",
}
RATES = ("escape_rate", "overkill_rate")
CAUGHT_AT = {f"caught_at_overkill_{rate:g}_oracle": rate for rate in (0.001, 0.01, 0.05)}
ORACLE_RATES = ("escape_rate_oracle", *CAUGHT_AT)
FIGURES = (*IMAGE_FIGURES, *PIXEL_FIGURES, *RATES, *ORACLE_RATES)
CURVES = ("image_roc", "image_pr", "pixel_roc", "pixel_pr", "pixel_pro")
_COUNTS = ("images", "rejected", "unsure", "refused", "located", "on_defect", "errors")
_CURVE_POINTS = 500

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]


@dataclass(frozen=True)
class Scored:
    """One test image as a detector scored it.

    Attributes:
        kind: "good" or the kind of defect.
        defective: what is known of it.
        score: None where there is none.
        verdict: "error" where it could not be judged: it has no score, or the capture check refuses it. None where
            there is no threshold.
        anomaly_map: (h, w) float32; None for methods without a map.
        mask: (h, w) bool, at the map's size; None where a defect has none.
        milliseconds: what it took.
        error: one line, where it could not be judged.
        path: the file; None for an array.
        p_value: the share of good images expected to score as high; None where it is not known.
        inside: (h, w) bool, the pixels of the map that count; None is all.
        on_defect: with verdict "defect", whether a region of the map lies on the defect; None without a map or a mask.
    """

    kind: str
    defective: bool
    score: float | None
    verdict: str | None
    anomaly_map: NDArray[np.float32] | None
    mask: NDArray[np.bool_] | None
    milliseconds: float
    error: str | None = None
    path: Path | None = None
    p_value: float | None = None
    inside: NDArray[np.bool_] | None = None
    on_defect: bool | None = None


@dataclass(frozen=True)
class Judged:
    """What is kept of a `Scored` image: all but its pixels."""

    path: Path | None
    kind: str
    defective: bool
    score: float | None
    p_value: float | None
    verdict: str | None
    error: str | None
    on_defect: bool | None = None

    @property
    def refused(self) -> bool:
        """Whether it has a score, and the capture check refuses it all the same."""
        return self.verdict == "error" and self.score is not None


@dataclass(frozen=True)
class EvaluationReport:
    """What `evaluate` found. Figures are fractions in 0..1, None where they do not exist.

    Attributes:
        figures: each of `FIGURES`. `ORACLE_RATES` are read off the test set's own good images, at thresholds chosen
            with the labels in view: the lowest escape rate with no more good images rejected than the model's own
            threshold does, and the shares of defective images caught with so much overkill at most.
            `RATES`, and the first of these, are None without a threshold.
        intervals: (low, high) of each figure with 95 % confidence: Clopper-Pearson for `RATES`, bootstrap over
            images, good and defective ones, for the others.
        kinds: for each kind of image: how many were scored (`images`), how many of them `rejected`, `unsure`, and
            `refused` by the capture check; how many of the rejected have a map and a mask (`located`), and a region on
            the defect (`on_defect`); how many have no score (`errors`).
        images: how many were scored. Those that are unsure or refused neither escape nor are they overkill, and count
            in all figures.
        unjudged: one line for each image that was refused or has no score.
        without_mask: defective images left out of the pixel figures because they have no mask.
        settings: what made the figures.
        results: every image in the order it came, those that could not be judged included.
        curves: each of `CURVES` as x and y of at most 500 points, ascending in x: false and true positive rate (roc),
            recall and precision (pr), false positive rate and per-region overlap (pro). None where the figures are.
    """

    figures: dict[str, float | None]
    intervals: dict[str, tuple[float, float] | None]
    kinds: dict[str, dict[str, int]]
    images: int
    unjudged: list[str]
    without_mask: int
    milliseconds_per_image: float | None
    settings: dict[str, Any] = field(default_factory=dict)
    results: tuple[Judged, ...] = field(default=(), repr=False)
    curves: dict[str, Curve | None] = field(default_factory=lambda: dict.fromkeys(CURVES), repr=False, compare=False)

    @property
    def errors(self) -> int:
        """How many images could not be judged."""
        return len(self.unjudged)

    @property
    def decides(self) -> bool:
        """Whether there are verdicts: without a threshold there are scores alone."""
        return all(judged.verdict is not None for judged in self.results)

    @property
    def unsure(self) -> int:
        """How many images got the verdict "unsure"."""
        return self.counted("unsure")

    def counted(self, what: str) -> int:
        """A count of `kinds` over all of them."""
        return sum(kind[what] for kind in self.kinds.values())

    def __getattr__(self, name: str) -> float | None:
        """`report.image_auroc` and so on."""
        if name in FIGURES:
            return self.figures[name]
        raise AttributeError(name)

    def auroc_of(self, kind: str) -> float | None:
        """Image AUROC of the defects of one kind against all good images; None where either is missing."""
        held = [r for r in self.results if r.score is not None and (not r.defective or r.kind == kind)]
        value = auroc(np.array([r.score for r in held]), [r.defective for r in held]) if held else math.nan
        return None if math.isnan(value) else value

    def to_json(self) -> dict[str, Any]:
        """One flat object, as `evaluate --json` writes it."""
        flat: dict[str, Any] = {}
        for name in FIGURES:
            interval = self.intervals[name]
            flat[name] = self.figures[name]
            flat[f"{name}_interval"] = None if interval is None else list(interval)
        flat["images"] = self.images
        flat["errors"] = self.errors
        flat["unsure"] = self.unsure
        flat["refused_good"] = sum(r.refused and not r.defective for r in self.results)
        flat["refused_defective"] = sum(r.refused and r.defective for r in self.results)
        flat["caught_with_mask"] = self.counted("located")
        flat["caught_on_defect"] = self.counted("on_defect")
        flat["without_mask"] = self.without_mask
        flat["milliseconds_per_image"] = self.milliseconds_per_image
        return flat | self.settings


def evaluate(scored: Iterable[Scored], settings: dict[str, Any] | None = None) -> EvaluationReport:
    """Figures of a test set, one image at a time: memory does not grow with the maps."""
    pixels = PixelCurves()
    results: list[Judged] = []
    scores: list[float] = []
    labels: list[bool] = []
    verdicts: list[str | None] = []
    times: list[float] = []
    unjudged: list[str] = []
    kinds: dict[str, dict[str, int]] = {}
    for image in scored:
        of = (image.path, image.kind, image.defective, image.score, image.p_value, image.verdict, image.error)
        results.append(Judged(*of, image.on_defect))
        kind = kinds.setdefault(image.kind, dict.fromkeys(_COUNTS, 0))
        if image.verdict == "error":
            unjudged.append(image.error or "")
        if image.score is None:
            kind["errors"] += 1
            continue
        rejected = image.verdict == "defect"
        kind["images"] += 1
        kind["rejected"] += rejected
        kind["unsure"] += image.verdict == "unsure"
        kind["refused"] += image.verdict == "error"
        kind["located"] += rejected and image.on_defect is not None
        kind["on_defect"] += rejected and bool(image.on_defect)
        scores.append(image.score)
        labels.append(image.defective)
        verdicts.append(image.verdict)
        times.append(image.milliseconds)
        if image.anomaly_map is not None:
            mask = image.mask
            if mask is None and not image.defective:
                mask = np.zeros(image.anomaly_map.shape, dtype=bool)
            pixels.update(image.anomaly_map[None], [mask], None if image.inside is None else image.inside[None])

    figures: dict[str, float | None] = {}
    intervals: dict[str, tuple[float, float] | None] = {}
    resampled = bootstrap_intervals(scores, labels)
    for name, figure in IMAGE_FIGURES.items():
        figures[name] = figure(scores, labels)
        intervals[name] = resampled[figure.__name__]
    found, spread = (pixels.compute(), pixels.intervals()) if pixels.images else (None, {})
    for name, attribute in PIXEL_FIGURES.items():
        figures[name] = getattr(found, attribute, math.nan)
        intervals[name] = spread.get(attribute)
    decided = [] if None in verdicts else list(zip(verdicts, labels, strict=True))
    missed = [verdict == "good" for verdict, defective in decided if defective]
    overkill = [verdict == "defect" for verdict, defective in decided if not defective]
    for name, events in (("escape_rate", missed), ("overkill_rate", overkill)):
        figures[name] = sum(events) / len(events) if events else math.nan
        intervals[name] = binomial_interval(sum(events), len(events)) if events else None
    own = sum(overkill) / len(overkill) if overkill else 0.0
    figures["escape_rate_oracle"] = best_escape_rate(scores, labels, own) if decided else math.nan
    (low, high), *caught = bootstrap_caught(scores, labels, [own, *CAUGHT_AT.values()])
    intervals["escape_rate_oracle"] = 1 - high, 1 - low
    for (name, rate), interval in zip(CAUGHT_AT.items(), caught, strict=True):
        figures[name], intervals[name] = caught_at_overkill(scores, labels, rate), interval
    for name, value in figures.items():
        if value is None or math.isnan(value):
            figures[name] = intervals[name] = None
    curves: dict[str, Curve | None] = dict.fromkeys(CURVES)
    if figures["image_auroc"] is not None:
        curves["image_roc"] = _thinned(*roc_curve(scores, labels)[:2])
        curves["image_pr"] = _thinned(*precision_recall_curve(scores, labels)[1::-1])
    if figures["pixel_auroc"] is not None:
        curves["pixel_roc"] = _thinned(*pixels.roc_curve()[:2])
        curves["pixel_pr"] = _thinned(*pixels.precision_recall_curve()[1::-1])
        curves["pixel_pro"] = _thinned(*pixels.pro_curve()[:2])
    return EvaluationReport(
        figures,
        intervals,
        kinds,
        images=len(scores),
        unjudged=unjudged,
        without_mask=pixels.skipped,
        milliseconds_per_image=float(np.median(times)) if times else None,
        settings=settings or {},
        results=tuple(results),
        curves=curves,
    )


def _thinned(x: NDArray[np.float64], y: NDArray[np.float64]) -> Curve:
    """A curve (K,) without the points that lie closest together along it, ascending in x, both ends kept."""
    if x[0] > x[-1]:
        x, y = x[::-1], y[::-1]
    if len(x) > _CURVE_POINTS:
        along = np.append(0.0, np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y))))
        kept = np.unique(np.searchsorted(along, np.linspace(0.0, along[-1], _CURVE_POINTS)))
        x, y = x[kept], y[kept]
    return x, y
