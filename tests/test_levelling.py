import numpy as np
import pytest
import torch

from flawmap import Detector
from flawmap.datasets.drawn import draw_dataset
from flawmap.errors import FlawmapError
from flawmap.imaging.decoding import read_image
from flawmap.learning.alignment import Alignment, find_alignment
from flawmap.methods.blocks.levelling import GoodMaps, Levelling

SIDE = 12


def drawn_maps(n=40, seed=0):
    """Maps that are high and restless in their left half."""
    random = np.random.default_rng(seed)
    place = np.where(np.arange(SIDE) < SIDE // 2, 5.0, 1.0)
    spread = np.where(np.arange(SIDE) < SIDE // 2, 2.0, 0.5)
    return torch.tensor(place + spread * random.standard_normal((n, 1, SIDE, SIDE)), dtype=torch.float32)


def test_level_maps_have_no_place_of_their_own():
    levelling = Levelling()
    assert not levelling.levels
    levelling.learn(GoodMaps(drawn_maps(400)), means=True)
    assert levelling.levels
    assert levelling.scores
    level = levelling(drawn_maps(400, seed=1))[:, 0]
    inner = level[:, :, [1, 2, 9, 10]]  # beside the step its two sides are averaged
    assert float(inner.mean(0).abs().max()) < 0.35
    np.testing.assert_allclose(inner.std(0), 1, atol=0.2)


def test_without_means_only_the_spread_of_a_place_counts():
    good = GoodMaps(drawn_maps(400))
    shift, gain = good.level(means=False)
    assert shift.unique().tolist() == pytest.approx([3.0], abs=0.05)  # the mean of all places
    np.testing.assert_allclose(gain[:, [0, 1]], 0.5, rtol=0.15)
    np.testing.assert_allclose(gain[:, [10, 11]], 2.0, rtol=0.15)


def test_what_is_left_out_teaches_nothing():
    maps = drawn_maps()
    maps[7] += 100
    good, rest = GoodMaps(maps), GoodMaps(torch.cat([maps[:3], maps[4:7], maps[8:]]))
    for found, wanted in zip(good.level(torch.tensor([3, 7]), means=True), rest.level(means=True), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert float((good.level(means=True)[0] - rest.level(means=True)[0]).abs().max()) > 1


def test_of_few_images_the_maps_are_levelled_and_their_scores_are_not(tmp_path):
    draw_dataset(tmp_path / "cloth", "fabric", 0, train=40, good=1, per_defect=1, size=64)
    good = sorted((tmp_path / "cloth" / "train" / "good").iterdir())
    picture = next((tmp_path / "cloth" / "test" / "hole").iterdir())
    for count in (39, 40):
        levelled, plain = (
            Detector("padim", image_size=64, level=level).fit(good[:count]) for level in ("auto", "none")
        )
        assert levelled.method_.levelling.scores == (count == 40)
        same = levelled.predict(picture).score == pytest.approx(plain.predict(picture).score, rel=1e-5)
        assert same == (count == 39)
        assert np.allclose(levelled.calibration_.scores, plain.calibration_.scores) == (count == 39)
        assert not np.allclose(levelled.predict(picture).anomaly_map, plain.predict(picture).anomaly_map)
        assert ("image scores are not" in levelled.training_["levelling"]) == (count == 39)


def test_places_that_were_never_scored_are_as_usual():
    maps, scored = drawn_maps(), torch.ones(40, 1, SIDE, SIDE)
    scored[:, :, 6:] = 0
    shift, gain = GoodMaps(maps, scored).level(means=True)
    alone = GoodMaps(maps[:, :, :6]).level(means=True)
    torch.testing.assert_close(shift[:4], alone[0][:4], rtol=1e-3, atol=1e-3)
    assert float(shift[10, 3]) == pytest.approx(float(maps[:, :, :6].mean()), rel=1e-3)
    assert bool(torch.isfinite(gain).all())


def test_maps_that_never_change_are_not_blown_up():
    maps = torch.zeros(20, 1, SIDE, SIDE)
    maps[:, :, :, :3] = torch.randn(20, 1, SIDE, 3)
    _, gain = GoodMaps(maps).level(means=True)
    usual = float(maps.var(0).mean().sqrt())
    assert float(gain.max()) == pytest.approx(1 / (0.05 * usual), rel=0.01)
    assert bool(torch.isfinite(GoodMaps(torch.zeros(5, 1, SIDE, SIDE)).level(means=False)[1]).all())


def test_the_share_that_the_place_explains():
    random = np.random.default_rng(2)
    place = random.standard_normal((1, 1, SIDE, SIDE)) * 2
    maps = place + random.standard_normal((300, 1, SIDE, SIDE))
    assert GoodMaps(torch.tensor(maps)).explained() == pytest.approx(place.var() / (place.var() + 1), abs=0.03)
    assert GoodMaps(torch.tensor(random.standard_normal((10, 1, SIDE, SIDE)))).explained() < 0.05


@pytest.mark.parametrize(("kind", "lie"), [("screws", "any pose"), ("boards", "alike"), ("fabric", "texture")])
def test_how_parts_lie(tmp_path, kind, lie):
    draw_dataset(tmp_path, kind, 3, train=24, good=1, per_defect=1, size=128)
    pictures = [read_image(p).astype(np.float32) / 255 for p in sorted((tmp_path / "train" / "good").iterdir())]
    found = find_alignment(pictures)
    assert found.lie == lie
    assert isinstance(found, Alignment)
    assert lie.split()[-1] in found.describe()


def test_a_levelled_detector_is_the_same_from_its_file_and_tells_why(tmp_path):
    draw_dataset(tmp_path / "boards", "boards", 0, train=24, good=2, per_defect=2, size=128)
    detector = Detector(image_size=128).fit(tmp_path / "boards")
    assert detector.method == "gaussbank"
    assert detector.calibration_.mode == "loo"
    assert "the parts lie alike" in detector.training_["levelling"]
    method = detector.method_  # keeps nothing of what only calibration needs
    assert method.groups is method.bank.owners is method.deep_bank.owners is method.gaussians._shrunk is None
    assert not method.bank.stand_ins
    detector.save(tmp_path / "m.safetensors")
    loaded = Detector.load(tmp_path / "m.safetensors")
    picture = next((tmp_path / "boards" / "test").rglob("*.png"))
    one, other = detector.predict(picture), loaded.predict(picture)
    assert one.score == other.score
    np.testing.assert_array_equal(one.anomaly_map, other.anomaly_map)
    plain = Detector(image_size=128, level="none").fit(tmp_path / "boards")
    assert plain.training_["levelling"] is None
    assert not np.allclose(plain.predict(picture).anomaly_map, one.anomaly_map)


@pytest.mark.parametrize("method", ["patchcore", "padim"])
def test_any_method_with_maps_can_be_levelled(tmp_path, method):
    draw_dataset(tmp_path, "fabric", 0, train=12, good=2, per_defect=2, size=128)
    detector = Detector(method, image_size=128, level="auto").fit(tmp_path)
    assert detector.method_.levelling.levels
    assert "texture" in detector.training_["levelling"]
    # Level maps of good images are about zero everywhere, as is what regions are cut by in units of the spread.
    good = sorted((tmp_path / "test" / "good").iterdir())
    assert abs(float(np.mean([detector.predict(path).anomaly_map.mean() for path in good]))) < 1


def test_maps_are_not_levelled_where_nothing_is_known_of_a_place(tmp_path):
    from flawmap.imaging.geometry import Geometry

    draw_dataset(tmp_path / "fabric", "fabric", 0, train=6, good=1, per_defect=1, size=128)
    few = Detector(image_size=128).fit(tmp_path / "fabric")
    assert "too few" in few.training_["levelling"]
    tiles = Detector("patchcore", image_size=64, geometry=Geometry.from_options(False, None, "64"), level="auto")
    assert "tile" in tiles.fit(tmp_path / "fabric").training_["levelling"]
    assert Detector(image_size=64, geometry=Geometry.from_options(False, None, "64")).method == "patchcore"


def test_images_learnt_later_are_levelled_as_before(tmp_path):
    draw_dataset(tmp_path / "cloth", "fabric", 0, train=16, good=1, per_defect=1, size=128)
    good = sorted((tmp_path / "cloth" / "train" / "good").iterdir())
    detector = Detector("patchcore", image_size=128, level="auto").fit(good[:12])
    shift, scores = detector.method_.levelling.shift.clone(), [detector.predict(path).score for path in good[12:]]
    detector.update(good[12:])
    assert torch.equal(detector.method_.levelling.shift, shift)
    np.testing.assert_allclose(detector.calibration_.scores[12:], scores, rtol=1e-3, atol=1e-3)


def test_what_is_trained_by_gradient_cannot_leave_one_out(tmp_path):
    draw_dataset(tmp_path / "cloth", "fabric", 0, train=6, good=1, per_defect=1, size=64)
    with pytest.raises(FlawmapError, match=r"loo.*holdout"):
        Detector("cfa", image_size=64, epochs=0, calibration="loo").fit(tmp_path / "cloth")


def test_a_level_of_another_grid_is_refused(tmp_path):
    draw_dataset(tmp_path / "cloth", "fabric", 0, train=8, good=1, per_defect=1, size=64)
    detector = Detector("patchcore", image_size=64, level="auto").fit(tmp_path / "cloth")
    method, state = detector.method_, detector.method_.state_dict()
    for name in ("levelling.shift", "levelling.gain"):
        with pytest.raises(RuntimeError, match="levelling"):
            method.load_state({**state, name: torch.ones(3)})
