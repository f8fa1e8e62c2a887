"""The HTML report of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flawmap.judging.calibration import Calibration, Threshold
from flawmap.judging.evaluation import EvaluationReport, Judged
from flawmap.report.charts import ScoreRow
from flawmap.report.figures import curve_charts, figure_rows, kind_rows, verdict_row, warning, why_no_pixel_figures
from flawmap.report.overlays import HeatScale
from flawmap.report.page import Card, histograms, legend, write_page
from flawmap.report.pictures import Picture, picture_uris
from flawmap.report.wording import facts, promise, settings_rows, short_path


def worth_showing(report: EvaluationReport, each: int = 8) -> list[int]:
    """Indices into `report.results` of the images whose pictures an evaluation page shows, ascending.

    Up to `each` of the worst misses and as many of the worst false alarms; where there are none of either, of those
    that came nearest to it; and as many caught defects, those caught in the wrong place first.
    """
    misses, _ = _worst(report, defective=True)
    alarms, _ = _worst(report, defective=False)
    return sorted({*misses[:each], *alarms[:each], *_hits(report)[:each]})


def _hits(report: EvaluationReport) -> list[int]:
    """Caught defects whose regions lie elsewhere, then the others; the highest scores first."""
    caught = [(i, r) for i, r in enumerate(report.results) if r.defective and r.verdict == "defect"]
    return [i for i, r in sorted(caught, key=lambda item: (item[1].on_defect is not False, -(item[1].score or 0.0)))]


def write_evaluation_page(
    path: Path,
    report: EvaluationReport,
    calibration: Calibration | None,
    threshold: Threshold | None,
    pictures: Mapping[int, Picture],
    *,
    scale: HeatScale | None,
    pixel_threshold: float | None,
    config: Mapping[str, Any] | None = None,
    each: int = 8,
) -> None:
    """Writes the report of an evaluation as one HTML file.

    Args:
        path: the file.
        report, calibration, threshold: of the detector that made the verdicts; without a threshold there are none.
        pictures: by index into `report.results`, of those `worth_showing(report, each)` names.
        scale, pixel_threshold: what heat colours mean and where regions are cut; None for methods without a map.
        config: the method's own settings.
        each: how many misses, and how many false alarms, to show.

    Raises:
        FlawmapError: the file cannot be written.
    """
    results = report.results
    defects = [r for r in results if r.defective and r.score is not None]
    good = [r for r in results if not r.defective and r.score is not None]
    known = np.empty(0) if calibration is None else calibration.scores.astype(np.float64)
    rows = [
        *([ScoreRow(f"Good images of the calibration ({len(known)})", known, False)] if len(known) else []),
        ScoreRow(f"Good test images ({len(good)})", _scores(good), False),
        ScoreRow(f"Defective test images ({len(defects)})", _scores(defects), True),
    ]
    misses, missed = _worst(report, defective=True)
    alarms, alarmed = _worst(report, defective=False)
    hits = _hits(report)
    no_pixel_figures = why_no_pixel_figures(report, scale)
    write_page(
        path,
        "evaluation.html",
        facts=facts(report.settings, pixels=no_pixel_figures is None),
        config=settings_rows(config),
        data=report.settings.get("data", "test images"),
        counts={"all": len(results), "good": len(good), "defects": len(defects), "unjudged": report.errors},
        milliseconds=report.milliseconds_per_image,
        verdicts=[]
        if threshold is None
        else [
            verdict_row(report, "escape_rate", defects, "good", "defective", "called good", "called good"),
            verdict_row(report, "overkill_rate", good, "defect", "good", "called a defect", "called defects"),
        ],
        figures=figure_rows(report),
        no_pixel_figures=no_pixel_figures,
        without_mask=report.without_mask,
        describe=None if threshold is None else threshold.describe(),
        promise=promise(threshold),
        warning=None if threshold is None else warning(report, threshold),
        histograms=histograms(rows, threshold),
        curves=curve_charts(report),
        kinds=kind_rows(report),
        unsure=report.unsure,
        threshold=None if threshold is None else threshold.value,
        misses=[_card(results[i], pictures.get(i)) for i in misses[:each]],
        missed=len(misses) if missed else 0,
        alarms=[_card(results[i], pictures.get(i)) for i in alarms[:each]],
        alarmed=len(alarms) if alarmed else 0,
        hits=[_card(results[i], pictures.get(i)) for i in hits[:each]],
        caught=len(hits),
        located=report.counted("located"),
        on_defect=report.counted("on_defect"),
        refused=report.counted("refused"),
        legend=legend(scale, pixel_threshold),
        unjudged=[(_name(r), _reason(r)) for r in results if r.verdict == "error"],
    )


def _worst(report: EvaluationReport, *, defective: bool) -> tuple[list[int], bool]:
    """The images judged wrongly, worst first, and True; where there are none, those nearest to it, and False."""
    wrong = "good" if defective else "defect"
    sign = 1 if defective else -1
    judged = [
        (sign * r.score, i) for i, r in enumerate(report.results) if r.defective == defective and r.score is not None
    ]
    order = [i for _, i in sorted(judged)]
    wrongly = [i for i in order if report.results[i].verdict == wrong]
    return (wrongly, True) if wrongly else (order, False)


def _card(result: Judged, picture: Picture | None) -> Card:
    in_its_folder = result.path is not None and result.path.parent.name == result.kind
    return Card(
        _name(result),
        "" if in_its_folder else result.kind,
        result.score,
        result.p_value,
        *picture_uris(picture),
        result.verdict == "defect",
        picture is not None and picture.mask is not None and bool(picture.mask.any()),
        elsewhere=result.on_defect is False,
    )


def _name(result: Judged) -> str:
    return "an array" if result.path is None else short_path(result.path)


def _reason(result: Judged) -> str:
    return (result.error or "no reason is known").removeprefix(f"{result.path}: ")


def _scores(results: list[Judged]) -> NDArray[np.float64]:
    return np.array([r.score for r in results], np.float64)
