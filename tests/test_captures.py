import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageFilter

from flawmap.backbones import create_backbone
from flawmap.datasets import find_dataset
from flawmap.datasets.drawn import draw_dataset
from flawmap.errors import FlawmapError
from flawmap.imaging.captures import STATISTICS, CaptureLimits, capture_statistics
from flawmap.imaging.decoding import read_image
from flawmap.imaging.preprocessing import Preprocessing

SHARED = Path(__file__).parents[2] / "shared" / "data"
KINDS = ("screws", "fabric", "boards")
SIZE = 128


def statistic(pixels, name, **options):
    return capture_statistics(pixels, **options)[STATISTICS.index(name)]


def read(samples):
    return [read_image(sample.path) for sample in samples]


def blurred(pixels, share):
    sigma = share * math.sqrt(pixels.shape[0] * pixels.shape[1])
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(sigma)))


def noisy(pixels, rng, sigma=2.0):
    return np.clip(np.rint(pixels + rng.normal(0, sigma, np.shape(pixels))), 0, 255).astype(np.uint8)


def failures(pixels, rng):
    """Captures that cannot be judged, by the words their reason may begin with."""
    mean = np.broadcast_to(pixels.mean((0, 1)), pixels.shape)
    return {
        "black": noisy(np.zeros(pixels.shape), rng, 1.5),
        "over-exposed": np.clip(pixels * 4.0, 0, 255).astype(np.uint8),
        "blurred": blurred(pixels, 0.02),
        "nothing to be seen": noisy(mean, rng),
    }


def patched(pixels, colour):
    """Thirty per cent of the image in one colour."""
    height, width = (int(side * 0.3**0.5) for side in pixels.shape[:2])
    top, left = pixels.shape[0] // 5, pixels.shape[1] // 6
    result = pixels.copy()
    result[top : top + height, left : left + width] = colour if pixels.ndim == 3 else int(np.mean(colour))
    return result


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("captures")
    for kind in KINDS:
        draw_dataset(root / kind, kind, 0, train=14, good=3, per_defect=1, size=SIZE)
    return {kind: find_dataset(root / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def limits(sets):
    return {kind: CaptureLimits.learn([capture_statistics(p) for p in read(sets[kind].train)]) for kind in KINDS}


# The statistics


def test_sharpness_of_known_surfaces():
    ramp = np.add.outer(np.arange(128), np.arange(128)) / 254
    steps = [np.where(np.arange(128) < at, 0.2, 0.8) * np.ones((128, 1)) for at in (64, 65)]
    noise = np.clip(np.random.default_rng(0).normal(0.5, 0.1, (128, 128)), 0, 1)
    assert statistic(ramp, "sharpness") == pytest.approx(0.25, rel=0.03)
    assert [statistic(step, "sharpness") for step in steps] == [
        pytest.approx(0.5, rel=0.02),
        pytest.approx(1, rel=0.02),
    ]
    assert statistic(noise, "sharpness") == pytest.approx(4, rel=0.05)


# In the first, a run adds up to more than 16 bits hold.
@pytest.mark.parametrize("size", [(36_000, 8), (224, 224), (256, 192), (128, 100), (2, 200), (700, 501), (1, 1)])
@pytest.mark.parametrize("colour", [False, True])
def test_gradients_are_those_of_pillows_box_filter(size, colour):
    rng = np.random.default_rng(0)
    pixels = rng.integers(200, 256, (*size, 3) if colour else size, dtype=np.uint8)
    grey = pixels.mean(2, dtype=np.float32) if colour else pixels.astype(np.float32)
    factor = min(1, 128 / max(size))
    target = [max(4, round(side * factor)) for side in size[::-1]]
    reduced = np.asarray(Image.fromarray(grey).resize(target, Image.Resampling.BOX), np.float64) / 255
    energy = (np.diff(reduced, axis=0) ** 2).mean() + (np.diff(reduced, axis=1) ** 2).mean()
    assert statistic(pixels, "detail") == pytest.approx(energy**0.5, rel=1e-4, abs=1e-6)
    assert statistic(pixels, "brightness") == pytest.approx(pixels.mean() / 255, abs=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_blur_lowers_sharpness_at_any_size(sets, kind):
    pixels = read(sets[kind].train[:1])[0]
    for factor in (1, 5):
        enlarged = np.asarray(Image.fromarray(pixels).resize((SIZE * factor, SIZE * factor), Image.Resampling.BICUBIC))
        values = [statistic(blurred(enlarged, share), "sharpness") for share in (0.0, 0.01, 0.02, 0.04)]
        assert values[1] < 0.85 * values[0]
        assert max(values[2:]) < 0.6 * values[0]


def test_grain_of_a_large_image_does_not_hide_its_blur(sets):
    pixels = np.asarray(Image.fromarray(read(sets["screws"].train[:1])[0]).resize((1024, 1024)))
    soft = blurred(pixels, 0.02)
    grainy = noisy(soft, np.random.default_rng(0), 4)
    assert statistic(grainy, "sharpness") == pytest.approx(statistic(soft, "sharpness"), rel=0.15)


def test_sharpness_does_not_depend_on_contrast(sets):
    pixels = read(sets["boards"].train[:1])[0] / 255
    assert statistic(pixels / 3 + 0.2, "sharpness") == pytest.approx(statistic(pixels, "sharpness"), rel=0.01)
    assert statistic(pixels / 3, "detail") == pytest.approx(statistic(pixels, "detail") / 3, rel=1e-5)


def test_brightness_clipping_and_colour():
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :15] = (255, 0, 0)
    pixels[:, 15:30] = 128
    expected = {
        "black share": 0.5,
        "white share": 0.25,
        "brightness": (0.25 + 0.25 * 128 / 255 * 3) / 3,
        "red-green": 0.25,
        "yellow-blue": 0.125,
    }
    assert {name: pytest.approx(statistic(pixels, name)) for name in expected} == expected


def test_the_same_image_in_every_type(sets):
    pixels = read(sets["boards"].train[:1])[0]
    grey = pixels[:, :, 1]
    expected = capture_statistics(grey)
    np.testing.assert_allclose(capture_statistics(grey / 255), expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(capture_statistics(grey.astype(np.uint16) * 257), expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(
        capture_statistics(grey.astype(np.uint16) * 16, white=4080), expected, rtol=1e-3, atol=1e-3
    )
    np.testing.assert_allclose(capture_statistics(np.stack([grey] * 3, 2)), expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(capture_statistics(pixels / 255), capture_statistics(pixels), rtol=0.02, atol=1e-3)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 300)).flatmap(lambda shape: arrays(np.uint8, shape)),
)
def test_any_image_has_finite_statistics(pixels):
    assert np.isfinite(capture_statistics(pixels)).all()
    assert np.isfinite(capture_statistics(pixels.T)).all()


# The limits


@pytest.mark.parametrize("kind", KINDS)
def test_good_and_defective_parts_can_be_judged(sets, limits, kind):
    reasons = [limits[kind].reason(capture_statistics(pixels)) for pixels in read(sets[kind].samples)]
    assert reasons == [None] * len(reasons)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (128, 128, 128), (255, 0, 0), (0, 0, 255)])
def test_a_large_defect_of_any_colour_can_be_judged(sets, limits, kind, colour):
    for pixels in read(sets[kind].good_test):
        assert limits[kind].reason(capture_statistics(patched(pixels, colour))) is None


@pytest.mark.parametrize("kind", KINDS)
def test_failed_captures_are_told_with_their_reason(sets, limits, kind):
    rng = np.random.default_rng(0)
    for pixels in read(sets[kind].test):
        for words, failed in failures(pixels, rng).items():
            reason = limits[kind].reason(capture_statistics(failed))
            assert reason is not None, words
            assert reason.startswith(words)
            assert "\n" not in reason
        assert limits[kind].reason(capture_statistics(noisy(blurred(pixels, 0.03), rng))) is not None


def test_the_reason_names_the_range_and_the_remedy():
    good = [[0.0, 0.0, 0.5, sharpness, 0.05, 0.0, 0.0] for sharpness in np.linspace(0.5, 0.6, 30)]
    learnt = CaptureLimits.learn(good)
    failed = [0.0, 0.0, 0.5, 0.26, 0.05, 0.0, 0.0]
    assert learnt.reason(failed) == "blurred: sharpness 0.26, good images 0.5 to 0.6; check the focus"
    assert learnt.reason([np.nan] * len(STATISTICS)) is not None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_good_images_are_enough(sets, kind, count):
    learnt = CaptureLimits.learn([capture_statistics(pixels) for pixels in read(sets[kind].train[:count])])
    for pixels in read(sets[kind].test):
        assert learnt.reason(capture_statistics(pixels)) is None
        assert learnt.reason(capture_statistics(np.zeros_like(pixels))) is not None
        assert learnt.reason(capture_statistics(np.full_like(pixels, 255))) is not None


def test_images_all_alike_leave_room():
    one = np.array([0.0, 0.01, 0.5, 0.6, 0.05, 0.1, 0.1])
    learnt = CaptureLimits.learn(np.tile(one, (20, 1)), np.ones((20, 8)))
    assert learnt.reason(one * 1.2, np.r_[np.ones(6), 0.5, 0.5]) is None


def test_one_bad_image_in_a_hundred_does_not_open_the_limits():
    rng = np.random.default_rng(0)
    good = np.array([0.0, 0.0, 0.5, 0.6, 0.05, 0.0, 0.0]) + rng.normal(0, 0.002, (300, len(STATISTICS)))
    embeddings = 1 + rng.normal(0, 0.1, (300, 8))
    black = np.array([1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    good[:3], embeddings[:3] = black, -1
    learnt = CaptureLimits.learn(good, embeddings)
    assert learnt.reason(black).startswith("black")
    assert learnt.reason(good[9], -np.ones(8)).startswith("another part")
    assert learnt.reason(good[9], embeddings[9]) is None


@settings(max_examples=60, deadline=None)
@given(arrays(np.float64, st.tuples(st.integers(1, 99), st.just(len(STATISTICS))), elements=st.floats(0, 1)))
def test_below_a_hundred_every_good_image_lies_within_its_limits(values):
    learnt = CaptureLimits.learn(values)
    # A hair wider, as a limit at an image's own value goes through a logarithm and back.
    assert (values >= np.array(learnt.low) * (1 - 1e-9) - 2e-6).all()
    assert (values <= np.array(learnt.high) * (1 + 1e-9) + 2e-6).all()


# Another part, by a backbone's features


@pytest.fixture(scope="module")
def embeddings(sets):
    """The mean features of the levels at 1/8 and 1/16, side by side: {kind: (train, test)}."""
    import torch

    backbone = create_backbone("tf_efficientnet_lite0", ["blocks.2", "blocks.4"], size=(SIZE, SIZE))
    preprocess = Preprocessing((SIZE, SIZE), tuple(backbone.mean), tuple(backbone.std))

    def embed(samples):
        inputs = np.stack([preprocess(pixels) for pixels in read(samples)])
        images = torch.from_numpy(preprocess.normalised(inputs))
        with torch.inference_mode():
            return torch.cat([level.mean((2, 3)) for level in backbone(images)], 1).numpy()

    return {kind: (embed(found.train[:10]), embed(found.test)) for kind, found in sets.items()}


def test_another_part_is_told_by_its_embedding(sets, embeddings):
    for kind in KINDS:
        statistics = [capture_statistics(pixels) for pixels in read(sets[kind].train[:10])]
        learnt = CaptureLimits.learn(statistics, embeddings[kind][0])
        for other in KINDS:
            reasons = [learnt.reason(statistics[0], embedding) for embedding in embeddings[other][1]]
            if other == kind:
                assert reasons == [None] * len(reasons)
            else:
                assert all(reason.startswith("another part: distance") for reason in reasons)


def test_distance_of_good_images_leaves_each_out_of_the_mean():
    rng = np.random.default_rng(0)
    vectors = rng.normal(1, 0.3, (12, 6))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    apart = [np.linalg.norm(unit[i] - np.delete(unit, i, 0).mean(0)) for i in range(12)]
    learnt = CaptureLimits.learn(np.full((12, len(STATISTICS)), 0.5), vectors * rng.uniform(0.1, 9, (12, 1)))
    assert learnt.good_distance == pytest.approx(max(apart))
    assert learnt.distance == pytest.approx(max(0.75, 1.35 * max(apart)))


# As JSON


def test_json_round_trip(limits):
    rng = np.random.default_rng(0)
    learnt = CaptureLimits.learn(rng.uniform(0, 1, (9, len(STATISTICS))), rng.normal(0, 1, (9, 5)))
    for one in (learnt, limits["screws"]):
        text = json.dumps(one.to_json(), sort_keys=True, allow_nan=False)
        again = CaptureLimits.from_json(json.loads(text))
        assert again == one
        assert json.dumps(again.to_json(), sort_keys=True) == text


@pytest.mark.parametrize(
    "change",
    [
        {"low": [0.0] * 3},
        {"low": "wide"},
        {"high": [0.0] * (len(STATISTICS) - 1) + [float("nan")]},
        {"good_low": [True] * len(STATISTICS)},
        {"centre": [None]},
        {"distance": "far"},
        {"good_distance": float("inf")},
        {"more": 1},
    ],
)
def test_json_that_does_not_fit_is_refused(limits, change):
    with pytest.raises(FlawmapError, match=r"^capture limits: .*train the model anew$"):
        CaptureLimits.from_json(limits["screws"].to_json() | change)


@pytest.mark.parametrize("settings", [None, [], {}, {"low": []}])
def test_json_of_another_shape_is_refused(settings):
    with pytest.raises(FlawmapError, match="train the model anew"):
        CaptureLimits.from_json(settings)


def test_what_cannot_be_learnt_from():
    with pytest.raises(ValueError, match="shape"):
        CaptureLimits.learn(np.zeros((0, len(STATISTICS))))
    with pytest.raises(FlawmapError, match="not finite"):
        CaptureLimits.learn(np.full((3, len(STATISTICS)), np.nan))
    with pytest.raises(ValueError, match="embeddings"):
        CaptureLimits.learn(np.ones((3, len(STATISTICS))), np.ones((2, 4)))


# Photographs


@pytest.mark.parametrize(("name", "every"), [("cookie", 1), ("mtd", 6)])
def test_photographs(name, every):
    if not (SHARED / name).is_dir():
        pytest.skip(f"the {name} images are not here")
    found = find_dataset(SHARED / name)
    learnt = CaptureLimits.learn([capture_statistics(pixels) for pixels in read(found.train[::every])])
    rng = np.random.default_rng(0)
    caught = []
    for i, pixels in enumerate(read(found.test[::every])):
        assert learnt.reason(capture_statistics(pixels)) is None
        assert learnt.reason(capture_statistics(np.zeros_like(pixels))) is not None
        if i % 4 == 0:
            failed = failures(pixels, rng).values()
            caught.append([learnt.reason(capture_statistics(pixels)) is not None for pixels in failed])
    # Four times a dim tile is a bright tile. Tiles are smooth: blurred or missing, they are left to the embedding.
    least = {"cookie": [1, 1, 1, 1], "mtd": [1, 0.9, 0, 0]}[name]
    assert (np.mean(caught, axis=0) >= least).all()
