"""CFA's equations, banks and switches, on features that are drawn, without images."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.spatial.distance import cdist

from feature_maps import LEVELS, SIZE, drawn_features, small_trunk
from flawmap import Detector, find_dataset
from flawmap.backbones import create_backbone
from flawmap.imaging.preparation import read_region
from flawmap.learning.feature_cache import FeatureCache
from flawmap.methods import Collect, Optimise, configure
from flawmap.methods.blocks.hypersphere_centres import moving_average
from flawmap.methods.cfa import CFA, coordinates
from flawmap.metrics import aupro, auroc

T = 64  # positions of the default grid


@pytest.fixture(scope="module")
def trunk():
    return small_trunk()


def create(trunk, preset=None, **chosen):
    return CFA(CFA.resolved(configure(CFA, {"levels": LEVELS, "stride": 8, **chosen}, preset), trunk.name), trunk, SIZE)


def collect(trunk, features, batches=None, preset=None, inside=None, seed=0, **chosen):
    """The method with its bank, and the stage that would train it."""
    method, optimise = create(trunk, preset, **chosen), None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for stage in method.stages(len(features[0])):
            if isinstance(stage, Optimise):
                optimise = stage
                continue
            assert isinstance(stage, Collect)
            with torch.no_grad():
                start = 0
                for batch in batches or [len(features[0])]:
                    part = slice(start, start + batch)
                    stage.update([level[part] for level in features], None if inside is None else inside[part])
                    start += batch
                assert start == len(features[0])
                stage.close(lambda done, total: None)
    return method, optimise


def steps(method, optimise, features, count):
    optimiser = optimise.optimiser(optimise.parameters)
    for _ in range(count):
        loss = optimise.loss(features, None)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def fused(features, pool=3, grid=(8, 8)):
    """(N, P, C) float64."""
    maps = [F.avg_pool2d(level.double(), pool, 1, pool // 2) if pool > 1 else level.double() for level in features]
    maps = [F.interpolate(level, size=grid, mode="bilinear", align_corners=False) for level in maps]
    return torch.cat(maps, 1).flatten(2).transpose(1, 2).numpy()


def embedded(method, features, pool=3):
    """phi(p) (N, P, D') float64, by hand."""
    x = fused(features, pool, method.grid)
    if method.rotation is not None:
        x = (x - method.shift.double().numpy()) @ method.rotation.double().numpy()
    if method.config.coordinates:
        y, z = np.meshgrid(*(np.linspace(-1, 1, side) for side in method.grid), indexing="ij")
        x = np.concatenate([x, np.broadcast_to(np.stack([y, z], 2).reshape(1, -1, 2), (*x.shape[:2], 2))], 2)
    layer = method.descriptor
    return x @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()


def bank(method):
    return method.index[:, :-1].detach().double().numpy()


def test_the_descriptor_of_the_paper_counts_3216640_parameters():
    wide = create_backbone("wide_resnet50_2", ("layer1", "layer2", "layer3"), weights="random", size=SIZE)
    config = configure(CFA, {}, "paper")
    assert CFA.levels(CFA.resolved(config, wide.name)) == ("layer1", "layer2", "layer3")
    method = CFA(config, wide, SIZE)
    assert sum(parameter.numel() for parameter in method.descriptor.parameters()) == 3_216_640
    assert method.grid == (16, 16)


@pytest.mark.parametrize("attraction", [True, False])
@pytest.mark.parametrize("repulsion", [True, False])
@pytest.mark.parametrize("distance", ["squared", "plain"])
@pytest.mark.parametrize(("k", "j"), [(3, 3), (1, 4)])
def test_the_loss_is_equations_1_to_3(trunk, attraction, repulsion, distance, k, j):
    features = drawn_features(5)
    method, optimise = collect(trunk, features, attraction=attraction, repulsion=repulsion, distance=distance, k=k, j=j,
                               radius=0.8, alpha=0.05, nu=0.01, positions=0)  # fmt: skip
    new = drawn_features(2, seed=4)
    near = np.sort(cdist(embedded(method, new).reshape(2 * T, -1), bank(method)), 1)[:, : k + j]
    near = near**2 if distance == "squared" else near
    expected = attraction * np.maximum(0, near[:, :k] - 0.8**2).mean()
    expected += repulsion * np.maximum(0, 0.8**2 - near[:, k:] - 0.05).mean()
    assert optimise.loss(new, None).item() == pytest.approx(expected / 0.01, rel=1e-4)


def test_repulsion_has_neither_value_nor_slope_at_the_papers_radius_and_both_at_one(trunk):
    features = drawn_features(4)
    for radius, alive in ((1e-5, False), (1.0, True)):
        method, optimise = collect(trunk, features, attraction=False, radius=radius, alpha=0.1)
        loss = optimise.loss(features, None)
        loss.backward()
        assert (loss.item() > 0) is alive
        assert bool(method.descriptor.weight.grad.abs().sum() > 0) is alive


def test_the_radius_is_trained_only_where_asked_and_grows_under_attraction(trunk):
    features = drawn_features(4)
    fixed, optimise = collect(trunk, features, preset="authors", r_mode="fixed")
    assert len(optimise.parameters) == 2
    steps(fixed, optimise, features, 3)
    assert float(fixed.radius) == pytest.approx(1e-5)

    method, optimise = collect(trunk, features, preset="authors")
    assert any(parameter is method.radius for parameter in optimise.parameters)
    with torch.no_grad():
        method.radius.fill_(0.5)
    near = np.sort(cdist(embedded(method, features, pool=3).reshape(-1, 64), bank(method)), 1)[:, :6] ** 2
    optimise.loss(features, None).backward()
    active = (near[:, :3] > 0.25).mean() - (near[:, 3:] < 0.15).mean()
    assert float(method.radius.grad) == pytest.approx(-2 * 0.5 / 1e-3 * active, rel=1e-4)

    with torch.no_grad():
        method.radius.fill_(1e-5)
    steps(method, optimise, features, 50)
    assert 0.03 < float(method.radius.detach()) < 0.09  # AdamW moves it by about its learning rate, 1e-3, a step
    assert optimise.after_epoch() == f"r = {float(method.radius.detach()):.4g}"


def test_training_lowers_the_loss_and_leaves_bank_and_whitening_alone(trunk):
    features = drawn_features(6)
    method, optimise = collect(trunk, features, positions=0)
    before, first = (
        float(optimise.loss(features, None).detach()),
        {k: v.clone() for k, v in method.state_dict().items()},
    )
    steps(method, optimise, features, 20)
    assert float(optimise.loss(features, None).detach()) < 0.9 * before
    moved = {key for key, value in method.state_dict().items() if not torch.equal(value, first[key])}
    assert moved == {"descriptor.weight", "descriptor.bias"}
    assert (optimise.epochs, optimise.batch_size) == (method.config.epochs, method.config.batch_size)


@pytest.mark.parametrize(
    ("images", "chosen", "epochs"),
    [
        (160, {}, 10),
        (761, {}, 3),
        (30, {}, 10),
        (761, {"max_steps": 0}, 10),
        (761, {"preset": "paper"}, 30),
        (9, {"epochs": 5, "batch_size": 2, "max_steps": 11}, 3),
    ],
)
def test_many_images_are_passed_over_fewer_times(trunk, images, chosen, epochs):
    *_, last = create(trunk, **chosen).stages(images)
    assert isinstance(last, Optimise)
    assert last.epochs == epochs


def test_without_epochs_nothing_is_trained(trunk):
    assert all(isinstance(stage, Collect) for stage in create(trunk, epochs=0).stages(10))


@pytest.mark.parametrize("scoring", ["naive", "certainty"])
@pytest.mark.parametrize("coordinates", [True, False])
@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize("pool", [1, 3])
def test_the_map_is_equation_4_or_5(trunk, scoring, coordinates, whiten, pool):
    method, _ = collect(trunk, drawn_features(5), scoring=scoring, coordinates=coordinates, whiten=whiten, pool=pool)
    new = drawn_features(3, seed=7)
    with torch.no_grad():
        maps, scores = method.score(new)
    near = np.sort(cdist(embedded(method, new, pool).reshape(3 * T, -1), bank(method)), 1)[:, :3]
    certainty = np.exp(-near[:, 0]) / np.exp(-near).sum(1) if scoring == "certainty" else 1
    np.testing.assert_allclose(maps.flatten(), certainty * near[:, 0], rtol=2e-4)
    assert (maps.flatten().numpy() <= near[:, 0] * (1 + 1e-4)).all()
    torch.testing.assert_close(scores, maps.amax((1, 2, 3)))


def test_the_image_score_is_the_largest_value_before_or_after_smoothing(trunk):
    features, inside = drawn_features(4), torch.zeros(4, 1, *SIZE)
    inside[:, :, 16:, 16:] = 1
    for where in (None, inside):
        for image_score in ("patch", "map"):
            method, _ = collect(trunk, features, image_score=image_score)
            with torch.no_grad():
                maps, scores = method.score(features, where)
            if image_score == "map":
                expected = method.enlarge(maps, where)
            else:
                expected = maps if where is None else maps[:, :, 2:, 2:]
            torch.testing.assert_close(scores, expected.amax((1, 2, 3)))


def test_equally_near_vectors_share_the_certainty(trunk):
    features = drawn_features(3)
    method, _ = collect(trunk, features, scoring="certainty")
    naive, _ = collect(trunk, features, scoring="naive")
    method.index = naive.index = method.index[:1].repeat(5, 1)
    with torch.no_grad():
        torch.testing.assert_close(method.score(features)[0], naive.score(features)[0] / 3)


def test_the_mean_bank_is_the_mean_of_each_position_however_batched(trunk):
    features = drawn_features(9)
    for batches in ([9], [4, 4, 1]):
        method, _ = collect(trunk, features, batches, preset="authors")
        np.testing.assert_allclose(bank(method), embedded(method, features).mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_the_moving_average_is_algorithm_1(trunk, beta):
    features = drawn_features(5)
    method, _ = collect(trunk, features, [2, 3], bank="ema", gamma_c=1.0, beta=beta)
    images = embedded(method, features)
    expected = images[0]
    for i, image in enumerate(images[1:], start=2):
        unused = list(range(T))
        matched = []
        for centre in expected:
            nearest = min(unused, key=lambda p: ((image[p] - centre) ** 2).sum())
            unused.remove(nearest)
            matched.append(image[nearest])
        rate = beta or 1 / i
        expected = (1 - rate) * expected + rate * np.array(matched)
    np.testing.assert_allclose(bank(method), expected, rtol=1e-3, atol=1e-5)


def test_the_moving_average_leaves_vectors_without_a_patch():
    torch.testing.assert_close(
        moving_average(torch.tensor([[0.0], [10.0], [20.0]]), torch.tensor([[12.0], [2.0]]), 0.5),
        torch.tensor([[1.0], [11.0], [20.0]]),
    )


@pytest.mark.parametrize("kind", ["kmeans", "mean", "ema"])
@pytest.mark.parametrize("gamma_c", [1.0, 0.25])
def test_the_banks_size_does_not_depend_on_the_number_of_images(trunk, kind, gamma_c):
    sizes = set()
    for images in (2, 7, 30):
        method, _ = collect(trunk, drawn_features(images), bank=kind, gamma_c=gamma_c, gamma_d=0.5)
        sizes.add(tuple(method.index.shape))
    assert sizes == {(int(gamma_c * T), 32 + 1)}


def test_the_kmeans_bank_holds_the_patches_as_well_as_scikit_learns(trunk):
    from sklearn.cluster import KMeans

    features = drawn_features(20)
    method, _ = collect(trunk, features, gamma_c=0.25)
    patches = embedded(method, features).reshape(20 * T, -1)
    ours = (cdist(patches, bank(method)).min(1) ** 2).sum()
    assert ours == pytest.approx(KMeans(16, n_init=3, random_state=0).fit(patches).inertia_, rel=0.03)


def test_whitened_patches_are_uncorrelated_and_of_length_one_or_less(trunk):
    features = drawn_features(10)
    method, _ = collect(trunk, features, [3, 7], coordinates=False, gamma_d=1.0)
    x = fused(features).reshape(10 * T, -1)
    np.testing.assert_allclose(method.shift, x.mean(0), rtol=1e-5)
    variances = np.linalg.eigvalsh(np.cov(x.T, bias=True))[::-1]
    white = embedded(method, features).reshape(10 * T, -1)
    np.testing.assert_allclose(
        np.cov(white.T, bias=True), np.diag(variances / (variances + 0.1 * variances.mean())) / 64, atol=1e-5
    )
    half, _ = collect(trunk, features, coordinates=False, gamma_d=0.5)
    np.testing.assert_allclose(
        np.abs(embedded(half, features)), np.abs(embedded(method, features)[..., :32]), atol=1e-4
    )


def test_the_coordinates_are_row_and_column_and_pass_the_untrained_descriptor(trunk):
    assert coordinates(2, 3)[0].tolist() == [[-1, -1], [-1, 0], [-1, 1], [1, -1], [1, 0], [1, 1]]
    method, _ = collect(trunk, drawn_features(3), gamma_d=0.5)
    with torch.no_grad():
        passed = method.embed(drawn_features(2))[..., -2:]
    torch.testing.assert_close(passed, coordinates(8, 8).expand(2, -1, -1))


def test_the_radius_left_open_is_a_quantile_of_the_distances(trunk):
    features = drawn_features(8)
    method, _ = collect(trunk, features, radius_quantile=0.7, gamma_c=0.25)
    near = np.sort(cdist(embedded(method, features).reshape(8 * T, -1), bank(method)), 1)[:, :3] ** 2
    assert float(method.radius) == pytest.approx(np.sqrt(np.quantile(near, 0.7)), rel=1e-3)


@given(st.integers(1, 70), st.integers(0, 10))
@settings(max_examples=15, deadline=None)
def test_a_step_sees_the_positions_asked_for_and_only_scored_ones(trunk, positions, seed):
    method = create(trunk, positions=positions, k=1, repulsion=False, nu=1.0, pool=1, coordinates=False, gamma_d=1.0)
    method.index = torch.zeros(5, 64 + 1)
    torch.nn.init.eye_(method.descriptor.weight)
    torch.nn.init.zeros_(method.descriptor.bias)
    method.rotation.copy_(torch.eye(64))
    inside = torch.zeros(2, 1, *SIZE)
    inside[0, :, :, :24] = inside[1, :, 8:, :8] = 1  # 24 and 7 of 64 positions
    maps = [torch.full((2, 24, 16, 16), 1e6), torch.zeros(2, 40, 8, 8)]
    maps[0][0, :, :, :6] = maps[0][1, :, 2:, :2] = 1.0  # a squared length of 24 wherever the image is scored
    torch.manual_seed(seed)
    assert float(method.loss(maps, inside).detach()) == pytest.approx(24, rel=1e-6)


def test_outside_the_region_nothing_is_learnt_or_scored(trunk):
    features = drawn_features(6)
    inside = torch.zeros(6, 1, *SIZE)
    inside[:, :, :, :32] = 1
    spoilt = [level.clone() for level in features]
    spoilt[0][..., 12:] += 1000
    spoilt[1][..., 6:] += 1000
    for kind in ("kmeans", "mean", "ema"):
        made = [collect(trunk, maps, inside=inside, bank=kind, gamma_c=0.25)[0] for maps in (features, spoilt)]
        torch.testing.assert_close(made[0].index, made[1].index)
        with torch.no_grad():
            assert torch.equal(made[0].score(features, inside)[1], made[0].score(spoilt, inside)[1])


def test_images_that_are_all_alike_leave_finite_scores(trunk):
    features = [torch.ones(4, 24, 16, 16), torch.ones(4, 40, 8, 8)]
    method, optimise = collect(trunk, features, pool=1, coordinates=False)
    steps(method, optimise, features, 2)
    with torch.no_grad():
        for tensor in method.score(drawn_features(2)):
            assert torch.isfinite(tensor).all()


def of_mantissa(features, bits):
    mantissas, exponents = zip(*map(torch.frexp, features), strict=True)
    kept = [torch.round(mantissa * 2 ** (bits + 1)) / 2 ** (bits + 1) for mantissa in mantissas]
    return [torch.ldexp(mantissa, exponent) for mantissa, exponent in zip(kept, exponents, strict=True)]


def test_half_precision_features_leave_scores_figures_and_losses_unmoved(drawn, tmp_path):
    """Of one trained method, since two trainings differ by more than what rounding its features does."""
    unit = 2.0**-11  # a feature moves by no larger share
    detector = Detector("cfa", image_size=128, engine="torch", epochs=2, calibration="holdout").fit(drawn)
    method, preprocessing = detector.method_, detector.preparation_.preprocessing
    samples = find_dataset(drawn).test
    labels = np.array([sample.label for sample in samples])
    masks = np.stack([read_region(sample.mask) if sample.mask else np.zeros((128, 128), bool) for sample in samples])
    inputs = np.stack([preprocessing(np.asarray(Image.open(sample.path))) for sample in samples])
    with torch.no_grad():
        features = method.features(torch.from_numpy(preprocessing.normalised(inputs)))
    cache = FeatureCache(tmp_path, "", half=True)
    cache.write([level.numpy() for level in features], expected_rows=len(samples))
    cache.commit("all", len(samples), None)
    halved = [torch.from_numpy(level) for level in cache.read(range(len(samples)))]
    assert not any(torch.equal(a, b) for a, b in zip(halved, features, strict=True))

    def found(features):
        losses = []
        with torch.no_grad():
            maps, scores = method.score(features)
            for seed in range(8):  # which positions a step sees
                torch.manual_seed(seed)
                losses.append(float(method.loss(features, None)))
            enlarged = method.enlarge(maps)[:, 0]
        return maps.numpy(), scores.numpy(), np.array(losses), enlarged.numpy()

    def moved(one, other):
        return np.abs(one / other - 1).max()

    (maps, scores, losses, enlarged), half, coarse = map(found, (features, halved, of_mantissa(features, 6)))
    assert moved(half[0], maps) < unit
    assert moved(half[1], scores) < unit
    assert moved(half[2], losses) < unit / 8  # a mean over thousands of patches
    assert moved(coarse[0], maps) > unit  # these bounds are not met by features that are rounded any more
    assert moved(coarse[2], losses) > unit / 8
    assert auroc(half[3], masks) == pytest.approx(auroc(enlarged, masks), abs=unit)
    assert aupro(half[3], masks) == pytest.approx(aupro(enlarged, masks), abs=unit)
    ratios = scores[labels == 1] / scores[labels == 0][:, None]
    within = (np.abs(np.log(ratios)) < 2 * unit).mean()  # pairs that may have changed places
    assert abs(auroc(half[1], labels) - auroc(scores, labels)) <= within
