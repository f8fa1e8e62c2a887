import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from flawmap import FlawmapError, ImageError
from flawmap.backbones import create_backbone, create_engine
from flawmap.imaging.preparation import Preparation
from flawmap.imaging.preprocessing import Preprocessing
from flawmap.imaging.reading import read_batches
from flawmap.learning.data import TrainingData
from flawmap.learning.feature_cache import FeatureCache
from flawmap.learning.good_scores import folds
from flawmap.learning.loop import train
from flawmap.methods import Method, Optimise

SIZE = (32, 32)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for number in range(10):
        Image.fromarray(random.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{number:02d}.png")
    (folder / "05.png").write_text("broken")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def backbone():
    return create_backbone("resnet18", ("layer1", "layer2"), weights="random", size=SIZE)


@pytest.fixture(scope="module")
def preparation(backbone):
    return Preparation(Preprocessing(SIZE, tuple(backbone.mean), tuple(backbone.std), 255), SIZE)


@pytest.fixture(scope="module")
def engine(backbone):
    return create_engine(backbone, SIZE, "torch")


@pytest.fixture(scope="module")
def data(paths, preparation, engine):
    with TrainingData(paths, preparation, engine) as data:
        yield data


class Mean(Method):
    """Learns the mean of the first level by gradient steps, from a random start."""

    optimises = True

    def __init__(self, backbone, inputs="features", fail_at=math.inf, lr=0.3):
        super().__init__(None, backbone, SIZE)
        self.centre = nn.Parameter(torch.zeros(64 if inputs == "features" else 3))
        self.inputs, self.fail_at, self.lr = inputs, fail_at, lr
        self.seen, self.losses, self.images = [], [], 0

    def stages(self, images):
        self.images = images
        with torch.no_grad():
            self.centre.normal_()

        def loss(tensors, inside):
            first = tensors[0].mean((2, 3))
            self.seen.append(first[:, 0].tolist())
            value = (first - self.centre).square().sum(1).mean()
            self.losses.append(float(value.detach()))
            return value * math.nan if len(self.losses) >= self.fail_at else value

        yield Optimise("means", loss, [self.centre], 12, 4, lambda p: torch.optim.SGD(p, self.lr), inputs=self.inputs,
                       schedule=lambda o, steps: torch.optim.lr_scheduler.LinearLR(o, 1, 0.1, steps))  # fmt: skip


def test_features_are_the_engines_and_images_those_read(data, paths, preparation, engine):
    assert data.paths == [path for path in paths if path.name != "05.png"]
    assert len(data.unreadable) == 1
    assert isinstance(data.unreadable[0], ImageError)
    assert "05.png" in str(data.unreadable[0])
    (images,), _ = data.images([8, 0])
    raw = np.stack([preparation.preprocessing(np.asarray(Image.open(data.paths[i]))) for i in (8, 0)])
    expected = preparation.preprocessing.normalised(raw)
    np.testing.assert_array_equal(images, expected)
    for level, theirs in zip(data.features([8, 0])[0], engine(expected), strict=True):
        np.testing.assert_allclose(level, theirs, rtol=1e-4, atol=1e-5)


def test_batches_keep_the_order_of_the_paths(paths, preparation):
    batches = list(read_batches(paths, preparation, size=3))
    assert [picture.path for batch in batches for picture in batch.pictures] == paths
    failed = [picture.path.name for batch in batches for picture in batch.pictures if picture.error is not None]
    assert failed == ["05.png"]
    assert [len(batch.inputs) for batch in batches] == [3, 3, 3]


@pytest.mark.parametrize("inputs", ["features", "images"])
def test_gradient_steps_find_the_mean(data, backbone, inputs):
    method, calls = Mean(backbone, inputs), []
    train(method, data, range(9), progress=lambda *call: calls.append(call))
    source = data.features if inputs == "features" else data.images
    expected = source(range(9))[0][0].mean((0, 2, 3))
    assert method.losses[-1] < 0.5 * method.losses[0]
    torch.testing.assert_close(method.centre.detach(), expected, rtol=0, atol=0.35 * float(expected.abs().max()))
    assert method.images == 9
    assert calls == [("means", step, 36) for step in range(1, 37)]
    assert not method.training
    assert not method.centre.requires_grad


def test_each_epoch_sees_every_image_once_in_its_own_order(data, backbone):
    method = Mean(backbone)
    train(method, data, [0, 1, 2, 3, 4, 7, 8])
    epochs = [[*method.seen[2 * i], *method.seen[2 * i + 1]] for i in range(12)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(epoch) == 7 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 8


def test_the_seed_alone_decides(data, backbone):
    def centre(seed):
        method = Mean(backbone)
        train(method, data, range(9), seed=seed)
        return method.centre

    torch.manual_seed(1)
    first = centre(4)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    assert torch.equal(first, centre(4))
    assert torch.equal(state, torch.random.get_rng_state())
    assert not torch.equal(first, centre(5))


def test_a_loss_that_is_not_finite_names_the_step(data, backbone):
    with pytest.raises(FlawmapError, match="loss of means is nan at step 5 of 36") as caught:
        train(Mean(backbone, fail_at=5), data, range(9))
    assert "\n" not in str(caught.value)


def test_memory_that_runs_out_is_told(data, backbone):
    method = Mean(backbone)

    def progress(*call):
        raise MemoryError

    with pytest.raises(FlawmapError, match="not enough memory for 9 images at 32 x 32"):
        train(method, data, range(9), progress=progress)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_when_it_stops_midway(paths, preparation, engine, tmp_path, monkeypatch, error):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def stop(*call):
        raise error

    with pytest.raises(error):
        TrainingData(paths, preparation, engine, progress=stop)
    assert list(tmp_path.iterdir()) == []

    def use():
        with TrainingData(paths, preparation, engine):
            assert len(list(tmp_path.iterdir())) == 1
            stop()

    with pytest.raises(error):
        use()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_names_the_folder_and_the_way_out(paths, preparation, engine, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(FeatureCache, "_file", lambda cache, level: Path("/dev/full"))
    with pytest.raises(FlawmapError, match="TMPDIR") as caught:
        TrainingData(paths, preparation, engine)
    assert str(tmp_path) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed", range(5))
def test_folds_keep_groups_together_and_share_evenly(seed):
    groups = ["a", "b", "a", "c", "d", "e", "c", "f", "g"]
    split = folds(groups, 3, seed)
    assert sorted(i for fold in split for i in fold) == list(range(9))
    for fold in split:
        rest = {groups[i] for other in split if other is not fold for i in other}
        assert not rest & {groups[i] for i in fold}
    alone = folds(list(range(23)), 5, seed)
    assert sorted(map(len, alone)) == [4, 4, 5, 5, 5]
    assert folds(list(range(23)), 5, seed) == alone
    assert len(folds(["a", "a", "b"], 5, seed)) == 2
