import math

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from scipy.ndimage import rotate

from flawmap import Detector, FlawmapError
from flawmap.backbones import create_backbone
from flawmap.backbones.tracing import to_onnx
from flawmap.imaging.geometry import Geometry
from flawmap.methods import configure
from flawmap.methods.blocks.pixel_losses import focal, ssim
from flawmap.methods.draem import DRAEM, Autoencoder, DRAEMConfig, discriminative, rotated
from synthetic_batches import batch

LEVELS = ("blocks.4",)


@pytest.fixture
def method():
    torch.manual_seed(0)
    trunk = create_backbone(levels=LEVELS, weights="random", size=(64, 64))
    return DRAEM(DRAEMConfig(levels=LEVELS, width=4), trunk, (64, 64))


def parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


def test_the_printed_networks_have_as_many_parameters_as_the_authors():
    paper = configure(DRAEM, {}, "paper")
    with torch.device("meta"):
        reconstruct, discriminate = Autoencoder(paper.width), discriminative(paper.width // 2)
        assert reconstruct(torch.empty(2, 3, 256, 256)).shape == (2, 3, 256, 256)
        assert discriminate(torch.empty(2, 6, 256, 256)).shape == (2, 2, 256, 256)
    # 97.42 M in all: what the networks of the authors' program have
    assert (parameters(reconstruct), parameters(discriminate)) == (69_048_579, 28_374_146)


def test_the_paper_preset_is_the_printed_schedule():
    paper = configure(DRAEM, {}, "paper")
    printed = {"epochs": 700, "max_steps": 0, "batch_size": 8, "learning_rate": 1e-4, "clean": 0.5}
    assert {name: getattr(paper, name) for name in printed} == printed
    assert configure(DRAEM, {}, "authors").rotate == 0.3
    assert configure(DRAEM, {}, "quick") == DRAEMConfig()


def test_the_loss_is_the_sum_of_its_three_terms(method):
    tensors = batch()
    rebuilt, logits = method.network.eval()(method.unit(tensors[1]))
    good = method.unit(tensors[0])
    expected = torch.nn.functional.mse_loss(rebuilt, good) + 1 - ssim(rebuilt, good).mean()
    expected = expected + focal(logits, tensors[2]).mean()
    torch.testing.assert_close(method.loss(tensors, None), expected)
    everywhere = torch.ones_like(tensors[2])
    torch.testing.assert_close(method.loss(tensors, everywhere), expected)
    changed = [tensor.clone() for tensor in tensors]
    changed[2][..., 40:, :] = 1 - changed[2][..., 40:, :]  # outside, nothing is compared with the mask
    everywhere[..., 40:, :] = 0
    torch.testing.assert_close(method.loss(changed, everywhere), method.loss(tensors, everywhere))


def test_the_discriminative_network_trains_the_reconstructive_one(method):
    _, logits = method.network(method.unit(batch()[1]))
    focal(logits, batch()[2]).mean().backward()
    first = method.network.reconstruct.encoder.blocks[0][0]
    assert float(first.weight.grad.abs().max()) > 0


def test_images_are_turned_as_scipy_turns_them(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda count: torch.full((count,), 0.75))  # half of 90 degrees
    good, defective, masks = batch(1)
    height = 40
    good, defective, masks = good[..., :height, :], defective[..., :height, :], masks[..., :height, :]
    turned = rotated(1.0, good, defective, masks, masks)
    for before, after in zip((good, defective), turned[:2], strict=True):
        expected = rotate(before[0].numpy(), 45, axes=(2, 1), reshape=False, order=1, mode="grid-constant")
        np.testing.assert_allclose(after[0], expected, atol=1e-4)
    assert set(turned[2].unique().tolist()) == {0, 1}
    assert float(turned[2].sum()) == pytest.approx(float(masks.sum()), rel=0.05)
    torch.testing.assert_close(turned[3], turned[2])
    # outside the mask the two images are still the same, but for where the mask's edge is interpolated
    inner = torch.nn.functional.max_pool2d(turned[2], 5, 1, 2) == 0
    torch.testing.assert_close(turned[0][inner.expand_as(good)], turned[1][inner.expand_as(good)])


def test_a_share_of_the_images_is_turned():
    torch.manual_seed(0)
    good = torch.rand(400, 3, 8, 8)
    turned, again, masks, inside = rotated(0.3, good, good, good[:, :1].round(), None)
    changed = ((turned - good).abs().amax((1, 2, 3)) > 1e-4).float().mean()
    assert float(changed) == pytest.approx(0.3, abs=3 * math.sqrt(0.3 * 0.7 / 400))
    assert inside is None
    torch.testing.assert_close(turned, again)
    assert masks.shape == (400, 1, 8, 8)


def test_onnxruntime_agrees_at_any_batch_size(method):
    method.network.train()(torch.rand(4, 3, 64, 64))  # running statistics that are not those of the start
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


def test_training_from_images_to_a_verdict(drawn):
    settings = {"width": 2, "max_steps": 4, "batch_size": 4, "rotate": 0.5}
    detector = Detector("draem", image_size=64, engine="torch", **settings).fit(drawn)
    assert np.isfinite(detector.calibration_.scores).all()
    assert not detector.method_.network.training
    found = detector.predict(drawn / "test" / "good" / "000.png")
    assert 0 <= found.score <= 1
    assert found.anomaly_map.shape == (128, 128)


def test_an_image_that_shrinks_while_it_is_learnt_from_is_named(tmp_path):
    rng = np.random.default_rng(0)
    for number, side in enumerate((200, 64, 100, 130)):
        Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")

    def shrink(what, done, total):
        if what == "features" and done == total:
            for number in (0, 2, 3):
                Image.new("RGB", (40, 40), "red").save(tmp_path / f"{number}.png")

    tiles = Geometry.from_options(False, None, "64")
    detector = Detector("draem", image_size=64, geometry=tiles, max_steps=4, width=4, batch_size=2, engine="torch")
    with pytest.raises(FlawmapError, match=r"\d.png: was changed while it was being learnt from"):
        detector.fit(tmp_path, progress=shrink)
