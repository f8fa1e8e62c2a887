import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage
from torch import nn

from flawmap.backbones import create_backbone, create_engine
from flawmap.imaging.geometry import Geometry
from flawmap.imaging.preparation import Preparation
from flawmap.imaging.preprocessing import Preprocessing
from flawmap.learning.data import TrainingData
from flawmap.learning.feature_cache import FeatureCache
from flawmap.learning.loop import train
from flawmap.learning.views import Views, _rotated
from flawmap.methods import Method, Optimise

SIZE = (32, 48)


def smooth(height, width, seed=0):
    noise = np.random.default_rng(seed).normal(size=(3, height, width))
    return ndimage.gaussian_filter(noise, (0, 3, 3)).astype(np.float32)


@settings(max_examples=30, deadline=None)
@given(st.integers(20, 40), st.integers(20, 40), st.floats(-60, 60), st.integers(0, 9))
def test_rotations_are_scipys_near_the_centre(height, width, angle, seed):
    image = smooth(height, width, seed)
    ours = _rotated(image[None], np.array([angle]), "bilinear")[0]
    theirs = ndimage.rotate(image, angle, axes=(1, 2), reshape=False, order=1, mode="mirror")
    rows, columns = np.ogrid[:height, :width]
    near = np.hypot(rows - (height - 1) / 2, columns - (width - 1) / 2) < min(height, width) / 2 - 1
    np.testing.assert_allclose(ours[:, near], theirs[:, near], atol=1e-4)


def test_a_quarter_turn_is_exact():
    image = smooth(24, 24)
    np.testing.assert_allclose(
        _rotated(image[None], np.array([90.0]), "bilinear")[0], np.rot90(image, axes=(1, 2)), atol=1e-5
    )


def test_nothing_is_left_empty():
    turned = _rotated(np.full((1, 3, 20, 40), 7, np.float32), np.array([30.0]), "bilinear")
    np.testing.assert_allclose(turned, 7, atol=1e-5)


def test_the_plain_view_comes_first_and_angles_follow_from_pixels_and_seed():
    windows = np.stack([smooth(*SIZE, seed) for seed in range(3)])
    views = Views(4, 30.0, seed=5)
    rotated, _ = views(windows)
    np.testing.assert_array_equal(rotated[::4], windows)
    alone, _ = views(windows[2:])
    np.testing.assert_array_equal(rotated[8:], alone)
    angles = views.angles(windows[0])
    assert angles[0] == 0
    assert (np.abs(angles) <= 30).all()
    assert len(set(angles)) == 4
    assert not np.array_equal(angles[1:], Views(4, 30.0, seed=6).angles(windows[0])[1:])
    assert not np.array_equal(angles[1:], views.angles(windows[1])[1:])
    assert np.ptp([views.angles(smooth(8, 8, seed))[1:] for seed in range(40)]) > 50


def test_masks_turn_with_the_input():
    window = np.zeros((1, 3, *SIZE), np.float32)
    inside = np.zeros((1, 1, *SIZE), bool)
    window[:, :, 10:20, 5:25] = 1
    inside[:, :, 10:20, 5:25] = True
    rotated, masks = Views(3, 40.0)(window, inside)
    np.testing.assert_array_equal(masks[0], inside[0])
    for view, mask in zip(rotated[1:], masks[1:], strict=True):
        assert (view[0] > 0.99)[mask[0]].mean() > 0.8
        assert (view[0] < 0.01)[~mask[0]].mean() > 0.95


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for number in range(6):
        Image.fromarray(random.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(folder / f"{number:02d}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def backbone():
    return create_backbone("resnet18", ("layer1", "layer2"), weights="random", size=SIZE)


@pytest.mark.parametrize("geometry", [Geometry(), Geometry.from_options(tile="24")])
def test_features_of_views_are_those_of_rotated_inputs(paths, backbone, geometry):
    size = geometry.input_size(SIZE)
    preparation = Preparation(Preprocessing(size, tuple(backbone.mean), tuple(backbone.std), 255), SIZE, geometry)
    engine, views, told = create_engine(backbone, size, "torch"), Views(3, 30.0, 1), []
    with (
        TrainingData(paths, preparation, engine, views=views, announce=told.append) as data,
        TrainingData(paths, preparation, engine) as plain,
    ):
        assert "3 views of each rotated by up to 30 degrees" in told[0]
        rows = data.rows(range(len(paths)))
        assert len(rows) == len(plain.rows(range(len(paths))))
        for level, expected in zip(
            data.features(rows)[0], plain.features(plain.rows(range(len(paths))))[0], strict=True
        ):
            torch.testing.assert_close(level, expected, rtol=1e-4, atol=1e-4)
        assert data.record(3)["embedding"] == pytest.approx(plain.record(3)["embedding"], rel=1e-4, abs=1e-5)
        (inputs,), inside = data.images(rows[-2:])
        rotated, masks = views(inputs.numpy(), None if inside is None else inside.numpy() > 0)
        found, kept = data.features([rows[-1], rows[-1] + 1, rows[-1] + 2])
        for level, expected in zip(found, engine(rotated[3:]), strict=True):
            np.testing.assert_allclose(level, expected, rtol=1e-3, atol=1e-3)
        if masks is not None:
            np.testing.assert_array_equal(kept > 0, masks[3:])


class Watching(Method):
    """Notes which rows it is shown; its parameter follows the steps."""

    optimises = True

    def __init__(self, backbone, views=True, parts=1, **options):
        super().__init__(None, backbone, SIZE)
        self.weight, self.idle = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
        self.seen, self.with_views, self.parts, self.options = [], views, parts, options

    def stages(self, images):
        def loss(tensors, inside):
            self.seen.append(tensors[0].mean((1, 2, 3)).tolist())
            if self.parts == 1:
                return self.weight.square().sum()
            return (
                self.weight.square().sum() + (self.idle.square().sum() if part == 0 else 0)
                for part in range(self.parts)
            )

        yield Optimise(
            "watching", loss, [self.weight, self.idle], 8, 6, lambda p: torch.optim.Adam(p, 0.01),
            views=self.with_views, **self.options,
        )  # fmt: skip


@pytest.fixture
def data(paths, backbone):
    preparation = Preparation(Preprocessing(SIZE, tuple(backbone.mean), tuple(backbone.std), 255), SIZE)
    with TrainingData(paths, preparation, create_engine(backbone, SIZE, "torch"), views=Views(3, 30.0)) as data:
        yield data


def test_an_epoch_takes_one_view_of_every_image(data, backbone):
    rows = data.rows(range(6))
    kinds = {round(float(data.features([row + v])[0][0].mean()), 5): (row, v) for row in rows for v in range(3)}
    for views in (True, False):
        method = Watching(backbone, views)
        train(method, data, rows)
        epochs = [[kinds[round(value, 5)] for value in epoch] for epoch in method.seen]
        assert all(sorted(row for row, _ in epoch) == rows for epoch in epochs)
        assert {v for epoch in epochs for _, v in epoch} == ({0, 1, 2} if views else {0})


def test_each_of_several_losses_gets_its_own_step(data, backbone):
    method, reference = Watching(backbone, parts=3), Watching(backbone)
    rows = data.rows(range(6))
    train(method, data, rows)
    with torch.no_grad():
        reference.weight.fill_(1)
    weight = torch.ones(1, requires_grad=True)
    optimiser = torch.optim.Adam([weight], 0.01)
    for _ in range(8 * 3):
        optimiser.zero_grad()
        weight.square().sum().backward()
        optimiser.step()
    torch.testing.assert_close(method.weight.detach(), weight.detach())


@pytest.mark.parametrize("keep", [False, True])
def test_parameters_without_a_gradient_rest_or_go_on_by_momentum(data, backbone, keep):
    method = Watching(backbone, parts=3, keep_gradients=keep)
    train(method, data, data.rows(range(6)))
    idle = torch.ones(1, requires_grad=True)
    optimiser = torch.optim.Adam([idle], 0.01)
    for step in range(8 * 3):
        optimiser.zero_grad(set_to_none=not keep)
        if step % 3 == 0:
            idle.square().sum().backward()
        optimiser.step()
    torch.testing.assert_close(method.idle.detach(), idle.detach())


def test_a_reopened_cache_keeps_the_views(paths, backbone, tmp_path):
    preparation = Preparation(Preprocessing(SIZE, tuple(backbone.mean), tuple(backbone.std), 255), SIZE)
    engine = create_engine(backbone, SIZE, "torch")
    rows = []
    for _ in range(2):
        with TrainingData(paths, preparation, engine, views=Views(2, 10.0), folder=tmp_path, identity="x") as data:
            rows.append(data.features([*data.rows([4]), data.rows([4])[0] + 1])[0][0])
    assert torch.equal(*rows)
    assert len(FeatureCache(tmp_path, "x").images[data.digests[4]]) == 2
