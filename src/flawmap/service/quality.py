"""How well a line judges: what operators say against it, and whether parts and pictures still are what was learnt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flawmap.imaging.captures import STATISTICS
from flawmap.judging.calibration import binomial_interval
from flawmap.service.tables import InspectionRow

_FEWEST = 10  # of each side, below which a test says nothing


@dataclass(frozen=True)
class Rate:
    """How often something was seen, with its 95 % Clopper-Pearson interval.

    Attributes:
        events, cases: seen so often in so many.
    """

    events: int
    cases: int

    @property
    def share(self) -> float | None:
        """None where there is no case."""
        return None if self.cases == 0 else self.events / self.cases

    @property
    def interval(self) -> tuple[float, float]:
        """Low and high; 0 and 1 where there is no case."""
        return binomial_interval(self.events, self.cases)


@dataclass(frozen=True)
class Agreement:
    """Verdicts held against operators' words.

    Attributes:
        escape: of parts that an operator calls defect, those that were judged good.
        overkill: of parts that an operator calls good, those that were judged defect.
        unsure: words "unsure", which count for neither.
    """

    escape: Rate
    overkill: Rate
    unsure: int


@dataclass(frozen=True)
class Drift:
    """Whether recent values come from where the earlier ones came from: a two-sample Kolmogorov-Smirnov test.

    Attributes:
        name: of what is compared.
        before, now: medians.
        counts: how many values each side has.
        distance: largest distance of the two distribution functions.
        p_value: how often chance alone does as much, corrected for so many tests by Holm; None with too few values.
    """

    name: str
    before: float
    now: float
    counts: tuple[int, int]
    distance: float
    p_value: float | None


def agreement(rows: Iterable[InspectionRow]) -> Agreement:
    """Of inspections with words. A verdict of unsure is neither escape nor overkill; errors are left out."""
    cases = {"good": 0, "defect": 0}
    against = {"good": 0, "defect": 0}
    unsure = 0
    for row in rows:
        if row.verdict == "error" or row.word is None:
            continue
        if row.word == "unsure":
            unsure += 1
            continue
        cases[row.word] += 1
        against[row.word] += row.verdict == ("defect" if row.word == "good" else "good")
    return Agreement(Rate(against["defect"], cases["defect"]), Rate(against["good"], cases["good"]), unsure)


def grouped(
    rows: Iterable[InspectionRow], key: Callable[[InspectionRow], tuple[str, ...]]
) -> dict[tuple[str, ...], list[InspectionRow]]:
    """Inspections by what a key gives, in its order."""
    found: dict[tuple[str, ...], list[InspectionRow]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return dict(sorted(found.items()))


def day_of(row: InspectionRow) -> str:
    """The day of an inspection where the service runs."""
    return datetime.fromtimestamp(row.at / 1000).strftime("%Y-%m-%d")


def disagreements(rows: Iterable[InspectionRow], limit: int = 50) -> list[InspectionRow]:
    """Verdicts that the operator's word is against, of one model; first those whose score is farthest from the
    threshold."""
    against = [
        row
        for row in rows
        if row.score is not None
        and row.threshold is not None
        and (row.word, row.verdict) in (("good", "defect"), ("defect", "good"))
    ]
    return sorted(against, key=lambda row: -abs((row.score or 0) - (row.threshold or 0)))[:limit]


def held_good(rows: Iterable[InspectionRow]) -> list[InspectionRow]:
    """Parts that pass for good: by the operator's word, or judged good without one."""
    return [row for row in rows if row.word == "good" or (row.word is None and row.verdict == "good")]


def score_drift(calibration: ArrayLike, rows: Iterable[InspectionRow], threshold: float) -> Drift:
    """Scores of recent good parts against those of calibration, which says the same of their p-values.

    Where nobody gave words, parts above the threshold are not known to be good, so both sides are taken below it.
    """
    recent = [row.score for row in held_good(rows) if row.score is not None and row.score < threshold]
    scores = np.asarray(calibration, dtype=np.float64)
    return _corrected([_compared("score of good parts", scores[scores < threshold], np.array(recent, np.float64))])[0]


def capture_drift(first: Sequence[InspectionRow], recent: Sequence[InspectionRow]) -> list[Drift]:
    """Each capture statistic of recent inspections against those first seen."""
    before, now = _statistics(first), _statistics(recent)
    return _corrected([_compared(name, before[:, i], now[:, i]) for i, name in enumerate(STATISTICS)])


def _statistics(rows: Sequence[InspectionRow]) -> NDArray[np.float64]:
    kept = [row.statistics for row in rows if row.statistics is not None and len(row.statistics) == len(STATISTICS)]
    return np.array(kept, dtype=np.float64).reshape(-1, len(STATISTICS))


def _compared(name: str, before: NDArray[np.float64], now: NDArray[np.float64]) -> Drift:
    counts = (len(before), len(now))
    medians = [float(np.median(side)) if len(side) else float("nan") for side in (before, now)]
    if min(counts) < _FEWEST:
        return Drift(name, medians[0], medians[1], counts, float("nan"), None)
    from scipy.stats import ks_2samp

    found: Any = ks_2samp(before, now)
    return Drift(name, medians[0], medians[1], counts, float(found.statistic), float(found.pvalue))


def _corrected(drifts: list[Drift]) -> list[Drift]:
    """Holm's step-down correction, so that seven tests do not cry wolf seven times as often."""
    from dataclasses import replace

    tested = sorted((one for one in drifts if one.p_value is not None), key=lambda one: one.p_value or 0.0)
    corrected: dict[str, float] = {}
    highest = 0.0
    for i, one in enumerate(tested):
        highest = max(highest, min(1.0, (len(tested) - i) * (one.p_value or 0.0)))
        corrected[one.name] = highest
    return [replace(one, p_value=corrected.get(one.name)) for one in drifts]
