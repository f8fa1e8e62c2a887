"""What a method could reach if its settings were chosen on the test labels: an oracle, printed under that name only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

from flawmap.datasets import Dataset, Sample
from flawmap.datasets.sources import labelled_samples
from flawmap.detector import Detector
from flawmap.errors import FlawmapError
from flawmap.imaging.decoding import read_image
from flawmap.imaging.image_files import digest
from flawmap.learning.data import Progress, quiet
from flawmap.learning.fitting import SHORT
from flawmap.metrics import partial_spearman, spearman
from flawmap.tuning.sweep import FIGURES, Labelled, Sweep, labelled

_CANDIDATES = 60_000  # training patches among which a gallery is chosen, unless it was among all in training

Point = dict[str, float]
"""A value of each live setting."""


class Correlation(NamedTuple):
    """A rank correlation with a figure over the grid, and its p-value."""

    of: str
    rho: float
    p: float


@dataclass(frozen=True)
class OracleGrid:
    """Figures on the test set at every point of a grid of settings.

    Attributes:
        points, figures: each point, and what was reached there, in `FIGURES`.
        reselected: whether what depends on the settings was chosen anew at every point.
    """

    points: list[Point]
    figures: list[dict[str, float]]
    reselected: bool = False

    def best(self, figure: str) -> tuple[Point, float]:
        """The point that is best for one figure, the first among equals."""
        known = [i for i, found in enumerate(self.figures) if not math.isnan(found[figure])]
        if not known:
            return {}, math.nan
        i = max(known, key=lambda i: self.figures[i][figure])
        return self.points[i], self.figures[i][figure]

    def correlations(self, figure: str = "pixel_auroc") -> list[Correlation]:
        """Spearman's correlations of two settings with a figure (F2R, Table 5).

        Those of the settings are partial, each controlling the other; that of minus their distance is plain. Empty for
        other than two settings.
        """
        names = list(self.points[0])
        values = [found[figure] for found in self.figures]
        if len(names) != 2 or any(math.isnan(value) for value in values):
            return []
        first, second = ([point[name] for point in self.points] for name in names)
        apart = [-abs(a - b) for a, b in zip(first, second, strict=True)]
        return [
            Correlation(names[0], *partial_spearman(first, values, second)),
            Correlation(names[1], *partial_spearman(second, values, first)),
            Correlation(f"-|{names[0]} - {names[1]}|", *spearman(apart, values)),
        ]

    def to_json(self) -> dict[str, float | None]:
        """The best of each figure and where it was reached, flat, under names that begin with oracle."""
        flat: dict[str, float | None] = {}
        for figure in FIGURES:
            point, value = self.best(figure)
            flat[f"oracle_{figure}"] = None if math.isnan(value) else value
            flat |= {f"oracle_{figure}_{name}": setting for name, setting in point.items()}
        return flat


def grid_points(grid: Mapping[str, Sequence[float]]) -> list[Point]:
    """Every combination of the values."""
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def oracle_grid(
    detector: Detector, source: str | Path | Dataset, *, category: str | None = None, progress: Progress = quiet
) -> OracleGrid:
    """Figures on labelled test images at every point of the grid the method's paper chooses from.

    Where `source` holds the training images, what depends on the settings (F2R's gallery) is chosen anew at every
    point, as the papers do; else what training chose is kept.

    Raises:
        FlawmapError: no setting can be moved, or there are no labelled test images.
    """
    detector.check_live()
    dataset, samples = labelled_samples(source, category)
    method = detector.method_
    shared = (detector.preparation_, detector.extraction_engine(), detector.device, progress)
    fitted = set(detector.training_["fitted"])
    known = [sample.path for sample in dataset.train if digest(sample.path)[:SHORT] in fitted]
    candidates = None
    if method.reselects and len(known) == detector.training_["images"]:
        good = (Labelled(read_image(path), False) for path in known)
        with Sweep(method, good, len(known), *shared) as sweep:
            candidates = sweep.patches(method.config.max_candidates if method.config.reselect else _CANDIDATES)
    points = grid_points(method.searched)
    figures = []
    with Sweep(method, (labelled(sample) for sample in samples), len(samples), *shared) as sweep:
        for done, point in enumerate(points, start=1):
            moved = method.with_settings(detector.moved_config(point))
            if candidates is not None:
                moved.reselect(candidates)
            figures.append(sweep.figures(moved))
            progress("oracle grid", done, len(points))
    return OracleGrid(points, figures, candidates is not None)


def test_samples(source: str | Path | Dataset | Sequence[str | Path], category: str | None) -> list[Sample]:
    """The labelled test images that an oracle is measured on.

    Raises:
        FlawmapError: there are none.
    """
    if not isinstance(source, (str, Path, Dataset)):
        raise FlawmapError("an oracle needs labelled test images: give a data set, not a list of good images")
    return labelled_samples(source, category)[1]


def oracle_table(grid: OracleGrid, current: Mapping[str, float]) -> str:
    """The grid in words and numbers: the best point of each figure beside `current`, and the correlations."""
    lines = ["oracle, settings chosen on the test labels:"]
    for figure in FIGURES:
        point, value = grid.best(figure)
        at = ", ".join(f"{name}={setting:g}" for name, setting in point.items())
        now = next((f[figure] for p, f in zip(grid.points, grid.figures, strict=True) if p == dict(current)), math.nan)
        own = "at its own settings, chosen anew" if grid.reselected else "as trained"
        beside = "" if math.isnan(now) else f"   {own} {now:.3f}"
        lines.append(f"  {figure.replace('_', ' '):<12} {value:.3f} at {at}{beside}")
    if correlations := grid.correlations():
        lines.append("Spearman correlation with pixel AUROC over the grid:")
        lines += [f"  {of:<18} rho {rho:6.2f}  p {p:.0e}" for of, rho, p in correlations]
    names = list(grid.points[0])
    if len(names) == 2:
        rows = sorted({point[names[0]] for point in grid.points})
        columns = sorted({point[names[1]] for point in grid.points})
        values = {(p[names[0]], p[names[1]]): f["pixel_auroc"] for p, f in zip(grid.points, grid.figures, strict=True)}
        lines.append(f"pixel AUROC, {names[0]} downwards, {names[1]} across:")
        lines.append("       " + "".join(f"{column:6.2g}" for column in columns))
        lines += [f"  {row:4.2g} " + "".join(f"{values[row, column]:6.3f}" for column in columns) for row in rows]
    return "\n".join(lines)
