"""Operators' words held against verdicts, and drift that is told from chance."""

import numpy as np
import pytest
from scipy.stats import ks_2samp

pytest.importorskip("sqlalchemy")

from flawmap.imaging.captures import STATISTICS
from flawmap.judging.calibration import binomial_interval
from flawmap.service.quality import agreement, capture_drift, day_of, disagreements, grouped, score_drift
from flawmap.service.tables import InspectionRow


def row(verdict, word=None, score=1.0, **values):
    return InspectionRow(verdict=verdict, word=word, score=score, threshold=2.0, **{"at": 0, "model": "m", **values})


def test_escape_and_overkill_are_of_what_operators_call_parts():
    rows = [
        *[row("good", "defect")] * 2,
        *[row("defect", "defect")] * 6,
        *[row("defect", "good")] * 1,
        *[row("good", "good")] * 9,
        row("unsure", "good"),
        row("unsure", "defect"),
        row("good", "unsure"),
        row("error", "defect", None),
        row("good"),
    ]
    found = agreement(rows)
    assert (found.escape.events, found.escape.cases) == (2, 9)
    assert (found.overkill.events, found.overkill.cases) == (1, 11)
    assert found.escape.interval == binomial_interval(2, 9)
    assert found.unsure == 1
    assert agreement([]).escape.share is None


def test_the_worst_disagreement_is_farthest_from_the_threshold():
    rows = [
        row("good", "defect", 1.5),
        row("defect", "good", 9.0),
        row("defect", "defect", 99.0),
        row("good", "defect", 0),
    ]
    assert [one.score for one in disagreements(rows)] == [9.0, 0, 1.5]


def test_days_come_in_order():
    rows = [row("good", at=day * 86_400_000 + 43_200_000) for day in (3, 1, 3)]
    assert [len(some) for some in grouped(rows, lambda one: (day_of(one),)).values()] == [1, 2]


def test_scores_of_good_parts_drift_only_where_they_do():
    draw = np.random.default_rng(0)
    calibration = draw.normal(0, 1, 300)
    same = [row("good", score=value) for value in draw.normal(0, 1, 200)]
    moved = [row("good", score=value) for value in draw.normal(0.7, 1, 200)]
    assert score_drift(calibration, same, 2.0).p_value > 0.05
    found = score_drift(calibration, moved, 2.0)
    below = [one.score for one in moved if one.score < 2]
    assert found.p_value == ks_2samp(calibration[calibration < 2], below).pvalue < 1e-6
    assert found.now > found.before
    assert score_drift(calibration, moved[:5], 2.0).p_value is None


def test_captures_that_turn_darker_are_told_by_brightness_alone():
    draw = np.random.default_rng(1)
    statistics = draw.normal(0.5, 0.05, (400, len(STATISTICS)))
    dark = STATISTICS.index("brightness")
    statistics[200:, dark] -= 0.05
    rows = [row("good", statistics=values.tolist()) for values in statistics]
    found = capture_drift(rows[:200], rows[200:])
    assert [one.name for one in found if one.p_value < 0.01] == ["brightness"]
    lone = ks_2samp(statistics[:200, dark], statistics[200:, dark]).pvalue
    assert found[dark].p_value == pytest.approx(len(STATISTICS) * lone)  # Holm: the smallest, times their number
