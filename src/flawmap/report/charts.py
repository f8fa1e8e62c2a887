"""Charts of a report as SVG text to stand inside a page.

Colours are the page's own custom properties (`--ink`, `--muted`, `--line`, `--good`, `--bad`, `--second`, `--card`), so
that a chart follows its light and dark scheme. Text stays text, in the page's font. The same input gives the same text.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Matplotlib knows no CSS: it draws in colours that nothing else has, which are then exchanged.
_INK, _MUTED, _LINE, _GOOD, _BAD, _SECOND, _CARD = (f"#0{n}0{n}0{n}" for n in range(1, 8))
_PROPERTIES = {
    _INK: "ink",
    _MUTED: "muted",
    _LINE: "line",
    _GOOD: "good",
    _BAD: "bad",
    _SECOND: "second",
    _CARD: "card",
}
_BINS = 40
_TAIL = 3.0  # what lies further above the threshold than this many times the good images' range is drawn at the end


@dataclass(frozen=True)
class ScoreRow:
    """One histogram: its title, scores (n,), and whether a score at or above the threshold is what one wants."""

    title: str
    scores: NDArray[np.float64]
    defective: bool


@dataclass(frozen=True)
class Line:
    """One curve: its label, x and y (K,) in 0..1."""

    label: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]


def score_histograms(rows: Sequence[ScoreRow], threshold: float | None, *, width: int) -> str:
    """Histograms one above the other on one axis of scores, crossed by the threshold. What it gets wrong is `--bad`.

    A bin edge lies on the threshold, so no bar is on both sides. Scores far above it are counted in the last bin.
    Without a threshold nothing is wrong, and what is defective is `--bad`.

    Args:
        rows: at least one; those without scores are left out.
        threshold: scores at or above it are called defects; None where there is none.
        width: of the picture in pixels at its natural size; it scales with the page.
    """
    rows = [row for row in rows if len(row.scores)]
    every = np.concatenate([row.scores for row in rows])
    drawn, threshold = threshold is not None, float(every.min()) if threshold is None else threshold
    low = float(min(every.min(), threshold))
    usual = max([threshold, *(float(row.scores.max()) for row in rows if not row.defective)]) - low
    span = max(usual, 1e-3 * abs(threshold)) or 1.0
    high = float(every.max())
    cut = min(max(high, low + span * 1.1), low + span * (1 + _TAIL))
    step = (cut - low) / _BINS
    below, above = max(1, np.ceil((threshold - low) / step)), max(1, np.ceil((cut - threshold) / step))
    edges = threshold + step * np.arange(-below, above + 1)

    left, right, top, bottom, pitch, bars = 30, 14, 22, 40, 96, 62  # pixels
    height = top + pitch * len(rows) + bottom
    with _style(f"scores-{width}"):
        figure = _figure(width, height)
        axes: list[Axes] = [
            figure.add_axes(
                (left / width, 1 - (top + pitch * (n + 1)) / height, 1 - (left + right) / width, bars / height)
            )
            for n in range(len(rows))
        ]
        for row, ax in zip(rows, axes, strict=True):
            counts, _ = np.histogram(np.clip(row.scores, edges[0], edges[-1]), edges)
            wrong = (edges[:-1] >= threshold) != row.defective if drawn else np.full(len(counts), row.defective)
            for of_bins, colour in ((~wrong, _GOOD), (wrong, _BAD)):
                filled = of_bins & (counts > 0)
                ax.bar(edges[:-1][filled] + 0.08 * step, counts[filled], 0.84 * step, align="edge", color=colour)
            if drawn:
                ax.plot(
                    [threshold] * 2,
                    [0, 1 + (pitch - bars) / bars],
                    color=_INK,
                    linewidth=1.2,
                    dashes=(4, 2),
                    transform=ax.get_xaxis_transform(),
                    clip_on=False,
                )
            ax.set_xlim(edges[0] - step / 2, edges[-1] + step / 2)
            ax.set_ylim(0, max(1, counts.max()) * 1.05)
            ax.set_yticks([0, int(counts.max())])
            ax.tick_params(labelbottom=ax is axes[-1])
            behind = {"facecolor": _CARD, "edgecolor": "none", "pad": 2}  # hides the threshold's line
            ax.text(0, 1 + 8 / bars, row.title, transform=ax.transAxes, bbox=behind)
        if drawn:
            near_end = threshold > (edges[0] + edges[-1]) / 2
            axes[0].annotate(
                f"threshold {threshold:.5g}",
                (threshold, 1),
                (-5 if near_end else 5, pitch - bars - 6),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="right" if near_end else "left",
            )
        axes[-1].ticklabel_format(axis="x", useOffset=False)
        tail = f" (the last bar: {edges[-2]:.4g} and above)" if high > edges[-1] else ""
        axes[-1].set_xlabel(f"score{tail}", labelpad=6)
        return _svg(figure, f"Histograms of scores{' with the threshold' if drawn else ''}")


def curve_chart(
    name: str,
    lines: Sequence[Line],
    *,
    axes: tuple[str, str],
    reach: float = 1.0,
    point: tuple[float, float] | None = None,
    legend: Literal["lower left", "lower right"] = "lower right",
    steps: bool = False,
) -> str:
    """Curves of rates in the unit square.

    Args:
        name: tells this chart from the others of its page.
        lines: one or two.
        axes: what x and y are, in words.
        reach: upper end of x, in (0, 1].
        point: x and y at the threshold in use, marked where given.
        legend: the corner it stands in.
        steps: whether y jumps between points, as precision does, or is linear.
    """
    from matplotlib.ticker import PercentFormatter

    size, left, right, top, bottom = 320, 40, 18, 30, 40  # pixels
    with _style(name):
        figure = _figure(size, size)
        ax = figure.add_axes((left / size, bottom / size, 1 - (left + right) / size, 1 - (top + bottom) / size))
        for line, colour, dash in zip(lines, (_GOOD, _SECOND), ("-", (0, (5, 2))), strict=False):
            ax.plot(
                line.x,
                line.y,
                color=colour,
                linestyle=dash,
                linewidth=2,
                label=line.label,
                drawstyle="steps-pre" if steps else "default",
                clip_on=reach < 1,
            )
        if point is not None:
            ax.plot(*point, "o", color=_INK, markersize=7, label="at the threshold", clip_on=False, zorder=5)
        ax.set_xlim(0, reach)
        ax.set_ylim(0, 1)
        ax.grid(color=_LINE, linewidth=0.8)
        ax.set_axisbelow(True)
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.set_xlabel(axes[0])
        ax.text(
            -left / (size - left - right), 1 + 14 / (size - top - bottom), axes[1], transform=ax.transAxes, color=_MUTED
        )
        ax.legend(loc=legend, frameon=False)
        return _svg(figure, f"{axes[1]} against {axes[0]}")


@contextmanager
def _style(name: str) -> Iterator[None]:
    """Matplotlib's own defaults, whatever the user's settings file says, with the page's colours and text as text."""
    from matplotlib import style

    ours: dict[str, object] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,  # else two charts of a page could define one id differently
        "font.size": 12,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 1,
        "axes.edgecolor": _LINE,
        "axes.labelcolor": _MUTED,
        "text.color": _INK,
        "xtick.color": _LINE,
        "ytick.color": _LINE,
        "xtick.labelcolor": _MUTED,
        "ytick.labelcolor": _MUTED,
        "lines.solid_capstyle": "round",
    }
    with style.context(["default", ours]):
        yield


def _figure(width: int, height: int) -> Figure:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), dpi=72)  # the backend counts 72 units an inch
    figure.patch.set_visible(False)
    FigureCanvasSVG(figure)
    return figure


def _svg(figure: Figure, label: str) -> str:
    """The figure as an element that may stand in a page beside others: no prologue, no ids of others, no addresses."""
    for ax in figure.axes:
        ax.patch.set_visible(False)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;]*; ", "", text)
    text = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href", "href")
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", text)
    for colour, role in _PROPERTIES.items():
        text = text.replace(colour, f"var(--{role})")
    view = re.search(r'viewBox="[^"]*"', text)
    assert view is not None
    return f'<svg class="chart" role="img" aria-label="{label}" {view[0]}>' + text[text.index(">") + 1 :].strip()
