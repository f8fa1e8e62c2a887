"""The blocks, losses and scores that DRAEM and POUTA share."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from torch import nn

from flawmap import FlawmapError
from flawmap.backbones import create_backbone
from flawmap.methods.blocks.encoder_decoder import Decoder, Encoder, UNet, bilinear, convolutions, redraw, transposed
from flawmap.methods.blocks.pixel_losses import focal, mean_inside, ssim
from flawmap.methods.contract import SyntheticDefects
from flawmap.methods.draem import DRAEM, DRAEMConfig

LEVELS = ("blocks.4",)


@pytest.fixture(scope="module")
def trunk():
    return create_backbone(levels=LEVELS, weights="random", size=(64, 64))


def draem(trunk, size, **settings):
    torch.manual_seed(0)
    return DRAEM(DRAEMConfig(levels=LEVELS, width=2, **settings), trunk, size).eval()


def structural_similarity(x, y):
    """Of planes (H, W), window by window, in float64 (Wang et al. 2004, Eq. 13); zeros beyond the border."""
    axis = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window = np.outer(axis, axis) / axis.sum() ** 2
    x, y = (np.pad(plane.astype(np.float64), 5) for plane in (x, y))
    found = np.empty((x.shape[0] - 10, x.shape[1] - 10))
    for i, j in np.ndindex(found.shape):
        a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
        mean_a, mean_b = (window * a).sum(), (window * b).sum()
        var_a, var_b = (window * a**2).sum() - mean_a**2, (window * b**2).sum() - mean_b**2
        covariance = (window * a * b).sum() - mean_a * mean_b
        found[i, j] = (2 * mean_a * mean_b + 1e-4) * (2 * covariance + 9e-4)
        found[i, j] /= (mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4)
    return found


def test_ssim_is_that_of_its_windows():
    random = np.random.default_rng(0)
    x = random.random((2, 3, 17, 23), dtype=np.float32)
    y = np.clip(x + 0.2 * random.standard_normal(x.shape, dtype=np.float32), 0, 1)
    found = ssim(torch.from_numpy(x), torch.from_numpy(y))
    expected = [[structural_similarity(a, b) for a, b in zip(*pair, strict=True)] for pair in zip(x, y, strict=True)]
    np.testing.assert_allclose(found, expected, atol=2e-5)
    a, b = x[0, 0].astype(np.float64), y[0, 0].astype(np.float64)

    def blurred(plane):
        return gaussian_filter(plane, 1.5, radius=5, mode="constant")

    covariance = blurred(a * b) - blurred(a) * blurred(b)
    variances = blurred(a * a) - blurred(a) ** 2 + blurred(b * b) - blurred(b) ** 2
    likeness = (2 * blurred(a) * blurred(b) + 1e-4) / (blurred(a) ** 2 + blurred(b) ** 2 + 1e-4)
    np.testing.assert_allclose(found[0, 0], likeness * (2 * covariance + 9e-4) / (variances + 9e-4), atol=2e-5)


def test_ssim_is_one_of_equal_images_and_exact_in_half_precision_too():
    x = torch.rand(1, 3, 20, 20)
    torch.testing.assert_close(ssim(x, x), torch.ones(1, 3, 20, 20))
    flat = torch.full((1, 3, 40, 40), 0.75)  # its variance is what is left of a difference
    torch.testing.assert_close(ssim(flat, flat), torch.ones(1, 3, 40, 40), rtol=0, atol=1e-3)
    assert ssim(x.half(), x.half()).dtype == torch.float32


@given(st.floats(-30, 30), st.booleans(), st.floats(0, 5))
@settings(max_examples=60, deadline=None)
def test_focal_is_its_formula(gap, defective, gamma):
    logits, mask = torch.tensor([0.0, gap]).view(1, 2, 1, 1), torch.full((1, 1, 1, 1), float(defective))
    log_true = -np.logaddexp(0, -gap if defective else gap)
    expected = -((-np.expm1(log_true)) ** gamma) * log_true
    assert float(focal(logits, mask, gamma)) == pytest.approx(expected, rel=1e-2, abs=1e-5)


def test_pixels_missed_for_certain_still_learn():
    for gap in (12.0, 60.0):  # the network is sure of the wrong class
        logits = torch.tensor([0.0, -gap]).view(1, 2, 1, 1).requires_grad_()
        focal(logits, torch.ones(1, 1, 1, 1)).sum().backward()
        assert float(logits.grad[0, 1]) == pytest.approx(-1, abs=0.01)
    logits = torch.tensor([0.0, 90.0]).view(1, 2, 1, 1).requires_grad_()
    focal(logits, torch.ones(1, 1, 1, 1), gamma=0.5).sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_focal_of_gamma_zero_is_cross_entropy():
    logits = torch.randn(4, 2, 6, 5, generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(4 * 6 * 5).reshape(4, 1, 6, 5) % 3 == 0).float()
    ours = focal(logits, mask, gamma=0.0)
    torch.testing.assert_close(ours, F.cross_entropy(logits, mask[:, 0].long(), reduction="none")[:, None])
    assert torch.isfinite(focal(torch.tensor([-500.0, 500.0]).view(1, 2, 1, 1), mask[:1, :, :1, :1])).all()


def test_means_count_what_is_inside():
    values = torch.arange(24.0).reshape(1, 2, 3, 4)
    inside = torch.zeros(1, 1, 3, 4)
    inside[..., 1, 2] = 1
    assert float(mean_inside(values, None)) == 11.5
    assert float(mean_inside(values, inside)) == 12.0  # 6 and 18
    assert float(mean_inside(values, torch.zeros(1, 1, 3, 4))) == 0


def test_blocks_are_what_they_are_called():
    encoder = Encoder(3, [(4, 5), (6,), (7, 7)])
    assert [tuple(level.shape) for level in encoder(torch.rand(1, 3, 16, 8))] == [
        (1, 5, 16, 8),
        (1, 6, 8, 4),
        (1, 7, 4, 2),
    ]
    for upsampling in (bilinear, transposed(2), transposed(4)):
        decoder = Decoder(7, [(6, 5), (4, 3, 2)], upsampling)
        assert [tuple(level.shape) for level in decoder(torch.rand(2, 7, 4, 2))] == [(2, 5, 8, 4), (2, 2, 16, 8)]
        net = UNet(3, [(4,), (5, 5), (6,)], [(5, 4), (4, 3)], upsampling, outputs=1)
        assert net(torch.rand(2, 3, 16, 8)).shape == (2, 1, 16, 8)
        assert net.decoder.blocks[0][0].in_channels == 5 + 5  # what was upsampled, and the map of that size
    block = convolutions(3, 4, 4)
    assert [type(layer) for layer in block] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * 2


def test_weights_start_as_draems():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(64, 64, 3), nn.ConvTranspose2d(64, 64, 2), nn.BatchNorm2d(4096))
    redraw(network)
    for layer, mean in zip(network, (0, 0, 1), strict=True):
        assert float(layer.weight.detach().mean()) == pytest.approx(mean, abs=1e-3)
        assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert not network[2].bias.any()


def test_the_image_score_is_the_largest_mean_over_a_square(trunk):
    method = draem(trunk, (128, 256), pool=21)
    assert method.padding == [5, 10]  # 21 pixels of 256
    probability = np.random.default_rng(0).random((2, 1, 128, 256), dtype=np.float32)
    padded = np.pad(probability[:, 0].astype(np.float64), ((0, 0), (5, 5), (10, 10)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (11, 21), axis=(1, 2))
    found = method.image_score(torch.from_numpy(probability), None)
    np.testing.assert_allclose(found, windows.mean((3, 4)).max((1, 2)), rtol=1e-5)
    assert method.image_score(torch.full((1, 1, 128, 256), 0.3), None).tolist() == pytest.approx([0.3])


def test_the_border_of_the_image_score_counts_zeros(trunk):
    method = draem(trunk, (256, 256))
    corner = torch.zeros(1, 1, 256, 256)
    corner[..., :5, :5] = 1
    assert float(method.image_score(corner, None)) == pytest.approx(25 / 441)
    band = torch.zeros(1, 1, 256, 256)
    band[..., :11] = 1  # the eleven columns that the outermost window sees
    assert float(method.image_score(band, None)) == pytest.approx(11 / 21)
    assert draem(trunk, (256, 256), pool=1).image_score(corner, None).tolist() == [1]


def test_nothing_outside_raises_the_image_score(trunk):
    method = draem(trunk, (64, 64))
    probability = torch.full((1, 1, 64, 64), 0.2)
    inside = torch.ones(1, 1, 64, 64)
    inside[..., 32:] = 0
    before = method.image_score(probability, inside)
    probability[..., 32:] = 0.9
    assert method.image_score(probability, inside).tolist() == before.tolist() == pytest.approx([0.2])
    enlarged = method.enlarge(probability, inside)
    assert float(enlarged[..., 32:].max()) == pytest.approx(0.2)
    assert method.enlarge(probability) is probability


def test_features_are_one_level_and_the_images(trunk):
    method = draem(trunk, (64, 64))
    images = torch.randn(2, 3, 64, 64)
    level, same = method.features(images)
    torch.testing.assert_close(level, trunk(images)[0])
    assert same is images
    unit = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(values)[:, None, None] for values in (trunk.mean, trunk.std))
    torch.testing.assert_close(method.unit((unit - mean) / std), unit)
    assert DRAEM.levels(DRAEM.resolved(DRAEMConfig(), trunk.name)) == LEVELS


@pytest.mark.parametrize("size", [(100, 100), (64, 80), (32, 64)])
def test_sizes_that_cannot_be_halved_are_refused(trunk, size):
    with pytest.raises(FlawmapError, match=r"choose an --image-size of at least 64 that 32 divides"):
        DRAEM.extractor(DRAEMConfig(), trunk, size)


def test_what_training_asks_for(trunk, tmp_path):
    method = draem(trunk, (64, 64), textures=tmp_path, clean=0.25, max_steps=100, batch_size=8)
    (stage,) = method.stages(80)
    assert stage.inputs == SyntheticDefects(DRAEM.defects, clean=0.25, textures=tmp_path, foreground=False)
    assert (stage.epochs, stage.batch_size) == (10, 8)
    assert {id(parameter) for parameter in stage.parameters} == {
        id(parameter) for parameter in method.network.parameters()
    }
    assert method.network.training
    optimiser = stage.optimiser(stage.parameters)
    schedule = stage.schedule(optimiser, 100)
    rates = []
    for _ in range(100):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    assert [rates[0], rates[79], rates[80], rates[89], rates[90]] == pytest.approx([1e-3, 1e-3, 2e-4, 2e-4, 4e-5])
