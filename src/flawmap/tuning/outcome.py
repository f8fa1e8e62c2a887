"""What tuning found, and how it is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flawmap.text import counted
from flawmap.tuning.oracle import OracleGrid
from flawmap.tuning.sweep import FIGURES

_SHOWN = 12  # points in the table

Point = dict[str, Any]
"""A value of each setting that is searched."""


@dataclass(frozen=True)
class Tuning:
    """What tuning found.

    Attributes:
        points: what was tried.
        values: (P,) the criterion at each, in 0..1: see `criterion.Criterion`.
        interval: 95 % bootstrap interval, over good images, of the best point's lead over the point before tuning.
        confidence: share of the resamples in which the best point is the best.
        images, defects: how many good images it was chosen on, and the defects made from them.
        before: the point that was set before.
        oracle: what each point reaches on labelled test images, where that was asked for. It served no choice.
    """

    points: list[Point]
    values: NDArray[np.float64]
    interval: tuple[float, float]
    confidence: float
    images: int
    defects: int
    before: Point
    oracle: OracleGrid | None = None

    @property
    def best(self) -> Point:
        """The point with the highest criterion."""
        return self.points[int(self.values.argmax())]

    @property
    def chosen(self) -> Point:
        """The best point, where the whole interval of its lead is above 0; else the point before tuning."""
        return self.best if self.interval[0] > 0 else self.before

    def kept(self, figure: str) -> float | None:
        """The share of what an oracle would gain over the point before tuning that the choice gains, at most 1.

        Negative where the choice is worse than what was set before. None without an oracle, where the figure does not
        exist, or where the oracle gains nothing.

        Args:
            figure: one of `flawmap.tuning.sweep.FIGURES`.
        """
        if self.oracle is None:
            return None
        reached, before = (self._reached(figure, point) for point in (self.chosen, self.before))
        gain = self.oracle.best(figure)[1] - before
        return (reached - before) / gain if gain > 0 else None

    def _reached(self, figure: str, point: Point) -> float:
        assert self.oracle is not None
        return self.oracle.figures[self.points.index(point)][figure]

    def describe(self) -> str:
        """Some lines for the terminal."""
        best, before = int(self.values.argmax()), self.points.index(self.before)
        lead = self.values[best] - self.values[before]
        if self.chosen != self.best:
            verdict = f"the settings stay at {in_words(self.before)}: the lead may be nothing, its interval holds 0"
        elif self.best == self.before:
            verdict = "the settings stay as they were: nothing that was tried is better"
        else:
            verdict = f"chosen {in_words(self.chosen)}"
        defects, images = counted(self.defects, "synthetic defect"), counted(self.images, "good image")
        lines = [
            f"tried on {defects} in {images}: {in_words(self.best)}, best in "
            f"{self.confidence:.0%} of bootstrap resamples",
            f"criterion {self.values[best]:.3f}, before ({in_words(self.before)}) {self.values[before]:.3f}: "
            f"{lead:+.3f} [{self.interval[0]:+.3f}, {self.interval[1]:+.3f}]",
            verdict,
        ]
        lines += self._table()
        if self.oracle is not None:
            lines.append("oracle, what the settings tried reach on the test labels, which served no choice:")
            lines += [line for figure in FIGURES if (line := self._oracle_line(figure, self.oracle))]
        return "\n".join(lines)

    def _oracle_line(self, figure: str, oracle: OracleGrid) -> str:
        point, value = oracle.best(figure)
        if np.isnan(value):
            return ""
        kept = self.kept(figure)
        share = "nothing to gain" if kept is None else f"{kept:.0%} of the gain kept"
        return (
            f"  {figure.replace('_', ' '):<12} chosen {self._reached(figure, self.chosen):.3f}   "
            f"before {self._reached(figure, self.before):.3f}   best {value:.3f} at {in_words(point)}   {share}"
        )

    def _table(self) -> list[str]:
        """The best points and the one before, with the criterion and, where there is one, the oracle's figures."""
        names = [] if self.oracle is None else [of for of in FIGURES if not np.isnan(self.oracle.best(of)[1])]
        order = np.argsort(-self.values, kind="stable")
        shown = [i for rank, i in enumerate(order) if rank < _SHOWN or self.points[i] == self.before]
        width = max(len(in_words(self.points[i])) for i in shown)
        lines = [f"{'settings':<{width}}  criterion" + "".join(f"  {name.replace('_', ' '):>11}" for name in names)]
        for i in shown:
            figures = [] if self.oracle is None else [f"  {self.oracle.figures[i][name]:>11.3f}" for name in names]
            lines.append(f"{in_words(self.points[i]):<{width}}  {self.values[i]:>9.3f}{''.join(figures)}")
        hidden = len(order) - len(shown)
        return [*lines, f"and {hidden} more, below {self.values[order[_SHOWN - 1]]:.3f}"] if hidden else lines


def in_words(point: Mapping[str, Any]) -> str:
    """A point as it is written on the command line."""
    return ", ".join(f"{name}={_in_words(name, value)}" for name, value in point.items())


def _in_words(name: str, value: Any) -> str:
    if value is None:
        return "auto"
    if name == "image_size":
        return str(value[0]) if value[0] == value[1] else f"{value[0]}x{value[1]}"
    if isinstance(value, tuple):
        return "+".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
