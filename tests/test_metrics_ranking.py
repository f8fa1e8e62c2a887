import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn import metrics as reference

from flawmap.metrics import (
    auroc,
    average_precision,
    best_escape_rate,
    caught_at_overkill,
    escape_rate,
    f1_max,
    overkill_rate,
    precision_recall_curve,
    roc_curve,
)

FIGURES = [auroc, average_precision, f1_max]

# Few distinct values, so that most scores are tied.
tied_scores = hnp.arrays(np.int64, st.integers(2, 60), elements=st.integers(-4, 4))


@st.composite
def ranked(draw, elements=None):
    """Scores and labels with both classes present."""
    scores = draw(tied_scores if elements is None else hnp.arrays(np.float64, st.integers(2, 60), elements=elements))
    labels = draw(hnp.arrays(np.bool_, scores.shape))
    labels[0], labels[-1] = False, True
    return scores, labels


any_float = st.floats(-1e300, 1e300)


@settings(deadline=None)
@given(ranked() | ranked(any_float))
def test_agrees_with_scikit_learn(data):
    scores, labels = data
    assert auroc(scores, labels) == pytest.approx(reference.roc_auc_score(labels, scores), abs=1e-12)
    assert average_precision(scores, labels) == pytest.approx(
        reference.average_precision_score(labels, scores), abs=1e-12
    )
    precision, recall, _ = reference.precision_recall_curve(labels, scores)
    best = np.max(2 * precision * recall / np.maximum(precision + recall, 1e-300))
    assert f1_max(scores, labels) == pytest.approx(best, abs=1e-12)


@settings(deadline=None)
@given(ranked() | ranked(any_float))
def test_curves_agree_with_scikit_learn(data):
    scores, labels = data
    expected = reference.roc_curve(labels, scores, drop_intermediate=False)
    for ours, theirs in zip(roc_curve(scores, labels), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    expected = reference.precision_recall_curve(labels, scores)
    for ours, theirs in zip(precision_recall_curve(scores, labels), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@settings(deadline=None)
@given(ranked())
def test_any_increasing_transform_leaves_the_figures_as_they_are(data):
    scores, labels = data
    for figure in FIGURES:
        assert figure(scores, labels) == figure(np.exp(scores) - 100, labels) == figure(1e-9 * scores**3, labels)


@settings(deadline=None)
@given(ranked() | ranked(any_float))
def test_auroc_of_negated_scores_is_the_complement(data):
    scores, labels = data
    assert auroc(-scores, labels) == pytest.approx(1 - auroc(scores, labels), abs=1e-12)


@pytest.mark.parametrize("figure", FIGURES)
def test_known_values(figure):
    labels = np.array([[0, 0, 0], [1, 1, 0]])
    assert figure(np.array([[-3.0, -2.5, -9.0], [5.0, 4.0, -2.0]]), labels) == 1.0
    constant = {auroc: 0.5, average_precision: 1 / 3, f1_max: 0.5}
    assert figure(np.full((2, 3), 7.0), labels) == pytest.approx(constant[figure])


def test_known_values_by_hand():
    scores, labels = [4, 3, 3, 2, 1], [1, 0, 1, 1, 0]
    assert auroc(scores, labels) == pytest.approx((2 + 1.5 + 1) / 6)
    assert average_precision(scores, labels) == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    assert f1_max(scores, labels) == pytest.approx(2 * 3 / (2 * 3 + 1))


def test_float64_is_not_cast_down():
    scores = np.array([1.0, 1.0 + 1e-12])
    assert np.float32(scores[0]) == np.float32(scores[1])
    assert auroc(scores, [0, 1]) == 1.0


def test_negative_zero_ties_with_zero():
    assert auroc([0.0, -0.0], [0, 1]) == 0.5


@pytest.mark.parametrize("labels", [[0, 0, 0], [1, 1, 1], []])
def test_one_class_has_no_figures(labels):
    scores = np.arange(len(labels), dtype=np.float64)
    for figure in FIGURES:
        assert np.isnan(figure(scores, labels))


def test_curves_of_one_class():
    fpr, tpr, thresholds = roc_curve([1.0, 2.0], [0, 0])
    np.testing.assert_array_equal(fpr, [0, 0.5, 1])
    assert np.isnan(tpr).all()
    np.testing.assert_array_equal(thresholds, [np.inf, 2, 1])
    precision, recall, _ = precision_recall_curve([1.0, 2.0], [0, 0])
    np.testing.assert_array_equal(precision, [0, 0, 1])
    assert np.isnan(recall).all()


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([np.nan, 1], [0, 1], "NaN or infinity"),
        ([np.inf, 1], [0, 1], "NaN or infinity"),
        ([0, 1, 2], [0, 1], "differ in shape"),
        ([0, 1], [0, 255], "0 .good. or 1"),
        ([0, 1], [0, 0.5], "0 .good. or 1"),
    ],
)
def test_bad_input_is_refused(scores, labels, message):
    for figure in [*FIGURES, roc_curve, precision_recall_curve]:
        with pytest.raises(ValueError, match=message):
            figure(scores, labels)


def test_a_score_at_the_threshold_is_called_a_defect():
    scores, labels = [0.1, 0.4, 0.4, 0.9], [0, 0, 1, 1]
    assert (escape_rate(scores, labels, 0.4), overkill_rate(scores, labels, 0.4)) == (0.0, 0.5)
    assert (escape_rate(scores, labels, 0.5), overkill_rate(scores, labels, 0.5)) == (0.5, 0.0)


def test_float32_scores_are_not_compared_with_a_rounded_threshold():
    score = np.array([0.1], dtype=np.float32)  # 0.100000001490116
    assert escape_rate(score, [1], 0.1000000012) == 0.0
    assert escape_rate(score, [1], 0.1000000017) == 1.0
    assert overkill_rate(score, [0], 0.1000000017) == 0.0


@settings(deadline=None)
@given(ranked() | ranked(any_float), st.floats(0, 1))
def test_the_best_escape_rate_is_that_of_the_best_threshold(data, overkill):
    scores, labels = data
    rates = [(escape_rate(scores, labels, t), overkill_rate(scores, labels, t)) for t in [*scores, np.inf]]
    best = min(escaped for escaped, rejected in rates if rejected <= overkill)
    assert best_escape_rate(scores, labels, overkill) == best
    assert caught_at_overkill(scores, labels, overkill) == pytest.approx(1 - best)
    for _, rejected in rates:  # whole numbers of images, in spite of binary fractions
        attained = min(other for other, more in rates if more <= rejected)
        assert best_escape_rate(scores, labels, rejected) == attained


def test_rates_round_down_to_whole_images():
    scores, labels = [*range(100), 70.5, 200], [0] * 100 + [1] * 2
    assert best_escape_rate(scores, labels, 0.2899) == 1 / 2
    assert best_escape_rate(scores, labels, 0.29) == 0  # though 0.29 * 100 is a hair below 29
    assert caught_at_overkill(scores, labels, 0.009) == 1 / 2
    with pytest.raises(ValueError, match="overkill"):
        best_escape_rate(scores, labels, 1.01)


def test_rates_of_a_missing_class():
    assert np.isnan(best_escape_rate([1.0], [0], 0.5))
    assert np.isnan(best_escape_rate([1.0], [1], 0.5))
    assert np.isnan(escape_rate([1.0], [0], 0.5))
    assert np.isnan(overkill_rate([1.0], [1], 0.5))
    with pytest.raises(ValueError, match="threshold is NaN"):
        escape_rate([1.0], [1], float("nan"))
