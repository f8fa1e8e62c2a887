"""DifferNet: vectors of turned and shrunk images, their density, and the gradient map."""

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from sklearn.decomposition import PCA

from feature_maps import LEVELS, SIZE, small_trunk
from flawmap import Detector, FlawmapError
from flawmap.backbones import create_backbone
from flawmap.backbones.pyramid import Pyramid, turned
from flawmap.backbones.tracing import to_onnx
from flawmap.methods import Collect, Optimise, configure
from flawmap.methods.differnet import DifferNet, DifferNetConfig, flow


@pytest.fixture(scope="module")
def trunk():
    return small_trunk()


def create(trunk, **chosen):
    return DifferNet(configure(DifferNet, {"levels": LEVELS, **chosen}), trunk, SIZE)


def fitted(trunk, features, steps=0, **chosen):
    method = create(trunk, **chosen)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for stage in method.stages(len(features[0])):
            if isinstance(stage, Collect):
                with torch.no_grad():
                    for part in torch.arange(len(features[0])).split(7):
                        stage.update([level[part] for level in features], None)
                    stage.close(lambda done, total: None)
            else:
                assert isinstance(stage, Optimise)
                optimiser = stage.optimiser(stage.parameters)
                for _ in range(steps):
                    loss = stage.loss(features, None)
                    optimiser.zero_grad()
                    loss.backward()
                    optimiser.step()
    return method.eval().requires_grad_(False)


def drawn_vectors(images, rotations=4, seed=0):
    """Correlated pooled maps of the trunk's 24 and 40 channels at one scale, not centred."""
    random = np.random.default_rng(seed)
    mixing = np.random.default_rng(9).standard_normal((64, 64)) / 8
    values = (2 + random.standard_normal((images, rotations, 64)) @ mixing).astype(np.float32)
    maps = torch.from_numpy(values).transpose(1, 2)[..., None]  # (B, 64, R, 1)
    return list(maps.split((24, 40), 1))


def images(count, size=SIZE, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((count, 3, *size), dtype=np.float32))


def test_the_papers_flow_has_as_many_parameters_as_its_authors():
    """f2r's Table 6 counts 172.08 M beside the encoder: 3 scales of AlexNet's 256 channels, 8 blocks, width 2048."""
    paper = configure(DifferNet, {}, "paper")
    with torch.device("meta"):
        assert sum(p.numel() for p in flow(paper, 3 * 256).parameters()) == 172_077_056


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_quarter_turns_are_numpys(quarters):
    square = images(2)
    assert np.array_equal(turned(square, 90 * quarters).numpy(), np.rot90(square.numpy(), quarters, (2, 3)))
    oblong = images(1, (48, 64))
    assert turned(oblong, 90 * quarters).shape == oblong.shape
    if quarters == 2:
        assert np.array_equal(turned(oblong, 180).numpy(), np.rot90(oblong.numpy(), 2, (2, 3)))


@pytest.mark.parametrize("size", [(31, 31), (25, 40)])
@given(degrees=st.floats(1, 359).filter(lambda degrees: degrees % 90))
@settings(max_examples=20, deadline=None)
def test_other_turns_are_scipys(size, degrees):
    image = images(1, size)
    expected = ndimage.rotate(image[0, 0].numpy(), degrees, reshape=False, order=1, mode="nearest")
    np.testing.assert_allclose(turned(image, degrees)[0, 0], expected, atol=2e-4)


def test_maps_are_the_moments_of_the_levels_at_every_angle_and_scale(trunk):
    batch = images(2)
    maps = Pyramid(trunk, rotations=4, scales=3, deviations=True)(batch)
    assert len(maps) == 2 * 3 * len(LEVELS)
    for angle in range(4):
        copies = np.rot90(batch.numpy(), angle, (2, 3))
        for scale in range(3):
            side = 64 >> scale
            shrunk = copies.reshape(2, 3, side, 1 << scale, side, 1 << scale).mean((3, 5), dtype=np.float32)
            for i, level in enumerate(trunk(torch.from_numpy(shrunk.copy()))):
                mean, std = level.numpy().mean((2, 3)), level.numpy().std((2, 3))
                at = scale * len(LEVELS) + i
                np.testing.assert_allclose(maps[at][:, :, angle, 0], mean, rtol=1e-4, atol=1e-5)
                np.testing.assert_allclose(maps[len(maps) // 2 + at][:, :, angle, 0], std, rtol=1e-3, atol=2e-3)


def test_nothing_outside_moves_the_maps(trunk):
    pyramid = Pyramid(trunk, rotations=8, scales=2, deviations=True)
    batch, inside = images(2), torch.zeros(2, 1, *SIZE)
    inside[:, :, 10:50, 16:] = 1
    scribbled = torch.where(inside > 0, batch, 100 * images(2, seed=3))
    for a, b in zip(pyramid(batch, inside), pyramid(scribbled, inside), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(pyramid(batch), pyramid(batch, torch.ones_like(inside)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    changed = batch.clone()
    changed[:, :, 20:30, 30:40] += 5
    assert all(not torch.allclose(a, b) for a, b in zip(pyramid(batch, inside), pyramid(changed, inside), strict=True))


@pytest.mark.parametrize("masked", [False, True])
def test_oblique_turns_run_in_onnxruntime(trunk, masked):
    pyramid = Pyramid(trunk, rotations=6, scales=1, deviations=True)
    session = onnxruntime.InferenceSession(to_onnx(pyramid, SIZE, masked=masked)[0], providers=["CPUExecutionProvider"])
    batch, inside = images(3), torch.ones(3, 1, *SIZE)
    inside[:, :, :20] = 0
    given = (batch, inside) if masked else (batch,)
    theirs = session.run(None, dict(zip(("images", "inside"), (x.numpy() for x in given), strict=False)))
    for a, b in zip(pyramid(*given), theirs, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-4 * float(a.abs().max()))


def test_a_backbone_of_one_size_is_refused_at_several_scales():
    backbone = create_backbone("deit_tiny_patch16_224", ("blocks.1",), weights="random", size=(224, 224))
    with pytest.raises(FlawmapError, match="scales=1"):
        Pyramid(backbone, rotations=1, scales=2, deviations=False)
    (mean,) = Pyramid(backbone, rotations=2, scales=1, deviations=False)(images(1, (224, 224)))
    assert mean.shape == (1, 192, 2, 1)


@pytest.mark.parametrize("components", [5, 40])
def test_the_untrained_score_is_scikit_learns_probabilistic_pca(trunk, components):
    train, new = drawn_vectors(30), drawn_vectors(6, seed=1)
    method = fitted(trunk, train, components=components, scales=1, deviations=False, ridge=1e-9)
    x, y = method.vectors(train).numpy().astype(float), method.vectors(new).numpy().astype(float)
    mean, std = x.mean(0), x.std(0)
    reference = PCA(components, svd_solver="full").fit((x - mean) / std)
    # -log p less its constant is half the squared length; scikit-learn divides variances by n - 1.
    logs = reference.score_samples((y - mean) / std)
    constant = reference.score_samples(np.zeros((1, 64)))
    expected = ((constant - logs) / 64 * len(x) / (len(x) - 1)).reshape(6, 4).mean(1)
    np.testing.assert_allclose(method.score(new)[1], expected, rtol=2e-4)


def test_fewer_vectors_than_components_leave_a_finite_score(trunk):
    method = fitted(trunk, drawn_vectors(2), steps=3, components=60, scales=1, deviations=False)
    assert int((method.axes.square().sum(0) > 0).sum()) <= 8
    _, scores = method.score(drawn_vectors(5, seed=1))
    assert bool(torch.isfinite(scores).all())
    assert bool((scores > method.score(drawn_vectors(2))[1].max()).all())


@pytest.mark.parametrize("components", [0, 30])
def test_training_raises_the_likelihood_that_its_loss_states(trunk, components):
    train = drawn_vectors(40)
    chosen = {"components": components, "scales": 1, "deviations": False, "noise": 0.0, "learning_rate": 1e-3}
    chosen |= {"blocks": 3, "hidden": 32}
    before, after = (fitted(trunk, train, steps=steps, **chosen) for steps in (0, 30))
    assert float(after.loss(train, None)) < float(before.loss(train, None)) - 0.05
    read, _ = after.reduced(after.vectors(train))
    z, log_det = after.flow(read)
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1) + log_det
    expected = -normal.mean() / read.shape[1] - 0.5 * np.log(2 * np.pi)
    assert float(after.loss(train, None)) == pytest.approx(float(expected), rel=1e-4)


def test_the_score_is_the_mean_over_the_angles(trunk):
    train = drawn_vectors(20)
    method = fitted(trunk, train, steps=5, components=20, scales=1, deviations=False, blocks=2)
    alone = fitted(
        trunk, [level[:, :, :1] for level in train], components=20, scales=1, deviations=False, blocks=2, rotations=1
    )
    alone.load_state(method.state_dict())
    angles = torch.stack([alone.score([level[:, :, [r]] for level in train])[1] for r in range(4)])
    torch.testing.assert_close(method.score(train)[1], angles.mean(0))


def test_score_and_gradient_map_turn_with_the_image(trunk):
    method = create(trunk, scales=2, components=0, hidden=16, identity=False, blocks=2).eval().requires_grad_(False)
    batch = images(2)
    score, gradient = method(batch)[1], method.gradient_map(batch)
    torch.testing.assert_close(method(turned(batch, 90))[1], score)
    torch.testing.assert_close(method.gradient_map(turned(batch, 90)), turned(gradient, 90), rtol=1e-3, atol=1e-6)
    assert gradient.shape == (2, 1, *SIZE)
    assert float(gradient.min()) >= 0


def test_the_gradient_map_is_the_slope_of_the_score(trunk):
    method = create(trunk, scales=1, rotations=3, components=0, hidden=16, identity=False, blocks=2, sigma=0.0)
    method = method.double().eval().requires_grad_(False)
    try:
        image, step = images(1).double(), 1e-5
        gradient = method.gradient_map(image)
        for y, x in ((3, 60), (31, 32)):
            slopes = []
            for channel in range(3):
                moved = image.repeat(2, 1, 1, 1)
                moved[0, channel, y, x] += step
                moved[1, channel, y, x] -= step
                up, down = method.score(method.features(moved))[1]
                slopes.append(abs(float(up - down)) / (2 * step))
            assert float(gradient[0, 0, y, x]) == pytest.approx(sum(slopes), rel=1e-3)
    finally:
        trunk.float()


def test_the_deepest_level_alone_is_the_papers():
    assert DifferNet.resolved(DifferNetConfig(), "tf_efficientnet_lite0").levels == ("blocks.2", "blocks.4", "blocks.6")
    paper = configure(DifferNet, {}, "paper")
    assert DifferNet.resolved(paper, "tf_efficientnet_lite0").levels == ("blocks.6",)


def test_a_detector_without_maps(drawn, broken_image, tmp_path):
    detector = Detector("differnet", image_size=128, engine="torch", epochs=2, rotations=2).fit(drawn)
    assert detector.pixel_threshold_ is None
    found = detector.predict(broken_image)
    assert found.maps is None
    assert found.anomaly_map is None
    assert found.regions == []
    assert found.score > detector.calibration_.scores.max()
    report = detector.evaluate(drawn)
    assert report.pixel_auroc is None
    assert report.aupro is None
    assert report.image_auroc > 0.5
    detector.save(tmp_path / "model.safetensors")
    assert Detector.load(tmp_path / "model.safetensors", engine="torch").predict(broken_image).score == found.score
