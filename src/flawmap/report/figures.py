"""The figures of an evaluation as the rows, the curves and the sentences of its page."""

from __future__ import annotations

from typing import Any

from flawmap.judging.calibration import Threshold
from flawmap.judging.evaluation import CAUGHT_AT, IMAGE_FIGURES, PIXEL_FIGURES, EvaluationReport, Judged
from flawmap.report.charts import Line, curve_chart
from flawmap.report.overlays import HeatScale
from flawmap.report.wording import percent

_FIGURES = {
    "escape_rate": ("Escape rate", "The share of defective images that were called good."),
    "overkill_rate": ("Overkill rate", "The share of good images that were called defects."),
    "escape_rate_oracle": (
        "Best escape rate (oracle)",
        "The lowest escape rate of any threshold that rejects no more of these good images. It is chosen with the "
        "answers in view: what the scores allow, not what can be expected.",
    ),
    **{
        name: (
            f"Caught at {100 * rate:g}\N{NO-BREAK SPACE}% overkill (oracle)",
            f"The share of defective images caught where at most {100 * rate:g}\N{NO-BREAK SPACE}% of these good "
            "images, rounded down to whole images, are rejected.",
        )
        for name, rate in CAUGHT_AT.items()
    },
    "image_auroc": (
        "Image AUROC",
        "How often a defective image scores above a good one, over all pairs. 1 is perfect, 0.5 is chance.",
    ),
    "image_ap": (
        "Image AP",
        "Average precision: how many of the rejected images are real defects, averaged as more and more defects "
        "are caught. 1 is perfect.",
    ),
    "image_f1_max": (
        "Image F1-max (oracle)",
        "The best balance of caught defects and false alarms that any threshold reaches. That threshold is chosen "
        "with the answers in view, so no real one can be expected to reach it.",
    ),
    "pixel_auroc": ("Pixel AUROC", "The same as image AUROC, for pixels inside and outside of defects."),
    "pixel_ap": ("Pixel AP", "The same as image AP, for pixels."),
    "pixel_f1_max": ("Pixel F1-max (oracle)", "The same as image F1-max, for pixels, and as much of an oracle."),
    "aupro": (
        "AUPRO (limit 0.3)",
        "How much of each defect is marked while up to 30 % of good pixels are. Every defect counts the same, "
        "however small. 1 is perfect.",
    ),
}


def verdict_row(
    report: EvaluationReport, name: str, judged: list[Judged], wrong: str, kind: str, one: str, many: str
) -> dict[str, Any]:
    """A rate in plain words; `one` and `many` say what the wrong verdict was."""
    count = sum(r.verdict == wrong for r in judged)
    return {
        "title": _FIGURES[name][0],
        "value": report.figures[name],
        "interval": report.intervals[name],
        "wrong": count,
        "judged": len(judged),
        "kind": kind,
        "were": f"was {one}" if count == 1 else f"were {many}",
    }


def figure_rows(report: EvaluationReport) -> list[dict[str, Any]]:
    """All figures with their intervals and their meaning; those of pixels only where there are any."""
    rows = []
    for name, (title, meaning) in _FIGURES.items():
        value, interval = report.figures[name], report.intervals[name]
        if value is None and name in PIXEL_FIGURES:
            continue
        show = (lambda x: f"{x:.3f}") if name in IMAGE_FIGURES or name in PIXEL_FIGURES else percent
        rows.append(
            {
                "title": title,
                "value": None if value is None else show(value),
                "interval": None if interval is None else f"{show(interval[0])} to {show(interval[1])}",
                "meaning": meaning,
            }
        )
    return rows


def why_no_pixel_figures(report: EvaluationReport, scale: HeatScale | None) -> str | None:
    """None where there are some."""
    if any(report.figures[name] is not None for name in PIXEL_FIGURES):
        return None
    if scale is None:
        return "There are no figures for pixels, because this method judges whole images and gives no map."
    if report.without_mask:
        return "There are no figures for pixels, because no defective image has a mask that shows where its defect is."
    return "There are no figures for pixels, because the test images do not hold both good and defective pixels."


def warning(report: EvaluationReport, threshold: Threshold) -> str | None:
    """Said where the good test images contradict the calibration."""
    interval = report.intervals["overkill_rate"]
    rate = report.figures["overkill_rate"]
    if threshold.guarantee == "none" or rate is None or interval is None or interval[0] <= threshold.highest:
        return None
    return (
        f"Of the good test images {percent(rate)} are rejected, clearly more than {percent(threshold.highest)}. "
        "They are not like the calibration images: look at the false alarms below for the difference."
    )


def curve_charts(report: EvaluationReport) -> list[tuple[str, str, str]]:
    """Title, chart and a sentence for each curve there is."""

    def lines(curve: str, figure: str) -> list[Line]:
        named = (("images", "image"), ("pixels", "pixel"))
        return [
            Line(f"{label} ({value:.3f})", *points)
            for label, prefix in named
            if (points := report.curves[f"{prefix}_{curve}"]) is not None
            and (value := report.figures[f"{prefix}_{figure}"]) is not None
        ]

    charts = []
    escaped, overkill = report.figures["escape_rate"], report.figures["overkill_rate"]
    if roc := lines("roc", "auroc"):
        point = None if escaped is None or overkill is None else (overkill, 1 - escaped)
        text = "What lowering the threshold costs: more defects caught, more good ones rejected. In brackets: AUROC."
        chart = curve_chart("roc", roc, axes=("good called defective", "defects caught"), point=point)
        charts.append(("ROC curve", chart, text))
    if pr := lines("pr", "ap"):
        text = "How many of the rejects are real defects, as more defects are caught. In brackets: AP."
        names = ("defects caught", "rejects that are real defects")
        chart = curve_chart("pr", pr, axes=names, legend="lower left", steps=True)
        charts.append(("Precision and recall", chart, text))
    points, aupro = report.curves["pixel_pro"], report.figures["aupro"]
    if points is not None and aupro is not None:
        text = "How much of each defect is marked as more good pixels are. In brackets: AUPRO, the area up to 30 %."
        line = Line(f"defects ({aupro:.3f})", *points)
        names = ("good pixels marked", "part of each defect that is marked")
        charts.append(("PRO curve", curve_chart("pro", [line], axes=names, reach=0.3), text))
    return charts


def kind_rows(report: EvaluationReport) -> list[dict[str, Any]]:
    """Kinds of defect, those that escape most first; then the good images."""
    rows = []
    for defective in (True, False):
        of_label = [r for r in report.results if r.defective == defective]
        group = []
        for kind in sorted({r.kind for r in of_label}):
            some = [r for r in of_label if r.kind == kind]
            rejected, passed, unsure = (sum(r.verdict == of for r in some) for of in ("defect", "good", "unsure"))
            scored = sum(r.score is not None for r in some)
            located = [r.on_defect for r in some if r.on_defect is not None]
            group.append(
                {
                    "kind": kind,
                    "defective": defective,
                    "images": len(some),
                    "rejected": rejected,
                    "passed": passed,
                    "unsure": unsure,
                    "located": len(located),
                    "on_defect": sum(located),
                    "refused": sum(r.refused for r in some),
                    "errors": len(some) - scored,
                    "right": (rejected if defective else passed) / scored if scored and report.decides else None,
                    "auroc": report.auroc_of(kind) if defective else None,
                }
            )
        rows += sorted(group, key=lambda row: 1.0 if row["right"] is None else row["right"])
    return rows
