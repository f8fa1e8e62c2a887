import shutil

import numpy as np
import pytest
from PIL import Image

from flawmap import Detector, FlawmapError, ImageError
from flawmap.datasets.drawn import draw_dataset


def small(**settings):
    return Detector("padim", image_size=64, engine="torch", channels=8, **settings)


def test_modes_of_calibration(drawn):
    good = drawn / "train" / "good"
    crossfit = small(calibration="crossfit").fit(drawn)
    assert (crossfit.calibration_.mode, crossfit.training_["images"]) == ("crossfit", 12)
    assert len(crossfit.calibration_.scores) == 12
    assert crossfit.threshold_.guarantee == "estimate"
    holdout = small(calibration="holdout").fit(drawn)
    assert (holdout.calibration_.mode, holdout.training_["images"]) == ("holdout", 9)
    assert len(holdout.calibration_.scores) == 3
    assert holdout.threshold_.guarantee == "marginal"
    further = drawn / "test" / "good"
    apart = small(calibration=further).fit(good)
    assert (apart.calibration_.mode, apart.training_["images"]) == ("folder", 12)
    assert len(apart.calibration_.scores) == 4
    again = [inspection.score for inspection in apart.predict(further)]
    np.testing.assert_allclose(sorted(apart.calibration_.scores), sorted(again), rtol=1e-5)
    peaks = [inspection.maps.max() for inspection in apart.predict(further)]
    np.testing.assert_allclose(sorted(apart.calibration_.peaks), sorted(peaks), rtol=1e-5)


@pytest.mark.parametrize("method", ["padim", "patchcore"])
@pytest.mark.parametrize("calibration", ["crossfit", "holdout"])
def test_a_copied_image_counts_once_and_never_stands_on_both_sides(drawn, tmp_path, method, calibration):
    good = tmp_path / "good"
    shutil.copytree(drawn / "train" / "good", good)
    for path in sorted(good.iterdir())[:6]:
        for copy in range(3):
            shutil.copy(path, good / f"copy{copy}-{path.name}")
    detector = Detector(method, image_size=64, engine="torch", calibration=calibration).fit(good)
    assert len(detector.calibration_.scores) == (12 if calibration == "crossfit" else 3)
    # a patch that the bank holds would be at distance zero
    assert detector.calibration_.scores.min() > 0.2 * np.median(detector.calibration_.scores)


def test_images_trained_on_do_not_calibrate(drawn, tmp_path):
    good = drawn / "train" / "good"
    shutil.copytree(drawn / "test" / "good", tmp_path / "further")
    shutil.copy(good / "000.png", tmp_path / "further" / "known.png")
    assert len(small(calibration=tmp_path / "further").fit(good).calibration_.scores) == 4
    with pytest.raises(FlawmapError, match="is also trained on"):
        small(calibration=good).fit(good)


def test_verdict_p_value_and_threshold_agree(detector, drawn):
    scores = detector.calibration_.scores
    for inspection in detector.predict(drawn / "test"):
        reached = (scores >= np.float32(inspection.score)).sum()
        assert inspection.p_value == (1 + reached) / (len(scores) + 1)
        assert (inspection.verdict == "defect") == (inspection.score >= detector.threshold_.value)
        assert (inspection.verdict == "defect") == (inspection.p_value <= 0.1)
        assert inspection.threshold == detector.threshold_.value


def test_another_threshold_leaves_the_detector_as_it_is(detector, drawn):
    before = detector.threshold_
    other = detector.with_threshold(max_false_reject=0.4)
    assert detector.threshold_ is before
    assert other.threshold_.value < before.value
    assert other.threshold_.requested == 0.4
    given = detector.with_threshold(threshold=1.5)
    assert (given.threshold_.value, given.threshold_.guarantee) == (1.5, "none")
    assert given.predict(drawn / "test" / "good" / "000.png").threshold == 1.5
    for wrong in (
        {},
        {"max_false_reject": 0.1, "threshold": 1.0},
        {"max_false_reject": 0.0},
        {"max_false_reject": 1.0},
    ):
        with pytest.raises(FlawmapError):
            detector.with_threshold(**wrong)


def test_arrays_are_inspected_as_files_are(detector, drawn, good_image):
    path = drawn / "test" / "good" / "000.png"
    expected = detector.predict(path)
    found = detector.predict(good_image)
    assert found.path is None
    assert found.score == expected.score
    np.testing.assert_array_equal(found.maps, expected.maps)
    grey = good_image[..., 1]
    assert detector.predict(grey).score == detector.predict(np.repeat(grey[..., None], 3, 2)).score
    mixed = detector.predict([path, good_image])
    # a batch of two may round otherwise than a batch of one
    assert [inspection.score for inspection in mixed] == pytest.approx([expected.score] * 2, rel=1e-5)
    with pytest.raises(ImageError):
        detector.predict(np.zeros((3, 4, 5, 6), np.uint8))


def test_16_bit_parts(drawn, tmp_path):
    good = tmp_path / "good"
    good.mkdir()
    for path in (drawn / "train" / "good").iterdir():
        grey = np.asarray(Image.open(path).convert("L")).astype(np.uint16) * 257
        Image.fromarray(grey).save(good / path.name)
    grey_folder = tmp_path / "grey"
    grey_folder.mkdir()
    for path in (drawn / "train" / "good").iterdir():
        Image.open(path).convert("L").save(grey_folder / path.name)
    detector, usual = small().fit(good), small().fit(grey_folder)
    array = np.asarray(Image.open(good / "000.png"))
    assert array.dtype == np.uint16
    assert detector.predict(array).score == pytest.approx(detector.predict(good / "000.png").score, rel=1e-6)
    eight = np.asarray(Image.open(grey_folder / "000.png"))
    assert detector.preparation_.preprocessing.white == 65535
    deep, shallow = detector.preparation_.preprocessing, usual.preparation_.preprocessing
    assert (deep.deep, shallow.deep) == (True, False)
    step = 1 / 255 / 0.5  # the weights expect a standard deviation of 0.5
    np.testing.assert_allclose(deep.normalised(deep(array)), shallow.normalised(shallow(eight)), atol=step)


def test_a_folder_is_inspected_in_the_order_of_its_names(detector, drawn, tmp_path):
    folder = tmp_path / "mixed"
    shutil.copytree(drawn / "test" / "good", folder)
    (folder / "001.png").write_text("broken")
    found = detector.predict(folder)
    assert [inspection.path.name for inspection in found] == ["000.png", "001.png", "002.png", "003.png"]
    assert found[1].verdict == "error"
    assert found[1].score is found[1].p_value is found[1].maps is None
    assert "001.png" in found[1].error
    alone = detector.predict(folder / "002.png")
    assert found[2].score == pytest.approx(alone.score, rel=1e-5)


@pytest.mark.parametrize("size", [(128, 128), (200, 310)])
def test_a_bright_square_is_found_where_it_lies_on_the_original_pixels(detector, broken_image, size):
    height, width = size
    pixels = np.asarray(Image.fromarray(broken_image).resize((width, height), Image.Resampling.NEAREST))
    found = detector.predict(pixels)
    assert found.verdict == "defect", found.error
    assert found.anomaly_map.shape == found.size == size
    assert found.anomaly_map.dtype == np.float32
    region = found.regions[0]
    left, top, right, bottom = region.box
    square = (60 / 128 * width, 40 / 128 * height, 95 / 128 * width, 70 / 128 * height)
    overlap = max(0, min(right, square[2]) - max(left, square[0])) * max(
        0, min(bottom, square[3]) - max(top, square[1])
    )
    assert overlap > 0.9 * (square[2] - square[0]) * (square[3] - square[1])
    assert region.area == region.mask.sum()
    assert region.peak == found.anomaly_map.max()
    assert region.mask.shape == (bottom - top, right - left)


def test_good_parts_are_rejected_about_as_often_as_promised(tmp_path):
    draw_dataset(tmp_path / "parts", "screws", 5, train=60, good=60, per_defect=0, size=64)
    detector = small(max_false_reject=0.1).fit(tmp_path / "parts")
    verdicts = [inspection.verdict for inspection in detector.predict(tmp_path / "parts" / "test" / "good")]
    assert verdicts.count("defect") <= 15  # 60 at one in ten: more than 15 are seen once in a thousand times


def test_what_is_not_fitted_says_so():
    with pytest.raises(FlawmapError, match="not fitted"):
        small().predict(np.zeros((64, 64), np.uint8))
    with pytest.raises(FlawmapError, match="not fitted"):
        small().save("m.safetensors")


def test_two_images_are_enough(drawn):
    paths = sorted((drawn / "train" / "good").iterdir())[:2]
    for method in ("padim", "patchcore"):
        detector = Detector(method, image_size=64, engine="torch").fit(paths)
        assert np.isfinite(detector.calibration_.scores).all()
        assert detector.training_["images"] == 2
