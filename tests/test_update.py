import shutil

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from flawmap import Detector, FlawmapError
from flawmap.datasets.drawn import draw_dataset
from flawmap.imaging.geometry import Geometry

SHALLOW = {"levels": ("blocks.1",), "min_vectors": 100}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """30 good fabrics to learn, in two halves, and some more of them with defects."""
    root = tmp_path_factory.mktemp("parts") / "fabric"
    draw_dataset(root, "fabric", 3, train=30, good=6, per_defect=2, size=64)
    return root


@pytest.fixture(scope="module")
def halves(parts):
    paths = sorted((parts / "train" / "good").iterdir())
    return paths[:15], paths[15:]


def padim(**settings):
    return Detector("padim", image_size=64, engine="torch", **{"channels": 8, **settings})


def patchcore(**settings):
    return Detector("patchcore", image_size=64, engine="torch", **{**SHALLOW, **settings})


def pictures(parts):
    return sorted((parts / "test").rglob("*.png"))


def scores(detector, paths):
    return np.array([detector.predict(path).score for path in paths])


def covariances(method):
    """(P, C, C) or (P, C), without epsilon, from the whitening that the method keeps."""
    if method.config.covariance == "diagonal":
        return method.gaussians.whiten.double() ** -2 - method.config.epsilon
    upper = torch.nn.functional.pad(
        method.gaussians.whiten_upper, (0, method.gaussians.width - method.gaussians.whiten_upper.shape[2])
    )
    factor = torch.linalg.inv(torch.cat([upper, method.gaussians.whiten_lower], 1).double())
    return factor @ factor.transpose(1, 2) - method.config.epsilon * torch.eye(method.gaussians.width)


@pytest.mark.parametrize("reduction", ["random", "orthogonal"])
@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_padim_updated_is_padim_fitted_on_all(parts, halves, covariance, reduction):
    settings = {"covariance": covariance, "reduction": reduction}
    updated = padim(**settings).fit(halves[0]).update(halves[1])
    together = padim(**settings).fit([*halves[0], *halves[1]])
    one, other = updated.method_, together.method_
    assert torch.equal(one.gaussians.reduce, other.gaussians.reduce)
    assert torch.equal(one.gaussians.images, other.gaussians.images)
    assert one.gaussians.images.unique().tolist() == [30]
    torch.testing.assert_close(one.gaussians.mean, other.gaussians.mean, rtol=1e-4, atol=1e-5)
    expected = covariances(other)
    torch.testing.assert_close(covariances(one), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    np.testing.assert_allclose(scores(updated, pictures(parts)), scores(together, pictures(parts)), rtol=1e-3)


def test_padim_updated_one_by_one_from_a_file(parts, halves, tmp_path):
    detector = padim().fit(halves[0])
    for path in halves[1][:3]:
        detector.save(tmp_path / "m")
        detector = Detector.load(tmp_path / "m", engine="torch").update([path])
    together = padim().fit([*halves[0], *halves[1][:3]])
    assert detector.training_["images"] == 18
    np.testing.assert_allclose(scores(detector, pictures(parts)), scores(together, pictures(parts)), rtol=1e-3)


def test_padim_with_a_region_of_interest_counts_each_position(halves):
    roi = np.zeros((64, 64), bool)
    roi[:, 20:] = True
    updated = padim(roi=roi).fit(halves[0]).update(halves[1])
    together = padim(roi=roi).fit([*halves[0], *halves[1]])
    assert torch.equal(updated.method_.gaussians.images, together.method_.gaussians.images)
    assert updated.method_.gaussians.images.unique().tolist() == [0, 30]
    seen = updated.method_.gaussians.images > 0
    torch.testing.assert_close(
        updated.method_.gaussians.mean[seen], together.method_.gaussians.mean[seen], rtol=1e-4, atol=1e-5
    )
    expected = covariances(together.method_)[seen]
    found = covariances(updated.method_)[seen]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.fixture(scope="module")
def unlike(parts, tmp_path_factory):
    """Parts of another kind, so that little of them is known."""
    root = tmp_path_factory.mktemp("unlike") / "screws"
    draw_dataset(root, "screws", 11, train=5, good=0, per_defect=0, size=64)
    return sorted((root / "train" / "good").iterdir())


def test_patchcore_learns_what_it_is_shown(parts, halves, unlike):
    detector = patchcore(coreset=0.05).fit(halves[0])
    features = detector.method_.features
    inputs = torch.stack([torch.from_numpy(image) for image in map(prepared(detector), unlike)])
    before = detector.method_(inputs)[1]
    assert features(inputs)[0].shape == (5, 24, 16, 16)
    kept = scores(detector, pictures(parts))
    detector.update(unlike)
    after = detector.method_(inputs)[1]
    assert (after < 0.5 * before).all(), (before, after)
    # The bank's vectors now cover both, so that what was known lies a little farther from them.
    assert (scores(detector, pictures(parts)) < 1.3 * kept).all()


def prepared(detector):
    from PIL import Image

    preprocessing = detector.preparation_.preprocessing
    return lambda path: preprocessing.normalised(preprocessing(np.asarray(Image.open(path))))


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"coreset": 0.1, "min_vectors": 10, "components": 12}, lambda patches: round(0.1 * patches)),
        ({"coreset": 0.01, "min_vectors": 100}, lambda patches: 100),
        ({"coreset": 0.5, "min_vectors": 10, "max_vectors": 300}, lambda patches: 300),
    ],
)
def test_patchcores_bank_keeps_its_size(halves, settings, rule):
    detector = patchcore(**settings).fit(halves[0])
    method = detector.method_
    assert len(method.bank.index) == rule(15 * 64)
    fixed = [name for name in method.bank.state_dict() if name == "unit" or name.startswith("patches.")]
    assert ("patches.axes" in fixed) == ("components" in settings)
    before = {name: method.bank.state_dict()[name].clone() for name in fixed}
    detector.update(halves[1])
    assert int(method.bank.seen) == 30 * 64
    assert len(method.bank.index) == rule(30 * 64)
    for name, value in before.items():
        assert torch.equal(method.bank.state_dict()[name], value)


@pytest.mark.parametrize("make", [padim, patchcore])
def test_calibration_grows_by_what_is_new(parts, halves, make, tmp_path):
    detector = make(calibration="holdout", max_false_reject=0.1).fit(halves[0])
    assert detector.threshold_.guarantee == "marginal"
    before = detector.calibration_
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    for path in halves[1]:
        shutil.copy(path, fresh)
    shutil.copy(halves[1][0], fresh / "twin.png")
    new = scores(detector, halves[1])
    peaks = [detector.predict(path).maps.max() for path in halves[1]]
    digest = detector.training_["digest"]
    detector.update(fresh)
    after = detector.calibration_
    assert len(after.scores) == len(after.peaks) == len(before.scores) + 15
    np.testing.assert_array_equal(after.scores[: len(before.scores)], before.scores)
    np.testing.assert_allclose(np.sort(after.scores[len(before.scores) :]), np.sort(new), rtol=1e-4)
    np.testing.assert_allclose(np.sort(after.peaks[len(before.scores) :]), np.sort(peaks), rtol=1e-4)
    assert after.mode == "crossfit"
    assert detector.threshold_.guarantee == "estimate"
    assert detector.threshold_.value == after.threshold(0.1).value
    assert detector.training_["images"] == 12 + 15
    assert detector.training_["digest"] != digest
    detector.save(tmp_path / "m")
    loaded = Detector.load(tmp_path / "m", engine="torch")
    np.testing.assert_array_equal(loaded.calibration_.scores, after.scores)
    assert (loaded.threshold_, loaded.training_) == (detector.threshold_, detector.training_)
    np.testing.assert_array_equal(scores(loaded, pictures(parts)), scores(detector, pictures(parts)))


@pytest.mark.parametrize("make", [padim, patchcore])
def test_updating_with_images_already_known_changes_little(parts, halves, make):
    detector = make(coreset=0.2).fit(halves[0]) if make is patchcore else make().fit(halves[0])
    before = scores(detector, pictures(parts))
    after = scores(detector.update(halves[0]), pictures(parts))
    # PaDiM's unbiased covariance of every image twice is (2n - 2) / (2n - 1) times what it was.
    np.testing.assert_allclose(after, before, rtol=0.05 if make is padim else 0.15)
    if make is padim:
        assert spearmanr(after, before).statistic > 0.95
    else:  # the bank covers the same patches with as many vectors again
        assert (after <= before * (1 + 1e-5)).all()


def test_tiles_are_learnt_later_too(parts, halves):
    geometry = Geometry.tile(48, 16)
    detector = padim(geometry=geometry).fit(halves[0]).update(halves[1])
    together = padim(geometry=geometry).fit([*halves[0], *halves[1]])
    assert detector.method_.gaussians.images.unique().tolist() == [30 * 4]
    np.testing.assert_allclose(scores(detector, pictures(parts)), scores(together, pictures(parts)), rtol=1e-3)


def test_what_cannot_be_updated_says_so(halves, tmp_path):
    cfa = Detector("cfa", image_size=64, engine="torch", epochs=0, levels=("blocks.2",)).fit(halves[0])
    before = {name: value.clone() for name, value in cfa.method_.state_dict().items()}
    with pytest.raises(FlawmapError, match="cfa cannot learn images later") as caught:
        cfa.update(halves[1])
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[name], value) for name, value in cfa.method_.state_dict().items())
    detector = padim().fit(halves[0])
    with pytest.raises(FlawmapError, match="not fitted"):
        padim().update(halves[1])
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    with pytest.raises(FlawmapError, match=r"none of what is there can be read \(1 image\)"):
        detector.update([broken])
    with pytest.raises(FlawmapError, match=r"broken\.png"):
        detector.update([broken, *halves[1]], strict=True)
    assert detector.training_["images"] == 15
    detector.update([broken, *halves[1]])
    assert detector.training_["images"] == 30
    assert [str(error).startswith(str(broken)) for error in detector.left_out_] == [True]


def test_the_command_line_updates(flawmap, parts, halves, tmp_path):
    model, updated, fresh = tmp_path / "m.safetensors", tmp_path / "n.safetensors", tmp_path / "fresh"
    detector = padim(seed=4, max_false_reject=0.2).fit(halves[0])
    detector.save(model)
    before = model.read_bytes()
    fresh.mkdir()
    for path in halves[1]:
        shutil.copy(path, fresh)
    code, out, err = flawmap("train", "--update", model, fresh, "-o", updated, "--engine", "torch")
    assert code == 0, err
    assert f"wrote {updated}" in out
    assert "an estimate, which promises nothing" in out
    assert (tmp_path / "n.html").read_text().startswith("<!doctype html>")
    assert model.read_bytes() == before
    loaded = Detector.load(updated, engine="torch")
    assert (loaded.seed, loaded.max_false_reject, loaded.training_["images"]) == (4, 0.2, 30)
    detector.update(halves[1]).save(tmp_path / "same")
    assert (tmp_path / "same").read_bytes() == updated.read_bytes()
    code, _, err = flawmap("train", "--update", model, fresh, "-o", model, "--engine", "torch")  # in its place
    assert code == 0, err
    assert model.read_bytes() == updated.read_bytes()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--method", "padim"), "--method"),
        (("--seed", 0), "--seed"),
        (("--set", "channels=3", "--image-size", 96), "--set|--settings"),
        (("--drop-atypical", 1), "--drop-atypical"),
        (("--resume",), "--resume"),
    ],
)
def test_settings_beside_update_are_refused(flawmap, model_file, halves, tmp_path, options, named):
    output = tmp_path / "n.safetensors"
    code, _, err = flawmap("train", "--update", model_file, halves[0][0].parent, "-o", output, *options)
    assert code == 2
    assert any(name in err.splitlines()[-1] for name in named.split("|"))
    assert "keeps the model's settings" in err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
