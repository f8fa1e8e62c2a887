"""Verdicts at one threshold and between two."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flawmap import Calibration, FlawmapError
from flawmap.imaging.geometry import Geometry
from flawmap.judging.judge import Judge

SCORES = np.random.default_rng(0).gumbel(size=60).astype(np.float32)
CALIBRATION = Calibration(SCORES, SCORES, "holdout")
CONFORMAL, TAIL = CALIBRATION.threshold(0.05), CALIBRATION.threshold(0.05, "tail")
PLAIN = Judge.of(CALIBRATION, 0.05, "marginal")


def test_a_tail_is_a_guarantee_of_its_own():
    for judge in (Judge.of(CALIBRATION, 0.05, "tail"), PLAIN.with_threshold(tail=True)):
        assert (judge.threshold, judge.guarantee, judge.max_false_reject) == (TAIL, "tail", 0.05)
        assert judge.pixel_threshold == PLAIN.pixel_threshold
        assert judge.with_threshold(max_false_reject=0.1).threshold == CALIBRATION.threshold(0.1, "tail")
        assert judge.with_threshold(max_false_reject=0.05, guarantee="marginal") == PLAIN
    assert PLAIN.with_threshold(max_false_reject=0.1, tail=True).threshold == CALIBRATION.threshold(0.1, "tail")


@pytest.mark.parametrize("tail", [False, True])
@given(st.floats(-3, 9, width=32))
def test_scores_between_the_two_thresholds_are_unsure(tail, score):
    judge = PLAIN.with_threshold(tail=tail, unsure=True)
    assert judge.threshold == (TAIL if tail else CONFORMAL)
    low, high = sorted([TAIL.value, CONFORMAL.value])
    assert judge.between == (low, high)
    expected = "defect" if score >= high else "unsure" if score >= low else "good"
    placement = Geometry().place((8, 8), (8, 8))
    for value in (score, low, high, np.nextafter(np.float32(low), np.float32(-9)), low / 2 + high / 2):
        assert judge.verdict(value) == (
            expected if value == score else "defect" if value >= high else "unsure" if value >= low else "good"
        )
    inspection = judge.judge(None, [score], None, placement, 1.0)
    assert (inspection.verdict, inspection.threshold) == (expected, judge.threshold.value)
    assert inspection.to_json()["unsure_between"] == [low, high]
    assert PLAIN.judge(None, [score], None, placement, 1.0).to_json()["unsure_between"] is None
    assert PLAIN.verdict(score) == ("defect" if score >= CONFORMAL.value else "good")


def test_unsure_stays_until_it_is_ended():
    judge = PLAIN.with_threshold(unsure=True)
    assert judge.describe().splitlines()[0] == CONFORMAL.describe()
    assert "unsure from" in judge.describe().splitlines()[1]
    stricter = judge.with_threshold(max_false_reject=0.02)
    assert stricter.other == CALIBRATION.threshold(0.02, "tail")
    assert judge.with_threshold(unsure=False) == PLAIN
    given = judge.with_threshold(threshold=1.0)
    assert (given.between, given.unsure, given.verdict(1.0)) == (None, False, "defect")
    assert PLAIN.describe() == CONFORMAL.describe()


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"tail": True, "guarantee": "confidence", "max_false_reject": 0.1}, "promises nothing"),
        ({"tail": True, "threshold": 1.0}, "leave --threshold out"),
        ({"unsure": True, "threshold": 1.0}, "leave --threshold out"),
        ({"tail": True, "max_false_reject": 0.7}, "does not lie in the tail"),
    ],
)
def test_what_does_not_go_together_is_refused(wrong, match):
    with pytest.raises(FlawmapError, match=match):
        PLAIN.with_threshold(**wrong)


@pytest.mark.parametrize("asked", [{"tail": True}, {"unsure": True}])
def test_without_a_tail_neither_is_to_be_had(asked):
    few = Judge.of(Calibration(SCORES[:9], SCORES[:9], "holdout"), 0.05, "marginal")
    with pytest.raises(FlawmapError, match="tail of 9 calibration scores"):
        few.with_threshold(**asked)
