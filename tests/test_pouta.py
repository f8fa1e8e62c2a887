import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from flawmap import Detector
from flawmap.backbones import create_backbone
from flawmap.backbones.tracing import to_onnx
from flawmap.methods import configure
from flawmap.methods.blocks.encoder_decoder import redraw
from flawmap.methods.blocks.pixel_losses import focal, ssim
from flawmap.methods.pouta import POUTA, Guidance, Head, Network, POUTAConfig, vanilla
from synthetic_batches import batch

LEVELS = ("blocks.4",)
VARIANTS = ("vanilla", "base", "hsg", "mss", "full")
PAPER = POUTA.presets["paper"].settings


@pytest.fixture(scope="module")
def trunk():
    return create_backbone(levels=LEVELS, weights="random", size=(64, 64))


@pytest.fixture
def build(trunk):
    """A method in training, and its stages, of which the first has come."""

    def make(**settings):
        torch.manual_seed(0)
        method = POUTA(POUTAConfig(levels=LEVELS, **{"width": 4, "head_width": 8} | settings), trunk, (64, 64))
        stages = method.stages(10)
        method.stage = next(stages)
        return method, stages

    return make


def parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


def printed(**settings):
    with torch.device("meta"):
        return Network(POUTAConfig(**PAPER | settings)).eval()


def giga_macs(network):
    counter = FlopCounterMode(display=False)
    with counter:
        network(torch.empty(1, 3, 224, 224, device="meta"))
    return counter.get_total_flops() / 2e9


def concatenated(self, maps):
    """The head as the paper draws it."""
    full = [F.interpolate(level, size=maps[0].shape[-2:], mode="bilinear", align_corners=False) for level in maps]
    return self.predict(self.mix(torch.cat(full, 1)))


def test_parameters_of_the_printed_network():
    network = printed()
    assert parameters(network.reconstruct) == 14_012_995
    assert parameters(network) == 15_010_888
    heads = [torch.nn.Conv2d(width, 2, 1) for width in (32, 64, 128, 256)]
    assert parameters(network) + sum(map(parameters, heads)) == 15_011_856  # the paper's 15.02 M


def test_operations_of_the_printed_network(monkeypatch):
    found = giga_macs(printed())
    monkeypatch.setattr(Head, "forward", concatenated)
    as_drawn = giga_macs(printed())
    assert as_drawn == pytest.approx(35.33, abs=0.01)  # the paper's 35.37 G
    assert found == pytest.approx(32.64, abs=0.01)  # the head convolves each scale at its own size


def test_the_other_layouts_are_near_the_printed_figures_too(monkeypatch):
    other = printed(recon_style="bilinear", head_width=0)
    assert parameters(other) == pytest.approx(15.02e6, rel=0.005)
    with torch.device("meta"):
        plain = vanilla(POUTAConfig(**{**PAPER, "variant": "vanilla"})).eval()
    assert parameters(plain) == pytest.approx(28.6e6, rel=0.001)  # the paper's 28.68 M
    assert giga_macs(plain) == pytest.approx(39.67, abs=0.05)  # the paper's 39.38 G
    monkeypatch.setattr(Head, "forward", concatenated)
    assert giga_macs(other) == pytest.approx(35.37, rel=0.006)


def test_symmetric_maps_are_of_one_size():
    encoded, decoded = printed().reconstruct.maps(torch.empty(2, 3, 224, 224, device="meta"))
    shapes = [(2, 64, 224, 224), (2, 128, 112, 112), (2, 256, 56, 56), (2, 512, 28, 28)]
    assert [tuple(level.shape) for level in encoded] == [tuple(level.shape) for level in decoded] == shapes
    *_, compared = printed()(torch.empty(2, 3, 224, 224, device="meta"))
    assert [level.shape[1] for level in compared] == [32, 64, 128, 256]


def test_the_paper_preset_is_the_printed_schedule():
    paper = POUTAConfig(**PAPER)
    schedule = {"epochs": 600, "max_steps": 0, "batch_size": 8, "learning_rate": 2e-4, "clean": 0.5, "pool": 21}
    assert {name: getattr(paper, name) for name in schedule} == schedule
    assert configure(POUTA, {}, "quick") == POUTAConfig()


@pytest.mark.parametrize("width", [0, 6])
@pytest.mark.parametrize("training", [True, False])
def test_the_head_is_that_of_the_concatenated_maps(width, training):
    torch.manual_seed(0)
    head = Head([2, 3, 5, 4], width).train(training)
    maps = [torch.randn(2, channels, 32 // 2**i, 48 // 2**i) for i, channels in enumerate(head.channels)]
    found, expected = head(maps), concatenated(head, maps)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    ours, theirs = (torch.autograd.grad(logits.square().sum(), head.mix.weight)[0] for logits in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


def test_the_head_never_holds_all_channels_at_full_size():
    head = Head([32, 64, 128, 256], 128)
    shapes = []
    maps = [torch.rand(1, channels, 32 // 2**i, 32 // 2**i) for i, channels in enumerate(head.channels)]
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: shapes.append(tuple(kept.shape)) or kept, lambda x: x):
        head(maps)
    assert max(shape[1] for shape in shapes if len(shape) == 4 and shape[2:] == (32, 32)) == 128


@pytest.mark.parametrize("gate", ["sigmoid", "none"])
def test_guidance_is_equation_4(gate):
    torch.manual_seed(0)
    guide = Guidance(6, 3, gate).eval()
    contrast, deeper = torch.randn(2, 3, 8, 8), torch.randn(2, 6, 4, 4)
    lifted = guide.lift(F.interpolate(deeper, size=(8, 8), mode="bilinear"))
    space = torch.einsum("c,bchw->bhw", guide.space.weight[0, :, 0, 0], lifted) + guide.space.bias
    channel = lifted.mean((2, 3)) @ guide.channel.weight[:, :, 0, 0].T + guide.channel.bias
    if gate == "sigmoid":
        space, channel = 1 / (1 + (-space).exp()), 1 / (1 + (-channel).exp())
    torch.testing.assert_close(guide(contrast, deeper), space[:, None] * contrast * channel[:, :, None, None])


def test_gates_of_one_leave_the_base():
    torch.manual_seed(0)
    guided, base = (
        Network(POUTAConfig(width=4, head_width=8, hsg_gate="none", variant=variant)) for variant in ("hsg", "base")
    )
    base.load_state_dict({key: value for key, value in guided.state_dict().items() if not key.startswith("guides.")})
    images = torch.rand(2, 3, 32, 32)
    assert not torch.equal(guided.eval()(images)[1], base.eval()(images)[1])
    for guide in guided.guides:
        for gate in (guide.space, guide.channel):
            assert (gate.bias == 1).all()  # how they start
            torch.nn.init.zeros_(gate.weight)
    for ours, theirs in zip(guided(images)[:2], base(images)[:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_comparisons_can_be_linear():
    linear = Network(POUTAConfig(width=4, fcm_act=False, variant="base"))
    assert not [m for m in linear.contrasts.modules() if isinstance(m, torch.nn.BatchNorm2d | torch.nn.ReLU)]


@pytest.mark.parametrize("recon_style", ["transposed", "bilinear"])
@pytest.mark.parametrize("term", ["focal", "l1"])
def test_the_prediction_loss_alone_reaches_the_encoder(build, term, recon_style):
    method, _ = build(reconstruction_loss="none", prediction_loss=term, variant="hsg", recon_style=recon_style)
    method.loss(batch(), None).backward()
    for name, parameter in method.network.reconstruct.named_parameters():
        if name.startswith("out."):  # the repaired image itself is not compared
            assert parameter.grad is None
        elif name.endswith("weight"):
            assert float(parameter.grad.abs().max()) > 0, name


def test_the_loss_is_the_sum_of_equation_8(build):
    method, _ = build(lambda_1=0.4, lambda_2=0.3, lambda_3=0.2, lambda_4=0.1)
    method.network.eval()
    tensors = batch()
    good, mask = method.unit(tensors[0]), tensors[2]
    rebuilt, logits, maps = method.network(method.unit(tensors[1]))

    def compared(logits):
        large = F.interpolate(logits, size=(64, 64), mode="bilinear", align_corners=False)
        return focal(large, mask).mean() + F.l1_loss(large.softmax(1)[:, 1:], mask)

    expected = F.mse_loss(rebuilt, good) + 1 - ssim(rebuilt, good).mean() + compared(logits)
    for weight, head, level in zip((0.4, 0.3, 0.2, 0.1), method.heads, maps, strict=True):
        enlarged = F.interpolate(level, size=(64, 64), mode="bilinear", align_corners=False)
        expected = expected + weight * compared(head(enlarged))
    torch.testing.assert_close(method.loss(tensors, None), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(method.loss(tensors, torch.ones_like(mask)), expected, rtol=1e-5, atol=1e-6)


def test_the_largest_weight_is_that_of_the_finest_scale(build):
    method, _ = build()
    method.network.eval()
    tensors = batch()
    *_, maps = method.network(method.unit(tensors[1]))
    assert [level.shape[-1] for level in maps] == [64, 32, 16, 8]
    alone = []
    for i in range(4):
        weights = {f"lambda_{j + 1}": float(i == j) for j in range(4)}
        method.config = method.config.model_copy(update=weights)
        alone.append(method.supervision(maps, tensors[2], None))
    method.config = POUTAConfig()
    expected = sum(weight * loss for weight, loss in zip((0.4, 0.3, 0.2, 0.1), alone, strict=True))
    torch.testing.assert_close(method.supervision(maps, tensors[2], None), expected)


def test_an_empty_mask_asks_for_no_defect(build):
    method, _ = build()
    empty = torch.zeros(2, 1, 64, 64)
    sure = torch.tensor([20.0, -20.0])[:, None, None].expand(2, 2, 64, 64)
    assert float(method.prediction(sure, empty, None)) == pytest.approx(0, abs=1e-6)
    assert float(method.prediction(-sure, empty, None)) > 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_supervision_ends_with_training(build, trunk, variant):
    method, stages = build(variant=variant)
    supervised = variant in ("mss", "full")
    assert len(method.heads) == (4 if supervised else 0)
    trained = {id(parameter) for parameter in method.stage.parameters}
    assert {id(p) for p in [*method.network.parameters(), *method.heads.parameters()]} == trained
    method.loss(batch(), None).backward()
    images = torch.randn(2, 3, 64, 64)
    method.eval()
    before = method(images)
    assert list(stages) == []
    assert not hasattr(method, "heads")
    after = method(images)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not [key for key in method.state_dict() if "heads" in key]
    fresh = POUTA(method.config, trunk, (64, 64)).eval()
    fresh.load_state(method.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(before, fresh(images), strict=True))


@pytest.mark.parametrize("gate", ["sigmoid", "none"])
def test_steps_lower_the_loss(build, gate):
    method, _ = build(hsg_gate=gate)
    optimiser = torch.optim.Adam(method.stage.parameters, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = method.loss(batch(), None)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    "settings", [*({"variant": v} for v in VARIANTS), {"recon_style": "bilinear", "head_width": 0}]
)
def test_onnxruntime_agrees_at_any_batch_size(build, settings):
    method, stages = build(**settings)
    method.network(torch.rand(4, 3, 64, 64))  # running statistics that are not those of the start
    list(stages)
    method.eval()
    session = onnxruntime.InferenceSession(
        to_onnx(method, (64, 64), masked=True)[0], providers=["CPUExecutionProvider"]
    )
    images = batch(3)[0]
    inside = torch.ones(3, 1, 64, 64)
    inside[1, :, :, :20] = 0
    for count in (1, 3):
        ours = method(images[:count], inside[:count])
        theirs = session.run(None, {"images": images[:count].numpy(), "inside": inside[:count].numpy()})
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(b, a.detach(), rtol=1e-4)


def test_weights_are_drawn_from_the_seed(build):
    first, second = (build()[0].state_dict() for _ in range(2))
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    network = Network(POUTAConfig())
    redraw(network)
    assert float(network.reconstruct.deepest[0].weight.detach().std()) == pytest.approx(0.02, rel=0.02)


def test_training_from_images_to_a_verdict(drawn):
    settings = {"width": 2, "head_width": 4, "max_steps": 4, "batch_size": 4}
    detector = Detector("pouta", image_size=64, engine="torch", **settings).fit(drawn)
    assert np.isfinite(detector.calibration_.scores).all()
    assert not detector.method_.network.training
    found = detector.predict(drawn / "test" / "good" / "000.png")
    assert 0 <= found.score <= 1
    assert found.anomaly_map.shape == (128, 128)
