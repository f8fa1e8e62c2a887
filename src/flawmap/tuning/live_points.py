"""Points of live settings: which are tried, and what each reaches on synthetic defects and on test images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flawmap.learning.data import Progress, quiet
from flawmap.methods import Method, configure
from flawmap.tuning.criterion import Criterion
from flawmap.tuning.outcome import Point
from flawmap.tuning.sweep import Sweep


def live_points(method: type[Method], config: Any, grid: Mapping[str, Sequence[float]]) -> list[Point]:
    """The points of a grid of `live` settings, those that it leaves out as `config` sets them; that of `config` first.

    Args:
        method: their class.
        config: what is set now.
        grid: values of some of them; empty for every other one that the method's paper tries.

    Raises:
        FlawmapError: a value is not valid.
    """
    before = {name: float(getattr(config, name)) for name in method.live}
    tried = grid or {name: values[::2] for name, values in method.searched.items()}
    points = [before]
    for values in product(*tried.values()):
        moved = configure(method, {**config.model_dump(), **dict(zip(tried, values, strict=True))})
        point = {name: float(getattr(moved, name)) for name in method.live}
        points += [] if point in points else [point]
    return points


def compare_live(
    method: Method, sweep: Sweep, points: Sequence[Point], progress: Progress = quiet
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """(P, N), twice: `Criterion.values` at each point of `live` settings.

    Args:
        method: one with `live` settings.
        sweep: of `synthetic_images`.
        points: what to try.
        progress: is told how it goes.
    """
    values, seen = [], []
    for done, point in enumerate(points, start=1):
        criterion = Criterion(method.localises)
        for batch in sweep.scored(_moved(method, point)):
            criterion.update(batch, sweep.labels)
        found = criterion.values(sweep.labels)
        values.append(found[0])
        seen.append(found[1])
        progress("settings", done, len(points))
    return np.array(values), np.array(seen)


def live_figures(
    method: Method, sweep: Sweep, points: Sequence[Point], progress: Progress = quiet
) -> list[dict[str, float]]:
    """The figures of `flawmap.tuning.sweep` at each point of `live` settings, of a sweep over test images."""
    figures = []
    for done, point in enumerate(points, start=1):
        figures.append(sweep.figures(_moved(method, point)))
        progress("oracle", done, len(points))
    return figures


def _moved(method: Method, point: Point) -> Method:
    return method.with_settings(configure(type(method), {**method.config.model_dump(), **point}))
