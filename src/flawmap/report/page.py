"""One HTML file: it opens anywhere, offline, without anything beside it. What pages of all kinds have."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flawmap.files import replacing
from flawmap.imaging.geometry import Geometry
from flawmap.judging.calibration import Threshold
from flawmap.judging.inspection import Inspection
from flawmap.report.charts import ScoreRow, score_histograms
from flawmap.report.overlays import CONTOUR, HeatScale, overlay
from flawmap.report.pictures import TRUTH, jpeg_uri
from flawmap.report.wording import number, percent

_CHART_WIDTHS = {"wide": 1060, "narrow": 340}


@dataclass(frozen=True)
class Card:
    """One image on a page.

    Attributes:
        name: the file with its folder.
        kind: of defect; empty where the name tells it.
        score, p_value: None where it was not judged.
        original, overlay: pictures as data URIs; None without one.
        rejected: whether its verdict is "defect".
        outlined: whether the original shows where its defect is.
        elsewhere: whether it was rejected, and no region lies on its defect.
    """

    name: str
    kind: str
    score: float | None
    p_value: float | None
    original: str | None
    overlay: str | None
    rejected: bool
    outlined: bool = False
    elsewhere: bool = False


@dataclass(frozen=True)
class Legend:
    """What the colours of heatmaps and outlines mean.

    Attributes:
        strip: the scale as a picture, a data URI.
        low, high: scores at its ends.
        middle, position: the score that regions are cut at, and where it lies on the strip, 0 to 1.
        found, truth: CSS colours of the outlines of what was found and of the ground truth.
        learnt: as `HeatScale.learnt`.
    """

    strip: str
    low: float
    middle: float | None
    high: float
    position: float
    found: str
    truth: str
    learnt: bool


def write_page(path: Path, template: str, **values: Any) -> None:
    """Fills one of the templates beside this file and writes it.

    Raises:
        FlawmapError: the file cannot be written.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("flawmap.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"percent": percent, "number": number}
    text = environment.get_template(template).render(values, version=version("flawmap"))
    with replacing(path) as file:
        file.write(text.encode("utf-8", "replace"))  # a file name need not be valid text


def histograms(rows: list[ScoreRow], threshold: Threshold | None) -> dict[str, str]:
    """The same chart for wide and for narrow screens, so that its text can be read on both."""
    value = None if threshold is None else threshold.value
    return {name: score_histograms(rows, value, width=width) for name, width in _CHART_WIDTHS.items()}


def legend(scale: HeatScale | None, pixel_threshold: float | None) -> Legend | None:
    """The scale as `overlay` draws it on a grey part."""
    if scale is None:
        return None
    width, height = 512, 8
    ramp = np.tile(np.linspace(scale.low, scale.high, width, dtype=np.float32), (height, 1))
    drawn = overlay(np.full((height, width), 150, np.uint8), _mapped(ramp), scale)
    position = 0.5 if pixel_threshold is None else float(scale.heat(np.array([pixel_threshold], np.float32))[0])
    strip = jpeg_uri(Image.fromarray(drawn))
    return Legend(strip, scale.low, pixel_threshold, scale.high, position, f"rgb{CONTOUR}", f"rgb{TRUTH}", scale.learnt)


def _mapped(anomaly_map: NDArray[np.float32]) -> Inspection:
    size = (anomaly_map.shape[0], anomaly_map.shape[1])
    return Inspection(None, "good", size=size, maps=anomaly_map[None], placement=Geometry().place(size, size))
