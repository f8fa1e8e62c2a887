"""Settings that give what papers and programs print, where the defaults do otherwise; and choices of the presets."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from feature_maps import LEVELS, SIZE, drawn_features, small_trunk
from flawmap.backbones import create_backbone
from flawmap.backbones.catalogue import DEFAULT_BACKBONE
from flawmap.backbones.pyramid import Pyramid
from flawmap.flows import convolutions
from flawmap.flows.subnets import CBAM
from flawmap.methods import configure, method_class
from flawmap.methods.blocks.position_flows import warm_cosine
from flawmap.methods.blocks.position_gaussians import PositionGaussians
from flawmap.methods.cainnflow import CAINNFlow
from flawmap.methods.cfa import CFA
from flawmap.methods.differnet import DifferNet
from flawmap.methods.draem import DRAEM
from flawmap.methods.f2r import F2R
from flawmap.methods.pouta import POUTA, Network, POUTAConfig
from flawmap.synthesis import DRAEM as DRAEM_PROGRAM
from flawmap.synthesis import DRAEM_TEXT, SynthesisSettings, synthesize
from flawmap.synthesis import POUTA as MERGED
from flawmap.synthesis.augmentation import OPERATIONS
from flawmap.synthesis.defects import generator
from synthetic_batches import batch


@pytest.fixture(scope="module")
def trunk():
    return small_trunk()


def made(kind, trunk, preset=None, size=SIZE, **chosen):
    torch.manual_seed(0)
    return kind(kind.resolved(configure(kind, {"levels": LEVELS, **chosen}, preset), trunk.name), trunk, size)


def test_cfa_divides_maps_by_their_channels(trunk):
    features = drawn_features(2)
    plain, divided = (made(CFA, trunk, pool=1, divided=divided).patches(features) for divided in (False, True))
    channels = [level.shape[1] for level in features]
    torch.testing.assert_close(divided, plain / torch.tensor([c for c in channels for _ in range(c)]))


@pytest.mark.parametrize(("start", "spread"), [("he", math.sqrt(2)), ("torch", 1 / math.sqrt(3))])
def test_cfas_descriptor_starts_as_the_text_or_the_program_has_it(trunk, start, spread):
    method = made(CFA, trunk, whiten=False, start=start, gamma_d=1.0)
    next(method.stages(3))
    weight = method.descriptor.weight.detach()
    assert float(weight.std()) == pytest.approx(spread / math.sqrt(weight.shape[1]), rel=0.1)


def test_levels_meet_at_the_inputs_size_if_they_are_to(trunk):
    method = made(CAINNFlow, trunk, meet="input", deep_levels="", scoring="probability", sigma=0.0)
    assert method.grid == SIZE
    features = drawn_features(2)
    found = method.likelihoods(features)
    maps, _ = method.score(features)
    values = [1 - (-(half - method.config.score_logdet * log_det)).exp() for half, log_det in found]
    shares = [level.shape[1] / sum(f.shape[1] for f in features) for level in features]
    enlarged = [F.interpolate(v, size=SIZE, mode="bilinear", align_corners=False) for v in values]
    torch.testing.assert_close(maps, sum(s * e for s, e in zip(shares, enlarged, strict=True)))
    torch.testing.assert_close(method.enlarge(maps), maps)


def test_cainnflows_paper_trains_without_a_clamp(trunk):
    method = made(CAINNFlow, trunk, preset="paper", steps=1)
    features = drawn_features(4)
    optimiser = torch.optim.Adam(method.flows.parameters(), lr=method.config.learning_rate)
    losses = []
    for _ in range(12):
        loss = method.loss(features, None)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    with torch.no_grad():
        maps, scores = method.score(features)
    density = [(half - log_det)[:, 0] for half, log_det in method.likelihoods(features)]
    enlarged = [F.interpolate(d[:, None], size=SIZE, mode="bilinear", align_corners=False) for d in density]
    torch.testing.assert_close(maps, torch.stack(enlarged).mean(0).detach())
    torch.testing.assert_close(scores, maps.amax((1, 2, 3)))


def test_cac_is_a_convolution_then_attention_then_a_convolution():
    kinds = [type(layer) for layer in convolutions("CAC", activation=False)(8, 8)]
    assert kinds == [torch.nn.Conv2d, CBAM, torch.nn.Conv2d]


def test_differnets_step_sees_some_of_the_angles(trunk):
    method = made(DifferNet, trunk, rotations=8, step_rotations=3, scales=1, components=0)
    assert isinstance(DifferNet.extractor(method.config, trunk, SIZE), Pyramid)
    maps = [torch.arange(2 * c * 8.0).view(2, c, 8, 1) for c in (4, 6)]
    torch.manual_seed(1)
    seen = method._seen(maps)
    assert [level.shape for level in seen] == [(2, 4, 3, 1), (2, 6, 3, 1)]
    for image in range(2):
        angles = (seen[0][image, 0, :, 0] - maps[0][image, 0, 0, 0]).tolist()
        assert len(set(angles)) == 3
        for level, plain in zip(seen, maps, strict=True):  # the same ones of all levels
            assert torch.equal(level[image], plain[image][:, [int(a) for a in angles]])
    paper = configure(DifferNet, {}, "paper")
    assert paper.batch_size * paper.step_rotations == 96


def test_padims_coarse_levels_can_be_replicated():
    gaussians = PositionGaussians([3, 2], (4, 4), 5, enlarge="nearest")
    gaussians.reduce.copy_(torch.eye(5))
    coarse = torch.rand(1, 2, 2, 2)
    embedded = gaussians.embed([torch.rand(1, 3, 4, 4), coarse])  # (P, B, C)
    expected = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3).flatten(2)[0].T
    torch.testing.assert_close(embedded[:, 0, 3:], expected)
    assert configure(method_class("padim"), {}, "paper").enlarge == "nearest"


def rates(schedule, steps):
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    moving, found = schedule(optimiser, steps), []
    for _ in range(steps):
        found.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        moving.step()
    return found


def test_the_flows_cosine_begins_after_the_warm_up_or_at_the_start():
    after, whole = (rates(partial(warm_cosine, whole=whole), 1000) for whole in (False, True))
    assert (after[500], whole[500]) == (pytest.approx(0.569, abs=2e-3), pytest.approx(0.5, abs=2e-3))
    for found in (after, whole):
        assert found[0] == pytest.approx(0.1)
        assert found[-1] < 0.002
        assert max(found) == pytest.approx(found[80], rel=1e-6)


def test_f2rs_rate_falls_along_a_cosine(trunk):
    method = made(F2R, trunk, components=8)
    stage = next(stage for stage in method.stages(2) if stage.name == "flow")
    found = rates(stage.schedule, 10)
    assert found == pytest.approx([(1 + math.cos(math.pi * i / 10)) / 2 for i in range(10)])


def test_draems_rate_falls_as_its_text_or_its_program_says(trunk):
    for schedule, falls, factor in (("program", (560, 630), 0.2), ("text", (400, 600), 0.1)):
        method = made(DRAEM, trunk, size=(64, 64), width=2, schedule=schedule)
        found = rates(method._steps_down, 700)
        changes = [i for i in range(1, 700) if found[i] != found[i - 1]]
        assert tuple(changes) == falls
        assert found[-1] == pytest.approx(factor**2)


def test_draems_defects_are_its_texts_or_its_programs(trunk):
    assert made(DRAEM, trunk, size=(64, 64), width=2).synthesis() == DRAEM_PROGRAM
    text = made(DRAEM, trunk, size=(64, 64), width=2, defects="text").synthesis()
    assert text == DRAEM_TEXT
    assert (text.opacity, len(text.operations)) == ((0.1, 1.0), 7)
    assert {"gamma", "invert"} == OPERATIONS.keys() - set(text.operations)
    paper = configure(DRAEM, {}, "paper")
    assert (paper.angle, paper.schedule, paper.defects) == (45, "text", "text")
    image = np.full((48, 48, 3), 120, np.uint8)
    shares = [
        synthesize(image, generator(0, n), settings=SynthesisSettings(
            kinds={"texture": 1}, isolated=0, threshold=threshold, attempts=1, least_change=0
        )).mask.mean()
        for n in range(12)
        for threshold in ((-0.9, -0.8), (0.6, 0.7))
    ]  # fmt: skip
    assert min(shares[::2]) > max(shares[1::2])


def test_poutas_blending_can_be_reached(trunk):
    method = made(POUTA, trunk, size=(64, 64), width=2, seamless=1.0, own_share=0.3, opacity=0.4)
    found = method.synthesis()
    assert (found.seamless, found.own_share, found.opacity) == (1.0, (0.0, 0.3), (0.4, 1.0))
    assert made(POUTA, trunk, size=(64, 64), width=2).synthesis() == MERGED
    assert configure(POUTA, {}, "paper").seamless == 1


def test_the_convolution_that_guides_can_be_plain():
    plain, default = (Network(POUTAConfig(width=4, hsg_act=act)).guides for act in (False, True))
    assert all(isinstance(guide.lift, torch.nn.Conv2d) for guide in plain)
    assert not any(isinstance(guide.lift, torch.nn.Conv2d) for guide in default)


def test_deeper_maps_guide_after_they_were_guided_and_heads_see_guided_maps():
    torch.manual_seed(0)
    network = Network(POUTAConfig(width=4, head_width=0, variant="full")).eval()
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        encoded, decoded = network.reconstruct.maps(images)
        raw = [contrast(e, d) for contrast, e, d in zip(network.contrasts, encoded, decoded, strict=True)]
        third = network.guides[2](raw[2], raw[3])
        second = network.guides[1](raw[1], third)
        first = network.guides[0](raw[0], second)
        _, logits, maps = network(images)
        for ours, theirs in zip(maps, (first, second, third, raw[3]), strict=True):
            torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(logits, network.head([first, second, third, raw[3]]))
        assert not torch.allclose(second, network.guides[1](raw[1], raw[2]))


def test_supervision_reads_the_guided_maps(trunk):
    method = made(POUTA, trunk, size=(64, 64), width=4, head_width=8, prediction_loss="focal")
    next(method.stages(2))
    seen = []
    method.supervision = lambda maps, masks, inside: seen.append(maps) or torch.zeros(())
    tensors = batch()
    method.network.eval()
    with torch.no_grad():
        method.loss(tensors, None)
        expected = method.network(method.unit(tensors[1]))[2]
    for ours, theirs in zip(seen[0], expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", [DRAEM, POUTA])
def test_networks_are_drawn_as_draem_draws_them(trunk, kind):
    method = made(kind, trunk, size=(64, 64), width=16)
    spreads = [
        float(layer.weight.detach().std())
        for layer in method.network.modules()
        if isinstance(layer, torch.nn.Conv2d) and layer.weight.numel() > 2000
    ]
    assert spreads == pytest.approx([0.02] * len(spreads), rel=0.1)
    assert kind.printed_size == {DRAEM: 256, POUTA: 224}[kind]


@pytest.mark.parametrize("name", ["equalize", "solarize", "hue and saturation"])
def test_every_operation_changes_a_picture(name):
    from PIL import Image

    pixels = np.random.default_rng(0).integers(40, 200, (16, 16, 3), np.uint8)
    found = [np.asarray(OPERATIONS[name](np.random.default_rng(n), Image.fromarray(pixels))) for n in range(4)]
    assert any(not np.array_equal(one, pixels) for one in found)


def test_the_image_itself_is_moved_turned_or_left_before_it_is_merged():
    ramp = np.arange(48, dtype=np.uint8)
    image = np.stack([ramp[:, None].repeat(48, 1), ramp[None].repeat(48, 0), np.full((48, 48), 9, np.uint8)], 2) * 4
    own = SynthesisSettings(
        kinds={"merged": 1}, seamless=0, opacity=(1, 1), isolated=0, own_share=(1, 1), threshold=-1, least_change=0
    )
    kinds = set()
    for n in range(30):
        made_of = synthesize(image, generator(1, n), settings=own).image
        if np.array_equal(made_of, image):
            kinds.add("left")
        elif np.array_equal(made_of, image[::-1, ::-1]):
            kinds.add("turned")
        elif np.array_equal(np.sort(made_of.reshape(-1, 3), 0), np.sort(image.reshape(-1, 3), 0)):
            kinds.add("moved")
    assert kinds == {"left", "turned", "moved"}


def test_defects_that_miss_the_part_leave_the_image_good_and_grey_ones_stay_coloured():
    grey = np.repeat(np.random.default_rng(0).integers(60, 200, (48, 48, 1), np.uint8), 3, 2)
    region = np.zeros((48, 48), np.bool_)
    region[20:26, 20:26] = True
    kept, redrawn = (
        sum(
            synthesize(grey, generator(2, n), region=region, settings=SynthesisSettings(
                kinds={"texture": 1}, isolated=0, least_change=0, attempts=attempts
            )).kind == "none"
            for n in range(40)
        )
        for attempts in (1, 10)
    )  # fmt: skip
    assert redrawn == 0 < kept
    colour = {
        coloured: any(
            np.ptp(synthesize(grey, generator(3, n), settings=SynthesisSettings(
                kinds={"texture": 1}, isolated=0, least_change=0, coloured=coloured
            )).image, axis=2).any()
            for n in range(6)
        )
        for coloured in (False, True)
    }  # fmt: skip
    assert colour == {False: False, True: True}


def test_cls_cnfs_settings_reach_what_makes_the_defects(trunk):
    kind = method_class("cls_cnf")
    for preset, attempts in (("paper", 10), ("authors", 1)):
        config = configure(kind, {"levels": "a,b,c"}, preset)
        assert (config.empty_masks, config.coloured, config.label_slope) == (preset == "authors", True, 5)
        assert (config.cosine, config.meet, attempts) == ("whole", "input", 1 if config.empty_masks else 10)


def test_each_map_of_cls_cnf_is_enlarged_once(trunk):
    from flawmap.methods.cls_cnf import ClsCnf

    names = "blocks.1,blocks.2,blocks.4"
    chosen = {"maps": "flows", "encoder": "pretrained", "blocks": 1, "deep_levels": "", "sigma": 0.0, "stride": 1}
    backbone = create_backbone(DEFAULT_BACKBONE, tuple(names.split(",")), weights="random", size=(32, 32))
    found = {}
    for meet in ("finest", "input"):
        torch.manual_seed(0)
        config = ClsCnf.resolved(configure(ClsCnf, {"levels": names, "meet": meet, **chosen}), DEFAULT_BACKBONE)
        method = ClsCnf(config, backbone, (32, 32))
        method.density.peaks.zero_()
        with torch.no_grad():
            features = method.features(torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
            found[meet] = method.parts(features)[0]
            likelihoods = method.density.likelihoods(features)
    once = sum(
        F.interpolate(method.density.relative(log_p, i), size=(32, 32), mode="bilinear", align_corners=False)
        for i, (log_p, _) in enumerate(likelihoods)
    )
    torch.testing.assert_close(found["input"], once)
    assert not torch.allclose(found["input"], found["finest"])
