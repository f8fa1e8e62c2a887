"""F2R's equations, counts and reversion, on features that are drawn, without images."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import special, stats
from scipy.spatial.distance import cdist, cosine
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from feature_maps import LEVELS, SIZE, drawn_features, small_trunk
from flawmap import Detector, FlawmapError
from flawmap.backbones import create_backbone, create_engine
from flawmap.backbones import moved as moved_engine
from flawmap.flows import ActNorm, Coupling, Mixing
from flawmap.methods import Collect, Optimise, configure
from flawmap.methods.blocks.factorisation import Factorisation, FactorisationConfig, covariance
from flawmap.methods.f2r import F2R
from flawmap.neighbours import k_center_greedy

T = 64  # positions
KINDS = ("plain", "lu", "permutation")


@pytest.fixture(scope="module")
def trunk():
    return small_trunk()


def create(trunk, preset=None, **chosen):
    return F2R(F2R.resolved(configure(F2R, {"levels": LEVELS, **chosen}, preset), trunk.name), trunk, SIZE)


def fit(trunk, features, *, epochs=3, inside=None, preset=None, seed=0, at=None, **chosen):
    """A trained method; `at` looks at it while the flow is trained."""
    method = create(trunk, preset, epochs=epochs, **chosen)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for stage in method.stages(len(features[0])):
            if isinstance(stage, Collect):
                with torch.no_grad():
                    stage.update([level.clone() for level in features], inside)
                    stage.close(lambda done, total: None)
                continue
            assert isinstance(stage, Optimise)
            optimiser = stage.optimiser(stage.parameters)
            for _ in range(stage.epochs):
                loss = stage.loss(features, inside)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            assert 1 <= float(stage.after_epoch().removeprefix("condition number of the mixing ")) < 100
            if at is not None:
                at(method, stage)
    return method.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def trained(trunk):
    return fit(trunk, drawn_features(6), epochs=40, learning_rate=3e-3, components=24)


def at(method, alpha, beta):
    return method.with_settings(method.config.model_copy(update={"alpha": alpha, "beta": beta}))


def patches(features, method):
    """f (N, P, c) float64, by hand."""
    side = method.config.patch_pool
    pooled = [F.avg_pool2d(level.double(), side, 1, side // 2, count_include_pad=False) for level in features]
    maps = [F.interpolate(level, size=(8, 8), mode="bilinear", align_corners=False) for level in pooled]
    f = (torch.cat(maps, 1).flatten(2).transpose(1, 2) - method.patches.shift.double()) * method.patches.scale.double()
    return (f if method.patches.axes is None else f @ method.patches.axes.double()).numpy()


def test_the_paper_sized_flow_counts_what_the_paper_counts_and_multiplies_nearly_as_much():
    with torch.device("meta"):
        wide = create_backbone("wide_resnet50_2.tv_in1k", ("layer2", "layer3"), weights="random", size=(224, 224))
        method = F2R(F2R.resolved(configure(F2R, {}, "paper"), wide.name), wide, (224, 224))
    assert method.config.levels == ("layer2", "layer3")
    assert (method.grid, method.channels, method.parts) == ((28, 28), 1536, (768, 768))
    backbone = sum(parameter.numel() for parameter in wide.parameters())
    flow = sum(parameter.numel() for parameter in method.flow.parameters())
    assert backbone / 1e6 == pytest.approx(24.8625, abs=1e-4)
    assert flow == 6 * (1536**2 + 2 * 1536 + 768 * 1728 + 1728 * 1728 + 1728 * 1536 + 1728 + 1728 + 1536)
    assert (backbone + flow) / 1e6 == pytest.approx(
        80.87, abs=0.005
    )  # the paper: 80.72, of which the layout is not told
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        method.eval().flow.transform(torch.empty(784, 1536, device="meta"))
    macs = counter.get_total_flops() // 2 - 6 * 784 * 1536**2  # without the mixing matrices
    assert (macs + wide.macs((224, 224))) / 1e9 == pytest.approx(42.0, abs=0.05)  # the paper: 43.27
    assert sum(parameter.numel() for parameter in method.parameters()) == backbone + flow


def test_levels_are_the_backbones_own_and_for_the_default_reach_to_a_thirty_second():
    assert F2R.resolved(configure(F2R, {}), "tf_efficientnet_lite0").levels == ("blocks.2", "blocks.4", "blocks.6")
    assert F2R.resolved(configure(F2R, {"levels": ("layer1",)}), "resnet18.tv_in1k").levels == ("layer1",)
    assert F2R.views(configure(F2R, {"views": 7, "rotation": 15})) == (7, 15.0)
    with pytest.raises(FlawmapError, match="components=1"):
        F2R.resolved(configure(F2R, {"components": 1}), "resnet18.tv_in1k")


@pytest.mark.parametrize("mixing", KINDS)
def test_the_flow_can_be_undone_after_training(trunk, mixing):
    method = fit(trunk, drawn_features(4), epochs=12, mixing=mixing, components=0, learning_rate=3e-3)
    f = torch.from_numpy(patches(drawn_features(2, seed=3), method)).flatten(0, 1)
    for kind, limit in ((torch.float64, 1e-8), (torch.float32, 1e-4)):
        flow, x = method.flow.to(kind), f.to(kind)
        z = flow(x)[0]
        torch.testing.assert_close(method.flow.transform(x), z)
        assert float((z - x).norm()) > 0.1 * float(x.norm())
        assert float((flow.inverse(z) - x).norm() / x.norm()) < limit


@pytest.mark.parametrize("mixing", KINDS)
@pytest.mark.parametrize("actnorm", [True, False])
def test_the_determinant_is_that_of_autograds_jacobian(trunk, mixing, actnorm):
    method = fit(trunk, drawn_features(4), epochs=8, mixing=mixing, actnorm=actnorm, components=8, learning_rate=3e-3)
    flow = method.flow.double()
    f = torch.from_numpy(patches(drawn_features(1, seed=3), method))[0, :5]
    _, log_det = flow(f)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x: flow(x[None])[0][0]))(f)
    torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobian).logabsdet, rtol=1e-9, atol=1e-9)
    assert sum(isinstance(block, ActNorm) for block in flow.blocks) == (6 if actnorm else 0)


def test_at_the_start_each_step_only_normalises_and_mixes(trunk):
    method = create(trunk, components=0)
    f = torch.from_numpy(patches(drawn_features(4), method)).float().flatten(0, 1)
    expected, blocks = f, list(method.flow.blocks)
    method.flow(f)
    for i in range(0, 18, 3):
        norm, mixing, coupling = blocks[i : i + 3]
        assert isinstance(norm, ActNorm)
        assert isinstance(mixing, Mixing)
        assert isinstance(coupling, Coupling)
        expected = (expected - expected.mean(0)) / expected.std(0, correction=0) @ mixing.weight().T
        torch.testing.assert_close(mixing.weight() @ mixing.weight().T, torch.eye(64), atol=1e-5, rtol=0)
    torch.testing.assert_close(method.flow(f)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("components", [0, 64])
@pytest.mark.parametrize(("image_score", "patch_pool"), [("map", 1), ("patch", 3)])
def test_with_alpha_and_beta_one_it_is_the_distance_to_the_nearest_patch(
    trunk, trained, image_score, patch_pool, components
):
    features, new = drawn_features(6), drawn_features(3, seed=9)
    chosen = {"image_score": image_score, "patch_pool": patch_pool, "components": components}
    method = fit(trunk, features, alpha=1, beta=1, coreset=1.0, **chosen)
    x, y = patches(features, method).reshape(-1, 64), patches(new, method).reshape(-1, 64)
    assert len(method.index) == len(x)
    maps, scores = method.score(new)
    expected = cdist(y, x).min(1).reshape(3, 8, 8)
    np.testing.assert_allclose(maps[:, 0], expected, rtol=2e-5)
    enlarged = method.enlarge(maps)
    largest = enlarged.amax((1, 2, 3)) if image_score == "map" else maps.amax((1, 2, 3))
    torch.testing.assert_close(scores, largest)
    # the long way, through the flow and back
    torch.testing.assert_close(method.score_latents(method.latents(new))[0], maps, rtol=1e-3, atol=0)
    moved = at(trained, 1.0, 1.0)
    torch.testing.assert_close(moved.score_latents(moved.latents(new))[0], moved.score(new)[0], rtol=1e-3, atol=0)
    torch.testing.assert_close(moved.index[:, :-1], moved.vectors)


@pytest.mark.parametrize(("alpha", "beta"), [(0.4, 1.0), (1.2, 0.0), (0.0, 1.2)])
def test_moving_alpha_and_beta_reverts_the_gallery_and_the_image_and_nothing_else(trained, alpha, beta):
    new = drawn_features(2, seed=5)
    before = {key: value.clone() for key, value in trained.state_dict().items()}
    moved = at(trained, alpha, beta)
    assert trained.config.beta == 0.8
    for key, value in trained.state_dict().items():
        assert torch.equal(value, before[key]), key
        shared = dict(moved.state_dict(keep_vars=True))[key].data_ptr() == value.data_ptr()
        assert shared == (key != "index"), key

    flow = trained.flow

    def reverted(f):
        z = flow(torch.from_numpy(f).float())[0]
        z[:, :12] *= alpha
        z[:, 12:] *= beta
        return flow.inverse(z).numpy()

    y = reverted(patches(new, trained).reshape(-1, 24))
    expected = cdist(y, reverted(trained.vectors.numpy().astype(float))).min(1).reshape(2, 8, 8)
    maps, scores = moved.score(new)
    np.testing.assert_allclose(maps[:, 0], expected, rtol=1e-4, atol=1e-5)
    again, same = moved.score_latents(trained.latents(new))
    assert torch.equal(maps, again)
    assert torch.equal(scores, same)


def test_without_either_part_every_patch_is_alike(trained):
    moved = at(trained, 0.0, 0.0)
    maps, scores = moved.score(drawn_features(2, seed=5))
    torch.testing.assert_close(maps, torch.zeros_like(maps), rtol=0, atol=1e-5)
    torch.testing.assert_close(scores, torch.zeros(2), rtol=0, atol=1e-5)
    moved.reselect(trained.latents(drawn_features(6)).flatten(0, 1))
    assert len(moved.index) == 1


@pytest.mark.parametrize("value", [0.0, 5.0])
def test_patches_that_are_all_alike_and_images_of_nothing_can_be_scored(trunk, trained, value):
    features = [torch.full_like(level, value) for level in drawn_features(3)]
    method = fit(trunk, features, epochs=0)
    assert len(method.index) == 1
    torch.testing.assert_close(method.score(features)[0], torch.zeros(3, 1, 8, 8), rtol=0, atol=1e-4)
    assert all(torch.isfinite(values).all() for values in trained.score(features))


def test_one_image_seen_several_times_can_be_learnt(trunk):
    features = [level.expand(4, -1, -1, -1).contiguous() for level in drawn_features(1)]
    method = fit(trunk, features, coreset=1.0)
    assert len(method.index) == 64
    assert all(torch.isfinite(values).all() for values in method.score(drawn_features(2, seed=1)))


def test_the_gallery_is_a_greedy_cover_chosen_among_features_or_reverted_ones(trunk):
    features = drawn_features(6)
    settings = {"coreset": 0.1, "alpha": 1, "beta": 0.2, "components": 24}
    method = fit(trunk, features, **settings)
    x = patches(features, method).reshape(-1, 24).astype(np.float32)
    assert len(method.vectors) == 38
    np.testing.assert_allclose(method.vectors, x[k_center_greedy(x, 38)], rtol=1e-4, atol=1e-4)
    radius = [cdist(x, method.vectors[:n]).min(1).max() for n in range(1, 39)]
    assert (np.diff(radius) <= 1e-6).all()
    spread = cdist(method.vectors, method.vectors)[np.triu_indices(38, 1)].min()
    assert spread >= radius[-1] - 1e-4  # greedy: picks lie no closer than the cover they leave

    z = method.latents(features).flatten(0, 1)
    reverted = method._reverted(z)
    picks = k_center_greedy(reverted.numpy(), 38)
    anew = fit(trunk, features, reselect=True, **settings)
    np.testing.assert_allclose(anew.vectors, x[picks], rtol=1e-4, atol=1e-4)
    method.reselect(z)
    torch.testing.assert_close(method.vectors, anew.vectors, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(method.index, anew.index, rtol=1e-3, atol=1e-3)


def test_the_gallery_keeps_to_its_budgets(trunk):
    features = drawn_features(10)
    for settings, count in (({}, 64), ({"max_vectors": 17}, 17), ({"max_candidates": 30, "coreset": 1.0}, 30)):
        assert len(fit(trunk, features, epochs=0, **settings).index) == count


def test_the_covariance_vanishes_with_independence_and_not_between_copies():
    z = torch.randn(200_000, 6, generator=torch.Generator().manual_seed(0))
    assert float(covariance(z[:, :3], z[:, 3:])) < 0.005
    assert float(covariance(z[:, :3], z[:, :3])) == pytest.approx(1 / 3, abs=0.01)  # the identity's nine entries
    first, second = z[:50, :2] + 3, z[:50, 2:] - 1
    blocks = np.cov(np.concatenate([first, second], 1), rowvar=False, bias=True)
    assert float(covariance(first, second)) == pytest.approx(abs(blocks[:2, 2:]).mean(), rel=1e-5)
    plain = abs(np.einsum("na,nb->ab", first.double(), second.double()) / 50).mean()
    assert float(covariance(first, second, centred=False)) == pytest.approx(plain, rel=1e-5)


TERMS = {"covariance": False, "semantics": "none", "position": False, "gamma": 0.0}


@pytest.mark.parametrize("half", [True, False])
def test_the_likelihood_is_that_of_the_standard_gaussian(trunk, half):
    features, seen = drawn_features(4), []

    def look(method, stage):
        seen.append(float(stage.loss(features, None).detach()))
        flow = method.flow.eval()
        f = torch.from_numpy(patches(features, method)).float().flatten(0, 1)
        with torch.no_grad():
            z, log_det = flow(f)
        expected = -stats.norm.logpdf(z.double()).sum(1) - 32 * np.log(2 * np.pi) - log_det.numpy()
        if not half:
            expected += 0.5 * z.double().square().sum(1).numpy()
        seen.append(0.002 * expected.mean())

    fit(trunk, features, positions=0, nll_half=half, components=0, at=look, **{**TERMS, "gamma": 0.002})
    assert seen[0] == pytest.approx(seen[1], rel=1e-4)


@pytest.mark.parametrize("term", ["covariance", "cls", "reg", "position"])
def test_the_terms_of_the_factorisation_are_equation_5(trunk, term):
    features, seen = drawn_features(4), []
    chosen = {**TERMS, **({"semantics": term} if term in ("cls", "reg") else {term: True})}

    def look(method, stage):
        seen.append(float(stage.loss(features, None).detach()))
        f = torch.from_numpy(patches(features, method)).float().flatten(0, 1)
        with torch.no_grad():
            z = method.flow(f)[0]
            assert method.parts == (19, 45)
            told = {name: network(z[:, :19] if name == "semantics" else z[:, 19:]).numpy()
                    for name, network in method.auxiliary.items()}  # fmt: skip
        if term == "covariance":
            assert not told
            expected = abs(np.cov(z, rowvar=False, bias=True)[:19, 19:]).mean()
        elif term == "cls":
            expected = np.mean([cosine(a, b) for a, b in zip(f.numpy(), told["semantics"], strict=True)])
        elif term == "reg":
            expected = ((f.numpy() - told["semantics"]) ** 2).mean()
        else:
            assert told["position"].shape == (4 * T, T)
            rows = special.log_softmax(told["position"].astype(float), axis=1)
            expected = -np.mean([rows[i, i % T] for i in range(4 * T)])
        seen.append(expected)

    fit(trunk, features, positions=0, split=0.3, components=0, at=look, **chosen)
    assert seen[0] == pytest.approx(seen[1], rel=1e-4)


def test_training_makes_one_half_tell_what_and_the_other_where(trunk):
    random = torch.Generator().manual_seed(0)
    place = torch.randn(1, 40, 8, 8, generator=random)
    features = [level.clone() for level in drawn_features(24)]
    features[1] = features[1] + 3 * place  # what is seen depends on the place
    method = fit(trunk, features, epochs=60, learning_rate=3e-3, components=32, gamma=0.01)
    z = method.latents(features).double().numpy()  # (24, 64, 32)

    def explained(part):
        """Share of the variance that the mean of each position explains."""
        return part.mean(0).var(0).sum() / part.reshape(-1, part.shape[2]).var(0).sum()

    assert explained(z[..., 16:]) > explained(z[..., :16]) + 0.2


def test_auxiliary_networks_are_kept_while_they_train_and_dropped_after(trunk):
    def look(method, stage):
        keys = [key for key in method.state_dict() if key.startswith("auxiliary.")]
        assert sum(key.endswith("weight") for key in keys) == 2 * 7  # four linear layers, three normalisations
        networks = list(method.auxiliary.values())
        assert [sum(isinstance(part, nn.Linear) for part in network) for network in networks] == [4, 4]
        trained = {id(parameter) for parameter in stage.parameters}
        assert trained == {id(p) for part in (method.flow, method.auxiliary) for p in part.parameters()}
        assert stage.views

    method = fit(trunk, drawn_features(3), at=look)
    assert {key.split(".")[0] for key in method.state_dict()} == {
        "backbone", "patches", "vectors", "index", "flow"
    }  # fmt: skip
    loaded = create(trunk)
    loaded.load_state(method.state_dict())
    loaded.requires_grad_(False)
    new = drawn_features(2, seed=4)
    for a, b in zip(loaded.eval().score(new), method.score(new), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("everything", [True, False])
def test_weight_decay_is_on_linear_layers_alone_unless_it_is_on_all(trunk, everything):
    def look(method, stage):
        groups = stage.optimiser(stage.parameters).param_groups
        decayed = {id(p) for group in groups if group["weight_decay"] == 0.05 for p in group["params"]}
        for name, parameter in (*method.flow.named_parameters(), *method.auxiliary.named_parameters()):
            linear = parameter.ndim == 2 and not name.endswith("matrix")
            assert (id(parameter) in decayed) == (linear or everything), name

    fit(trunk, drawn_features(3), decay_all=everything, at=look)


def test_the_same_seed_gives_the_same_tensors_whatever_was_drawn_before(trunk):
    first = fit(trunk, drawn_features(4)).state_dict()
    torch.manual_seed(99)
    second, third = fit(trunk, drawn_features(4)).state_dict(), fit(trunk, drawn_features(4), seed=1).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["index"], third["index"])


def test_what_lies_outside_is_neither_learnt_nor_raises_the_score(trunk):
    features = drawn_features(5)
    inside = torch.zeros(5, 1, *SIZE)
    inside[..., :32] = 1  # the left half
    wild = [level.clone() for level in features]
    for level in wild:
        level[..., level.shape[3] * 3 // 4 :] = 1e3
    settings = {"patch_pool": 1, "levels": LEVELS[1:], "positions": 16, "components": 8}
    trunk = create_backbone(levels=LEVELS[1:], weights="random", size=SIZE)
    plain = fit(trunk, features[1:], inside=inside, **settings)
    method = fit(trunk, wild[1:], inside=inside, **settings)
    for key in ("patches.shift", "patches.scale", "patches.axes", "vectors", "index"):
        torch.testing.assert_close(method.get_buffer(key), plain.get_buffer(key), rtol=1e-3, atol=1e-3)
    assert len(method.index) == 16  # a tenth of half the patches
    maps, scores = method.score(wild[1:], inside)
    assert float(maps.max()) > 100
    assert (scores <= maps[..., :4].amax((1, 2, 3)) + 1e-4).all()
    torch.testing.assert_close(scores, method.enlarge(maps, inside).amax((1, 2, 3)))
    one = torch.zeros(5, 1, *SIZE)
    one[..., :1, :1] = 1  # a single patch of each image
    fit(trunk, features[1:], inside=one, **settings)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_an_exported_graph_follows_alpha_and_beta(trained, engine):
    if engine == "openvino":
        pytest.importorskip("openvino")
    images = np.random.default_rng(0).standard_normal((3, 3, *SIZE), dtype=np.float32)
    started = at(trained, 1.0, 1.0)
    runner = create_engine(started, SIZE, engine, given=F2R.live_buffers)
    for method in (started, at(trained, 1.0, 0.5), at(trained, 0.3, 1.2)):
        found = moved_engine(runner, method, F2R.live_buffers)(images)
        with torch.inference_mode():
            expected = method(torch.from_numpy(images))
        for a, b in zip(expected, found, strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-4 * float(a.abs().max()))


@pytest.mark.parametrize("masked", [False, True])
def test_rotations_are_drawn_anew_at_every_step(trunk, masked):
    method = create(trunk, views=0, rotation=30, standardise=False, components=0, positions=0)
    assert F2R.views(method.config) == (1, 0.0)
    images = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    inside = torch.zeros(2, 1, *SIZE) if masked else None
    if inside is not None:
        inside[:, :, 8:40, 8:40] = 1
    stage = next(stage for stage in method.stages(2) if stage.name == "flow")
    assert (stage.inputs, stage.views, stage.loss) == ("images", False, method.loss_of_rotated)
    seen = []
    method.loss = lambda features, inside: seen.append((features, inside))
    for _ in range(2):
        method.loss_of_rotated([images], inside)
    (first, held), (second, _) = seen
    plain = method.features(images)
    for a, b, c in zip(first, second, plain, strict=True):
        assert not torch.allclose(a, b)
        assert not torch.allclose(a, c)
        assert not a.requires_grad
    if masked:
        assert set(held.unique().tolist()) == {0.0, 1.0}
        assert not torch.equal(held, inside)
    still = create(trunk, views=0, rotation=0.0)
    still.loss = method.loss
    still.loss_of_rotated([images], None)
    for a, c in zip(seen[-1][0], plain, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-3, atol=1e-3)
    fresh = next(stage for stage in create(trunk, views=3).stages(2) if stage.name == "flow")
    assert (fresh.inputs, fresh.views) == ("features", True)


def test_term_1_and_term_2_have_the_printed_sizes():
    generator = torch.Generator().manual_seed(0)
    z, f = torch.randn(500, 7, generator=generator), torch.randn(500, 7, generator=generator)
    matrix = (z[:, :3].T @ z[:, 3:] / 500).numpy()
    for size, value in (("sum", abs(matrix).sum()), ("norm", np.linalg.norm(matrix)), ("mean", abs(matrix).mean())):
        found = covariance(z[:, :3], z[:, 3:], centred=False, size=size)
        assert float(found) == pytest.approx(value, rel=1e-5)
    for square, expected in (("sum", np.linalg.norm(f - z, axis=1) ** 2), ("mean", ((f - z) ** 2).numpy())):
        losses = Factorisation(FactorisationConfig(semantics="reg", square_as=square), (3, 4), 5)
        assert float(losses.unlikeness(f, z)) == pytest.approx(expected.mean(), rel=1e-5)
    nothing = torch.zeros(4, 3, requires_grad=True)
    covariance(nothing, torch.zeros(4, 4), size="norm").backward()
    assert torch.isfinite(nothing.grad).all()


def test_glows_own_coupling_bounds_by_a_sigmoid(trunk):
    for coupling, clamp in (("tanh", "tanh"), ("sigmoid", "sigmoid")):
        method = create(trunk, coupling=coupling)
        assert {block.clamp for block in method.flow.blocks if isinstance(block, Coupling)} == {clamp}


def test_the_papers_preset_trains(trunk):
    method = fit(trunk, drawn_features(3), preset="paper", epochs=2, levels=LEVELS, views=1)
    assert method.patches.axes is None
    assert method.channels == 64
    assert torch.equal(method.patches.scale, torch.ones(64))
    assert len(method.index) == 19  # a tenth


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_levels_weigh_by_their_channels_or_alike(trunk, balance):
    features = drawn_features(6)
    f = patches(features, fit(trunk, features, epochs=0, components=0, balance=balance)).reshape(-1, 64)
    np.testing.assert_allclose(f.mean(0), 0, atol=1e-5)
    first, second = f[:, :24].var(), f[:, 24:].var()  # of one channel of each level
    assert first / second == pytest.approx((40 / 24) ** balance, rel=1e-4)
    assert first * 24**balance == pytest.approx((64 / 2) ** balance, rel=1e-4)


def test_components_are_those_of_the_largest_variance(trunk):
    features = drawn_features(6)
    full = patches(features, fit(trunk, features, epochs=0, components=0)).reshape(-1, 64)
    first = patches(features, fit(trunk, features, epochs=0, components=10)).reshape(-1, 10)
    singular = np.linalg.svd(full - full.mean(0), compute_uv=False)
    np.testing.assert_allclose(np.linalg.norm(first, axis=0), singular[:10], rtol=1e-4)
    np.testing.assert_allclose(np.cov(first, rowvar=False) - np.diag(first.var(0, ddof=1)), 0, atol=1e-3)


QUICK = {"image_size": 64, "engine": "torch", "epochs": 3, "views": 2, "steps": 2, "components": 8, "max_vectors": 40}


@pytest.fixture(scope="module")
def uninterrupted(drawn, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "m"
    Detector("f2r", **QUICK).fit(drawn).save(path)
    return path.read_bytes()


@pytest.mark.parametrize("at", [("moments", 9), ("flow", 3), ("flow", 6), ("gallery", 9)])
def test_a_training_that_was_stopped_goes_on_to_the_same_file(drawn, uninterrupted, tmp_path, at):
    class Stop(Exception):
        pass

    def stop(what, done, total):
        if (what, done) == at:
            raise Stop

    with pytest.raises(Stop):
        Detector("f2r", **QUICK).fit(drawn, workspace=tmp_path / "work", progress=stop)
    Detector("f2r", **QUICK).fit(drawn, workspace=tmp_path / "work", resume=True).save(tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == uninterrupted
