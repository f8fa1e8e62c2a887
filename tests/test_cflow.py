"""CFLOW-AD's flows, losses and scores, on features that are drawn, without images."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from scipy.special import log_expit
from scipy.stats import multivariate_normal

from feature_maps import LEVELS, SIZE, drawn_features, small_trunk
from flawmap.flows import Mixing, position_code
from flawmap.flows.conditional import PositionalMLP, conditional_flow, standard_normal
from flawmap.methods import Collect, Optimise, configure
from flawmap.methods.blocks.position_flows import vectors_inside, warm_cosine
from flawmap.methods.cflow import CFlow

GRIDS = [(16, 16), (8, 8)]
QUICK = {"levels": LEVELS, "deep_levels": (), "blocks": 2}

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture(scope="module")
def trunk():
    return small_trunk()


def create(trunk, preset=None, **chosen):
    return CFlow(CFlow.resolved(configure(CFlow, {**QUICK, **chosen}, preset), trunk.name), trunk, SIZE)


def collect(stage, features, inside=None):
    """Runs a stage over batches of 2 and what is left over."""
    with torch.no_grad():
        for start in range(0, len(features[0]), 2):
            part = slice(start, start + 2)
            stage.update([level[part] for level in features], None if inside is None else inside[part])
        stage.close(lambda done, total: None)


def start(method, features, inside=None):
    """Up to the stage that trains, which it returns, and the one behind it."""
    stages = list(method.stages(len(features[0])))
    for stage in stages[:-2]:
        collect(stage, features, inside)
    return stages[-2:]


def steps(stage, features, count):
    optimiser = stage.optimiser(stage.parameters)
    for _ in range(count):
        losses = stage.loss(features, None)
        for loss in [losses] if isinstance(losses, torch.Tensor) else losses:
            optimiser.zero_grad(set_to_none=not stage.keep_gradients)
            loss.backward()
            optimiser.step()


def fitted(trunk, features, count=5, inside=None, **chosen):
    method = create(trunk, **chosen)
    optimise, peaks = start(method, features, inside)
    steps(optimise, features, count)
    collect(peaks, features, inside)
    return method.eval().requires_grad_(False)


def densities(method, features):
    """For each level log p / C and |z|^2 / 2C (B, h, w), from vectors with their codes, z's density by scipy."""
    found = []
    for flow, level in zip(method.density.flows, method.density.inputs(features), strict=True):
        b, c, h, w = level.shape
        vectors = level.permute(0, 2, 3, 1).reshape(-1, c)
        code = position_code(128, h, w).permute(1, 2, 0).reshape(-1, 128).repeat(b, 1)
        z, log_det = flow(vectors, code)
        log_p = multivariate_normal(np.zeros(c)).logpdf(z.double().numpy()) + log_det.double().numpy()
        found.append((log_p.reshape(b, h, w) / c, (z**2).mean(1).reshape(b, h, w).double().numpy() / 2))
    return found


def enlarged(values, grid=(16, 16)):
    values = torch.from_numpy(np.asarray(values))[:, None]
    return F.interpolate(values, size=grid, mode="bilinear", align_corners=False).numpy()[:, 0]


def flows_of(blocks):
    with torch.device("meta"):
        return [conditional_flow(c, grid, blocks) for c, grid in ((512, (32, 32)), (1024, (16, 16)), (2048, (8, 8)))]


def trainable(modules):
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


@pytest.fixture(scope="module")
def encoder():
    with torch.device("meta"):
        return timm.create_model("wide_resnet50_2", num_classes=0)


def test_the_cflow_row_of_f2rs_table_6_is_eight_blocks_and_the_trunk_up_to_layer3(encoder):
    flows = trainable(flows_of(8))
    trunk = trainable([encoder.conv1, encoder.bn1, encoder.layer1, encoder.layer2, encoder.layer3])
    print(f"flows {flows / 1e6:.4f} M, trunk {trunk / 1e6:.4f} M, together {(flows + trunk) / 1e6:.2f} M")
    assert flows == 81_647_616
    assert round(trunk / 1e6, 4) == 24.8625
    assert round((flows + trunk) / 1e6, 2) == 106.51


def test_the_flows_of_cls_cnfs_with_matrices_inverses_and_encoder_take_740_mib(encoder):
    flows = flows_of(6)
    count = trainable(flows)
    fixed = 2 * sum(part.matrix.numel() for flow in flows for part in flow.modules() if isinstance(part, Mixing))
    mib = [4 * numbers / 2**20 for numbers in (trainable([encoder]), count, fixed)]
    print(f"trainable {count / 1e6:.1f} M, fixed {fixed / 1e6:.1f} M, encoder {mib[0]:.2f} MiB, all {sum(mib):.1f} MiB")
    assert round(count / 1e6, 1) == 61.2
    assert round(fixed / 1e6, 1) == 66.1
    assert round(mib[0], 2) == 254.95
    assert round(sum(mib), 1) == 740.5


@pytest.mark.parametrize("two_sided", [False, True])
def test_maps_know_the_positions_that_vectors_have_to_be_told(two_sided):
    flow = conditional_flow(6, (5, 7), 3, code=8, two_sided=two_sided).double()
    for part in flow.modules():
        if isinstance(part, PositionalMLP):
            part.last.weight.data *= 10
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    code = position_code(8, 5, 7).double().expand(2, 8, 5, 7)
    z, log_det = flow.at_positions(x)

    def vectors(maps):
        return maps.permute(0, 2, 3, 1).reshape(70, -1)

    flat, flat_log_det = flow.at_positions(vectors(x), vectors(code))
    np.testing.assert_allclose(vectors(z).detach(), flat.detach(), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(log_det.flatten().detach(), flat_log_det.detach(), rtol=1e-9, atol=1e-12)
    # The rotations are orthogonal to the precision of the float32 that they were drawn in.
    np.testing.assert_allclose(flow.inverse(z).detach(), x, atol=1e-5)
    np.testing.assert_allclose(flow.inverse(flat, vectors(code)).detach(), vectors(x), atol=1e-5)
    jacobian = torch.autograd.functional.jacobian(lambda v: flow(v[None], vectors(code)[3:4])[0][0], vectors(x)[3])
    assert float(flat_log_det[3].detach()) == pytest.approx(np.linalg.slogdet(jacobian.numpy())[1], abs=1e-5)
    moved = flow.at_positions(x.roll(1, 3))[0].roll(-1, 3)
    assert float((moved - z).detach().abs().max()) > 0.01  # the position counts


def test_a_block_is_freias_all_in_one_block():
    modules = pytest.importorskip("FrEIA.modules", reason="FrEIA is a development dependency")
    channels, places = 10, 128
    theirs = modules.AllInOneBlock(
        [(channels,)], [(places,)], lambda i, o: torch.nn.Sequential(
            torch.nn.Linear(i, 2 * i), torch.nn.ReLU(), torch.nn.Linear(2 * i, o)
        ), affine_clamping=1.9, global_affine_type="SOFTPLUS", permute_soft=True,
    )  # fmt: skip
    ours = conditional_flow(channels, (4, 4), 1)
    coupling, scale, mixing = ours.blocks
    with torch.no_grad():
        theirs.global_scale += torch.randn_like(theirs.global_scale)
        theirs.global_offset += torch.randn_like(theirs.global_offset)
        coupling.of_first.first.load_state_dict(theirs.subnet[0].state_dict())
        coupling.of_first.last.load_state_dict(theirs.subnet[2].state_dict())
        scale.theta.copy_(theirs.global_scale.flatten())
        scale.offset.copy_(theirs.global_offset.flatten())
        mixing.matrix.copy_(theirs.w_perm.squeeze())
        x, code = torch.randn(32, channels), position_code(places, 4, 8).flatten(1).T
        (expected,), log_det = theirs([x], c=[code])
        z, ours_log_det = ours(x, code)
    np.testing.assert_allclose(z, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours_log_det, log_det, rtol=1e-4, atol=1e-4)


def test_whitened_vectors_are_uncorrelated_and_outliers_beyond_the_region_do_not_count(trunk):
    features, inside = drawn_features(9), torch.ones(9, 1, *SIZE)
    inside[:, :, :, :16] = 0
    for level in features:
        level[:, :, :, : level.shape[3] // 4] = 1e3
    method = create(trunk, pool=1)
    start(method, features, inside)
    for level in method.density.inputs(features):
        vectors = vectors_inside(level, inside)[0].double().numpy()
        assert vectors.shape[0] == 9 * 3 / 4 * level.shape[2] * level.shape[3]
        np.testing.assert_allclose(vectors.mean(0), 0, atol=1e-3)
        covariance = np.cov(vectors, rowvar=False, bias=True)
        np.testing.assert_allclose(covariance, np.diag(covariance.diagonal()), atol=1e-3)
        assert (covariance.diagonal() < 1.001).all()  # less where the ridge counts
        assert np.median(covariance.diagonal()) > 0.95


@pytest.mark.parametrize("pool", [1, 3])
def test_untrained_flows_of_whitened_vectors_are_the_mahalanobis_distance(trunk, pool):
    features, new = drawn_features(8), drawn_features(2, seed=3)
    method = create(trunk, pool=pool)
    start(method, features)
    for i, (x, y) in enumerate(zip(features, new, strict=True)):
        x, y = (
            F.avg_pool2d(level, pool, 1, pool // 2, count_include_pad=False).permute(0, 2, 3, 1).flatten(0, 2)
            for level in (x, y)
        )
        x, y = x.double().numpy(), y.double().numpy()
        covariance = np.cov(x, rowvar=False, bias=True)
        covariance += 0.01 * covariance.diagonal().mean() * np.eye(len(covariance))
        d = y - x.mean(0)
        expected = ((d @ np.linalg.inv(covariance)) * d).mean(1) / 2
        with torch.no_grad():
            np.testing.assert_allclose(method.density.likelihoods(new)[i][1].flatten(), expected, rtol=2e-3)


@pytest.mark.parametrize("scoring", ["likelihood", "log"])
@pytest.mark.parametrize("image_score", ["latent", "density", "map"])
def test_map_and_image_score_are_what_the_density_says(trunk, scoring, image_score):
    features, new = drawn_features(5), [3 * level for level in drawn_features(3, seed=7)]
    method = fitted(trunk, features, scoring=scoring, image_score=image_score, deep_levels=())
    peaks = [log_p.max() for log_p, _ in densities(method, features)]
    np.testing.assert_allclose(method.density.peaks, peaks, rtol=1e-4)
    found = densities(method, new)
    relative = [log_p - peak for (log_p, _), peak in zip(found, peaks, strict=True)]
    expected = sum(enlarged(1 - np.exp(r) if scoring == "likelihood" else -r) for r in relative)
    maps, scores = method.score(new)
    np.testing.assert_allclose(maps[:, 0], expected, rtol=1e-3, atol=1e-4)
    if image_score == "map":
        np.testing.assert_allclose(scores, method.enlarge(maps).amax((1, 2, 3)))
    else:
        kind = 1 if image_score == "latent" else 0
        sign = 1 if kind else -1
        total = sum(c * sign * enlarged(levels[kind]) for c, levels in zip((24, 40), found, strict=True)) / 64
        np.testing.assert_allclose(scores, total.max((1, 2)), rtol=1e-3)


def test_a_deep_level_counts_for_the_image_score_alone(trunk):
    features, new = drawn_features(5), drawn_features(2, seed=2)
    method = fitted(trunk, features, levels=LEVELS[:1], deep_levels=LEVELS[1:])
    shifted = [new[0], new[1] + 3]
    (maps, scores), (same, higher) = method.score(new), method.score(shifted)
    np.testing.assert_array_equal(maps, same)
    assert (higher > scores + 0.1).all()


def test_unscored_places_change_neither_loss_nor_peaks_nor_scores(trunk):
    features, inside = drawn_features(4), torch.ones(4, 1, *SIZE)
    inside[:, :, 32:] = 0
    changed = [level.clone() for level in features]
    for level in changed:
        level[:, :, level.shape[2] // 2 :] += 50
    for fibres in (0, 100):
        found = []
        for maps in (features, changed):
            torch.manual_seed(3)
            method = create(trunk, pool=1, fibres=fibres)
            optimise, peaks = start(method, maps, inside)
            losses = optimise.loss(maps, inside)
            losses = torch.stack([losses] if isinstance(losses, torch.Tensor) else list(losses)).detach()
            collect(peaks, maps, inside)
            with torch.no_grad():
                found.append((losses, method.density.peaks, method.score(maps, inside)[1]))
        for one, other in zip(*found, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5)


@pytest.mark.parametrize("loss", ["sigmoid", "plain"])
def test_the_loss_is_equation_2_on_the_likelihood_of_each_channel(trunk, loss):
    features = drawn_features(4)
    method = create(trunk, loss=loss)
    optimise, _ = start(method, features)
    with torch.no_grad():
        found = [log_p for log_p, _ in densities(method, features)]
        given = float(optimise.loss(features, None))
    expected = sum(-(log_expit(log_p) if loss == "sigmoid" else log_p).mean() for log_p in found)
    assert given == pytest.approx(expected, rel=1e-5)


def test_fibres_are_vectors_of_one_level_each_seen_once(trunk):
    features = drawn_features(3)
    method = create(trunk, fibres=200, loss="plain")
    optimise, _ = start(method, features)
    sizes = [200, 200, 200, 168, 192]  # 3 images of 16 x 16, then of 8 x 8
    values, trained = [], []
    for loss in optimise.loss(features, None):
        method.zero_grad(set_to_none=True)
        loss.backward()
        trained.append([any(p.grad is not None for p in flow.parameters()) for flow in method.density.flows])
        values.append(float(loss.detach()))
    assert trained == [[True, False]] * 4 + [[False, True]]
    with torch.no_grad():
        means = [log_p.mean() for log_p, _ in densities(method, features)]
    assert np.average(values[:4], weights=sizes[:4]) == pytest.approx(-means[0], rel=1e-5)
    assert values[4] == pytest.approx(-means[1], rel=1e-5)


def test_summed_losses_under_adam_are_an_optimiser_for_each_flow(trunk):
    features = drawn_features(3)
    found = []
    for alone in (False, True):
        torch.manual_seed(1)
        method = create(trunk)
        optimise, _ = start(method, features)
        groups = [list(flow.parameters()) for flow in method.density.flows] if alone else [optimise.parameters]
        optimisers = [torch.optim.Adam(group, 1e-3) for group in groups]
        for _ in range(3):
            loss = optimise.loss(features, None)
            for optimiser in optimisers:
                optimiser.zero_grad()
            loss.backward()
            for optimiser in optimisers:
                optimiser.step()
        found.append(torch.nn.utils.parameters_to_vector(method.density.flows.parameters()).detach())
    assert torch.equal(*found)


def test_idle_flows_go_on_by_momentum_only_under_the_authors_adam(trunk):
    features = drawn_features(2)
    for shared in (False, True):
        method = create(trunk, fibres=256, shared_adam=shared)
        optimise, _ = start(method, features)
        optimiser = optimise.optimiser(optimise.parameters)
        first = torch.nn.utils.parameters_to_vector(method.density.flows[0].parameters()).detach()
        for number, loss in enumerate(optimise.loss(features, None)):
            optimiser.zero_grad(set_to_none=not optimise.keep_gradients)
            loss.backward()
            optimiser.step()
            now = torch.nn.utils.parameters_to_vector(method.density.flows[0].parameters()).detach()
            assert torch.equal(now, first) is (number == 2 and not shared)  # the third fibre is of the second level
            first = now
        assert number == 2


@pytest.mark.parametrize("preset", [None, "paper"])
def test_training_learns_what_belongs_where(trunk, preset):
    features, new = drawn_features(4), drawn_features(4, seed=8)
    for maps in (features, new):
        for level in maps:
            level[:, 0, :, level.shape[3] // 2 :] += 8  # the right halves differ in one channel
    method = fitted(trunk, features, 30, preset=preset, learning_rate=1e-2, scoring="log")
    maps, swapped = method.score(new)[0], method.score([level.flip(3) for level in new])[0]
    assert float(swapped.mean()) > 1.2 * float(maps.mean())


def test_the_papers_setting_and_levels():
    paper = configure(CFlow, {}, "paper")
    assert (paper.blocks, paper.fibres, paper.batch_size, paper.learning_rate) == (8, 256, 32, 2e-4)
    assert CFlow.levels(CFlow.resolved(paper, "wide_resnet50_2")) == ("layer2", "layer3", "layer4")
    default = CFlow.resolved(configure(CFlow, {}), "tf_efficientnet_lite0")
    assert (default.levels, default.deep_levels) == (("blocks.2", "blocks.4", "blocks.6"), ("blocks.5",))
    assert CFlow.levels(default) == ("blocks.2", "blocks.4", "blocks.6", "blocks.5")


@pytest.mark.parametrize(("images", "chosen", "epochs"), [(160, {}, 8), (1600, {}, 3), (1600, {"max_steps": 0}, 8)])
def test_many_images_are_passed_over_fewer_times(trunk, images, chosen, epochs):
    whitening, optimise, peaks = create(trunk, **chosen).stages(images)
    assert isinstance(whitening, Collect)
    assert isinstance(optimise, Optimise)
    assert isinstance(peaks, Collect)
    assert (optimise.epochs, optimise.batch_size) == (epochs, 8)


def test_the_learning_rate_warms_up_and_falls_to_a_thousandth():
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 2.0)
    schedule = warm_cosine(optimiser, 100)
    rates = []
    for _ in range(101):
        rates.append(schedule.get_last_lr()[0])
        optimiser.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.2)
    assert np.argmax(rates) == 8
    assert rates[8] == pytest.approx(2.0)
    assert rates[54] == pytest.approx(1.001)
    assert rates[100] == pytest.approx(0.002)


def test_a_standard_normals_likelihood_of_a_channel():
    z, log_det = torch.randn(5, 3), torch.randn(5)
    expected = (multivariate_normal(np.zeros(3)).logpdf(z.numpy()) + log_det.numpy()) / 3
    np.testing.assert_allclose(standard_normal(z, log_det), expected, rtol=1e-5)
