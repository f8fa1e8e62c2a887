"""Rank correlations against scipy and against a regression of ranks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from flawmap.metrics import partial_spearman, spearman


def toy(seed, n=60, ties=False):
    random = np.random.default_rng(seed)
    given_ = random.standard_normal(n)
    x = given_ + random.standard_normal(n)
    y = np.exp(x) - 2 * given_ + random.standard_normal(n)
    return [np.round(values, 0) if ties else values for values in (x, y, given_)]


@pytest.mark.parametrize("ties", [False, True])
def test_spearman_is_scipys(ties):
    x, y, _ = toy(0, ties=ties)
    expected = stats.spearmanr(x, y)
    rho, p = spearman(x, y)
    assert rho == pytest.approx(expected.statistic, rel=1e-12)
    assert p == pytest.approx(expected.pvalue, rel=1e-9)


@pytest.mark.parametrize("ties", [False, True])
def test_the_partial_correlation_is_that_of_what_a_regression_of_ranks_leaves(ties):
    ranks = [stats.rankdata(values) for values in toy(1, ties=ties)]
    x, y, held = ranks
    left = []
    for values in (x, y):
        fit = stats.linregress(held, values)
        left.append(values - fit.intercept - fit.slope * held)
    rho, p = partial_spearman(*toy(1, ties=ties))
    assert rho == pytest.approx(stats.pearsonr(*left).statistic, rel=1e-10)
    # the p-value of the slope in the regression of the ranks of y on those of x and the given
    design = np.stack([np.ones(len(x)), x, held], 1)
    inverse = np.linalg.inv(design.T @ design)
    slopes = inverse @ design.T @ y
    variance = ((y - design @ slopes) ** 2).sum() / (len(x) - 3)
    assert p == pytest.approx(2 * stats.t.sf(abs(slopes[1]) / np.sqrt(variance * inverse[1, 1]), len(x) - 3), rel=1e-8)


def test_the_partial_correlation_is_the_textbooks_formula_of_three_correlations():
    x, y, held = toy(2)
    (xy, _), (xz, _), (yz, _) = spearman(x, y), spearman(x, held), spearman(y, held)
    expected = (xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2))
    assert partial_spearman(x, y, held)[0] == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("rho", "exponent"), [(0.94, -76), (0.84, -46), (0.68, -23), (-0.57, -15)])
def test_p_values_are_those_of_the_papers_table_over_169_points(rho, exponent):
    """Table 5 of F2R gives rho to two digits, so its p-values can be met to some powers of ten only."""
    rng = np.random.default_rng(0)
    held, noise = rng.standard_normal((2, 169))
    x = rng.standard_normal(169)
    best = min(
        (partial_spearman(x, w * x + noise, held) for w in np.linspace(-8, 8, 4001)), key=lambda r: abs(r[0] - rho)
    )
    assert best[0] == pytest.approx(rho, abs=0.005)
    assert np.log10(best[1]) == pytest.approx(exponent, abs=4)


def test_on_a_crossed_grid_the_partial_correlation_ignores_the_other_setting():
    alpha, beta = (values.ravel() for values in np.meshgrid(np.arange(13) / 10, np.arange(13) / 10, indexing="ij"))
    assert spearman(alpha, beta)[0] == pytest.approx(0, abs=1e-12)
    figure = alpha + 10 * beta
    assert partial_spearman(alpha, figure, beta)[0] > 0.99
    assert spearman(alpha, figure)[0] < 0.2


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(10, 40))
def test_monotone_changes_leave_it_and_a_change_of_sign_turns_it(seed, n):
    x, y, held = toy(seed, n)
    rho, p = partial_spearman(x, y, held)
    assert -1 <= rho <= 1
    assert 0 <= p <= 1
    assert partial_spearman(np.exp(x), y**3, np.arctan(held)) == pytest.approx((rho, p), nan_ok=True)
    assert partial_spearman(y, x, held) == pytest.approx((rho, p), nan_ok=True)
    assert partial_spearman(-x, y, held) == pytest.approx((-rho, p), nan_ok=True)


def test_what_is_constant_has_no_correlation():
    x, y, held = toy(3)
    assert np.isnan(spearman(x, np.ones(60))).all()
    assert np.isnan(partial_spearman(np.zeros(60), y, held)).all()
    assert np.isnan(partial_spearman(2 * held + 1, y, held)).all()
    rho, _ = partial_spearman(x, y, np.ones(60))
    assert rho == pytest.approx(spearman(x, y)[0])
    assert spearman(x, x) == (1.0, 0.0)


@pytest.mark.parametrize("bad", [([1, 2], [1, 2]), ([1, 2, 3], [1, 2]), ([1, 2, np.nan], [1, 2, 3])])
def test_inputs_that_have_no_ranks_are_refused(bad):
    with pytest.raises(ValueError, match=r"needs flat inputs|finite"):
        spearman(*bad)
