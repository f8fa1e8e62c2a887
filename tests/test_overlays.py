import numpy as np
import pytest
from PIL import Image

from flawmap.imaging.geometry import Geometry
from flawmap.judging.inspection import Inspection, find_regions
from flawmap.report.overlays import Coco, HeatScale, as_rgb, overlay, run_lengths, write_map


@pytest.fixture
def inspection():
    heat = np.zeros((40, 60), np.float32)
    heat[5:15, 10:30] = 5
    heat[30:40, 50:60] = 9
    heat[15, 30] = 5  # touches the first by a corner alone
    return Inspection(
        None, "defect", 9.0, 0.01, 4.0, 4.0, (40, 60), maps=heat[None], placement=Geometry().place((40, 60), (40, 60))
    )


def test_regions_are_8_connected_and_the_hottest_comes_first(inspection):
    hot, wide = inspection.regions
    assert (hot.box, hot.area, hot.peak) == ((50, 30, 60, 40), 100, 9.0)
    assert (wide.box, wide.area, wide.peak) == ((10, 5, 31, 16), 201, 5.0)
    assert find_regions([inspection.anomaly_map], 9.5) == []


def test_a_map_below_the_threshold_has_no_region(inspection):
    assert Inspection(None, "good", pixel_threshold=10.0, size=(40, 60), maps=inspection.maps).regions == []


def test_regions_outlive_the_map(inspection):
    light = inspection.without_map()
    assert light.maps is None
    assert light.regions == inspection.regions


def test_heat_does_not_change_with_the_image():
    scale = HeatScale.from_good(np.array([1.0, 2.0, 3.0], np.float32), 4.0)
    assert (scale.low, scale.high) == (2.0, 6.0)
    np.testing.assert_allclose(scale.heat(np.array([[0.0, 2.0, 4.0, 6.0, 99.0]])), [[0, 0, 0.5, 1, 1]])
    flat = HeatScale.from_good(np.array([2.0, 2.0], np.float32), 2.0)
    assert np.isfinite(flat.heat(np.array([[1.0, 2.0, 3.0]]))).all()


def test_cold_pixels_stay_as_they_are_and_hot_ones_do_not(inspection):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    drawn = overlay(pixels, inspection, HeatScale(3.0, 5.0))
    assert drawn.dtype == np.uint8
    near = np.zeros((40, 60), bool)
    near[3:18, 8:34] = near[28:, 48:] = True
    np.testing.assert_array_equal(drawn[~near], pixels[~near])
    assert (drawn[7:13, 12:28] != pixels[7:13, 12:28]).any(2).all()
    assert drawn[4, 15].tolist() == [0, 220, 255]  # the outline lies around the region


def test_any_image_becomes_rgb():
    grey = np.array([[0, 128], [255, 7]], np.uint8)
    np.testing.assert_array_equal(as_rgb(grey), np.stack([grey] * 3, 2))
    assert as_rgb(np.array([[0, 1000], [500, 4000]], np.uint16))[..., 0].tolist() == [[0, 64], [32, 255]]
    assert as_rgb(np.zeros((2, 2), np.uint16)).max() == 0


def test_the_map_file_holds_the_values_in_16_bits(inspection, tmp_path):
    write_map(tmp_path / "map.png", inspection, HeatScale(1.0, 4.0))
    image = Image.open(tmp_path / "map.png")
    assert (image.mode, image.size) == ("I;16", (60, 40))
    np.testing.assert_allclose(np.asarray(image) / 65535 * 8, np.clip(inspection.maps[0], 0, 8), atol=8 / 65535)


def test_coco_runs_go_down_the_columns(inspection):
    (region,) = find_regions([np.array([[0, 1, 0], [0, 1, 1]], np.float32)], 1)
    assert run_lengths(region, (2, 3)) == {"size": [2, 3], "counts": [2, 2, 1, 1]}
    (region,) = find_regions([np.array([[1, 0], [1, 0]], np.float32)], 1)
    assert run_lengths(region, (2, 2))["counts"] == [0, 2, 2]
    made = Coco()
    for one in (Inspection(None, "error", error="x"), inspection):
        made.add(one)
    content = made.to_json()
    assert [image["id"] for image in content["images"]] == [2]
    assert [(a["id"], a["image_id"], a["bbox"]) for a in content["annotations"]] == [
        (1, 2, [50, 30, 10, 10]), (2, 2, [10, 5, 21, 11]),
    ]  # fmt: skip
