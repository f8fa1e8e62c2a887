"""Batches of good model inputs and copies with a synthetic defect, from real files."""

import numpy as np
import pytest
import torch

from flawmap import FlawmapError
from flawmap.backbones import create_backbone, create_engine
from flawmap.datasets import find_dataset
from flawmap.imaging.preparation import Preparation
from flawmap.imaging.preprocessing import Preprocessing
from flawmap.learning.data import TrainingData
from flawmap.learning.defective import DefectiveBatches
from flawmap.methods import SyntheticDefects
from flawmap.synthesis import CLS_CNF, SynthesisSettings

SIZE = (64, 64)


@pytest.fixture(scope="module")
def engine():
    return create_engine(create_backbone("resnet18", ("layer1",), weights="random", size=SIZE), SIZE, "torch")


def preparation(region=None):
    return Preparation(Preprocessing(SIZE, (0.5, 0.4, 0.3), (0.2, 0.3, 0.25), 255), SIZE, region=region)


@pytest.fixture(scope="module")
def data(drawn, engine):
    paths = [sample.path for sample in find_dataset(drawn).train]
    with TrainingData(paths, preparation(), engine) as data:
        yield data


def rngs(seed, count):
    return [np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(i,))) for i in range(count)]


def batch(data, seed=0, rows=range(12), **inputs):
    inputs = SyntheticDefects(**({"settings": CLS_CNF} | inputs))
    rows = list(rows)
    return DefectiveBatches(data, rows, inputs)(rows, rngs(seed, len(rows)))


def test_defects_lie_where_the_masks_say_and_nowhere_else(data):
    (good, defective, masks), inside = batch(data)
    assert inside is None
    plain = data.images(range(12))[0][0]
    np.testing.assert_allclose(good, plain, atol=4e-3)  # kept in half precision, of which 8-bit images need a tenth
    changed = (good != defective).any(1, keepdim=True)
    assert not (changed & (masks == 0)).any()
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    assert (changed & (masks > 0)).sum() > 0.9 * masks.sum()
    assert (masks.amax((1, 2, 3)) > 0).sum() >= 10  # a mask may miss the part
    for maps, mean, std in zip(defective.unbind(1), (0.5, 0.4, 0.3), (0.2, 0.3, 0.25), strict=True):
        unit = maps * std + mean
        assert unit.min() > -1e-3
        assert unit.max() < 1 + 1e-3


def test_the_same_generators_give_the_same_batch_and_others_another(data):
    first, again, other = (batch(data, seed)[0] for seed in (0, 0, 1))
    for one, same, different in zip(first, again, other, strict=True):
        assert torch.equal(one, same)
        assert different is first[0] or torch.equal(first[0], other[0])
    assert not torch.equal(first[2], other[2])
    alone = DefectiveBatches(data, range(12), SyntheticDefects(CLS_CNF))([5], rngs(0, 12)[5:6])[0]
    assert torch.equal(alone[1][0], first[1][5])


@pytest.mark.parametrize("clean", [0.0, 0.5, 1.0])
def test_a_share_stays_clean(data, clean):
    everywhere = SynthesisSettings(kinds={"texture": 1.0}, seamless=0.0, isolated=0.0, least_change=0.0)
    (good, defective, masks), _ = batch(data, rows=list(range(12)) * 20, clean=clean, settings=everywhere)
    untouched = (masks.amax((1, 2, 3)) == 0).float()
    assert float(untouched.mean()) == pytest.approx(clean, abs=0.1)
    assert torch.equal(good[untouched > 0], defective[untouched > 0])


def test_defects_keep_to_the_part_and_to_the_region_of_interest(drawn, engine, data):
    on_part = DefectiveBatches(data, range(12), SyntheticDefects(CLS_CNF))
    assert on_part.foreground is not None
    assert on_part.foreground.polarity is not None  # screws on a plain ground
    (good, _, masks), _ = on_part(range(12), rngs(3, 12))
    for pixels, mask in zip(good, masks, strict=True):
        unit = pixels.permute(1, 2, 0).numpy() * (0.2, 0.3, 0.25) + (0.5, 0.4, 0.3)
        outside = ~on_part.foreground.mask(unit.clip(0, 1).astype(np.float16).astype(np.float32))
        assert mask[0].numpy()[outside].mean() < 0.02
    anywhere = DefectiveBatches(data, range(12), SyntheticDefects(CLS_CNF, foreground=False))
    assert anywhere.foreground is None
    assert anywhere(range(12), rngs(3, 12))[0][2].sum() > masks.sum()
    region = np.zeros((100, 100), bool)
    region[:, :50] = True
    with TrainingData(data.paths, preparation(region), engine) as half:
        (_, _, masks), inside = batch(half, foreground=False)
    assert inside is not None
    assert inside[:, :, :, :32].all()
    assert not inside[:, :, :, 32:].any()
    assert not masks[:, :, :, 32:].any()
    assert masks[:, :, :, :32].any()


def test_a_folder_without_textures_is_told_in_one_line(data, tmp_path):
    with pytest.raises(FlawmapError, match="holds no images") as caught:
        DefectiveBatches(data, range(12), SyntheticDefects(CLS_CNF, textures=tmp_path))
    assert "\n" not in str(caught.value)


def test_sources_come_from_the_texture_folder(data, tmp_path):
    from PIL import Image

    Image.new("RGB", (20, 20), (255, 0, 255)).save(tmp_path / "magenta.png")
    settings = SynthesisSettings(
        kinds={"texture": 1.0}, seamless=0.0, isolated=0.0, least_change=0.0, augmented=False, opacity=(1.0, 1.0)
    )
    (_, defective, masks), _ = batch(data, textures=tmp_path, settings=settings, foreground=False)
    unit = defective.movedim(1, 3)[masks[:, 0] > 0] * torch.tensor([0.2, 0.3, 0.25]) + torch.tensor([0.5, 0.4, 0.3])
    np.testing.assert_allclose(unit.mean(1), 2 / 3, atol=1e-2)  # on grey images magenta turns grey
