"""The upper tail of good scores: what its threshold rejects, how sure that is, and when it is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from flawmap import Calibration, FlawmapError
from flawmap.judging.tail import FEWEST, SURE, fit_tail

KINDS = {
    "gumbel": stats.gumbel_r(),
    "exponential": stats.expon(),
    "uniform": stats.uniform(),
    "normal": stats.norm(),
}
_SETS = 60


def simulated(kind, n, seed=0):
    return KINDS[kind].rvs(size=n, random_state=np.random.default_rng(seed)).astype(np.float32)


def calibration(scores):
    return Calibration(np.asarray(scores, np.float32), np.empty(0, np.float32), "holdout")


@pytest.fixture(scope="module", params=[30, 100, 300])
def estimates(request):
    """By kind of the scores: for each of many sets the true rate at its threshold for 1 %, and what was said of it."""
    found = {}
    for kind, law in KINDS.items():
        tails = [fitted(simulated(kind, request.param, seed)) for seed in range(_SETS)]
        thresholds = [tail.threshold(0.01) for tail in tails if tail is not None]
        assert len(thresholds) >= 0.95 * _SETS
        found[kind] = [(float(law.sf(found.value)), float(law.isf(0.01)), found) for found in thresholds]
    return request.param, found


def test_intervals_hold_the_true_rate_and_the_true_threshold(estimates):
    _, found = estimates
    rates = [[t.rates[0] <= rate <= t.rates[1] for rate, _, t in each] for each in found.values()]
    values = [[t.values[0] <= value <= t.values[1] for _, value, t in each] for each in found.values()]
    rates, values = [list(map(np.mean, held)) for held in (rates, values)]
    assert min(rates) >= 0.83
    assert np.mean(rates) >= 0.91
    assert min(values) >= 0.75
    assert np.mean(values) >= 0.83


def test_the_true_rate_is_near_the_one_asked_for(estimates):
    n, found = estimates
    for kind, each in found.items():
        rates = [rate for rate, _, _ in each]
        assert np.mean(rates) <= {30: 0.035, 100: 0.02, 300: 0.014}[n], kind
        if kind != "uniform":  # whose end a shape a little too long passes
            assert 0.006 <= np.median(rates) <= 0.02, kind


def test_where_the_tail_begins_the_rate_is_as_sure_as_a_count():
    tail = fit_tail(simulated("gumbel", 100))
    low, high = tail.threshold(tail.share * 0.999).rates
    assert [low, high] == pytest.approx(stats.beta(41, 60).interval(0.95), abs=0.01)


def test_more_images_say_more():
    widths = [np.ptp(fit_tail(simulated("gumbel", n)).threshold(0.01).rates) for n in (30, 300, 3000)]
    assert widths[0] > 1.5 * widths[1] > 3 * widths[2]


def test_shape_and_scale_are_those_of_the_scores():
    for shape in (-0.5, 0.0, 0.3):
        law = stats.genpareto(shape, scale=2)
        tail = fit_tail(law.rvs(size=100_000, random_state=np.random.default_rng(1)).astype(np.float32))
        assert tail.shape == pytest.approx(shape, abs=0.1)
        assert tail.scale == pytest.approx(2 + shape * tail.start, rel=0.1)


sets = st.builds(simulated, st.sampled_from(sorted(KINDS)), st.integers(12, 200), st.integers(0, 10**6))


def fitted(scores):
    """The tail; None where it is refused, which one set in a hundred is by chance."""
    try:
        return fit_tail(scores)
    except FlawmapError:
        return None


@settings(deadline=None, max_examples=40)
@given(sets, st.floats(1e-4, 0.25), st.floats(1e-4, 0.25))
def test_a_lower_rate_has_a_higher_threshold(scores, one, other):
    tail = fitted(scores)
    if tail is not None:
        low, high = sorted([one, other])
        assert tail.start < tail.threshold(high).value <= tail.threshold(low).value
        for rate in (low, high):
            found = tail.threshold(rate)
            assert np.isfinite([found.value, *found.values, *found.rates]).all()
            assert found.value == np.float32(found.value)
            assert 0 <= found.rates[0] <= found.rates[1] <= 1


@settings(deadline=None, max_examples=40)
@given(sets, st.floats(-30, 30), st.floats(1e-3, 1e3))
def test_shifted_and_scaled_scores_have_a_shifted_and_scaled_threshold(scores, shift, scale):
    tail, moved = fitted(scores), fitted(scale * (scores.astype(np.float64) + shift))
    assert (tail is None) == (moved is None)
    if tail is not None:
        found, other = tail.threshold(0.01), moved.threshold(0.01)
        assert other.value == pytest.approx(scale * (found.value + shift), rel=1e-4, abs=1e-5 * scale)
        assert other.rates == pytest.approx(found.rates, abs=1e-9)


def test_the_same_scores_have_the_same_tail_whatever_their_order():
    scores = simulated("gumbel", 80)
    assert fit_tail(scores).threshold(0.01) == fit_tail(scores[::-1].copy()).threshold(0.01)


def test_few_sets_are_rejected_that_do_have_such_a_tail():
    law = stats.genpareto(-0.1)
    rejected = [fitted(law.rvs(size=40, random_state=np.random.default_rng(seed))) is None for seed in range(300)]
    assert np.mean(rejected) <= 3 * SURE


@pytest.mark.parametrize(
    ("scores", "told"),
    [
        (np.arange(FEWEST - 1), "calibrate on at least 10"),
        (np.ones(50), "all alike"),
        (np.repeat([0.0, 1.0], 30), "all alike"),
        (np.append(np.zeros(39), 5.0), "do not follow"),
        (np.append(np.linspace(0, 1, 60), np.linspace(10, 10.2, 12)), "do not follow"),
        (np.round(stats.norm.ppf(np.linspace(0.01, 0.99, 200))), "do not follow"),
        (np.geomspace(1e30, 3.3e38, 40), "too large"),
    ],
)
def test_scores_without_a_tail_are_refused_in_one_line(scores, told):
    with pytest.raises(FlawmapError, match=told) as refused:
        calibration(scores).threshold(0.001, "tail")
    assert "\n" not in str(refused.value)
    assert "conformal" in str(refused.value)


def test_a_rate_that_is_not_of_the_tail_is_refused():
    tail = fit_tail(simulated("gumbel", 40))
    assert tail.exceedances == 20
    assert tail.threshold(0.51).value > tail.start
    with pytest.raises(FlawmapError, match=r"less than 0\.512"):
        tail.threshold(0.513)


def test_a_tail_threshold_says_that_it_is_an_estimate():
    threshold = calibration(simulated("gumbel", 100)).threshold(0.01, "tail")
    assert (threshold.rate, threshold.requested, threshold.guarantee, threshold.missing) == (0.01, 0.01, "tail", 0)
    low, high = threshold.interval
    assert low < 0.01 < high == threshold.highest
    told = threshold.describe()
    assert f"about 1.00% of good parts are rejected [{low:.2%}, {high:.2%}]: an estimate" in told
    assert "promises nothing" in told
