"""CAINNFlow and FastFlow: counts, likelihoods, switches and sampling, on features that are drawn, without images."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from sklearn.preprocessing import StandardScaler

from feature_maps import LEVELS, SIZE, drawn_features, small_trunk
from flawmap import FlawmapError
from flawmap.backbones import create_backbone
from flawmap.flows import CBAM, Coupling
from flawmap.learning.loop import train
from flawmap.methods import configure
from flawmap.methods.blocks.latent_noise import disturbed, with_noise
from flawmap.methods.cainnflow import CAINNFlow

FEW = {"levels": LEVELS, "deep_levels": (), "sigma": 0.0}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Maps this small are done before a second thread has woken up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trunk():
    return small_trunk()


def resolved(name, preset=None, **chosen):
    return CAINNFlow.resolved(configure(CAINNFlow, chosen, preset), name)


def create(trunk, preset=None, seed=0, **chosen):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CAINNFlow(resolved(trunk.name, preset, **{**FEW, **chosen}), trunk, SIZE)


class Kept:
    """Training data that is there already."""

    def __init__(self, maps):
        self.maps = maps

    def of(self, method):
        return self

    def features(self, rows):
        return [level[list(rows)] for level in self.maps], None


def trained(trunk, preset=None, features=None, seed=0, announce=lambda line: None, **chosen):
    features = drawn_features(8) if features is None else features
    method = create(trunk, preset, **{"max_steps": 0, "epochs": 4, "batch_size": 4, **chosen})
    train(method, Kept(features), range(len(features[0])), seed=seed, announce=announce)
    return method


def subnets(name, size, preset=None, **chosen):
    """Parameters, in millions, of the networks inside the couplings, and of all else that is trained."""
    # Those of the fact sheet have one network for s and t, and all else that the programs of FastFlow have.
    shared = {"st_shared": "true", "actnorm": "data", "feature_norm": "true"}
    config = resolved(name, preset, **({**shared, **chosen} if preset == "paper" else chosen))
    with torch.device("meta"):
        method = CAINNFlow(config, create_backbone(name, CAINNFlow.levels(config), weights="random", size=size), size)
    inside = [p for part in method.flows.modules() if isinstance(part, Coupling) for p in part.parameters()]
    count = sum(p.numel() for p in inside)
    others = sum(p.numel() for p in (*method.flows.parameters(), *method.norms.parameters())) - count
    return round(count / 1e6, 2), others


# The counts of the fact sheet, without activation normalisation, which has 2 C a step.


def test_parameters_of_cainnflow_on_resnet18():
    counts = [subnets("resnet18.tv_in1k", (256, 256), "paper", steps=steps)[0] for steps in range(1, 6)]
    assert counts == [1.17, 2.34, 3.51, 4.67, 5.84]
    others = {kind: subnets("resnet18.tv_in1k", (256, 256), "paper", subnet=kind)[0] for kind in ("CC", "CA", "AC")}
    assert others == {"CC": 2.33, "CA": 1.59, "AC": 1.56}


def test_parameters_of_cainnflow_on_wide_resnet50():
    counts = [subnets("wide_resnet50_2.tv_in1k", (256, 256), "paper", steps=steps) for steps in range(1, 6)]
    assert [count for count, _ in counts] == [18.67, 37.34, 56.01, 74.69, 93.36]
    # LayerNorm over C x H x W: 3.67 M, beside the activation normalisation of 256 + 512 + 1024 channels.
    assert [others for _, others in counts] == [3_670_016 + 2 * 1792 * steps for steps in range(1, 6)]
    kinds = {
        kind: subnets("wide_resnet50_2.tv_in1k", (256, 256), "paper", subnet=kind)[0] for kind in ("CC", "CA", "AC")
    }
    assert kinds == {"CC": 37.17, "CA": 25.47, "AC": 24.95}


def test_parameters_of_fastflow():
    assert subnets("wide_resnet50_2.tv_in1k", (256, 256), "fastflow")[0] == 41.31
    assert subnets("resnet18.tv_in1k", (256, 256), "fastflow", alternate="false")[0] == 4.65


def test_parameters_on_a_transformer_and_its_level():
    config = resolved("deit_base_distilled_patch16_384.fb_in1k", "paper")
    assert CAINNFlow.levels(config) == ("blocks.7",)
    counts = [
        subnets("deit_base_distilled_patch16_384.fb_in1k", (384, 384), "paper", **chosen)
        for chosen in ({"steps": 1}, {}, {"subnet": "CC"}, {"subnet": "CA"}, {"subnet": "AC"})
    ]
    assert [count for count, _ in counts] == [8.0, 16.0, 15.93, 10.92, 10.69]
    assert counts[1][1] == 2 * 2 * 768  # no LayerNorm of its own
    assert CAINNFlow.levels(resolved("cait_m48_448.fb_dist_in1k")) == ("blocks.40",)


def test_tokens_are_normalised_over_channels():
    name, size = "deit_tiny_distilled_patch16_224", (64, 64)
    config = resolved(name, levels="blocks.3,blocks.7", actnorm="none")
    backbone = create_backbone(name, CAINNFlow.levels(config), weights="random", size=size)
    method = CAINNFlow(config, backbone, size).eval()
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    kept = []
    handle = backbone.network.blocks[3].register_forward_hook(lambda module, inputs, output: kept.append(output))
    with torch.no_grad():
        features = method.features(images)
        anomaly_map, scores = method(images)
    handle.remove()
    assert [level.shape[1:] for level in features] == [(192, 4, 4)] * 2
    patches = kept[0][:, 2:].numpy()  # without the class token and the distillation token
    expected = (patches - patches.mean(2, keepdims=True)) / np.sqrt(patches.var(2, keepdims=True) + 1e-6)
    read = method.inputs(features)[0].flatten(2).transpose(1, 2)
    np.testing.assert_allclose(read, expected, atol=1e-4)
    # Untouched flows only permute, and normalised tokens all have the same length.
    np.testing.assert_allclose(anomaly_map, 0.5, atol=1e-3)
    np.testing.assert_allclose(scores, 0.5, atol=1e-3)


@pytest.mark.parametrize("subnet", ["CAC", "CA", "AC", "CC"])
@pytest.mark.parametrize("chosen", [{}, {"two_sided": "false", "spatial_first": "true", "st_shared": "false"}])
def test_flows_start_as_permutations(trunk, subnet, chosen):
    method = create(trunk, subnet=subnet, actnorm="none", **chosen)
    for flow, level in zip(method.flows, drawn_features(2), strict=True):
        order = flow.blocks[0].order[flow.blocks[2].order]
        assert sorted(order.tolist()) == list(range(level.shape[1]))
        assert order.tolist() != list(range(level.shape[1]))
        z, log_det = flow(level)
        assert torch.equal(z, level[:, order])
        assert log_det.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("chosen", "kernels", "attentions"),
    [
        ({"subnet": "CAC"}, [3, 3] * 4, 4),
        ({"subnet": "CA"}, [3] * 4, 4),
        ({"subnet": "AC", "two_sided": "false"}, [3] * 2, 2),
        ({"subnet": "CC", "alternate": "true"}, [3, 3, 3, 3, 1, 1, 1, 1], 0),
        ({"subnet": "CAC", "st_shared": "false"}, [3, 3] * 8, 8),
    ],
)
def test_switches_build_what_they_say(trunk, chosen, kernels, attentions):
    method = create(trunk, **chosen)
    found = [part for part in method.flows[0].modules() if isinstance(part, torch.nn.Conv2d) and part.bias is not None]
    assert [part.kernel_size[0] for part in found] == kernels
    assert sum(isinstance(part, CBAM) for part in method.flows[0].modules()) == attentions


def test_the_start_scores_as_independent_gaussians_do(trunk):
    """Before any step, activation normalisation standardises: the density is a product of Gaussians."""
    features, new = drawn_features(6), drawn_features(3, seed=5)
    expected = {}
    for share in (0.0, 1.0):
        method = create(trunk, score_logdet=share, image_logdet=share, weights="equal")
        method.flows.train()
        with torch.no_grad():
            method.loss(features, None)
            method.flows.eval()
            anomaly_map, scores = method.score([level.clone() for level in new])
            levels = []
            for known, level in zip(features, new, strict=True):
                rows = known.transpose(1, 3).flatten(0, 2).double().numpy()
                scaler = StandardScaler().fit(rows)
                asked = level.permute(0, 2, 3, 1).double().numpy()
                if share:
                    log_density = stats.norm.logpdf(asked, scaler.mean_, scaler.scale_) + 0.5 * np.log(2 * np.pi)
                    values = -log_density.mean(3)
                else:
                    values = ((asked - scaler.mean_) / scaler.scale_) ** 2 / 2
                    values = values.mean(3)
                values = torch.from_numpy(values)[:, None]
                levels.append(F.interpolate(values, size=(16, 16), mode="bilinear", align_corners=False))
            expected[share] = torch.stack(levels).mean(0)
        np.testing.assert_allclose(anomaly_map, expected[share], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(scores, expected[share].amax((1, 2, 3)), rtol=1e-4)


def test_levels_count_by_their_channels_and_deep_levels_in_the_image_score_alone(trunk):
    new = drawn_features(2, seed=5)
    both = trained(trunk, image_logdet=0.5)
    apart = create(trunk, levels=LEVELS[:1], deep_levels=LEVELS[1:], image_logdet=0.5).eval()
    apart.load_state_dict(both.state_dict())
    (first, first_det), (second, second_det) = both.likelihoods(new)
    fine = first - 0.5 * first_det
    coarse = F.interpolate(second - 0.5 * second_det, size=(16, 16), mode="bilinear", align_corners=False)
    weighted = (24 * fine + 40 * coarse) / 64
    torch.testing.assert_close(both.score(new)[0], weighted)
    torch.testing.assert_close(apart.score(new)[0], fine)
    torch.testing.assert_close(apart.score(new)[1], weighted.amax((1, 2, 3)))


def test_probabilities_are_the_papers_reading(trunk):
    new = drawn_features(2, seed=5)
    method = trained(trunk, scoring="probability", weights="equal", score_logdet=0.0, image_score="map")
    levels = []
    for flow, level in zip(method.flows, new, strict=True):
        probability = torch.exp(-0.5 * flow(level)[0].square().mean(1, keepdim=True))
        levels.append(F.interpolate(1 - probability, size=(16, 16), mode="bilinear", align_corners=False))
    anomaly_map, scores = method.score(new)
    torch.testing.assert_close(anomaly_map, torch.stack(levels).mean(0))
    torch.testing.assert_close(scores, method.enlarge(anomaly_map).amax((1, 2, 3)))
    assert float(anomaly_map.max()) < 1


@pytest.mark.parametrize("chosen", [{}, {"preset": "fastflow", "feature_norm": "false"}, {"permutation": "soft"}])
def test_samples_are_found_again(trunk, chosen):
    method = trained(trunk, **chosen)
    for flow, level in zip(method.flows, drawn_features(4), strict=True):
        z = torch.randn(level.shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            torch.testing.assert_close(flow(flow.inverse(z))[0], z, rtol=1e-4, atol=1e-4)


def test_scores_grow_with_the_length_of_z(trunk):
    method = trained(trunk, score_logdet=0.0)
    z = [torch.randn(level.shape, generator=torch.Generator().manual_seed(2)) for level in drawn_features(1)]
    found = []
    for length in (0.5, 1.0, 2.0, 4.0):
        maps = [flow.inverse(length * level) for flow, level in zip(method.flows, z, strict=True)]
        found.append(method.score(maps))
    torch.testing.assert_close(found[3][0], 64 * found[0][0], rtol=1e-3, atol=0)
    assert all((b[0] > a[0]).all() and b[1] > a[1] for a, b in pairwise(found))


def test_short_training_stays_finite_and_reduces_the_loss(trunk):
    lines = []
    features = [level[:, :, :6, :6] for level in drawn_features(4)]
    method = trained(trunk, epochs=150, learning_rate=5e-4, features=features, announce=lines.append)
    losses = [float(line.rpartition(" ")[2]) for line in lines]
    assert len(losses) == 150
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.8 * losses[0]
    for flow, level in zip(method.flows, drawn_features(3, seed=7), strict=True):
        back = flow.inverse(flow(level)[0])
        assert float((back - level).norm() / level.norm()) < 1e-4


def test_the_same_seed_trains_the_same_tensors(trunk):
    first, again, other = (trained(trunk, seed=seed).flows.state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first if "order" in key)


def test_training_that_diverges_ends_with_one_line(trunk):
    with pytest.raises(
        FlawmapError, match=r"training diverged: the loss of flows is .* at step \d+ of .*learning"
    ) as caught:
        trained(trunk, learning_rate=1e6, clamp="none")
    assert "\n" not in str(caught.value)


def test_steps_are_bounded(trunk):
    (stage,) = create(trunk, epochs=20, max_steps=30, batch_size=8).stages(80)
    assert stage.epochs == 3
    (stage,) = create(trunk, "paper").stages(80)
    assert (stage.epochs, stage.batch_size) == (750, 32)


def test_what_lies_outside_neither_scores_nor_trains(trunk):
    method = trained(trunk, subnet="CC", steps=1, two_sided="false", image_logdet=0.5)
    features = drawn_features(2, seed=5)
    inside = torch.ones(2, 1, *SIZE)
    inside[:, :, :, 24:] = 0
    whole = method.score([level.clone() for level in features])
    loss = float(method.loss(features, inside).detach())
    for level in features:
        level[..., -level.shape[3] // 4 :] += 50  # farther from the inside than the convolutions reach
    masked = method.score([level.clone() for level in features], inside)
    torch.testing.assert_close(masked[0][..., :5], whole[0][..., :5])
    assert (masked[1] <= whole[1]).all()
    assert (method.score(features)[1] > 5 * whole[1]).all()
    assert float(method.loss(features, inside).detach()) == pytest.approx(loss, rel=1e-5)
    assert float(method.loss(features, None).detach()) > 2 * loss


def test_noise_in_z_disturbs_the_maps_around_it(trunk):
    method = trained(trunk, epochs=10)
    features = drawn_features(2, seed=5)
    with torch.no_grad():
        levels = method.inputs(features)

    def noise(*places, strength=3.0):
        return with_noise(method.flows, levels, places, strength=strength)

    def moved(*places, strength=3.0):
        return disturbed(method.flows, levels, noise(*places, strength=strength))

    for disturbance, level in zip(moved(), features, strict=True):
        assert float(disturbance.max()) < 1e-4 * float(level.std())
    noisy, plain = noise((0.3, 0.7), strength=2.0), noise()
    for a, b in zip(noisy, plain, strict=True):
        assert float((a - b).abs().flatten(2).amax(1).gt(0).sum(1)[0]) == 1
        assert float((a - b).flatten(2).std(1).amax()) == pytest.approx(2, rel=0.5)
    for row, column in ((0.3, 0.7), (0.99, 0.0)):
        for disturbance in moved((row, column)):
            side = disturbance.shape[-1]
            assert disturbance.shape == (2, side, side)
            at = np.unravel_index(int(disturbance[0].argmax()), (side, side))
            assert at == (int(row * side), int(column * side))
            assert float(disturbance[0, at[0], at[1]]) > 10 * float(disturbance[0].median())
    weak, strong = (moved((0.5, 0.5), strength=strength)[0] for strength in (1.0, 4.0))
    assert (strong.amax((1, 2)) > 2 * weak.amax((1, 2))).all()
