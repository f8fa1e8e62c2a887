"""CLS-CNFs: the decoder, the tuned encoder, the sum of both maps."""

import copy

import numpy as np
import pytest
import timm
import torch
from scipy.special import expit, log_expit

from flawmap import Detector, FlawmapError
from flawmap.backbones import Backbone, create_backbone
from flawmap.datasets import find_dataset
from flawmap.flows import Mixing
from flawmap.methods import configure
from flawmap.methods.blocks.decoder import Decoder
from flawmap.methods.blocks.encoder_tuning import EncoderTuning
from flawmap.methods.cls_cnf import ClsCnf

SIZE = (64, 64)
QUICK = {"blocks": 2, "freeze_epochs": 2, "tune_epochs": 2, "epochs": 2, "deep_levels": ()}
WIDE = (512, 1024, 2048)

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture(scope="module")
def trunk():
    levels = ("blocks.2", "blocks.4", "blocks.6")
    return create_backbone(levels=levels, weights="random", size=SIZE)


def create(trunk, **chosen):
    config = configure(ClsCnf, {**QUICK, **chosen})
    return ClsCnf(ClsCnf.resolved(config, trunk.name), trunk, SIZE)


def tuning_of(method):
    return EncoderTuning(method.config, method.backbone, method.decoder, method.read)


def inputs(images=4, seed=0):
    random = np.random.default_rng(seed)
    good = torch.from_numpy(random.standard_normal((images, 3, *SIZE)).astype(np.float32))
    masks = torch.zeros(images, 1, *SIZE)
    masks[:, :, 8:24, 16:40] = 1
    return [good, torch.where(masks > 0, good + 1.5, good), masks]


def features(method, images=3, seed=1):
    with torch.no_grad():
        return method.features(inputs(images, seed)[0])


# Numbers of the paper


def wide(**chosen):
    """With a WideResNet-50-2 that has no weights."""
    with torch.device("meta"):
        trunk = Backbone(
            "wide_resnet50_2", timm.create_model("wide_resnet50_2"), ("layer2", "layer3", "layer4"), (256, 256)
        )
        return ClsCnf(configure(ClsCnf, chosen, "authors"), trunk, (256, 256))


def test_the_printed_decoder_has_7_797_080_parameters():
    with torch.device("meta"):
        decoder = Decoder(WIDE, (256, 256))
        maps = [torch.zeros(2, c, side, side) for c, side in zip(WIDE, (32, 16, 8), strict=True)]
        assert decoder(maps).shape == (2, 1, 256, 256)
    assert sum(p.numel() for p in decoder.parameters()) == 7_797_080
    widths = [stage[0].body[0].out_channels for stage in decoder.stages]
    assert widths == [256, 128, 64, 32]
    assert [len(stage) for stage in decoder.stages] == [3, 6, 4, 3]


@pytest.mark.parametrize(
    ("chosen", "mib"),
    [
        ({"maps": "classifier"}, 284.7),
        ({"maps": "flows"}, 740.5),
        ({}, 770.3),
        ({"shared": False}, 1025.2),
    ],
)
def test_model_sizes_are_those_of_table_3(chosen, mib):
    method = wide(**chosen)
    trainable = sum(p.numel() for p in method.parameters())
    fixed = sum(part.matrix.numel() for part in method.modules() if isinstance(part, Mixing))
    size = 4 * (trainable + 2 * fixed) / 2**20  # the authors store each fixed matrix and its inverse
    print(f"{chosen}: {size:.1f} MiB")
    assert round(size, 1) == mib
    assert 4 * sum(p.numel() for p in method.backbone.parameters()) / 2**20 == pytest.approx(254.95, abs=0.005)


def test_the_papers_settings():
    paper = configure(ClsCnf, {}, "paper")
    assert paper.two_sided  # Fig. 3; Table 3's sizes are those of one side, as the authors have it
    assert (paper.blocks, paper.fibres, paper.learning_rate, paper.epochs) == (6, 256, 2e-4, 200)
    assert (paper.stride, paper.upsampling, paper.reflect, paper.weight_decay) == (1, "bicubic", True, 1e-4)
    reflecting = [m for m in wide().backbone.modules() if isinstance(m, torch.nn.Conv2d) and max(m.padding)]
    assert len(reflecting) == 17  # the stem and a 3 x 3 convolution in each of 16 blocks
    assert all(m.padding_mode == "reflect" for m in reflecting)


# The decoder


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("size", [(64, 64), (96, 64), (100, 76)])
def test_the_decoder_answers_at_its_stride(stride, size):
    decoder = Decoder((40, 112, 320), size, 1, stride=stride, upsampling="bilinear")
    maps = [torch.randn(2, c, -(-size[0] // f), -(-size[1] // f)) for c, f in ((40, 8), (112, 16), (320, 32))]
    assert decoder(maps).shape == (2, 1, size[0] // stride, size[1] // stride)


def test_without_skips_the_deepest_level_alone_is_read():
    maps = [torch.randn(2, c, side, side) for c, side in ((40, 8), (112, 4), (320, 2))]
    others = [torch.randn_like(maps[0]), torch.randn_like(maps[1]), maps[2]]
    for skips in (True, False):
        decoder = Decoder((40, 112, 320), SIZE, 3, stride=4, skips=skips).eval()
        assert torch.equal(decoder(maps), decoder(others)) is not skips


# Labels and losses


def test_soft_labels_are_sigmoids_of_the_change_in_pixel_values(trunk):
    good, defective, masks = inputs()
    std = np.array(trunk.std)
    labels = tuning_of(create(trunk)).soft_labels(good, defective, masks)
    assert not labels[masks == 0].any()
    expected = expit(5 * np.abs(1.5 * std).mean())
    np.testing.assert_allclose(labels[masks > 0], expected, rtol=1e-5)
    darker = torch.where(masks > 0, good - 1.5, good)
    signed = tuning_of(create(trunk, soft_label="official_signed_scalar")).soft_labels(good, darker, masks)
    np.testing.assert_allclose(signed[masks > 0], 1 - expected, rtol=1e-4)
    binary = tuning_of(create(trunk, soft_label="binary")).soft_labels(good, defective, masks)
    assert torch.equal(binary, masks)


def test_the_classification_loss_is_equation_1(trunk):
    method, batch = create(trunk, soft_label="binary"), inputs()
    method.decoder.eval()
    with torch.no_grad():
        logits = method.decoder(method.backbone(batch[1])).double().numpy()
        found = float(tuning_of(method).classification_loss(batch, None))
        inside = torch.ones_like(batch[2])
        inside[..., 32:] = 0
        half = float(tuning_of(method).classification_loss(batch, inside))
    label = batch[2].numpy()[:, :, ::4, ::4]  # the mask's borders lie on the decoder's grid
    losses = -(label * log_expit(logits) + (1 - label) * log_expit(-logits))
    assert found == pytest.approx(losses.mean(), rel=1e-4)
    assert half == pytest.approx(losses[..., :8].mean(), rel=1e-4)


def train(method, stage, batch, steps):
    optimiser = stage.optimiser(stage.parameters)
    for _ in range(steps):
        loss = stage.loss(batch, None)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return float(loss.detach())


def test_the_encoder_rests_at_first_and_its_statistics_always(trunk):
    before = copy.deepcopy(trunk.state_dict())
    method, batch = create(trunk), inputs()
    stages = method.stages(8)
    tuning = next(stages)
    assert tuning.epochs == 4
    tuning.before_epoch(1)
    first = train(method, tuning, batch, 3)
    for key, value in method.backbone.state_dict().items():
        assert torch.equal(value, before[key]), key
    tuning.before_epoch(2)
    assert train(method, tuning, batch, 30) < 0.5 * first
    changed = {key for key, value in method.backbone.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {name for name, _ in method.backbone.named_parameters()}
    for key, value in trunk.state_dict().items():  # another method's, and the next fold's
        assert torch.equal(value, before[key]), key
    next(stages)
    assert not any(p.requires_grad for p in method.backbone.parameters())
    assert not method.decoder.training


def test_a_pretrained_encoder_is_never_tuned(trunk):
    method = create(trunk, encoder="pretrained")
    tuning = next(method.stages(8))
    tuning.before_epoch(3)
    assert not any(p.requires_grad for p in method.backbone.parameters())
    flows = create(trunk, encoder="pretrained", maps="flows")
    assert [stage.name for stage in flows.stages(8)] == ["whitening", "flows", "largest likelihoods"]


def test_regression_redraws_the_good_image(trunk):
    method = create(trunk, encoder="regressed", maps="flows", stride=1)
    stages = method.stages(8)
    tuning, batch = next(stages), inputs()
    decoder = method.decoder
    with torch.no_grad():
        decoder.eval()
        expected = (decoder(method.backbone(batch[0])) - batch[0]).abs().mean()
        assert float(tuning.loss(batch, None)) == pytest.approx(float(expected), rel=1e-5)
    next(stages)
    assert method.decoder is None  # it has served


@pytest.mark.parametrize("wrong", [{"maps": "flows", "weight": "2"}, {"maps": "classifier", "weight": "0.5"}])
def test_a_weight_of_one_map_is_refused(wrong):
    with pytest.raises(FlawmapError, match=r"do not go together: weight .* set maps=joint") as caught:
        configure(ClsCnf, wrong)
    assert "\n" not in str(caught.value)


def test_other_than_three_levels_or_no_pass_are_refused(drawn):
    with pytest.raises(FlawmapError, match="three levels, not 2"):
        fitted(drawn, levels="blocks.2,blocks.4")
    with pytest.raises(FlawmapError, match="give one of them a pass"):
        configure(ClsCnf, {"freeze_epochs": 0, "tune_epochs": "0"})


def test_a_decoder_that_redraws_does_not_classify(drawn):
    with pytest.raises(FlawmapError, match="set maps=flows"):
        fitted(drawn, encoder="regressed")


# Maps


def likely(method):
    """With flows that have learnt where nothing is as likely as the likeliest of random images."""
    for stage in list(method.density.stages(3))[::2]:
        with torch.no_grad():
            stage.update(features(method), None)
            stage.close(lambda done, total: None)
    return method.eval().requires_grad_(False)


@pytest.mark.parametrize("image_score", ["latent", "map"])
def test_the_joint_map_is_the_weighted_sum_of_both(trunk, image_score):
    method = likely(create(trunk, weight=0.3, sigma=0, image_score=image_score))
    new = features(method, 2, seed=5)
    with torch.no_grad():
        anomaly_map, score = method.score(new)
        found = method.density.likelihoods(new)
        a_p = expit(method.decoder(new).double().numpy())
    a_nf = 0
    for i, (log_p, _) in enumerate(found):
        part = 1 - (log_p - method.density.peaks[i]).exp()
        part = torch.nn.functional.interpolate(part, size=(8, 8), mode="bilinear")
        a_nf = a_nf + torch.nn.functional.interpolate(part, size=(16, 16), mode="bilinear").numpy()
    np.testing.assert_allclose(anomaly_map, a_nf + 0.3 * a_p, rtol=1e-4, atol=1e-5)
    if image_score == "map":
        np.testing.assert_allclose(score, (a_nf + 0.3 * a_p).max((1, 2, 3)), rtol=1e-4)
    other = method.with_settings(method.config.model_copy(update={"weight": 0.0}))
    np.testing.assert_allclose(other.score(new)[0], a_nf, rtol=1e-4, atol=1e-5)
    assert method.w == pytest.approx(0.3)  # untouched


def test_scores_of_latents_are_those_of_features(trunk):
    method = likely(create(trunk))
    new, inside = features(method, 2, seed=5), torch.ones(2, 1, *SIZE)
    inside[:, :, :, :24] = 0
    for scored in (None, inside):
        with torch.no_grad():
            direct = method.score(new, scored)
            kept = method.score_latents(method.latents(new, scored), scored)
        for one, other in zip(direct, kept, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5)


def test_separate_encoders_give_the_flows_the_pretrained_features(trunk):
    method = create(trunk, shared=False)
    with torch.no_grad():
        for parameter in method.tuned.parameters():
            parameter.mul_(1.1)
    images = inputs()[0]
    with torch.no_grad():
        maps = method.features(images)
        for one, other in zip(maps, [*trunk(images), *method.tuned(images)], strict=True):
            assert torch.equal(one, other)
        likely(method)
        _, _, a_p = method.parts(maps)
        np.testing.assert_allclose(a_p, expit(method.decoder(maps[3:]).numpy()), rtol=1e-5)


# The whole road


def fitted(drawn, **chosen):
    return Detector("cls_cnf", image_size=64, **{**QUICK, **chosen}).fit(drawn)


@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"shared": False, "maps": "joint"},
        {"encoder": "regressed", "maps": "flows"},
        {"maps": "classifier"},
    ],
    ids=str,
)
def test_calibration_scores_are_those_of_inspection_with_the_tuned_encoder(drawn, chosen):
    detector = fitted(drawn, engine="torch", **chosen)
    paths = [sample.path for sample in find_dataset(drawn).train]
    scores = sorted(inspection.score for inspection in detector.predict([str(path) for path in paths]))
    for score in detector.calibration_.scores:  # features are kept in half precision
        assert min(abs(score - other) for other in scores) < 5e-3 * abs(score)
    assert detector.method_.backbone.digest() != create_backbone(
        levels=detector.method_.backbone.levels, size=SIZE
    ).digest() or (not detector.config.shared)


def test_the_weight_moves_after_training(drawn, tmp_path):
    detector = fitted(drawn)
    detector.save(tmp_path / "m")
    loaded = Detector.load(tmp_path / "m")
    image = str(find_dataset(drawn).train[0].path)
    one = loaded.predict(image)
    moved = loaded.with_settings(weight=0.0)
    flows = moved.predict(image)
    assert one.score > flows.score
    np.testing.assert_array_equal(moved.with_settings(weight=1.0).predict(image).maps, one.maps)
    assert moved.threshold_.value != loaded.threshold_.value


INTERRUPTED = {**QUICK, "image_size": 64, "engine": "torch", "tune_batch_size": 4, "batch_size": 4}


@pytest.fixture(scope="module")
def uninterrupted(drawn, tmp_path_factory):
    path, threads = tmp_path_factory.mktemp("whole") / "m", torch.get_num_threads()
    torch.set_num_threads(1)  # as the tests do: sums of several threads have other last digits
    Detector("cls_cnf", **INTERRUPTED).fit(drawn).save(path)
    torch.set_num_threads(threads)
    return path.read_bytes()


@pytest.mark.parametrize("at", [("encoder", 7), ("whitening", 9), ("flows", 4)])
def test_an_interrupted_training_goes_on_to_the_same_file(drawn, uninterrupted, tmp_path, at):
    def stop(what, done, total):
        if (what, done) == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Detector("cls_cnf", **INTERRUPTED).fit(drawn, workspace=tmp_path / "work", progress=stop)
    resumed = Detector("cls_cnf", **INTERRUPTED).fit(drawn, workspace=tmp_path / "work", resume=True)
    resumed.save(tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == uninterrupted
