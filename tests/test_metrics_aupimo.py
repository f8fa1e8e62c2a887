import numpy as np
import pytest

from flawmap.metrics import aupimo


def aupimo_by_brute_force(maps, masks, low, high, points=4001):
    """The definition, by sampling log z finely and searching the lowest threshold allowed at each z."""
    good = [scores.ravel() for scores, mask in zip(maps, masks, strict=True) if not mask.any()]
    thresholds = np.unique(maps)
    above = np.append(thresholds[1:], np.inf)  # just above a score is, for every count, the next one
    candidates = np.concatenate([thresholds, above])
    shared = np.mean([[np.mean(image >= t) for t in candidates] for image in good], axis=0)
    z = np.exp(np.linspace(np.log(low), np.log(high), points))
    z = np.sqrt(z[1:] * z[:-1])
    allowed = np.array([candidates[shared <= level].min() for level in z])
    return [
        np.mean([np.mean(scores[mask] >= t) for t in allowed]) if mask.any() else np.nan
        for scores, mask in zip(maps, masks, strict=True)
    ]


@pytest.mark.parametrize("decimals", [1, 2, 8])
def test_agrees_with_brute_force(decimals):
    rng = np.random.default_rng(decimals)
    masks = np.zeros((6, 12, 12), dtype=bool)
    masks[3:, 2:6, 4:9] = True
    maps = np.round(rng.normal(size=masks.shape) + 1.5 * masks, decimals)
    per_image, mean = aupimo(maps, masks, fpr_bounds=(0.01, 0.3))
    expected = aupimo_by_brute_force(maps, masks, 0.01, 0.3)
    np.testing.assert_allclose(per_image, expected, atol=2e-3)
    assert mean == pytest.approx(np.nanmean(expected), abs=2e-3)


def test_known_values():
    masks = np.zeros((3, 10, 10), dtype=bool)
    masks[1:, 0] = True
    maps = np.zeros(masks.shape)
    maps[0] = np.arange(100).reshape(10, 10)  # shared false positive rate k / 100 just above score 99 - k
    maps[1, 0] = 200
    maps[2, 0] = 97.5  # found once 2 false positives are allowed
    per_image, mean = aupimo(maps, masks, fpr_bounds=(0.01, 0.1))
    found = np.log(0.1 / 0.02) / np.log(0.1 / 0.01)
    np.testing.assert_allclose(per_image, [np.nan, 1.0, found])
    assert mean == pytest.approx((1 + found) / 2)


def test_bounds_finer_than_the_data_give_the_recall_without_false_positives():
    masks = np.zeros((2, 5, 5), dtype=bool)
    masks[1, :2] = True
    maps = np.zeros(masks.shape)
    maps[1, 0] = 1.0
    maps[0, 0, 0] = 0.5
    per_image, mean = aupimo(maps, masks)
    np.testing.assert_allclose(per_image, [np.nan, 0.5])
    assert mean == pytest.approx(0.5)


def test_false_positives_of_defective_images_do_not_count():
    masks = np.zeros((2, 5, 5), dtype=bool)
    masks[1, 0] = True
    maps = np.where(masks, 1.0, 0.0)
    maps[1, 3] = 9.0
    assert aupimo(maps, masks, fpr_bounds=(0.1, 1.0))[1] == pytest.approx(1.0)


def test_constant_maps_find_nothing():
    masks = np.zeros((2, 5, 5), dtype=bool)
    masks[1, 0] = True
    assert aupimo(np.ones(masks.shape), masks, fpr_bounds=(0.1, 1.0))[1] == 0.0


@pytest.mark.parametrize("fill", [False, True])
def test_undefined_without_good_or_defective_images(fill):
    per_image, mean = aupimo(np.zeros((2, 3, 3)), np.full((2, 3, 3), fill))
    assert np.isnan(per_image).all()
    assert np.isnan(mean)


def test_bad_bounds_are_refused():
    with pytest.raises(ValueError, match="fpr_bounds"):
        aupimo(np.zeros((1, 2, 2)), np.zeros((1, 2, 2), dtype=bool), fpr_bounds=(1e-4, 1e-5))
