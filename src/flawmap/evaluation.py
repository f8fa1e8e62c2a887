"""Scored images with known labels -> figures with intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flawmap.calibration import binomial_interval
from flawmap.metrics import PixelCurves, auroc, average_precision, bootstrap_interval, f1_max

IMAGE_FIGURES = {"image_auroc": auroc, "image_ap": average_precision, "image_f1_max": f1_max}
PIXEL_FIGURES = {
    "pixel_auroc": "auroc",
    "pixel_ap": "average_precision",
    "pixel_f1_max": "f1_max",
    "aupro": "aupro",
}
RATES = ("escape_rate", "overkill_rate")
FIGURES = (*IMAGE_FIGURES, *PIXEL_FIGURES, *RATES)


@dataclass(frozen=True)
class Scored:
    """One test image as a detector scored it.

    Attributes:
        kind: "good" or the kind of defect.
        defective: what is known of it.
        score, verdict: None and "error" where it could not be judged.
        anomaly_map: (h, w) float32; None for methods without a map.
        mask: (h, w) bool, at the map's size; None where a defect has none.
        milliseconds: what it took.
    """

    kind: str
    defective: bool
    score: float | None
    verdict: str
    anomaly_map: NDArray[np.float32] | None
    mask: NDArray[np.bool_] | None
    milliseconds: float
    error: str | None = None


@dataclass(frozen=True)
class EvaluationReport:
    """What `evaluate` found. Figures are fractions in 0..1, None where they do not exist.

    Attributes:
        figures: each of `FIGURES`.
        intervals: (low, high) of each figure with 95 % confidence: Clopper-Pearson for the rates, bootstrap over
            images for the others.
        kinds: for each kind of image: how many, how many of them rejected, how many not judged.
        images: how many were judged.
        unjudged: one line for each image that could not be.
        without_mask: defective images left out of the pixel figures because they have no mask.
        settings: what made the figures.
    """

    figures: dict[str, float | None]
    intervals: dict[str, tuple[float, float] | None]
    kinds: dict[str, dict[str, int]]
    images: int
    unjudged: list[str]
    without_mask: int
    milliseconds_per_image: float | None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def errors(self) -> int:
        """How many images could not be judged."""
        return len(self.unjudged)

    def __getattr__(self, name: str) -> float | None:
        """`report.image_auroc` and so on."""
        if name in FIGURES:
            return self.figures[name]
        raise AttributeError(name)

    def to_json(self) -> dict[str, Any]:
        """One flat object, as `evaluate --json` writes it."""
        flat: dict[str, Any] = {}
        for name in FIGURES:
            interval = self.intervals[name]
            flat[name] = self.figures[name]
            flat[f"{name}_interval"] = None if interval is None else list(interval)
        flat["images"] = self.images
        flat["errors"] = self.errors
        flat["without_mask"] = self.without_mask
        flat["milliseconds_per_image"] = self.milliseconds_per_image
        return flat | self.settings


def evaluate(scored: Iterable[Scored], settings: dict[str, Any] | None = None) -> EvaluationReport:
    """Figures of a test set, one image at a time: memory does not grow with the maps."""
    curves = PixelCurves()
    scores: list[float] = []
    labels: list[bool] = []
    rejected: list[bool] = []
    times: list[float] = []
    unjudged: list[str] = []
    kinds: dict[str, dict[str, int]] = {}
    for image in scored:
        kind = kinds.setdefault(image.kind, {"images": 0, "rejected": 0, "errors": 0})
        if image.score is None:
            kind["errors"] += 1
            unjudged.append(image.error or "")
            continue
        kind["images"] += 1
        kind["rejected"] += image.verdict == "defect"
        scores.append(image.score)
        labels.append(image.defective)
        rejected.append(image.verdict == "defect")
        times.append(image.milliseconds)
        if image.anomaly_map is not None:
            mask = image.mask
            if mask is None and not image.defective:
                mask = np.zeros(image.anomaly_map.shape, dtype=bool)
            curves.update(image.anomaly_map[None], [mask])

    figures: dict[str, float | None] = {}
    intervals: dict[str, tuple[float, float] | None] = {}
    for name, figure in IMAGE_FIGURES.items():
        figures[name] = figure(scores, labels) if scores else math.nan
        intervals[name] = bootstrap_interval(figure, scores, labels) if scores else None
    pixels, spread = (curves.compute(), curves.intervals()) if curves.images else (None, {})
    for name, attribute in PIXEL_FIGURES.items():
        figures[name] = getattr(pixels, attribute, math.nan)
        intervals[name] = spread.get(attribute)
    missed = [not r for r, defective in zip(rejected, labels, strict=True) if defective]
    overkill = [r for r, defective in zip(rejected, labels, strict=True) if not defective]
    for name, events in (("escape_rate", missed), ("overkill_rate", overkill)):
        figures[name] = sum(events) / len(events) if events else math.nan
        intervals[name] = binomial_interval(sum(events), len(events)) if events else None
    for name, value in figures.items():
        if value is None or math.isnan(value):
            figures[name] = intervals[name] = None
    return EvaluationReport(
        figures,
        intervals,
        kinds,
        images=len(scores),
        unjudged=unjudged,
        without_mask=curves.skipped,
        milliseconds_per_image=float(np.median(times)) if times else None,
        settings=settings or {},
    )
