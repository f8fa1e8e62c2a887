import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flawmap.metrics import (
    PixelCurves,
    aupro,
    auroc,
    average_precision,
    f1_max,
    precision_recall_curve,
    pro_curve,
    roc_curve,
)


def exact(maps, masks, limit=0.3):
    return auroc(maps, masks), average_precision(maps, masks), f1_max(maps, masks), aupro(maps, masks, limit)


def streamed(maps, masks, limit=0.3):
    curves = PixelCurves()
    curves.update(maps, masks)
    return curves.compute(limit)


def spots(rng, images, size):
    """Smooth maps with noise, and masks of a few discs in every other image."""
    y, x = np.mgrid[:size, :size]
    masks = np.zeros((images, size, size), dtype=bool)
    for mask in masks[::2]:
        for _ in range(rng.integers(1, 4)):
            row, column, radius = rng.integers(size), rng.integers(size), rng.integers(1, size // 6)
            mask |= (y - row) ** 2 + (x - column) ** 2 <= radius**2
    waves = np.sin(y / 17 + rng.random((images, 1, 1)) * 6) + np.cos(x / 23 + rng.random((images, 1, 1)) * 6)
    return waves + rng.normal(size=masks.shape) + 1.5 * masks, masks


narrow = st.floats(10.0, np.float32(10.1).item(), width=32)
wide = st.floats(allow_nan=False, allow_infinity=False, width=32)
neighbours = st.integers(-3, 3).map(lambda step: (np.float32(-7) + np.float32(2**-21) * step).item())
equal = st.just(-2.5)


@st.composite
def scored_masks(draw):
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(2, 6)))
    elements = draw(st.sampled_from([narrow, wide, neighbours, equal]))
    maps = draw(hnp.arrays(np.float32, shape, elements=elements))
    masks = draw(hnp.arrays(np.bool_, shape))
    masks[0, 0, 0], masks[0, 0, 1] = True, False
    return maps, masks


@settings(deadline=None)
@given(scored_masks(), st.sampled_from([0.05, 0.3, 1.0]))
@example((np.array([[[0.0, -0.0]]], np.float32), np.array([[[True, False]]])), 0.3)
def test_agrees_with_the_exact_functions(data, limit):
    maps, masks = data
    np.testing.assert_allclose(streamed(maps, masks, limit), exact(maps, masks, limit), atol=1e-4)


@pytest.mark.parametrize(
    "scale",
    [
        lambda s: s,
        lambda s: 10 + s / 100,
        lambda s: -1e30 * (s + 9),
        lambda s: np.exp(4 * s),
        lambda s: np.where(np.indices(s.shape)[1] < 10, 0, 10.0 + s / 200),  # a border that is not scored
        lambda s: np.round(s, 1),
    ],
)
def test_agrees_with_the_exact_functions_on_many_pixels(scale):
    maps, masks = spots(np.random.default_rng(0), images=12, size=160)
    maps = scale(maps).astype(np.float32)
    np.testing.assert_allclose(streamed(maps, masks), exact(maps, masks), atol=1e-4)


def test_agrees_where_scores_fill_all_of_float32():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, size=1_500_000, dtype=np.uint32).view(np.float32)
    maps = bits[np.isfinite(bits)][: 20 * 250 * 250].reshape(20, 250, 250)
    masks = rng.random(maps.shape) < 0.05
    maps = np.where(masks & (rng.random(maps.shape) < 0.5), np.abs(maps), maps)
    np.testing.assert_allclose(streamed(maps, masks), exact(maps, masks), atol=1e-4)


@settings(deadline=None)
@given(scored_masks(), st.data())
def test_batches_do_not_matter(data, cuts):
    maps, masks = data
    cut = cuts.draw(st.integers(0, len(maps)))
    curves = PixelCurves()
    curves.update(maps[:cut], masks[:cut])
    curves.update(maps[cut:], masks[cut:])
    assert curves.compute() == streamed(maps, masks)


def test_batches_do_not_matter_to_the_last_bit():
    maps, masks = spots(np.random.default_rng(1), images=8, size=100)
    maps = np.exp(5 * maps).astype(np.float32)
    one_by_one, backwards = PixelCurves(), PixelCurves()
    for i in range(len(maps)):
        one_by_one.update(maps[i : i + 1], masks[i : i + 1])
        backwards.update(maps[::-1][i : i + 1], masks[::-1][i : i + 1])
    whole = PixelCurves()
    whole.update(maps, masks)
    assert one_by_one.compute() == whole.compute() == backwards.compute()
    assert one_by_one.intervals(repeats=50) == whole.intervals(repeats=50)


def test_curves_agree_with_the_exact_functions():
    rng = np.random.default_rng(2)
    maps = np.round(rng.normal(size=(3, 20, 20)), 1).astype(np.float32)
    masks = rng.random(maps.shape) < 0.2
    curves = PixelCurves()
    curves.update(maps, masks)
    pairs = [
        (curves.roc_curve(), roc_curve(maps, masks)),
        (curves.precision_recall_curve(), precision_recall_curve(maps, masks)),
        (curves.pro_curve(), pro_curve(maps, masks)),
    ]
    for ours, expected in pairs:
        for a, b in zip(ours, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-9)


def test_images_without_masks_are_skipped_and_counted():
    maps, masks = spots(np.random.default_rng(3), images=6, size=30)
    maps = maps.astype(np.float32)
    curves = PixelCurves()
    curves.update(maps[:4], [masks[0], None, masks[2], None])
    curves.update(maps[4:], None)
    assert (curves.images, curves.skipped) == (2, 4)
    assert curves.compute() == streamed(maps[[0, 2]], masks[[0, 2]])


def test_images_may_differ_in_size():
    rng = np.random.default_rng(4)
    curves, scores, labels = PixelCurves(), [], []
    for shape in [(2, 20, 30), (1, 9, 11), (3, 300, 280)]:
        maps, masks = rng.normal(size=shape).astype(np.float32), rng.random(shape) < 0.1
        curves.update(maps, masks)
        scores.append(maps.ravel())
        labels.append(masks.ravel())
    assert curves.compute().auroc == pytest.approx(auroc(np.concatenate(scores), np.concatenate(labels)), abs=1e-4)


@pytest.mark.parametrize("masks", [np.zeros((1, 4, 4), bool), np.ones((1, 4, 4), bool), None])
def test_undefined_without_defect_or_normal_pixels(masks):
    curves = PixelCurves()
    curves.update(np.arange(16, dtype=np.float32).reshape(1, 4, 4), masks)
    assert np.isnan(curves.compute()).all()
    assert np.isnan(list(curves.intervals().values())).all()


def test_undefined_before_the_first_image():
    curves = PixelCurves()
    curves.update(np.zeros((0, 4, 4), np.float32), np.zeros((0, 4, 4), bool))
    assert np.isnan(curves.compute()).all()


def test_single_image():
    masks = np.zeros((1, 6, 6), dtype=bool)
    masks[0, :2, :2] = True
    assert streamed(np.where(masks, 0.0, -1.0).astype(np.float32), masks) == (1.0, 1.0, 1.0, 1.0)
    constant = streamed(np.full(masks.shape, 3, np.float32), masks)
    assert constant == pytest.approx((0.5, 4 / 36, 2 * 4 / 40, 0.15))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_refused_batch_leaves_no_trace(bad):
    maps, masks = spots(np.random.default_rng(5), images=4, size=20)
    maps = maps.astype(np.float32)
    curves = PixelCurves()
    curves.update(maps, masks)
    before = curves.compute()
    broken = maps.copy()
    broken[3, 1, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        curves.update(broken, masks)
    assert curves.compute() == before
    assert curves.images == 4


def test_bad_input_is_refused():
    maps, masks = np.zeros((2, 4, 4), np.float32), np.zeros((2, 4, 4), bool)
    curves = PixelCurves()
    with pytest.raises(ValueError, match=r"\(B, H, W\)"):
        curves.update(maps[0], masks[0])
    with pytest.raises(ValueError, match="float64"):
        curves.update(maps.astype(np.float64), masks)
    with pytest.raises(ValueError, match="2 maps but 1 masks"):
        curves.update(maps, masks[:1])
    with pytest.raises(ValueError, match=r"must be bool \(4, 4\)"):
        curves.update(maps, masks.astype(np.uint8))
    with pytest.raises(ValueError, match="limit"):
        curves.compute(limit=1.5)


def test_memory_does_not_grow_with_the_images():
    rng = np.random.default_rng(6)
    maps = rng.normal(size=(50, 32, 32)).astype(np.float32)
    masks = rng.random(maps.shape) < 0.01
    curves = PixelCurves()
    tracemalloc.start()
    try:
        for _ in range(22):
            curves.update(maps, masks)
        full = tracemalloc.get_traced_memory()[0]
        for _ in range(20):
            curves.update(maps, masks)
        assert tracemalloc.get_traced_memory()[0] < full + 1e6
    finally:
        tracemalloc.stop()
    assert curves.images == 2100
