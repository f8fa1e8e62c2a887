"""One-file HTML reports of an evaluation and of a training: open anywhere, offline, without anything beside them."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flawmap.errors import ImageError
from flawmap.files import replacing
from flawmap.imaging.decoding import read_image
from flawmap.imaging.geometry import Geometry
from flawmap.judging.calibration import Calibration, Threshold
from flawmap.judging.evaluation import IMAGE_FIGURES, PIXEL_FIGURES, EvaluationReport, Judged
from flawmap.judging.inspection import Inspection
from flawmap.report.charts import Line, ScoreRow, curve_chart, score_histograms
from flawmap.report.overlays import CONTOUR, HeatScale, as_rgb, overlay

_SIDE = 360  # pixels, of a picture's longest side
_QUALITY = 85  # of JPEG
_GROUPS_WITH_PICTURES = 12
_PICTURES_OF_A_GROUP = 6
_TRUTH = (255, 0, 200)  # the outline of the ground truth
_GAP, _WIDTH = 1, 2  # pixels between a defect and its outline, and of the outline
_CHART_WIDTHS = {"wide": 1060, "narrow": 340}

_FACTS = {
    "data": "Data set",
    "method": "Method",
    "backbone": "Backbone",
    "image_size": "Image size",
    "training_images": "Good training images",
    "engine": "Engine",
    "seed": "Seed",
    "max_false_reject": "False rejects asked for",
    "full_resolution": "Pixel figures",
}
_FIGURES = {
    "escape_rate": ("Escape rate", "The share of defective images that were called good."),
    "overkill_rate": ("Overkill rate", "The share of good images that were called defects."),
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


@dataclass(frozen=True)
class Picture:
    """What a page shows of one image. `take_picture` makes one that is small enough to keep many.

    Attributes:
        original: uint8 (H, W, 3).
        overlay: uint8 (H, W, 3), the heatmap over it; None without a map.
        mask: bool (H, W), True on defects, outlined on the original; None where there is none.
    """

    original: NDArray[np.uint8]
    overlay: NDArray[np.uint8] | None = None
    mask: NDArray[np.bool_] | None = None


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


def take_picture(
    pixels: NDArray[Any], inspection: Inspection, scale: HeatScale | None, mask: NDArray[np.bool_] | None = None
) -> Picture:
    """An image with its heatmap at the size a page shows it.

    Args:
        pixels: as `read_image` gives them, (H, W) or (H, W, 3).
        inspection: of the same image.
        scale: the detector's; None for methods without a map.
        mask: bool (H, W) of its ground truth.
    """
    heat = None if scale is None or inspection.maps is None else _shrunk(overlay(pixels, inspection, scale))
    original = _shrunk(as_rgb(pixels))
    return Picture(original, heat, None if mask is None else _shrunk_mask(mask, original.shape[:2]))


def worth_showing(report: EvaluationReport, each: int = 8) -> list[int]:
    """Indices into `report.results` of the images whose pictures an evaluation page shows, ascending.

    Up to `each` of the worst misses and as many of the worst false alarms; where there are none of either, of those
    that came nearest to it.
    """
    misses, _ = _worst(report, defective=True)
    alarms, _ = _worst(report, defective=False)
    return sorted({*misses[:each], *alarms[:each]})


def write_evaluation_page(
    path: Path,
    report: EvaluationReport,
    calibration: Calibration,
    threshold: Threshold,
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
        report, calibration, threshold: of the detector that made the verdicts.
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
    rows = [
        ScoreRow(f"Good images of the calibration ({len(calibration.scores)})", _float64(calibration.scores), False),
        ScoreRow(f"Good test images ({len(good)})", _scores(good), False),
        ScoreRow(f"Defective test images ({len(defects)})", _scores(defects), True),
    ]
    misses, missed = _worst(report, defective=True)
    alarms, alarmed = _worst(report, defective=False)
    no_pixel_figures = _why_no_pixel_figures(report, scale)
    _write(
        path,
        "evaluation.html",
        facts=_facts(report.settings, pixels=no_pixel_figures is None),
        config=_settings(config),
        data=report.settings.get("data", "test images"),
        counts={"all": len(results), "good": len(good), "defects": len(defects), "unjudged": report.errors},
        milliseconds=report.milliseconds_per_image,
        verdicts=[
            _verdict(report, "escape_rate", defects, "good", "defective", "called good", "called good"),
            _verdict(report, "overkill_rate", good, "defect", "good", "called a defect", "called defects"),
        ],
        figures=_figure_rows(report),
        no_pixel_figures=no_pixel_figures,
        without_mask=report.without_mask,
        describe=threshold.describe(),
        promise=_promise(threshold),
        warning=_warning(report, threshold),
        histograms=_histograms(rows, threshold),
        curves=_curve_charts(report),
        kinds=_kind_rows(report),
        threshold=threshold.value,
        misses=[_card(results[i], pictures.get(i)) for i in misses[:each]],
        missed=len(misses) if missed else 0,
        alarms=[_card(results[i], pictures.get(i)) for i in alarms[:each]],
        alarmed=len(alarms) if alarmed else 0,
        legend=_legend(scale, pixel_threshold),
        unjudged=[(_name(r), _reason(r)) for r in results if r.score is None],
    )


def write_training_page(
    path: Path,
    settings: Mapping[str, Any],
    learnt: Learnt,
    calibration: Calibration,
    threshold: Threshold,
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
        calibration, threshold: of the trained detector.
        scale, pixel_threshold, config: as `write_evaluation_page`.

    Raises:
        FlawmapError: the file cannot be written.
    """
    rows = [ScoreRow(f"Good images ({len(calibration.scores)})", _float64(calibration.scores), False)]
    _write(
        path,
        "training.html",
        facts=_facts(settings, pixels=False),
        config=_settings(config),
        data=settings.get("data", "good images"),
        images=len(learnt.sizes),
        sizes=_sizes(learnt.sizes),
        left_out=[(_short(item.path), item.reason.removeprefix(f"{item.path}: ")) for item in learnt.left_out],
        describe=threshold.describe(),
        promise=_promise(threshold),
        histograms=_histograms(rows, threshold),
        threshold=threshold.value,
        atypical=[
            _Card(_short(item.path), "", item.score, item.p_value, *_uris(item.picture), item.score >= threshold.value)
            for item in learnt.atypical
        ],
        near_duplicates=_groups(learnt.near_duplicates),
        in_train_and_test=_groups(learnt.in_train_and_test),
        legend=_legend(scale, pixel_threshold),
    )


# What the templates show


@dataclass(frozen=True)
class _Card:
    name: str
    kind: str
    score: float | None
    p_value: float | None
    original: str | None
    overlay: str | None
    rejected: bool
    outlined: bool = False


@dataclass(frozen=True)
class _Legend:
    strip: str
    low: float
    middle: float | None
    high: float
    position: float
    found: str
    truth: str


def _write(path: Path, template: str, **values: Any) -> None:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("flawmap.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"percent": _percent, "number": _number}
    text = environment.get_template(template).render(values, version=version("flawmap"))
    with replacing(path) as file:
        file.write(text.encode("utf-8", "replace"))  # a file name need not be valid text


def _percent(value: float) -> str:
    digits = 0 if value in (0, 1) else 1 if value >= 0.1 else 2
    return f"{100 * value:.{digits}f}\N{NO-BREAK SPACE}%"


def _number(value: float) -> str:
    return f"{value:.5g}"


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


def _facts(settings: Mapping[str, Any], *, pixels: bool) -> list[tuple[str, str]]:
    """What was asked and with what: the settings in the order of `_FACTS`, then those it does not name."""
    elsewhere = ("threshold", "guarantee") if pixels else ("threshold", "guarantee", "full_resolution")
    names = [name for name in _FACTS if name in settings] + [name for name in settings if name not in _FACTS]
    return [
        (_FACTS.get(name, name.replace("_", " ").capitalize()), _fact(name, settings[name]))
        for name in names
        if name not in elsewhere
    ]


def _fact(name: str, value: Any) -> str:
    if value is None:
        return "none"
    if name == "image_size":
        return f"{value[0]} × {value[1]} pixels"
    if name == "full_resolution":
        return "on the original pixels" if value else "at the model's image size"
    if name == "max_false_reject":
        return _percent(value)
    return _text(value)


def _settings(config: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    return [(name, _text(value)) for name, value in (config or {}).items()]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(item) for item in value)
    return str(value)


def _verdict(
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


def _figure_rows(report: EvaluationReport) -> list[dict[str, Any]]:
    rows = []
    for name, (title, meaning) in _FIGURES.items():
        value, interval = report.figures[name], report.intervals[name]
        if value is None and name in PIXEL_FIGURES:
            continue
        show = (lambda x: f"{x:.3f}") if name in IMAGE_FIGURES or name in PIXEL_FIGURES else _percent
        rows.append(
            {
                "title": title,
                "value": None if value is None else show(value),
                "interval": None if interval is None else f"{show(interval[0])} to {show(interval[1])}",
                "meaning": meaning,
            }
        )
    return rows


def _why_no_pixel_figures(report: EvaluationReport, scale: HeatScale | None) -> str | None:
    if any(report.figures[name] is not None for name in PIXEL_FIGURES):
        return None
    if scale is None:
        return "There are no figures for pixels, because this method judges whole images and gives no map."
    if report.without_mask:
        return "There are no figures for pixels, because no defective image has a mask that shows where its defect is."
    return "There are no figures for pixels, because the test images do not hold both good and defective pixels."


def _promise(threshold: Threshold) -> dict[str, list[str]]:
    """What the calibration means and what it does not, in sentences."""
    rate, images = _percent(threshold.rate), threshold.images
    means = {
        "marginal": [
            f"Of good parts like the {images} calibration images, at most {rate} are rejected on average. "
            "These images were kept out of training.",
            "On average is meant over many such calibrations. This one may be better or worse: "
            f"with 95 % confidence its own rate is below {_percent(threshold.upper)}.",
        ],
        "confidence": [
            f"With 95 % confidence, at most {rate} of good parts like the {images} calibration images are rejected. "
            "These images were kept out of training.",
        ],
        "estimate": [
            f"About {rate} of good parts like the {images} calibration images are rejected.",
            "Each of these images was scored by a model that had not seen it, but the model in use has learnt from "
            "all of them. So this is a fair estimate, and not a promise. For a promise, keep good images out of "
            "training: train with --calibration holdout, or with a folder of further good images.",
        ],
        "none": [f"You chose this threshold. {rate} of the {images} calibration images reach it."],
    }[threshold.guarantee]
    does_not = [
        "It says nothing about defects. How many of them escape can only be measured, on defective test images.",
        "It does not hold for parts unlike the calibration images. After a change of light, camera, lens, material or "
        "supplier, calibrate again.",
    ]
    if threshold.guarantee == "none":
        does_not.insert(0, "A threshold chosen by hand comes without any promise.")
    return {"means": means, "does_not": does_not}


def _warning(report: EvaluationReport, threshold: Threshold) -> str | None:
    """Said where the good test images contradict the calibration."""
    interval = report.intervals["overkill_rate"]
    rate = report.figures["overkill_rate"]
    if threshold.guarantee == "none" or rate is None or interval is None or interval[0] <= threshold.rate:
        return None
    return (
        f"Of the good test images {_percent(rate)} are rejected, clearly more than {_percent(threshold.rate)}. "
        "They are not like the calibration images: look at the false alarms below for the difference."
    )


def _histograms(rows: list[ScoreRow], threshold: Threshold) -> dict[str, str]:
    """The same chart for wide and for narrow screens, so that its text can be read on both."""
    return {name: score_histograms(rows, threshold.value, width=width) for name, width in _CHART_WIDTHS.items()}


def _curve_charts(report: EvaluationReport) -> list[tuple[str, str, str]]:
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


def _kind_rows(report: EvaluationReport) -> list[dict[str, Any]]:
    """Kinds of defect, those that escape most first; then the good images."""
    rows = []
    for defective in (True, False):
        of_label = [r for r in report.results if r.defective == defective]
        group = []
        for kind in sorted({r.kind for r in of_label}):
            verdicts = [r.verdict for r in of_label if r.kind == kind]
            rejected, passed, errors = (verdicts.count(verdict) for verdict in ("defect", "good", "error"))
            group.append(
                {
                    "kind": kind,
                    "defective": defective,
                    "images": len(verdicts),
                    "rejected": rejected,
                    "passed": passed,
                    "errors": errors,
                    "right": (rejected if defective else passed) / (rejected + passed) if rejected + passed else None,
                    "auroc": report.auroc_of(kind) if defective else None,
                }
            )
        rows += sorted(group, key=lambda row: 1.0 if row["right"] is None else row["right"])
    return rows


def _card(result: Judged, picture: Picture | None) -> _Card:
    in_its_folder = result.path is not None and result.path.parent.name == result.kind
    return _Card(
        _name(result),
        "" if in_its_folder else result.kind,
        result.score,
        result.p_value,
        *_uris(picture),
        result.verdict == "defect",
        picture is not None and picture.mask is not None and bool(picture.mask.any()),
    )


def _groups(groups: Sequence[Sequence[Path]]) -> list[list[tuple[str, str | None]]]:
    """Names with pictures; without them where there are very many, so that the file stays small."""
    return [
        [
            (_short(path), _file_uri(path) if g < _GROUPS_WITH_PICTURES and i < _PICTURES_OF_A_GROUP else None)
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


def _legend(scale: HeatScale | None, pixel_threshold: float | None) -> _Legend | None:
    """The scale as `overlay` draws it on a grey part."""
    if scale is None:
        return None
    width, height = 512, 8
    ramp = np.tile(np.linspace(scale.low, scale.high, width, dtype=np.float32), (height, 1))
    drawn = overlay(np.full((height, width), 150, np.uint8), _mapped(ramp), scale)
    position = 0.5 if pixel_threshold is None else float(scale.heat(np.array([pixel_threshold], np.float32))[0])
    strip = _uri(Image.fromarray(drawn))
    return _Legend(strip, scale.low, pixel_threshold, scale.high, position, f"rgb{CONTOUR}", f"rgb{_TRUTH}")


def _mapped(anomaly_map: NDArray[np.float32]) -> Inspection:
    size = (anomaly_map.shape[0], anomaly_map.shape[1])
    return Inspection(None, "good", size=size, maps=anomaly_map[None], placement=Geometry().place(size, size))


def _name(result: Judged) -> str:
    return "an array" if result.path is None else _short(result.path)


def _short(path: Path) -> str:
    """The file with its folder: enough to find it, and nothing of the machine it lies on."""
    return "/".join(path.parts[-2:])


def _reason(result: Judged) -> str:
    return (result.error or "no reason is known").removeprefix(f"{result.path}: ")


def _scores(results: list[Judged]) -> NDArray[np.float64]:
    return np.array([r.score for r in results], np.float64)


def _float64(scores: NDArray[np.float32]) -> NDArray[np.float64]:
    return scores.astype(np.float64)


# Pictures


def _uris(picture: Picture | None) -> tuple[str | None, str | None]:
    """Original with its ground truth outlined, and overlay."""
    if picture is None:
        return None, None
    original = _shrunk(picture.original)
    if picture.mask is not None:
        original = _outlined(original, _shrunk_mask(picture.mask, original.shape[:2]))
    heat = None if picture.overlay is None else _uri(Image.fromarray(_shrunk(picture.overlay)))
    return _uri(Image.fromarray(original)), heat


def _file_uri(path: Path) -> str | None:
    try:
        return _uri(Image.fromarray(_shrunk(as_rgb(read_image(path)))))
    except ImageError:
        return None


def _uri(image: Image.Image) -> str:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=_QUALITY, subsampling=0)  # thin coloured outlines would blur with fewer colours
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode("ascii")


def _shrunk(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    image = Image.fromarray(pixels)
    image.thumbnail((_SIDE, _SIDE))
    return np.asarray(image)


def _shrunk_mask(mask: NDArray[np.bool_], size: tuple[int, ...]) -> NDArray[np.bool_]:
    """At another (height, width): true wherever any of it was, so that a hairline stays."""
    height, width = size
    covered = Image.fromarray(mask.astype(np.float32)).resize((width, height), Image.Resampling.BOX)
    return np.asarray(covered) > 0


def _outlined(pixels: NDArray[np.uint8], mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """A line around the mask, with a gap, so that the defect itself stays to be seen."""
    from scipy import ndimage

    square = np.ones((3, 3))
    inner = ndimage.binary_dilation(mask, square, iterations=_GAP)
    ring = ndimage.binary_dilation(inner, square, iterations=_WIDTH) & ~inner
    return np.where(ring[..., None], np.array(_TRUTH, np.uint8), pixels)
