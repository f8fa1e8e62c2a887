"""Settings that move after training: `with_settings`, `inspect --set`, `flawmap tune`, and the oracle grid."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from flawmap import Detector, FlawmapError, find_dataset
from flawmap.imaging.image_files import digest
from flawmap.tuning.live import tune
from flawmap.tuning.oracle import OracleGrid, grid_points, oracle_grid, oracle_table

SMALL = {
    "image_size": 128,
    "epochs": 2,
    "views": 2,
    "components": 16,
    "steps": 2,
    "max_vectors": 60,
    "alpha": 1,
    "beta": 1,
}


@pytest.fixture(scope="module")
def f2r(drawn):
    return Detector("f2r", **SMALL).fit(drawn)


@pytest.fixture(scope="module")
def f2r_file(f2r, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "f2r.safetensors"
    f2r.save(path)
    return path


@pytest.fixture(scope="module")
def otherwise(drawn):
    """Trained on the same features as `f2r`, with other live settings from the start."""
    return Detector("f2r", **{**SMALL, "alpha": 0.3, "beta": 0.8}).fit(drawn)


def test_maps_follow_the_settings_and_the_first_detector_stays(f2r, drawn):
    image = drawn / "test" / "good" / "000.png"
    before = f2r.predict(image)
    moved = f2r.with_settings(alpha=0.4, beta=1.0)
    found = moved.predict(image)
    assert abs(found.score - before.score) > 1e-3
    assert f2r.predict(image).score == before.score
    assert found.threshold == moved.threshold_.value != before.threshold
    back = moved.with_settings(alpha=1, beta=1).predict(image)
    assert back.score == pytest.approx(before.score, rel=2e-3)
    with torch.inference_mode():
        features = moved.method_.features(torch.zeros(1, 3, 128, 128))
        direct = moved.method_.score(features)[1]
        torch.testing.assert_close(moved.method_.score_latents(moved.method_.latents(features))[1], direct)


@pytest.mark.parametrize("engine", ["torch", "onnxruntime", "openvino"])
def test_a_moved_detector_is_one_trained_so(drawn, f2r_file, otherwise, engine):
    loaded = Detector.load(f2r_file, engine=engine)
    image = drawn / "test" / "good" / "001.png"
    loaded.predict(image)  # the graph is made here, and taken over
    moved = loaded.with_settings(alpha=0.3, beta=0.8)
    assert torch.equal(moved.method_.vectors, otherwise.method_.vectors)
    assert moved.predict(image).score == pytest.approx(otherwise.predict(image).score, rel=1e-4)
    # latents are kept in half precision
    np.testing.assert_allclose(moved.calibration_.scores, otherwise.calibration_.scores, rtol=1e-3)
    assert (moved.inspector().engine._sessions if engine == "onnxruntime" else True) is (
        loaded.inspector().engine._sessions if engine == "onnxruntime" else True
    )


def test_verdicts_wait_for_calibration(f2r, drawn):
    image = drawn / "test" / "good" / "000.png"
    moved = f2r.with_settings(alpha=0.2, calibrate=False)
    found = moved.predict(image)
    assert (found.verdict, found.p_value, found.threshold, found.regions) == (None, None, None, [])
    assert found.maps is not None
    assert moved.heat_scale() is None
    assert moved.calibrate().predict(image).verdict in ("good", "defect")
    at_once = f2r.with_settings(alpha=0.2)
    np.testing.assert_array_equal(moved.calibration_.scores, at_once.calibration_.scores)


def test_a_moved_detector_is_saved_with_what_it_needs_to_move_again(f2r, drawn, tmp_path):
    moved = f2r.with_settings(alpha=0.5, beta=0.1)
    moved.save(tmp_path / "moved.safetensors")
    loaded = Detector.load(tmp_path / "moved.safetensors", engine="torch")
    assert (loaded.config.alpha, loaded.config.beta) == (0.5, 0.1)
    assert loaded.threshold_ == moved.threshold_
    image = drawn / "test" / "good" / "000.png"
    assert loaded.predict(image).score == pytest.approx(moved.predict(image).score, rel=1e-4)
    again = loaded.with_settings(alpha=0.9, beta=0.9)
    np.testing.assert_allclose(
        again.calibration_.scores, f2r.with_settings(alpha=0.9, beta=0.9).calibration_.scores, rtol=1e-3
    )


def test_what_cannot_move_is_told(f2r, detector, drawn, tmp_path):
    with pytest.raises(FlawmapError, match=r"steps of f2r is fixed by training \(only alpha and beta can be moved"):
        f2r.with_settings(steps=3)
    with pytest.raises(FlawmapError, match="alpha=-1 is not valid"):
        f2r.with_settings(alpha=-1)
    with pytest.raises(FlawmapError, match="patchcore has no setting that can be moved"):
        detector.with_settings(alpha=1)
    crossfit = Detector("f2r", calibration="crossfit", **{**SMALL, "epochs": 0, "views": 1}).fit(drawn)
    with pytest.raises(FlawmapError, match="where good images were held out"):
        crossfit.with_settings(alpha=0.5)


def test_inspect_moves_settings(f2r, f2r_file, drawn, flawmap):
    image = drawn / "test" / "good" / "000.png"
    code, out, _ = flawmap("inspect", f2r_file, image, "--format", "jsonl", "--set", "alpha=0.4", "--set", "beta=1.0")
    assert code == 0
    expected = f2r.with_settings(alpha=0.4, beta=1.0).predict(image)
    assert json.loads(out)["score"] == pytest.approx(expected.score, rel=1e-3)
    code, _, err = flawmap("inspect", f2r_file, image, "--set", "hidden=2")
    assert code == 2
    assert "hidden of f2r is fixed by training" in err


def test_tuning_keeps_tuning_and_calibration_apart(f2r, drawn, tmp_path):
    # 12 images: 3 held out are too few to share; a calibration folder of unseen ones is enough.
    with pytest.raises(FlawmapError, match="left to tune on"):
        tune(f2r, drawn, grid={"alpha": [1.0]})
    unseen = sorted((drawn / "test" / "good").iterdir())
    for number, path in enumerate(unseen):  # as many as are enough to leave the calibration whole
        for copy in range(6):
            pixels = np.roll(np.asarray(_read(path)), copy, axis=1)
            _write(tmp_path / f"{number}-{copy}.png", pixels)
    tuned, tuning = tune(f2r, tmp_path, grid={"alpha": [0.0, 0.5, 1.0], "beta": [0.0, 1.0]}, seed=1)
    assert tuning.images == 24
    assert tuning.defects > 60
    assert len(tuning.points) == 6
    assert tuning.before in tuning.points
    assert (tuning.values >= 0).all()
    assert (tuning.values <= 1).all()
    assert tuning.values[tuning.points.index({"alpha": 0.0, "beta": 0.0})] == pytest.approx(0.25)  # a constant map
    assert tuning.values.max() > 0.4
    assert {name: getattr(tuned.config, name) for name in ("alpha", "beta")} == tuning.chosen
    assert len(tuned.calibration_.scores) == len(f2r.calibration_.scores)
    again = tune(f2r, tmp_path, grid={"alpha": [0.0, 0.5, 1.0], "beta": [0.0, 1.0]}, seed=1)[1]
    np.testing.assert_array_equal(again.values, tuning.values)
    assert not {digest(path) for path in tmp_path.glob("*.png")} & set(tuned.latents_.digests)


def test_tuning_tells_the_oracle_where_labels_are_at_hand(f2r, drawn, tmp_path):
    _shifted(drawn, tmp_path, 20)
    test = find_dataset(drawn).test
    dataset = replace(find_dataset(tmp_path), samples=(*find_dataset(tmp_path).train, *test))
    tuning = tune(f2r, dataset, grid={"alpha": [0.0], "beta": [0.0]}, oracle=True)[1]
    assert tuning.points == [{"alpha": 1.0, "beta": 1.0}, {"alpha": 0.0, "beta": 0.0}]
    assert tuning.oracle.figures[1]["pixel_auroc"] == 0.5  # a constant map
    report = f2r.evaluate(drawn)
    assert tuning.oracle.figures[0]["pixel_auroc"] == pytest.approx(report.figures["pixel_auroc"], abs=1e-3)
    assert "oracle, what the settings tried" in tuning.describe()
    with pytest.raises(FlawmapError, match="no labelled test images"):
        tune(f2r, tmp_path, oracle=True)


def _read(path):
    return Image.open(path).convert("RGB")


def _write(path, pixels):
    Image.fromarray(pixels).save(path)


def test_half_of_the_held_out_images_tune_where_no_others_are_there(drawn, tmp_path):
    detector = Detector("f2r", calibration="holdout", **SMALL).fit(
        sorted((drawn / "train" / "good").iterdir()) + _shifted(drawn, tmp_path, 48)
    )
    held_out = set(detector.latents_.digests)
    tuned, tuning = tune(detector, tmp_path, grid={"beta": [0.2, 1.0]})
    kept = set(tuned.latents_.digests)
    assert kept < held_out
    assert len(tuned.calibration_.scores) == len(kept)
    assert tuning.images == len(held_out & {digest(p) for p in tmp_path.glob("*.png")}) // 2
    assert tuned.training_["tuned"]["beta"] == tuned.config.beta


def _shifted(drawn, folder, count):
    paths = []
    for number in range(count):
        source = sorted((drawn / "train" / "good").iterdir())[number % 12]
        pixels = np.roll(np.asarray(_read(source)), 5 + number, axis=number % 2)
        _write(folder / f"{number:02d}.png", pixels)
        paths.append(folder / f"{number:02d}.png")
    return paths


def test_the_oracle_grid_is_the_figures_of_an_evaluation(f2r, drawn, monkeypatch):
    monkeypatch.setattr(type(f2r.method_), "searched", {"alpha": (0.0, 0.5, 1.0), "beta": (0.0, 1.0)})
    found = oracle_grid(f2r, drawn)
    assert found.points == grid_points({"alpha": (0.0, 0.5, 1.0), "beta": (0.0, 1.0)})
    at = found.figures[found.points.index({"alpha": 1.0, "beta": 1.0})]
    report = f2r.evaluate(drawn)
    for figure in ("image_auroc", "pixel_auroc", "aupro"):
        assert at[figure] == pytest.approx(report.figures[figure], abs=0.15)  # its gallery is chosen anew
    assert found.best("pixel_auroc")[1] == max(f["pixel_auroc"] for f in found.figures)
    text = oracle_table(found, {"alpha": 1.0, "beta": 1.0})
    assert text.startswith("oracle")
    assert len(re.findall(r"rho", text)) == 3


def test_correlations_of_a_made_up_grid():
    points = grid_points({"alpha": [i / 10 for i in range(13)], "beta": [i / 10 for i in range(13)]})
    figures = [
        {"image_auroc": 0.5, "pixel_auroc": p["alpha"] - 0.01 * p["beta"], "pixel_ap": 0.5, "aupro": 0.5}
        for p in points
    ]
    alpha, beta, apart = OracleGrid(points, figures).correlations()
    assert alpha.rho > 0.99
    assert beta.rho < -0.9
    assert abs(apart.rho) < 0.2
    assert len(points) == 169


def test_the_command_lines(f2r_file, drawn, tmp_path, flawmap, monkeypatch):
    from flawmap.methods.f2r import F2R

    monkeypatch.setattr(F2R, "searched", {"alpha": (0.5, 1.0), "beta": (0.5, 1.0)})
    code, out, _ = flawmap("evaluate", f2r_file, drawn, "--oracle", "--json", tmp_path / "figures.json")
    assert code == 0
    assert "oracle, settings chosen on the test labels" in out
    assert json.loads((tmp_path / "figures.json").read_text())["oracle_pixel_auroc_alpha"] in (0.5, 1.0)
    _shifted(drawn, tmp_path, 20)
    code, out, err = flawmap(
        "tune", f2r_file, tmp_path, "-o", tmp_path / "m.safetensors", "--grid", "alpha=0.5,1", "--grid", "beta=0.5,1"
    )
    assert code == 0, err
    assert "on " in out
    assert "synthetic defects in 20 good images" in out
    assert Detector.load(tmp_path / "m.safetensors").config.alpha in (0.5, 1.0)
    code, _, err = flawmap("tune", f2r_file, tmp_path, "-o", tmp_path / "m.safetensors", "--grid", "alpha=a,b")
    assert code == 2
    assert "give numbers" in err
