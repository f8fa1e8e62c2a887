"""From a labelled data set to the figures of an inspector."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flawmap.datasets import Dataset, Sample
from flawmap.datasets.sources import labelled_samples
from flawmap.imaging.masks import read_mask
from flawmap.judging.evaluation import EvaluationReport, Scored, evaluate
from flawmap.judging.inspection import Inspection
from flawmap.line.inspector import Inspector


def evaluate_inspector(
    inspector: Inspector,
    source: str | Path | Dataset,
    *,
    category: str | None = None,
    full_resolution: bool = False,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> EvaluationReport:
    """Figures on the test images of a labelled data set, at the inspector's threshold.

    Pixel figures are taken at the model's input size, masks resized nearest; or on the original pixels, with
    `full_resolution` and for tiles. What lies outside the region of interest counts nowhere. What the capture check
    refuses has a score and counts by it.

    Raises:
        FlawmapError: there are no labelled test images.
    """
    dataset, samples = labelled_samples(source, category)
    settings = {
        **inspector.settings(),
        "engine": inspector.engine.name,
        "full_resolution": full_resolution,
        "data": dataset.name,
    }
    if inspector.judge.between is not None:
        settings["unsure_between"] = list(inspector.judge.between)
    return evaluate(_scored(inspector, samples, full_resolution, progress), settings)


def _scored(
    inspector: Inspector, samples: list[Sample], full_resolution: bool, progress: Callable[[str, int, int], None]
) -> Iterator[Scored]:
    inspections = inspector.without_capture_check().stream(sample.path for sample in samples)
    for number, (sample, inspection) in enumerate(zip(samples, inspections, strict=True), start=1):
        verdict, error = inspection.verdict, inspection.error
        if inspection.refused and verdict != "error" and inspector.capture_check:
            verdict, error = "error", f"{sample.path}: {inspection.refused}"
        truth = None
        if sample.label == 1 and sample.mask is not None and inspection.placement is not None:
            truth = read_mask(sample.mask, inspection.placement.size)
        anomaly_map, mask, inside = _pixels(inspection, truth, full_resolution)
        on_defect = None
        if verdict == "defect" and inspection.maps is not None and truth is not None:
            on_defect = any(region.mask[truth[region.rows_and_columns]].any() for region in inspection.regions)
        yield Scored(
            sample.kind,
            sample.label == 1,
            inspection.score,
            verdict,
            anomaly_map,
            mask,
            inspection.milliseconds,
            error,
            sample.path,
            inspection.p_value,
            inside,
            on_defect,
        )
        progress("evaluation", number, len(samples))


def _pixels(
    inspection: Inspection, mask: NDArray[np.bool_] | None, full_resolution: bool
) -> tuple[NDArray[np.float32] | None, NDArray[np.bool_] | None, NDArray[np.bool_] | None]:
    """Map, mask and scored pixels of one test image, all of one size; None where there is none.

    Args:
        mask: of its defect, on the original pixels.
    """
    maps, placement = inspection.maps, inspection.placement
    if maps is None or placement is None:
        return None, None, None
    if full_resolution or len(maps) > 1:
        laid = inspection.anomaly_map
        assert laid is not None
        inside = ~np.isnan(laid)
        return np.where(inside, laid, np.float32(0)), mask, None if inside.all() else inside
    inside = placement.inside()[0]
    return maps[0], None if mask is None else placement.project(mask)[0], None if inside.all() else inside
