import functools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from flawmap.judging import calibration
from flawmap.judging.calibration import (
    PROMISES,
    Calibration,
    binomial_cdf,
    binomial_interval,
    threshold_for,
    upper_bound,
)

scores_of_good = st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=200).map(
    lambda values: np.array(values, dtype=np.float32)
)


@given(st.integers(1, 400), st.data())
def test_clopper_pearson_matches_scipy(n, data):
    k = data.draw(st.integers(0, n))
    reference = stats.binomtest(k, n).proportion_ci(0.95, method="exact")
    assert binomial_interval(k, n) == pytest.approx((reference.low, reference.high), abs=1e-9)
    assert upper_bound(k, n) == pytest.approx(stats.beta.ppf(0.95, k + 1, n - k) if k < n else 1.0, abs=1e-9)
    assert binomial_cdf(k, n, 0.3) == pytest.approx(stats.binom.cdf(k, n, 0.3), abs=1e-10)


def test_no_images_leave_the_rate_unknown():
    assert binomial_interval(0, 0) == (0.0, 1.0)


def test_a_hundredth_with_95_percent_confidence_takes_299_images():
    assert threshold_for(np.arange(299, dtype=np.float32), 0.01, "confidence").missing == 0
    short = threshold_for(np.arange(298, dtype=np.float32), 0.01, "confidence")
    assert short.missing == 1
    assert short.value > 297
    assert short.rate > 0.01


def test_a_hundredth_marginally_takes_99_images():
    assert threshold_for(np.arange(99, dtype=np.float32), 0.01).missing == 0
    short = threshold_for(np.arange(98, dtype=np.float32), 0.01)
    assert (short.missing, short.rate) == (1, 1 / 99)
    assert short.value == np.nextafter(np.float32(97), np.float32(np.inf))
    assert "1 more good image" in short.describe()


@given(scores_of_good, st.floats(0.002, 0.9), st.floats(-1e3, 1e3, width=32))
def test_verdict_and_p_value_agree(scores, rate, score):
    calibrated = Calibration(scores, scores, "holdout")
    threshold = calibrated.threshold(rate)
    if threshold.missing == 0:
        assert (np.float32(score) >= np.float32(threshold.value)) == (calibrated.p_value(score) <= rate * (1 + 1e-12))
    else:
        assert threshold.rate == 1 / (len(scores) + 1)
        assert (scores < threshold.value).all()


@given(scores_of_good, st.floats(0.002, 0.9), st.sampled_from(["marginal", "confidence"]))
def test_thresholds_are_the_lowest_that_keep_the_rate(scores, rate, guarantee):
    threshold = threshold_for(scores, rate, guarantee)
    reached = int((scores >= np.float32(threshold.value)).sum())
    if threshold.missing == 0:
        assert threshold.rate <= rate * (1 + 1e-9) or guarantee == "confidence"
        below = scores[scores < np.float32(threshold.value)].max()
        more = int((scores >= below).sum())
        if guarantee == "marginal":
            assert (more + 1) / (len(scores) + 1) > rate * (1 - 1e-9)
        elif more < len(scores):
            assert upper_bound(reached, len(scores)) <= rate
            assert upper_bound(more, len(scores)) > rate


@pytest.mark.parametrize("n", [99, 400])
def test_the_marginal_promise_holds_on_average(n):
    rng = np.random.default_rng(0)
    rates = []
    for _ in range(2000):
        threshold = threshold_for(rng.standard_normal(n).astype(np.float32), 0.01)
        rates.append(stats.norm.sf(threshold.value))
    error = np.std(rates) / math.sqrt(len(rates))
    assert np.mean(rates) <= 0.01 + 4 * error
    assert np.mean(rates) >= 0.5 * 0.01


def test_the_confident_promise_holds_in_95_of_100_cases(monkeypatch):
    monkeypatch.setattr(calibration, "upper_bound", functools.cache(upper_bound))  # which no score enters
    rng = np.random.default_rng(0)
    broken = [
        stats.norm.sf(threshold_for(rng.standard_normal(500).astype(np.float32), 0.01, "confidence").value) > 0.01
        for _ in range(2000)
    ]
    assert np.mean(broken) <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / len(broken))


def test_cross_fitted_scores_promise_nothing():
    threshold = Calibration(np.arange(200, dtype=np.float32), np.empty(0, np.float32), "crossfit").threshold(0.01)
    assert threshold.guarantee == "estimate"
    assert "promises nothing" in threshold.describe()


def test_a_named_threshold_states_what_good_images_did():
    threshold = Calibration(np.arange(10, dtype=np.float32), np.empty(0, np.float32), "folder").threshold_at(8)
    assert (threshold.rate, threshold.requested, threshold.guarantee) == (0.2, None, "none")


@pytest.mark.parametrize("scores", [[], [math.nan], [math.inf, 1.0]])
def test_scores_must_be_finite(scores):
    with pytest.raises(ValueError, match="finite"):
        Calibration(np.array(scores, dtype=np.float32), np.empty(0, np.float32), "holdout")


@given(scores_of_good.filter(lambda scores: len(scores) > 1), st.floats(0.002, 0.9), st.sampled_from(PROMISES))
def test_one_image_sets_the_threshold(scores, rate, guarantee):
    calibrated = Calibration(scores, np.empty(0, np.float32), "holdout")
    decisive = calibrated.decisive(rate, guarantee)
    threshold = calibrated.threshold(rate, guarantee)
    assert threshold.value == np.nextafter(np.float32(decisive.score), np.float32(np.inf))
    assert decisive.score == scores[decisive.image]
    others = Calibration(np.delete(scores, decisive.image), np.empty(0, np.float32), "holdout")
    assert decisive.without == others.threshold(rate, guarantee).value


def test_an_odd_image_sets_the_threshold_of_few():
    calibrated = Calibration(np.array([3, 1, 14, 2], np.float32), np.empty(0, np.float32), "holdout")
    decisive = calibrated.decisive(0.01)
    assert (decisive.image, decisive.score) == (2, 14)
    assert decisive.without == np.nextafter(np.float32(3), np.float32(4))
    assert Calibration(np.ones(1, np.float32), np.empty(0, np.float32), "holdout").decisive() is None
