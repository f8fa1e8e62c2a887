"""`flawmap train --tune`: settings that need a new fit, chosen on synthetic defects in good images held out for it."""

import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from flawmap import Detector, FlawmapError, find_dataset
from flawmap.imaging.geometry import Geometry
from flawmap.imaging.image_files import digest
from flawmap.imaging.preparation import Preparation
from flawmap.imaging.preprocessing import Preprocessing
from flawmap.synthesis import DEFAULTS, synthesize
from flawmap.tuning import candidates, synthetic
from flawmap.tuning.criterion import Compared, Criterion
from flawmap.tuning.oracle import OracleGrid
from flawmap.tuning.outcome import Tuning, in_words
from flawmap.tuning.refitting import tune_fit
from flawmap.tuning.sweep import Batch
from flawmap.tuning.synthetic import synthetic_images

SMALL = {"image_size": 64, "engine": "torch", "deep_levels": (), "min_vectors": 40}


@pytest.fixture(scope="module")
def good(drawn):
    return sorted((drawn / "train" / "good").iterdir())


def preparation(side, geometry=None, region=None):
    mean = std = (0.5, 0.5, 0.5)
    return Preparation(Preprocessing((side, side), mean, std), (side, side), geometry or Geometry(), region)


# The criterion


def batch(image, score, values, mask, inside=None):
    size = values.shape
    mask = np.zeros(size, bool) if mask is None else mask
    return Batch([image], values[None], np.array([score], np.float32), [mask], None if inside is None else inside[None])


def test_the_criterion_is_the_auroc_and_the_area_under_the_mean_overlap():
    rng = np.random.default_rng(0)
    labels = [False] * 30 + [True] * 20
    scores = rng.normal(size=50) + np.array(labels)
    criterion, good_pixels, expected = Criterion(), [], []
    for i, defective in enumerate(labels):
        values = rng.normal(size=(16, 16)).astype(np.float32)
        mask = np.zeros((16, 16), bool)
        if defective:
            mask[4:8, 4:8] = True
            values[mask] += 2
        else:
            good_pixels.append(values.ravel()[::4])
        criterion.update(batch(i, scores[i], values, mask), labels[: i + 1])
        if defective:
            expected.append(values[mask])
    values, seen = criterion.values(labels)
    assert seen.tolist() == labels
    # Each threshold's recall over the defect's pixels, against the share of good pixels above it, up to 0.3.
    pixels = np.concatenate(good_pixels)
    thresholds = np.quantile(pixels, 1 - np.linspace(0, 0.3, 3001))
    areas = [np.trapezoid([(of >= t).mean() for t in thresholds], dx=1 / 3000) for of in expected]
    pixel_half = 2 * values[30:].mean() - roc_auc_score(labels, scores)
    assert pixel_half == pytest.approx(np.mean(areas), abs=2e-3)


def test_the_criterion_does_not_depend_on_the_resolution_or_the_scale():
    rng = np.random.default_rng(1)
    labels, fine, coarse = [False, False, True], Criterion(), Criterion()
    for i, defective in enumerate(labels):
        values = rng.normal(size=(16, 16)).astype(np.float32)
        mask = np.zeros((16, 16), bool)
        mask[2:5, 2:9] = defective
        coarse.update(batch(i, i, values, mask), labels)
        twice = np.kron(values, np.ones((4, 1), np.float32))  # every fourth pixel of a row counts, four rows for one
        fine.update(batch(i, i * 100, np.exp(twice), np.kron(mask, np.ones((4, 1))) > 0), labels)
    np.testing.assert_allclose(fine.values(labels)[0], coarse.values(labels)[0])


def test_what_no_pixel_shows_is_told_and_what_is_outside_does_not_count():
    labels, criterion = [False, True, True], Criterion()
    inside = np.zeros((8, 8), bool)
    inside[:, :4] = True
    here, there = np.zeros((8, 8), bool), np.zeros((8, 8), bool)
    here[0, 0] = there[0, 7] = True
    high = np.where(here | there, 9, np.arange(64).reshape(8, 8) / 64).astype(np.float32)
    for i, mask in enumerate((None, here, there)):
        criterion.update(batch(i, i, high if i else high * 0, mask, inside), labels)
    values, seen = criterion.values(labels)
    assert seen.tolist() == [False, True, False]
    assert values[1:].tolist() == [1.0, 0.5]  # both score above the good image; the pixels of one lie outside
    image_only = Criterion(localises=False)
    for i, mask in enumerate((None, here, there)):
        image_only.update(batch(i, i, high, mask, inside), labels)
    assert image_only.values(labels)[0][1:].tolist() == [1.0, 1.0]


def test_the_choice_its_interval_and_what_it_keeps_of_the_oracle():
    rng = np.random.default_rng(2)
    labels = [False, True, True] * 12
    noise = rng.normal(0, 0.01, size=36)
    values = np.stack([0.5 + noise, 0.6 + noise, 0.6 + noise[::-1]])
    seen = np.tile(labels, (3, 1))
    seen[:, 1] = False  # a defect that no setting shows
    points = [{"pool": 1}, {"pool": 3}, {"pool": 5}]
    figures = [
        {"image_auroc": a, "pixel_auroc": 0.9, "pixel_ap": np.nan, "aupro": b}
        for a, b in ((0.6, 0.8), (0.7, 0.7), (0.8, 0.6))
    ]
    tuning = Compared(points, values, seen, labels).tuning(points[0], 0, OracleGrid(points, figures))
    assert (tuning.images, tuning.defects, tuning.before) == (12, 23, {"pool": 1})
    counted = np.array(labels) & (np.arange(36) != 1)
    np.testing.assert_allclose(tuning.values, values[:, counted].mean(1))
    best = tuning.points.index(tuning.chosen)
    assert best in (1, 2)
    assert tuning.interval[0] <= tuning.values[best] - tuning.values[0] <= tuning.interval[1]
    assert tuning.interval[0] > 0.09
    assert 0.3 < tuning.confidence < 1
    assert tuning.kept("image_auroc") == pytest.approx(0.5 if best == 1 else 1)
    assert tuning.kept("aupro") is None  # the oracle would have left what was set
    assert tuning.kept("pixel_ap") is None
    text = tuning.describe()
    assert "nothing to gain" in text
    assert "pixel ap" not in text
    exact = Compared(points[:2], values[:2], seen[:2], labels).tuning(points[0], 0)
    assert exact.interval == pytest.approx((0.1, 0.1))
    assert exact.confidence == 1
    assert exact.kept("image_auroc") is None


def test_points_are_written_as_on_the_command_line():
    point = {"levels": ("a", "b"), "deep_levels": None, "image_size": (64, 64), "alpha": 0.5, "pool": 3}
    assert in_words(point) == "levels=a+b, deep_levels=auto, image_size=64, alpha=0.5, pool=3"
    assert in_words({"image_size": (64, 96)}) == "image_size=64x96"


def test_defects_are_the_same_at_every_size(good):
    small, large = (list(synthetic_images(good[:3], preparation(side), 7)) for side in (32, 96))
    assert len(small) == len(large) > 10
    for one, other in zip(small, large, strict=True):
        np.testing.assert_array_equal(one.pixels, other.pixels)
        assert one.defective == other.defective
        if one.defective:
            np.testing.assert_array_equal(one.mask, other.mask)
            assert one.mask.shape == one.pixels.shape[:2]


def test_defects_lie_where_images_are_scored(good):
    region = np.zeros((128, 128), bool)
    region[:, :64] = True
    made = [image for image in synthetic_images(good[:3], preparation(64, region=region), 0) if image.defective]
    assert made
    assert all(not image.mask[:, 64:].any() for image in made)


def test_defects_are_of_other_kinds_than_those_trained_on(good, monkeypatch):
    drawn = []

    def synthesized(*arguments, settings, **others):
        drawn.append(settings)
        return synthesize(*arguments, settings=settings, **others)

    monkeypatch.setattr(synthetic, "synthesize", synthesized)
    list(synthetic_images(good[:2], preparation(64), 0, frozenset({"texture", "scar"})))
    assert set(drawn[0].kinds) == {"image", "rearranged", "cutpaste"}
    assert drawn == [replace(DEFAULTS, kinds=drawn[0].kinds)] * 8


def test_what_may_be_no_gain_at_all_changes_nothing():
    """A lead of 0.005 whose interval holds 0 has cost 0.07 of image AUROC."""
    points = [{"alpha": 0.1}, {"alpha": 0.2}]
    given = {"confidence": 0.2, "images": 8, "defects": 30, "before": points[0]}
    unsure = Tuning(points, np.array([0.60, 0.605]), (-0.001, 0.017), **given)
    assert (unsure.best, unsure.chosen) == (points[1], points[0])
    assert "the settings stay at alpha=0.1: the lead may be nothing, its interval holds 0" in unsure.describe()
    sure = Tuning(points, np.array([0.60, 0.65]), (0.01, 0.09), **given)
    assert sure.chosen == points[1]
    assert "chosen alpha=0.2" in sure.describe()
    same = Tuning(points, np.array([0.65, 0.60]), (0.0, 0.0), **given)
    assert same.chosen == points[0]
    assert "nothing that was tried is better" in same.describe()


# Fitting


@pytest.fixture(scope="module")
def tuned(drawn):
    grid = {"levels": [("blocks.1",), ("blocks.2", "blocks.4")], "image_size": [64]}
    return tune_fit(drawn, grid, levels="blocks.1", oracle=True, seed=1, **SMALL)


def test_what_was_held_out_neither_fits_nor_calibrates(tuned, good):
    detector, tuning = tuned
    assert (tuning.images, len(tuning.points)) == (4, 2)  # as set is one of the grid's
    assert tuning.before == tuning.points[0] == {"levels": ("blocks.1",), "image_size": (64, 64)}
    assert detector.training_["images"] == len(detector.calibration_.scores) == len(good) - 4
    assert detector.calibration_.mode == "loo"
    assert detector.training_["tuned"] == {
        "levels": list(tuning.chosen["levels"]),
        "image_size": [64, 64],
        "images": 4,
        "seed": 1,
    }


def test_the_chosen_detector_is_one_fitted_so(tuned, good):
    detector, tuning = tuned
    assert detector.config.levels == tuning.chosen["levels"]
    fitted = set(detector.training_["fitted"])
    others = [path for path in good if digest(path)[:16] in fitted]
    assert len(others) == 8
    again = Detector(**SMALL, levels=tuning.chosen["levels"], seed=1).fit(others)
    np.testing.assert_array_equal(again.calibration_.scores, detector.calibration_.scores)


def test_the_oracle_is_an_evaluation_of_the_candidate(tuned, good, drawn):
    detector, tuning = tuned
    assert tuning.oracle.points == tuning.points
    others = [path for path in good if digest(path)[:16] in set(detector.training_["fitted"])]
    candidate = Detector(**SMALL, levels="blocks.1", seed=1, calibration="holdout").fit(others)
    figures = candidate.evaluate(drawn).figures
    for name in ("image_auroc", "pixel_auroc", "pixel_ap", "aupro"):
        assert tuning.oracle.figures[0][name] == pytest.approx(figures[name], abs=2e-3)


def test_copies_stand_on_one_side_and_large_grids_are_drawn_from(good, tmp_path, monkeypatch, caplog):
    for path in good:
        shutil.copy(path, tmp_path / f"{path.stem}-copy.png")
        Image.open(path).save(tmp_path / f"{path.stem}-again.jpg", quality=95)
    monkeypatch.setattr(candidates, "MOST_CANDIDATES", 2)
    detector, tuning = tune_fit([*good, *sorted(tmp_path.iterdir())], {"pool": ["1", "3", "5"]}, **SMALL)
    assert tuning.images == 4
    assert len(tuning.points) == 2
    assert tuning.before == {"pool": 3}
    assert "2 of 3 combinations" in caplog.text
    assert len(detector.training_["fitted"]) == 24  # of 12 contents with three files each, four are held out
    assert len(set(detector.training_["fitted"])) == 16


def test_images_of_a_calibration_folder_are_not_held_out(good, tmp_path):
    for path in good[:3]:
        Image.open(path).save(tmp_path / f"{path.stem}.bmp")
    detector, tuning = tune_fit(good, {"pool": [1]}, calibration=tmp_path, **SMALL)
    assert detector.calibration_.mode == "folder"
    assert {digest(path)[:16] for path in good[:3]} <= set(detector.training_["fitted"])
    assert tuning.images == 4


def test_live_settings_are_searched_within_each_candidate(drawn):
    settings = {"epochs": 0, "views": 1, "steps": 1, "components": 16, "max_vectors": 40, "engine": "torch"}
    options = {"method": "f2r", "image_size": 64, "calibration": "crossfit", "beta": 1, **settings}
    grid = {"stride": [8, 16], "alpha": [0.0, 1.0]}
    detector, tuning = tune_fit(drawn, grid, oracle=True, **options)
    assert tuning.points == [
        {"stride": stride, "alpha": alpha, "beta": 1.0} for stride in (8, 16) for alpha in (1.0, 0.0)
    ]
    assert tuning.before == tuning.points[0]
    assert {name: getattr(detector.config, name) for name in tuning.chosen} == tuning.chosen
    assert detector.calibration_.mode == "crossfit"  # where they could not be moved
    assert len(tuning.oracle.figures) == 4


def test_methods_without_a_map(drawn):
    options = {"method": "differnet", "image_size": 64, "engine": "torch", "epochs": 0, "rotations": 1}
    _, tuning = tune_fit(drawn, {"scales": [1, 2]}, oracle=True, scales=1, **options)
    assert np.isnan(tuning.oracle.figures[1]["aupro"])
    assert 0 <= tuning.values.min() <= tuning.values.max() <= 1


# The command line


def test_train_tune(drawn, tmp_path, flawmap):
    model = tmp_path / "m.safetensors"
    arguments = ("train", drawn, "-o", model, "--image-size", 64, "--engine", "torch", "--set", "min_vectors=40")
    grid = ("--grid", "levels=blocks.1+blocks.2", "--grid", "deep_levels=blocks.4,")
    code, out, err = flawmap(*arguments, "--tune", "--oracle", *grid)
    assert code == 0, err
    assert "candidate 3 of 3" in err
    assert re.search(r"on 1\d synthetic defects in 4 good images: .* best in \d+% of bootstrap resamples", out)
    assert "levels=blocks.1+blocks.2, deep_levels=blocks.4" in out
    assert "oracle, what the settings tried reach on the test labels" in out
    detector = Detector.load(model, engine="torch")
    chosen = detector.training_["tuned"]
    assert chosen["levels"] in (None, ["blocks.1", "blocks.2"])
    assert detector.config.levels == tuple(chosen["levels"] or ("blocks.1", "blocks.2", "blocks.4"))
    assert not model.with_name("m.safetensors.training").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--grid", "pool=1,3"], "chooses nothing without --tune"),
        (["--oracle"], "chooses nothing without --tune"),
        (["--tune", "--grid", "pool"], "'pool' is not key=a,b,c"),
        (["--tune", "--grid", "depth=1,3"], "no such setting of gaussbank; choose image_size, level"),
        (["--tune", "--grid", "pool=a,b"], "pool=a is not valid"),
        (["--tune", "--grid", "image_size=small"], "give whole numbers"),
        (["--tune", "--grid", "image_size=16,64"], "too small"),
        (["--tune", "--grid", "pool=3"], "nothing to choose between"),
        (["--tune", "--grid", "levels=blocks.2,blocks.77"], "levels=blocks.77 cannot be tried: backbone"),
        (["--tune", "--grid", "levels=layer1+layer2"], "has no level layer1, layer2"),
        (["--tune", "--update", "m.safetensors"], "leave --image-size and --tune out"),
        (["--tune", "--shots", "6", "--grid", "pool=1"], "6 different good images found"),
    ],
)
def test_what_cannot_be_tuned_is_told_before_anything_is_trained(drawn, tmp_path, flawmap, arguments, told):
    model = tmp_path / "m.safetensors"
    code, _, err = flawmap("train", drawn, "-o", model, "--image-size", 64, "--engine", "torch", *arguments)
    assert code == 2
    assert told in err.splitlines()[-1]
    assert "candidate 1" not in err
    assert not list(tmp_path.iterdir())


def test_sizes_that_a_backbone_refuses(drawn):
    options = {"backbone": "vit_tiny_patch16_224", "weights": "random", "levels": "blocks.5", "image_size": 64}
    with pytest.raises(FlawmapError, match=r"image_size=72 cannot be tried: .* patches of 16 pixels"):
        tune_fit(drawn, {"image_size": [72]}, deep_levels=(), **options)


def test_an_interrupted_training_is_told_before_the_search(drawn, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(FlawmapError, match="go on with --resume"):
        tune_fit(drawn, {"pool": [1]}, workspace=tmp_path, **SMALL)


def test_an_oracle_needs_labels(drawn, good):
    with pytest.raises(FlawmapError, match="not a list"):
        tune_fit(good, {"pool": [1]}, oracle=True, **SMALL)
    dataset = find_dataset(drawn)
    unlabelled = replace(dataset, samples=tuple(sample for sample in dataset.samples if sample.split == "train"))
    with pytest.raises(FlawmapError, match="no labelled test images"):
        tune_fit(unlabelled, {"pool": [1]}, oracle=True, **SMALL)
