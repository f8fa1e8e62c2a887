import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from flawmap.metrics import aupro, pro_curve
from flawmap.metrics.regions import defect_regions


def pro_by_brute_force(maps, masks):
    """The definition, threshold by threshold and region by region."""
    regions = []
    for scores, mask in zip(maps, masks, strict=True):
        labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
        regions += [scores[labels == number] for number in range(1, count + 1)]
    normal = maps[~masks]
    points = [(0.0, 0.0)]
    for threshold in np.unique(maps)[::-1]:
        points.append((np.mean(normal >= threshold), np.mean([np.mean(region >= threshold) for region in regions])))
    return np.array(points).T


def area_by_brute_force(fpr, pro, limit):
    """Many small trapezia; a vertical step of the curve lies between two of them."""
    x = np.linspace(0, limit, 20001)
    x = (x[1:] + x[:-1]) / 2
    upper = np.minimum(np.searchsorted(fpr, x), len(fpr) - 1)
    run = fpr[upper] - fpr[upper - 1]
    y = pro[upper - 1] + (pro[upper] - pro[upper - 1]) * (x - fpr[upper - 1]) / run
    return y.mean()


@st.composite
def scored_masks(draw, elements=None):
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(2, 7)))
    maps = draw(hnp.arrays(np.float64, shape, elements=st.integers(-3, 3) if elements is None else elements))
    masks = draw(hnp.arrays(np.bool_, shape))
    masks[0, 0, 0], masks[0, 0, 1] = True, False
    return maps, masks


any_float = st.floats(-1e6, 1e6)


@settings(deadline=None)
@given(scored_masks() | scored_masks(any_float), st.sampled_from([0.05, 0.3, 1.0]))
def test_agrees_with_brute_force(data, limit):
    maps, masks = data
    fpr, pro, thresholds = pro_curve(maps, masks)
    np.testing.assert_allclose([fpr, pro], pro_by_brute_force(maps, masks), atol=1e-12)
    np.testing.assert_array_equal(thresholds[1:], np.unique(maps)[::-1])
    assert aupro(maps, masks, limit) == pytest.approx(area_by_brute_force(fpr, pro, limit), abs=2e-4)


@settings(deadline=None)
@given(scored_masks())
def test_any_increasing_transform_leaves_it_as_it_is(data):
    maps, masks = data
    assert aupro(np.exp(maps), masks) == pytest.approx(aupro(maps, masks), abs=1e-12)


def test_regions_touch_at_corners():
    mask = np.array([[0, 0, 0, 0, 0], [0, 1, 0, 0, 1], [0, 0, 1, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 1]], dtype=bool)
    regions, areas = defect_regions(mask)
    assert sorted(areas) == [1, 1, 3]
    np.testing.assert_array_equal(areas[regions], [3, 1, 3, 3, 1])


def test_known_values():
    masks = np.zeros((2, 10, 10), dtype=bool)
    masks[1, :2, :2] = True
    masks[1, 7:, 7:] = True
    assert aupro(np.where(masks, 2.0, -1.0), masks) == 1.0
    # Every threshold takes all or nothing: the curve is the diagonal.
    assert aupro(np.full(masks.shape, 5.0), masks) == pytest.approx(0.15)
    assert aupro(np.where(masks, -1.0, 2.0), masks) == 0.0


def test_small_and_large_regions_count_the_same():
    masks = np.zeros((1, 20, 20), dtype=bool)
    masks[0, 0, 0] = True
    masks[0, 5:15, 5:15] = True
    maps = np.zeros((1, 20, 20))
    maps[0, 5:15, 5:15] = 1.0  # the large region is found, the single pixel is not
    # PRO is 1/2 from the start and grows linearly to 1 at a false positive rate of 1.
    assert aupro(maps, masks, limit=1.0) == pytest.approx(0.75)
    assert aupro(maps, masks, limit=0.3) == pytest.approx(0.5 + 0.5 * 0.15)


def test_normal_pixels_of_good_images_count():
    masks = np.zeros((2, 4, 4), dtype=bool)
    masks[1, :2] = True
    maps = np.zeros((2, 4, 4))
    maps[1, :2] = 1.0
    maps[0, 0] = 2.0  # 4 of the 24 normal pixels of both images lie above the region
    fpr, pro, _ = pro_curve(maps, masks)
    np.testing.assert_allclose(fpr, [0, 4 / 24, 4 / 24, 1])
    np.testing.assert_allclose(pro, [0, 0, 1, 1])
    assert aupro(maps, masks, limit=0.5) == pytest.approx((0.5 - 4 / 24) / 0.5)


@pytest.mark.parametrize("fill", [False, True])
def test_undefined_without_defect_or_normal_pixels(fill):
    assert np.isnan(aupro(np.zeros((2, 3, 3)), np.full((2, 3, 3), fill)))


def test_a_fully_defective_image_is_one_region_among_others():
    masks = np.zeros((2, 4, 4), dtype=bool)
    masks[0] = True
    assert aupro(np.where(masks, 1.0, 0.0), masks) == 1.0


def test_bad_input_is_refused():
    maps, masks = np.zeros((1, 3, 3)), np.zeros((1, 3, 3), dtype=bool)
    with pytest.raises(ValueError, match=r"\(N, H, W\)"):
        aupro(maps[0], masks[0])
    with pytest.raises(ValueError, match="must be bool"):
        aupro(maps, masks.astype(np.uint8) * 255)
    with pytest.raises(ValueError, match="NaN or infinity"):
        aupro(np.full((1, 3, 3), np.nan), masks)
    with pytest.raises(ValueError, match="limit"):
        aupro(maps, masks, limit=0.0)
