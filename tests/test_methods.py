"""One matrix over the registry, then what each method's paper says, in numbers."""

import copy
import typing
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from scipy.spatial.distance import cdist, mahalanobis

from feature_maps import LEVELS, SIZE, drawn_features, small_trunk
from flawmap import Detector, FlawmapError
from flawmap.backbones.catalogue import DEFAULT_BACKBONE
from flawmap.backbones.tracing import to_onnx
from flawmap.export import export
from flawmap.methods import METHODS, SyntheticDefects, configure, method_class
from flawmap.methods.blocks.smoothing import enlarging_matrix
from flawmap.synthesis import KINDS

# A few values for settings whose annotation does not list them.
_SAMPLES = {bool: ["true", "false"], int: ["3"], float: ["0.5"], str: ["blocks.1"]}

# What makes the methods that train by gradient, and their presets, quick enough to be tried one after the other.
_QUICK = {
    "cainnflow": {"epochs": 4},
    "cflow": {"epochs": 2},
    "cls_cnf": {"epochs": 2, "freeze_epochs": 2, "tune_epochs": 1},
    "differnet": {"epochs": 2, "hidden": 32, "rotations": 4},
    "draem": {"width": 4, "max_steps": 10, "batch_size": 4},
    "f2r": {"epochs": 3, "views": 2, "hidden": 0.5, "max_vectors": 300, "max_candidates": 10_000},
    "pouta": {"width": 4, "head_width": 8, "max_steps": 10, "batch_size": 4},
}


@pytest.fixture(scope="module")
def fitted(drawn):
    made = {}

    def get(name, **settings):
        settings = _QUICK.get(name, {}) | {key: value for key, value in settings.items() if value is not None}
        key = (name, *sorted(settings.items()))
        if key not in made:
            made[key] = Detector(name, image_size=128, engine="torch", **settings).fit(drawn)
        return made[key]

    return get


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).standard_normal((3, 3, 128, 128), dtype=np.float32)


@pytest.mark.parametrize("name", METHODS)
class TestEveryMethod:
    def test_a_glaring_defect_scores_above_every_good_part(self, name, fitted, drawn, broken_image):
        if name in ("draem", "pouta"):
            pytest.skip("learns nothing in so few steps; make soak trains it for longer")
        detector = fitted(name)
        good = [inspection.score for inspection in detector.predict(drawn / "test" / "good")]
        assert np.isfinite(good).all()
        assert np.isfinite(detector.calibration_.scores).all()
        found = detector.predict(broken_image)
        assert found.score > max(*good, *detector.calibration_.scores)
        if detector.method_.localises:
            y, x = np.unravel_index(found.anomaly_map.argmax(), found.anomaly_map.shape)
            assert 36 <= y < 74
            assert 56 <= x < 99

    def test_a_loaded_model_predicts_the_same_to_the_bit(self, name, fitted, drawn, tmp_path):
        detector = fitted(name)
        detector.save(tmp_path / "model.safetensors")
        loaded = Detector.load(tmp_path / "model.safetensors", engine="torch")
        assert loaded.threshold_ == detector.threshold_
        assert loaded.pixel_threshold_ == detector.pixel_threshold_
        assert loaded.method_.config == detector.method_.config
        assert loaded.training_ == detector.training_
        before, after = detector.predict(drawn / "test"), loaded.predict(drawn / "test")
        assert len(before) == 12
        for a, b in zip(before, after, strict=True):
            assert (a.path, a.verdict, a.score, a.p_value) == (b.path, b.verdict, b.score, b.p_value)
            np.testing.assert_array_equal(a.maps, b.maps)

    def test_training_twice_gives_the_same_file(self, name, drawn, fitted, tmp_path):
        fitted(name).save(tmp_path / "a.safetensors")
        Detector(name, image_size=128, engine="torch", **_QUICK.get(name, {})).fit(drawn).save(
            tmp_path / "b.safetensors"
        )
        assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()

    def test_the_whole_method_runs_in_onnxruntime_at_any_batch_size(self, name, fitted, images):
        for preset in (None, *(preset for preset, changed in method_class(name).presets.items() if changed.choices)):
            # neither a preset's weights nor its thresholds are a part of its graph
            detector = fitted(name, preset=preset, backbone=preset and DEFAULT_BACKBONE)
            session = onnxruntime.InferenceSession(
                to_onnx(detector.method_, (128, 128))[0], providers=["CPUExecutionProvider"]
            )
            for batch in (images[:1], images):
                theirs = session.run(None, {"images": batch})
                with torch.inference_mode():
                    ours = detector.method_(torch.from_numpy(batch))
                for a, b in zip(ours, theirs, strict=True):
                    np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-4 * float(a.abs().max()))

    def test_an_exported_file_says_what_the_detector_says(self, name, fitted, drawn, tmp_path):
        detector, file = fitted(name), tmp_path / "model.onnx"
        exported = export(detector, file, check=drawn / "test" / "good")  # held against itself by each engine
        assert [proof.engine for proof in exported.proofs] == ["openvino", "onnxruntime"]
        assert max(proof.score_share for proof in exported.proofs) < 1e-4
        pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 128, 128), dtype=np.uint8)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        names = ["map", "score"] if detector.method_.localises else ["score"]
        for count in (1, 3):
            normalised = detector.preparation_.preprocessing.normalised(pixels[:count])
            with torch.inference_mode():
                ours = detector.method_(torch.from_numpy(normalised))
            for a, b in zip(ours[-len(names) :], session.run(names, {"images": pixels[:count]}), strict=True):
                np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-4 * float(a.abs().max()))

    def test_tuning_leaves_out_the_defects_that_it_trains_on(self, name, fitted):
        method = copy.deepcopy(fitted(name).method_)
        inputs = [stage.inputs for stage in method.stages(8)]
        trained = [set(source.settings.kinds) for source in inputs if isinstance(source, SyntheticDefects)]
        assert bool(trained) == bool(method.trained_on)
        assert set().union(*trained) <= method.trained_on < KINDS.keys()

    def test_an_images_result_does_not_depend_on_its_batch(self, name, fitted, images):
        method = fitted(name).method_
        with torch.inference_mode():
            maps, scores = method(torch.from_numpy(images))
            alone = method(torch.from_numpy(images[1:2]))
        torch.testing.assert_close(maps[1:2], alone[0], rtol=1e-4, atol=1e-4 * float(maps.max()))
        torch.testing.assert_close(scores[1:2], alone[1], rtol=1e-4, atol=0)

    def test_every_setting_can_be_given_as_text(self, name):
        method = method_class(name)
        for key, field in method.Config.model_fields.items():
            annotation = field.annotation
            options = typing.get_args(annotation) or (annotation,)
            if typing.get_origin(annotation) is typing.Literal:
                texts = [(value, value) for value in options]
            elif any(typing.get_origin(option) is tuple for option in options):
                texts = [("blocks.1, blocks.2", ("blocks.1", "blocks.2")), ("none", None)]
            elif Path in options:
                texts = [("textures", Path("textures")), ("none", None)]
            else:
                texts = [
                    (text, annotation(text) if annotation is not bool else text == "true")
                    for text in _SAMPLES[annotation]
                ]
            for text, value in texts:
                assert getattr(configure(method, {key: text}), key) == value, key

    def test_settings_that_do_not_exist_are_refused_in_one_line(self, name):
        method = method_class(name)
        number = next(key for key, field in method.Config.model_fields.items() if field.annotation in (int, float))
        for settings, preset, named in (
            ({"no_such": "1"}, None, "no_such"),
            ({number: "many"}, None, f"{number}=many"),
            ({number: -5}, None, f"{number}=-5"),
            ({}, "no-such-preset", "no-such-preset"),
        ):
            with pytest.raises(FlawmapError) as caught:
                configure(method, settings, preset)
            assert named in str(caught.value)
            assert "\n" not in str(caught.value)


def test_an_unknown_method_is_refused():
    with pytest.raises(FlawmapError, match=r"unknown method nothing.*padim, patchcore"):
        method_class("nothing")


@pytest.mark.parametrize(("source", "target", "sigma"), [(16, 128, 4.0), (10, 77, 2.5), (5, 40, 20.0), (8, 64, 0.0)])
def test_maps_are_enlarged_as_torch_and_scipy_do(source, target, sigma):
    values = np.random.default_rng(1).random((source, source + 3))
    rows, columns = enlarging_matrix(source, target, sigma), enlarging_matrix(source + 3, target + 5, sigma)
    enlarged = F.interpolate(
        torch.from_numpy(values)[None, None], size=(target, target + 5), mode="bilinear", align_corners=False
    )[0, 0].numpy()
    if sigma:
        enlarged = ndimage.gaussian_filter(enlarged, sigma, mode="reflect", truncate=4)
    np.testing.assert_allclose(rows.double().numpy() @ values @ columns.double().numpy().T, enlarged, rtol=2e-6)


# PaDiM and PatchCore on features that are drawn, without images

GRID = (16, 16)


@pytest.fixture(scope="module")
def trunk():
    return small_trunk()


def collect(name, features, trunk, batches=None, seed=0, **settings):
    """Runs the one stage of a method over features, split in `batches`."""
    settings = {"levels": LEVELS, **settings}
    cls = method_class(name)
    method = cls(cls.resolved(configure(cls, settings), trunk.name), trunk, SIZE)
    count = len(features[0])
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        (stage,) = method.stages(count)
        start = 0
        for batch in batches or [count]:
            stage.update([level[start : start + batch].clone() for level in features], None)
            start += batch
        assert start == count
        stage.close(lambda done, total: None)
    return method.eval().requires_grad_(False)


def embedded(features, reduce):
    """(P, N, C) float64: all levels bilinearly on the finest grid, then reduced."""
    maps = [F.interpolate(level.double(), size=GRID, mode="bilinear", align_corners=False) for level in features]
    full = torch.cat(maps, 1).flatten(2).permute(2, 0, 1)
    return (full @ reduce.double().T).numpy()


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
@pytest.mark.parametrize("reduction", ["random", "orthogonal"])
def test_padim_is_the_mahalanobis_distance_to_numpys_moments(trunk, covariance, reduction):
    features = drawn_features(30)
    method = collect("padim", features, trunk, channels=12, covariance=covariance, reduction=reduction)
    np.testing.assert_allclose(method.gaussians.reduce @ method.gaussians.reduce.T, np.eye(12), atol=1e-5)
    x = embedded(features, method.gaussians.reduce)
    np.testing.assert_allclose(method.gaussians.mean, x.mean(1), rtol=1e-5, atol=1e-6)
    new = drawn_features(2, seed=5)
    y = embedded(new, method.gaussians.reduce)
    maps, scores = method.score([level.clone() for level in new])
    expected = np.empty((2, len(x)))
    for position in range(len(x)):
        moment = np.cov(x[position], rowvar=False)
        if covariance == "diagonal":
            moment = np.diag(np.diag(moment))
        inverse = np.linalg.inv(moment + 0.01 * np.eye(12))
        for image in range(2):
            expected[image, position] = mahalanobis(y[position, image], x[position].mean(0), inverse)
    np.testing.assert_allclose(maps.flatten(1), expected, rtol=2e-4)
    torch.testing.assert_close(scores, method.enlarge(maps).amax((1, 2, 3)))


def test_padim_takes_no_more_channels_than_there_are_and_chooses_each_once(trunk):
    features = drawn_features(4)
    assert collect("padim", features, trunk, channels=500).gaussians.reduce.tolist() == np.eye(64).tolist()
    chosen = collect("padim", features, trunk, channels=10).gaussians.reduce
    assert chosen.sum(1).tolist() == [1] * 10
    assert chosen.sum(0).max() == 1


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_padim_leave_one_out_is_a_fit_without_that_image(trunk, covariance):
    features = drawn_features(20)
    n = len(features[0])
    method = collect("padim", features, trunk, channels=8, covariance=covariance, epsilon=0.01)
    maps, scores = method.leave_one_out([level.clone() for level in features], None, torch.arange(n))
    for image in (0, 7, 19):
        rest = [torch.cat([level[:image], level[image + 1 :]]) for level in features]
        refit = collect("padim", rest, trunk, channels=8, covariance=covariance, epsilon=0.01 * (n - 1) / (n - 2))
        assert torch.equal(refit.gaussians.reduce, method.gaussians.reduce)
        expected, score = refit.score([level[image : image + 1].clone() for level in features])
        np.testing.assert_allclose(maps[image], expected[0], rtol=3e-4)
        assert float(scores[image]) == pytest.approx(float(score), rel=3e-4)


def test_padim_has_no_leave_one_out_of_two_images(trunk):
    features = drawn_features(2)
    assert collect("padim", features, trunk, channels=8).leave_one_out(features, None, torch.arange(2)) is None


def whitening(method):
    """(P, C, C) of the halves that are kept, or (P, C)."""
    if method.config.covariance == "diagonal":
        return method.gaussians.whiten
    upper = F.pad(method.gaussians.whiten_upper, (0, method.gaussians.whiten_lower.shape[1]))
    return torch.cat([upper, method.gaussians.whiten_lower], 1)


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_padim_does_not_depend_on_the_batches(trunk, covariance):
    features = drawn_features(17)
    one = collect("padim", features, trunk, channels=10, covariance=covariance)
    many = collect("padim", features, trunk, [5, 1, 8, 3], channels=10, covariance=covariance)
    torch.testing.assert_close(one.gaussians.mean, many.gaussians.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whitening(one), whitening(many), rtol=1e-3, atol=1e-3)


def test_padim_keeps_its_digits_far_from_zero(trunk):
    features = [level + 1000 for level in drawn_features(25)]
    method = collect("padim", features, trunk, [8, 8, 9], channels=6)
    x = embedded(features, method.gaussians.reduce)
    for position in (0, 100, 255):
        inverse = np.linalg.inv(np.cov(x[position], rowvar=False) + 0.01 * np.eye(6))
        ours = whitening(method)[position].double().numpy()
        np.testing.assert_allclose(ours.T @ ours, inverse, rtol=0.01, atol=0.01 * abs(inverse).max())


def patches(features, pool=3):
    """(N, P, C): averaged over the neighbourhood, all levels bilinearly on the grid of 8 input pixels."""
    pooled = [
        F.avg_pool2d(level, pool, 1, pool // 2, count_include_pad=False) if pool > 1 else level for level in features
    ]
    maps = [F.interpolate(level, size=(8, 8), mode="bilinear", align_corners=False) for level in pooled]
    return torch.cat(maps, 1).flatten(2).transpose(1, 2).double().numpy()


@pytest.mark.parametrize("standardise", [True, False])
@pytest.mark.parametrize("pool", [1, 3])
def test_patchcore_is_the_distance_to_the_nearest_of_the_bank(trunk, standardise, pool):
    features, new = drawn_features(6), drawn_features(3, seed=9)
    method = collect(
        "patchcore", features, trunk, [4, 2], deep_levels=(), standardise=standardise, pool=pool, coreset=1.0
    )
    x, y = patches(features, pool), patches(new, pool)
    x = x.reshape(-1, x.shape[-1])
    assert len(method.bank.index) == len(x)
    mean, std = (x.mean(0), np.maximum(x.std(0), 0.1 * x.std(0).mean())) if standardise else (0, 1)
    expected = cdist(((y - mean) / std).reshape(-1, x.shape[-1]), (x - mean) / std).min(1).reshape(3, 8, 8)
    maps, scores = method.score([level.clone() for level in new])
    np.testing.assert_allclose(maps[:, 0], expected, rtol=1e-4)
    np.testing.assert_allclose(scores, expected.max((1, 2)), rtol=1e-4)


def test_patchcore_compares_principal_components_and_sums_of_the_others(trunk):
    features, new = drawn_features(6), drawn_features(3, seed=9)
    method = collect("patchcore", features, trunk, [4, 2], deep_levels=(), components=21, coreset=1.0)
    x, y = (patches(maps).reshape(-1, 64) for maps in (features, new))
    mean, std = x.mean(0), np.maximum(x.std(0), 0.1 * x.std(0).mean())
    x, y = (x - mean) / std, (y - mean) / std
    axes = np.linalg.svd(x, full_matrices=False)[2].T
    first, others = axes[:, :11], axes[:, 11:] * np.sign(axes[np.abs(axes).argmax(0), np.arange(64)])[11:]
    folded = np.stack([others[:, i::10].sum(1) for i in range(10)], 1)
    projection = np.concatenate([first, folded], 1)
    expected = cdist(y @ projection, x @ projection).min(1).reshape(3, 1, 8, 8)
    np.testing.assert_allclose(method.score([level.clone() for level in new])[0], expected, rtol=1e-3)
    # Over good patches distances are kept on average.
    kept, whole = (cdist(a[:64], a[64:]) ** 2 for a in (x @ projection, x))
    assert kept.mean() == pytest.approx(whole.mean(), rel=0.05)


def test_patchcore_reweights_by_equation_7(trunk):
    features, new = drawn_features(6), drawn_features(3, seed=9)
    method = collect("patchcore", features, trunk, deep_levels=(), standardise=False, reweight=True, neighbours=5)
    bank = method.bank.index[:, :-1].double().numpy()
    for image, queries in enumerate(patches(new)):
        distances = cdist(queries, bank)
        farthest = distances.min(1).argmax()  # m^test,*
        star = distances[farthest].argmin()  # m*
        around = cdist(bank[star][None], bank)[0].argsort(kind="stable")[:5]  # N_b(m*), with m* itself
        to_around = distances[farthest][around]
        weight = 1 - np.exp(distances[farthest, star]) / np.exp(to_around).sum()
        _, scores = method.score([level[image : image + 1].clone() for level in new])
        assert float(scores) == pytest.approx(weight * distances[farthest, star], rel=1e-4)


def test_patchcore_without_deep_levels_has_one_bank(trunk):
    features = drawn_features(4)
    method = collect("patchcore", features, trunk, deep_levels="")
    assert method.config.deep_levels == ()
    assert method.deep_bank is None
    assert {key.split(".")[0] for key in method.state_dict()} == {"backbone", "bank"}


def test_patchcore_mixes_the_banks_in_units_of_their_own_patches(trunk):
    features, new = drawn_features(4), drawn_features(2, seed=3)
    both = {"levels": LEVELS[:1], "deep_levels": LEVELS[1:], "standardise": False, "coreset": 0.2, "deep_coreset": 0.2}
    both |= {"min_vectors": 10, "sigma": 0.0}
    alone = {}
    for share in (0.0, 1.0, 0.3):
        method = collect("patchcore", features, trunk, map_share=share, image_share=share, **both)
        alone[share] = method.score([level.clone() for level in new])
    torch.testing.assert_close(alone[0.3][0], 0.7 * alone[0.0][0] + 0.3 * alone[1.0][0])
    for bank in (method.bank, method.deep_bank):
        assert float(bank.unit) > 0
    shallow = F.avg_pool2d(new[0], 3, 1, 1, count_include_pad=False)
    shallow = F.interpolate(shallow, size=(8, 8), mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
    nearest = cdist(shallow.reshape(-1, 24), method.bank.index[:, :-1]).min(1) / float(method.bank.unit)
    np.testing.assert_allclose(alone[0.0][0].flatten(), nearest, rtol=1e-4)


def test_patchcore_keeps_to_its_budgets(trunk):
    features = drawn_features(10)  # 64 patches each
    vectors = {
        "default": collect("patchcore", features, trunk, deep_levels=()),
        "share": collect("patchcore", features, trunk, deep_levels=(), coreset=0.25, min_vectors=1),
        "max": collect("patchcore", features, trunk, deep_levels=(), max_vectors=17),
        "candidates": collect("patchcore", features, trunk, deep_levels=(), max_candidates=100),
    }
    assert {key: len(method.bank.index) for key, method in vectors.items()} == {
        "default": 640,
        "share": 160,
        "max": 17,
        "candidates": 100,
    }
    x = patches(features).reshape(-1, 64)
    bank = vectors["candidates"].bank
    rows = (bank.index[:, :-1] / bank.patches.scale + bank.patches.shift).double().numpy()
    assert cdist(rows, x).min(1).max() < 1e-4  # patches of training images, ten of each
    assert np.bincount(cdist(rows, x).argmin(1) // 64, minlength=10).tolist() == [10] * 10


@pytest.mark.parametrize("coreset", [0.1, 0.9, 1.0])
def test_a_banks_unit_is_how_far_its_patches_lie_from_other_vectors(trunk, coreset):
    features = drawn_features(5)
    method = collect(
        "patchcore", features, trunk, levels=LEVELS[:1], deep_levels=LEVELS[1:], coreset=coreset, min_vectors=1
    )
    bank = method.bank
    x = patches(features[:1]).reshape(-1, 24)
    distances = cdist((x - bank.patches.shift.numpy()) * bank.patches.scale.numpy(), bank.index[:, :-1])
    distances[distances < 1e-4] = np.inf
    assert float(bank.unit) == pytest.approx(distances.min(1).mean(), rel=1e-4)
