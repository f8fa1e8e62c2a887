import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from flawmap import Detector, ImageError
from flawmap.backbones import create_backbone
from flawmap.datasets.drawn import draw_part
from flawmap.imaging.geometry import Geometry
from flawmap.imaging.preparation import read_region
from flawmap.line.engines import available_engines
from flawmap.methods import method_class
from flawmap.methods.blocks.smoothing import on_grid

HEIGHT, WIDTH = 96, 160
SQUARE = (slice(40, 58), slice(66, 88))  # of the glaring pixels, on the part

# The whole image is learnt with the backbone's own levels; blocks.1 sees 19 pixels around, so that what lies farther
# than 24 pixels from the region of interest does not reach it.
PADIM = {"method": "padim", "channels": 8, "levels": ("blocks.1", "blocks.2")}
PATCHCORE = {"method": "patchcore", "levels": ("blocks.1",), "pool": 1, "min_vectors": 300}
METHODS = {"padim": PADIM, "patchcore": PATCHCORE}
COMMON = {"engine": "torch", "max_false_reject": 0.1, "calibration": "holdout"}


def region():
    """Of an L, so that neither rows nor columns alone tell it."""
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[20:70, 50:110] = True
    mask[20:40, 50:70] = False
    return mask


def part(number, defect=None):
    """A board as a picture of 96 x 160, and its mask."""
    pixels, mask = draw_part("boards", defect, np.random.default_rng(number), 160)
    return pixels[32 : 32 + HEIGHT], mask[32 : 32 + HEIGHT]


@pytest.fixture(scope="module")
def boards(tmp_path_factory):
    """12 good boards, 3 to test on, and 5 with defects, in the MVTec AD layout."""
    root = tmp_path_factory.mktemp("boards") / "boards"
    folders = {name: root / name for name in ("train/good", "test/good", "test/flaw", "ground_truth/flaw")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    for number in range(12):
        Image.fromarray(part(number)[0]).save(folders["train/good"] / f"{number:03d}.png")
    for number in range(3):
        Image.fromarray(part(100 + number)[0]).save(folders["test/good"] / f"{number:03d}.png")
    random = np.random.default_rng(5)
    for number in range(5):
        pixels, mask = part(200 + number)[0].copy(), np.zeros((HEIGHT, WIDTH), np.uint8)
        top, left = random.integers(5, 60), random.integers(10, 110)
        pixels[top : top + 24, left : left + 30] = random.integers(0, 256, (24, 30, 3))
        mask[top : top + 24, left : left + 30] = 255
        Image.fromarray(pixels).save(folders["test/flaw"] / f"{number:03d}.png")
        Image.fromarray(mask).save(folders["ground_truth/flaw"] / f"{number:03d}_mask.png")
    return root


GEOMETRIES = {
    "stretch": {"image_size": 96},
    "keep_aspect": {"image_size": 96, "geometry": Geometry.keep_aspect()},
    "crop": {"image_size": 96, "geometry": Geometry.crop(64)},
    "tile": {"image_size": 64, "geometry": Geometry.tile(64, 16)},
    "roi": {"image_size": (96, 160), "roi": region()},
    "roi keep_aspect": {"image_size": 160, "geometry": Geometry.keep_aspect(), "roi": region()},
    "roi tile": {"image_size": 64, "geometry": Geometry.tile(64, 16), "roi": region()},
    "register": {"image_size": 96, "register": True},
    "register roi": {"image_size": (96, 160), "register": True, "roi": region()},
}


@pytest.fixture(scope="module")
def fitted(boards):
    """fitted(geometry, method): a detector, fitted once."""
    made = {}

    def make(geometry, method="padim"):
        if (geometry, method) not in made:
            settings = dict(GEOMETRIES[geometry])
            if settings.get("register"):
                settings["register"] = boards / "train" / "good" / "000.png"
            made[geometry, method] = Detector(**COMMON, **METHODS[method], **settings).fit(boards)
        return made[geometry, method]

    return make


# PaDiM learns one place of all tiles together, which suits no picture with a layout.
LEFT_OUT = {("tile", "padim"), ("roi tile", "padim"), ("register", "patchcore"), ("crop", "patchcore")}
PAIRS = [pair for pair in itertools.product(GEOMETRIES, METHODS) if pair not in LEFT_OUT]


def glaring(pixels, square=SQUARE):
    pixels = pixels.copy()
    pixels[square] = (255, 0, 255)
    return pixels


@pytest.mark.parametrize(("geometry", "method"), PAIRS)
def test_a_saved_detector_says_the_same_to_the_bit(fitted, boards, tmp_path, geometry, method):
    detector = fitted(geometry, method)
    detector.save(tmp_path / "m")
    loaded = Detector.load(tmp_path / "m", engine="torch")
    assert loaded.preparation_ == detector.preparation_
    assert (loaded.image_size, loaded.geometry) == (detector.image_size, detector.geometry)
    for one, other in zip(loaded.predict(boards / "test"), detector.predict(boards / "test"), strict=True):
        assert one.verdict in ("good", "defect"), one.error
        assert (one.score, one.p_value, one.verdict) == (other.score, other.p_value, other.verdict)
        np.testing.assert_array_equal(one.maps, other.maps)
        np.testing.assert_array_equal(one.anomaly_map, other.anomaly_map)
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "m").read_bytes()


def expected_inside(geometry):
    everywhere = np.ones((HEIGHT, WIDTH), bool)
    if geometry == "crop":  # the middle 64 of 96 model pixels, of 1 x 5/3 original ones
        everywhere[:] = False
        everywhere[16:80, round(16 * 5 / 3) : round(80 * 5 / 3)] = True
    return region() if geometry.startswith("roi") else everywhere


@pytest.mark.parametrize("geometry", [name for name in GEOMETRIES if "register" not in name])
def test_the_map_ends_where_nothing_is_scored(fitted, boards, geometry):
    detector = fitted(geometry, "padim" if (geometry, "padim") in PAIRS else "patchcore")
    for inspection in detector.predict(boards / "test"):
        assert inspection.anomaly_map.shape == (HEIGHT, WIDTH)
        np.testing.assert_array_equal(~np.isnan(inspection.anomaly_map), expected_inside(geometry))


@pytest.mark.parametrize(("geometry", "method"), PAIRS)
def test_a_glaring_square_is_found_where_it_lies(fitted, geometry, method):
    detector = fitted(geometry, method)
    good = part(100)[0]
    inspection = detector.predict(glaring(good))
    assert inspection.verdict == "defect", inspection.error
    assert inspection.score > 1.5 * detector.predict(good).score
    anomaly_map = inspection.anomaly_map
    row, column = np.unravel_index(np.nanargmax(anomaly_map), anomaly_map.shape)
    assert 38 <= row < 60
    assert 64 <= column < 90
    hot = np.argwhere(np.nan_to_num(anomaly_map) > 0.9 * np.nanmax(anomaly_map))
    assert (hot >= (36, 62)).all()  # half a patch around the square
    assert (hot < (62, 92)).all()
    region = inspection.regions[0]
    left, top, right, bottom = region.box
    assert left < 77 < right
    assert top < 49 < bottom
    assert region.peak == np.nanmax(anomaly_map)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("geometry", ["roi", "roi keep_aspect"])
def test_what_lies_outside_the_region_changes_nothing(fitted, geometry, method):
    detector = fitted(geometry, method)
    good = part(101)[0]
    before = detector.predict(good)
    inside = region()
    # blocks.2 of PaDiM sees 51 pixels around.
    for square in ((slice(4, 30), slice(138, 158)), (slice(60, 90), slice(0, 12))):
        painted = glaring(good, square)
        assert not inside[square].any()
        after = detector.predict(painted)
        assert after.verdict == before.verdict
        if method == "patchcore":
            assert after.score == pytest.approx(before.score, rel=1e-5)
            np.testing.assert_allclose(after.anomaly_map[inside], before.anomaly_map[inside], rtol=1e-4)
        assert not any(region.mask.any() and region.box[0] >= 110 for region in after.regions)
    near = glaring(good, SQUARE)
    assert detector.predict(near).score > 1.5 * before.score


@pytest.mark.parametrize("geometry", ["roi", "roi keep_aspect", "roi tile"])
def test_training_ignores_what_lies_outside_the_region(fitted, boards, tmp_path, geometry):
    """Noise outside, farther away than a patch sees, leaves bank and scores as they are."""
    random = np.random.default_rng(7)
    near = np.zeros((HEIGHT, WIDTH), bool)
    near[0:94, 26:134] = True  # 24 pixels around the region, and what Pillow's filter reaches
    noisy = tmp_path / "noisy"
    noisy.mkdir()
    for path in sorted((boards / "train" / "good").iterdir()):
        pixels = np.asarray(Image.open(path)).copy()
        pixels[~near] = random.integers(0, 256, (int((~near).sum()), 3))
        Image.fromarray(pixels).save(noisy / path.name)
    one = fitted(geometry, "patchcore")
    other = Detector(**COMMON, **PATCHCORE, **GEOMETRIES[geometry]).fit(noisy)
    assert one.method_.bank.index.shape == other.method_.bank.index.shape
    torch.testing.assert_close(one.method_.bank.patches.shift, other.method_.bank.patches.shift, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one.method_.bank.index, other.method_.bank.index, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(np.sort(one.calibration_.scores), np.sort(other.calibration_.scores), rtol=1e-4)
    assert one.threshold_.value == pytest.approx(other.threshold_.value, rel=1e-4)


def made(method, size=(64, 64), **settings):
    of = method_class(method)
    config = of.resolved(of.Config(levels=("blocks.1",), **settings), "tf_efficientnet_lite0")
    backbone = create_backbone("tf_efficientnet_lite0", of.levels(config), weights="random", size=size)
    return of(config, backbone, size)


def run_stage(method, features, inside):
    with torch.no_grad():
        for stage in method.stages(len(features[0])):
            stage.update(features, inside)
            stage.close(lambda done, total: None)


@pytest.mark.parametrize("method", ["padim", "patchcore", "cfa"])
def test_masked_features_alone_are_learnt_and_scored(method):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(12, 24, 16, 16, generator=generator)
    inside = torch.zeros(12, 1, 64, 64)
    inside[:, :, 10:50, 5:40] = 1
    inside[6:, :, 30:] = 0
    scored = on_grid(inside, (16, 16)) > 0
    other = torch.where(scored, features, 5 * torch.randn(features.shape, generator=generator))
    settings = {
        "padim": {"channels": 6},
        "patchcore": {"pool": 1, "stride": 4, "min_vectors": 50},
        "cfa": {"pool": 1, "epochs": 0},
    }[method]
    one, two = made(method, **settings), made(method, **settings)
    for learnt, seen in ((one, features), (two, other)):
        torch.manual_seed(0)
        run_stage(learnt.eval().requires_grad_(False), [seen], inside)
    if method == "padim":
        at = one.gaussians.images > 0
        assert one.gaussians.images.unique().tolist() == [0, 6, 12]
        torch.testing.assert_close(one.gaussians.mean[at], two.gaussians.mean[at], rtol=1e-4, atol=1e-3)
    if method == "patchcore":
        assert int(one.bank.seen) == int(scored.sum())
        assert torch.equal(one.bank.index, two.bank.index)
    for learnt in (one, two):
        clean = learnt.score([features], inside)
        dirty = learnt.score([other], inside)
        torch.testing.assert_close(dirty[1], clean[1], rtol=1e-4, atol=1e-4)
        laid, painted = learnt.enlarge(clean[0], inside), learnt.enlarge(dirty[0], inside)
        torch.testing.assert_close(painted, laid, rtol=1e-4, atol=1e-4)
        assert (laid[inside == 0].amin() >= laid[inside > 0].amin() - 1e-5).all()
    torch.testing.assert_close(one.score([features], inside)[1], two.score([features], inside)[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("geometry", ["roi", "roi keep_aspect", "roi tile"])
def test_a_region_of_another_aspect_names_both_sizes(fitted, tmp_path, geometry):
    detector = fitted(geometry, "patchcore")
    wrong = np.asarray(Image.fromarray(part(100)[0]).resize((120, 96)))
    Image.fromarray(wrong).save(tmp_path / "wrong.png")
    for inspection in (detector.predict(tmp_path / "wrong.png"), detector.predict(wrong)):
        assert inspection.verdict == "error"
        assert inspection.score is inspection.anomaly_map is None
        assert "96 x 160" in inspection.error
        assert "96 x 120" in inspection.error
        assert "\n" not in inspection.error
    assert str(tmp_path / "wrong.png") in detector.predict(tmp_path / "wrong.png").error
    larger = np.asarray(Image.fromarray(glaring(part(100)[0])).resize((320, 192), Image.Resampling.NEAREST))
    found = detector.predict(larger)
    assert found.anomaly_map.shape == (192, 320)
    np.testing.assert_array_equal(~np.isnan(found.anomaly_map), np.kron(region(), np.ones((2, 2))) > 0)


def test_training_leaves_images_out_that_the_region_does_not_fit(boards, tmp_path):
    good = tmp_path / "good"
    good.mkdir()
    for path in sorted((boards / "train" / "good").iterdir())[:6]:
        Image.open(path).save(good / path.name)
    Image.open(path).resize((120, 96)).save(good / "wrong.png")
    detector = Detector(engine="torch", **PADIM, **GEOMETRIES["roi"])
    detector.fit(good)
    assert detector.training_["images"] == 6
    assert [str(error).startswith(str(good / "wrong.png")) for error in detector.left_out_] == [True]
    with pytest.raises(ImageError, match="96 x 120"):
        Detector(engine="torch", **PADIM, **GEOMETRIES["roi"]).fit(good, strict=True)


def truth(boards, inspection):
    if inspection.path.parent.name == "good":
        return np.zeros((HEIGHT, WIDTH), bool)
    return read_region(boards / "ground_truth" / "flaw" / f"{inspection.path.stem}_mask.png")


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_pixel_figures_are_those_of_the_pixels_inside(fitted, boards, geometry, full):
    detector = fitted(geometry, "padim" if (geometry, "padim") in PAIRS else "patchcore")
    report = detector.evaluate(boards, full_resolution=full)
    inspections = detector.predict(boards / "test")
    assert report.errors == 0
    labels, values = [], []
    for inspection in inspections:
        mask, placement = truth(boards, inspection), inspection.placement
        if full or "tile" in geometry:
            inside = ~np.isnan(inspection.anomaly_map)
            labels.append(mask[inside])
            values.append(inspection.anomaly_map[inside])
        else:
            inside = placement.inside()
            labels.append(placement.project(mask)[inside])
            values.append(inspection.maps[inside])
    labels, values = np.concatenate(labels), np.concatenate(values)
    assert 0 < labels.sum() < len(labels)
    assert report.pixel_auroc == pytest.approx(roc_auc_score(labels, values), abs=2e-3)
    scores = [inspection.score for inspection in inspections]
    defective = [inspection.path.parent.name != "good" for inspection in inspections]
    assert report.image_auroc == pytest.approx(roc_auc_score(defective, scores), abs=1e-6)
    if "roi" not in geometry and geometry != "crop":
        assert report.pixel_auroc > 0.85


@pytest.mark.parametrize("engine", [name for name in available_engines() if name != "torch"])
@pytest.mark.parametrize(
    ("geometry", "method"), [("keep_aspect", "padim"), ("roi", "padim"), ("tile", "patchcore"), ("roi", "patchcore")]
)
def test_engines_agree_on_what_is_inside(fitted, boards, tmp_path, geometry, method, engine):
    detector = fitted(geometry, method)
    detector.save(tmp_path / "m")
    other = Detector.load(tmp_path / "m", engine=engine)
    assert other.inspector().engine.name == engine
    for one, two in zip(other.predict(boards / "test"), detector.predict(boards / "test"), strict=True):
        assert one.verdict == two.verdict
        assert one.score == pytest.approx(two.score, rel=2e-4)
        np.testing.assert_allclose(one.maps, two.maps, rtol=1e-3, atol=1e-3 * two.maps.max())
        np.testing.assert_array_equal(np.isnan(one.anomaly_map), np.isnan(two.anomaly_map))


@pytest.mark.parametrize("geometry", ["tile", "roi tile"])
def test_a_tiled_image_scores_as_its_worst_window(fitted, boards, geometry):
    detector = fitted(geometry, "patchcore")
    for path in sorted((boards / "test").rglob("*.png"))[:4]:
        pixels = np.asarray(Image.open(path))
        inspection = detector.predict(path)
        placement = inspection.placement
        assert len(inspection.maps) == len(placement.windows) > 1
        raw = np.stack(list(detector.preparation_.inputs(pixels, placement)))
        inputs = torch.from_numpy(detector.preparation_.preprocessing.normalised(raw))
        inside = torch.from_numpy(placement.inside()[:, None]).float()
        each = [float(detector.method_(inputs[i : i + 1], inside[i : i + 1])[1]) for i in range(len(inputs))]
        assert inspection.score == pytest.approx(max(each), rel=1e-5)


def test_a_turned_part_is_scored_in_the_templates_frame(fitted):
    detector = fitted("register roi")
    good = Image.fromarray(part(102)[0])
    straight = detector.predict(np.asarray(good))
    turned = detector.predict(np.asarray(good.rotate(6, Image.Resampling.BICUBIC, fillcolor=tuple(part(102)[0][2, 2]))))
    assert turned.verdict != "error", turned.error
    alignment = turned.placement.alignment
    assert alignment.angle == pytest.approx(-6, abs=1)
    inside, before = ~np.isnan(turned.anomaly_map), ~np.isnan(straight.anomaly_map)
    expected = np.asarray(Image.fromarray(before.astype(np.uint8)).rotate(6)) > 0
    assert (inside & expected).sum() > 0.93 * (inside | expected).sum()
    nothing = detector.predict(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    assert nothing.verdict == "error"
    assert "cannot be found" in nothing.error
