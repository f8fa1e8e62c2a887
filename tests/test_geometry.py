"""Windows and maps against Pillow, torchvision, torch, imaging.preprocessing and functions whose values are known."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from flawmap.errors import FlawmapError, ImageError
from flawmap.imaging import preprocessing
from flawmap.imaging.geometry import MOST_TILES, Geometry
from flawmap.imaging.masks import resize_mask
from flawmap.imaging.placement import Placement
from flawmap.imaging.windows import Window, resize_window

RNG = np.random.default_rng(3)
SIZES = [(1, 1), (37, 80), (80, 37), (64, 64), (300, 211), (50, 512)]


def grey(height: int, width: int) -> NDArray[np.uint8]:
    return RNG.integers(0, 256, (height, width), np.uint8)


def one_line(error: pytest.ExceptionInfo[FlawmapError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@st.composite
def geometries(draw: st.DrawFn) -> tuple[Geometry, tuple[int, int], tuple[int, int]]:
    """Any geometry, the size of an image, and the image size asked for."""
    size = draw(st.tuples(st.integers(12, 160), st.integers(12, 160)))
    image_size = draw(st.tuples(st.integers(32, 80), st.integers(32, 80)))
    kind = draw(st.sampled_from(["stretch", "keep_aspect", "crop", "tile"]))
    if kind == "crop":
        return Geometry.crop(draw(st.integers(16, min(image_size)))), size, image_size
    if kind == "tile":
        side = draw(st.integers(16, 90))
        return Geometry.tile(side, draw(st.integers(0, side // 2 + 6))), size, image_size
    return Geometry(kind), size, image_size  # type: ignore[arg-type]


def model_pixel(placement: Placement) -> tuple[float, float]:
    """Height and width of a model pixel, in original pixels."""
    window = placement.windows[0]
    height, width = placement.input_size
    return (window.bottom - window.top) / height, (window.right - window.left) / width


# Windows


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("pixels", ["grey", "colour", "float"])
def test_stretch_is_preprocessings_resize_to_the_byte(size: tuple[int, int], pixels: str) -> None:
    image = {
        "grey": grey(*size),
        "colour": RNG.integers(0, 256, (*size, 3), np.uint8),
        "float": RNG.random(size, np.float32),
    }[pixels]
    placement = Geometry().place(size, (64, 48))
    (found,) = placement.inputs(image)
    expected = np.asarray(Image.fromarray(image).resize((48, 64), Image.Resampling.BILINEAR))
    assert found.dtype == expected.dtype
    assert found.tobytes() == expected.tobytes()
    if pixels == "colour":
        preprocess = preprocessing.Preprocessing((64, 48), (0, 0, 0), (1, 1, 1))
        np.testing.assert_array_equal(found.transpose(2, 0, 1), preprocess(image))


@pytest.mark.parametrize("size", SIZES)
def test_stretch_lays_back_and_projects_as_images_does(size: tuple[int, int]) -> None:
    placement = Geometry().place(size, (64, 48))
    anomaly_map = RNG.normal(size=(64, 48)).astype(np.float32)
    np.testing.assert_array_equal(placement.lay_back([anomaly_map]), preprocessing.lay_back(anomaly_map, size))
    mask = RNG.random(size) < 0.3
    np.testing.assert_array_equal(placement.project(mask)[0], resize_mask(mask, (64, 48)))
    assert placement.inside().all()


@pytest.mark.parametrize(("size", "wide"), [((300, 211), (256, 256)), ((50, 512), (256, 320)), ((700, 900), (65, 64))])
def test_crop_is_resize_then_center_crop(size: tuple[int, int], wide: tuple[int, int]) -> None:
    image = RNG.integers(0, 256, (*size, 3), np.uint8)
    side = min(wide) - 32
    (found,) = Geometry.crop(side).place(size, wide).inputs(image)
    resized = TF.resize(Image.fromarray(image), list(wide), TF.InterpolationMode.BILINEAR)
    expected = np.asarray(TF.center_crop(resized, [side, side]))
    assert found.shape == (side, side, 3)
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_crop_lays_back_only_what_it_saw() -> None:
    placement = Geometry.crop(224).place((512, 256), (256, 256))
    assert placement.windows == (Window(16, 32, 240, 480),)
    ramp = np.broadcast_to(np.arange(224, dtype=np.float32), (224, 224))
    laid = placement.lay_back([ramp])
    seen = np.zeros((512, 256), np.bool_)
    seen[32:480, 16:240] = True
    np.testing.assert_array_equal(~np.isnan(laid), seen)
    np.testing.assert_allclose(laid[32:480, 16:240], np.broadcast_to(np.arange(224), (448, 224)), atol=1e-4)


def test_keep_aspect_keeps_it_and_repeats_the_edge() -> None:
    image = RNG.integers(0, 256, (100, 300), np.uint8)
    placement = Geometry.keep_aspect().place((100, 300), (96, 96))
    assert placement.windows == (Window(0, -100, 300, 200),)
    (found,) = placement.inputs(image)
    content = np.asarray(Image.fromarray(image).resize((96, 32), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(found, np.pad(content, ((32, 32), (0, 0)), mode="edge"))
    inside = placement.inside()[0]
    assert inside[32:64].all()
    assert not inside[:32].any()
    assert not inside[64:].any()
    # What a model says of the padding does not reach the image.
    anomaly_map = np.where(inside, np.float32(1), np.float32(1e6))
    np.testing.assert_array_equal(placement.lay_back([anomaly_map]), np.ones((100, 300), np.float32))


@given(st.integers(1, 400), st.integers(1, 400), st.integers(8, 96), st.integers(8, 96))
@settings(max_examples=200, deadline=None)
def test_keep_aspect_is_as_large_as_fits(height: int, width: int, model_height: int, model_width: int) -> None:
    inside = Geometry.keep_aspect().place((height, width), (model_height, model_width)).inside()[0]
    rows, columns = inside.any(axis=1).sum(), inside.any(axis=0).sum()
    assert rows == model_height or columns == model_width
    scale = min(model_height / height, model_width / width)
    assert abs(rows - max(1, height * scale)) <= 0.5 + 1e-9
    assert abs(columns - max(1, width * scale)) <= 0.5 + 1e-9
    assert abs(np.flatnonzero(inside.any(axis=1)).sum() / rows - (model_height - 1) / 2) <= 0.5


@given(st.integers(1, 500), st.integers(1, 500), st.integers(8, 120), st.floats(0, 0.99))
@settings(max_examples=200, deadline=None)
def test_tiles_cover_the_image_and_stay_in_it(height: int, width: int, side: int, share: float) -> None:
    overlap = int(share * side)
    if (height / (side - overlap) + 1) * (width / (side - overlap) + 1) > 2000:
        return
    windows = Geometry.tile(side, overlap).windows((height, width), (64, 64))
    covered = np.zeros((height, width), np.bool_)
    for left, top, right, bottom in windows:
        for start, stop, length in ((left, right, width), (top, bottom, height)):
            if length >= side:
                assert start >= 0
                assert stop == start + side <= length
            else:
                assert start <= 0
                assert stop >= length
        covered[max(int(top), 0) : int(np.ceil(bottom)), max(int(left), 0) : int(np.ceil(right))] = True
    assert covered.all()
    assert len(set(windows)) == len(windows)
    lefts = sorted({w.left for w in windows})
    assert all(right - left <= side - overlap for left, right in pairwise(lefts))
    # None can be spared: the one before the last ends before the image does.
    assert len(lefts) == 1 or lefts[-2] + side < width


def test_a_tile_is_the_models_input_where_the_sizes_agree() -> None:
    image = grey(200, 300)
    placement = Geometry.tile(100, 0).place((200, 300), (100, 100))
    expected = [image[:100, :100], image[:100, 100:200], image[:100, 200:]]
    for found, part in zip(list(placement.inputs(image))[:3], expected, strict=True):
        np.testing.assert_array_equal(found, part)


def test_one_window_of_many_equals_pillows_box_on_the_whole_picture() -> None:
    """Cutting a part out first, for speed, leaves the result as it is."""
    for image in (grey(400, 500), RNG.integers(0, 256, (400, 500, 3), np.uint8), RNG.random((400, 500), np.float32)):
        for window in (Window(0, 0, 130, 130), Window(370, 270, 500, 400), Window(101.3, 77.7, 240.9, 181.2)):
            for size in ((64, 64), (200, 180)):
                found = resize_window(image, window, size)
                whole = Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR, box=window)
                np.testing.assert_allclose(found, np.asarray(whole), atol=1 if image.dtype == np.uint8 else 1e-5)


# There and back


@given(geometries(), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_a_marked_pixel_lands_where_it_was(case: tuple[Geometry, tuple[int, int], tuple[int, int]], random) -> None:
    geometry, size, image_size = case
    placement = geometry.place(size, image_size)
    # A block as large as a model pixel (or 3 pixels), where the model sees it.
    down, across = (max(3, int(np.ceil(side))) for side in model_pixel(placement))
    window = random.choice(placement.windows)
    y, x = (
        int(start) + random.randint(0, max(0, int(stop) - int(start) - block))
        for start, stop, block in (
            (max(np.ceil(window.top), 0), min(window.bottom, size[0]), down),
            (max(np.ceil(window.left), 0), min(window.right, size[1]), across),
        )
    )
    image = np.zeros(size, np.float32)
    image[y : y + down, x : x + across] = 1
    laid = placement.lay_back(placement.inputs(image))
    assert laid.shape == size
    row, column = np.unravel_index(np.nanargmax(laid), size)
    reach_y, reach_x = model_pixel(placement)
    assert y - reach_y <= row <= y + down - 1 + reach_y
    assert x - reach_x <= column <= x + across - 1 + reach_x
    # The block as a whole stays in its place: its centre of mass is the block's centre.
    if not np.isnan(laid).any() and 8 < y < size[0] - down - 8 and 8 < x < size[1] - across - 8:
        rows, columns = np.mgrid[: size[0], : size[1]]
        assert abs((laid * rows).sum() / laid.sum() - (y + (down - 1) / 2)) < 0.6 * max(reach_y, 1)
        assert abs((laid * columns).sum() / laid.sum() - (x + (across - 1) / 2)) < 0.6 * max(reach_x, 1)


@given(geometries(), st.floats(-1e3, 1e3, width=32))
@settings(max_examples=150, deadline=None)
def test_constant_maps_come_back_constant(
    case: tuple[Geometry, tuple[int, int], tuple[int, int]], value: float
) -> None:
    geometry, size, image_size = case
    placement = geometry.place(size, image_size)
    laid = placement.lay_back(np.full((len(placement.windows), *placement.input_size), value, np.float32))
    scored = laid[~np.isnan(laid)]
    np.testing.assert_allclose(scored, value, rtol=1e-6)
    if geometry.kind != "crop":
        assert scored.size == laid.size


def smooth(y: NDArray[np.floating], x: NDArray[np.floating]) -> NDArray[np.floating]:
    return np.sin(y / 40) * np.cos(x / 55) + 0.01 * x


@pytest.mark.parametrize("geometry", [Geometry.tile(128, 32), Geometry.tile(100, 70), Geometry.tile(90)])
def test_a_smooth_function_comes_back_without_seams(geometry: Geometry) -> None:
    size, model = (331, 417), (64, 64)
    placement = geometry.place(size, model)
    assert len(placement.windows) >= 12
    maps = []
    for left, top, right, bottom in placement.windows:
        rows = top + (np.arange(64) + 0.5) * (bottom - top) / 64
        columns = left + (np.arange(64) + 0.5) * (right - left) / 64
        maps.append(smooth(rows[:, None], columns[None]).astype(np.float32))
    laid = placement.lay_back(maps)
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    expected = smooth(y, x)
    inner = np.s_[2:-2, 2:-2]  # half a model pixel at the image's own border is extrapolated
    np.testing.assert_allclose(laid[inner], expected[inner], atol=2e-3)

    # The step from one pixel to the next is that of the function, at tile borders as elsewhere.
    for axis, starts, stops in ((0, "top", "bottom"), (1, "left", "right")):
        surplus = np.abs(np.diff(laid, axis=axis) - np.diff(expected, axis=axis))[2:-2, 2:-2]
        borders = {int(getattr(w, edge)) - 3 for w in placement.windows for edge in (starts, stops)}
        borders = sorted(b for b in borders if 0 < b < surplus.shape[axis])
        assert len(borders) >= 4
        elsewhere = np.delete(surplus, borders, axis)
        assert np.take(surplus, borders, axis).max() <= 1.2 * elsewhere.max()


def test_tiles_that_disagree_meet_in_a_linear_ramp() -> None:
    placement = Geometry.tile(100, 40).place((100, 160), (50, 50))
    assert placement.windows == (Window(0, 0, 100, 100), Window(60, 0, 160, 100))
    laid = placement.lay_back([np.zeros((50, 50)), np.ones((50, 50))])
    expected = np.clip((np.arange(160) + 0.5 - 60) / 40, 0, 1)
    np.testing.assert_allclose(laid, np.broadcast_to(expected, (100, 160)), atol=1e-6)


@pytest.mark.parametrize("overlap", [0, 10, 45])
def test_tiles_blend_as_the_weighted_mean_of_all_that_cover_a_pixel(overlap: int) -> None:
    """Against the plain sums of weights and weighted values, with torch's bilinear resize."""
    size, geometry = (130, 170), Geometry.tile(64, overlap)
    placement = geometry.place(size, (32, 32))
    maps = RNG.random((len(placement.windows), 32, 32), np.float32)
    axis = {}
    for low, high, length in ((0, 2, 170), (1, 3, 130)):
        spans = sorted({(w[low], w[high]) for w in placement.windows})
        weights = np.zeros((len(spans), length))
        for i, (start, stop) in enumerate(spans):
            centres = np.arange(start, stop) + 0.5
            weight = np.ones(64)
            if i > 0 and spans[i - 1][1] > start:
                weight = np.minimum(weight, (centres - start) / (spans[i - 1][1] - start))
            if i + 1 < len(spans) and stop > spans[i + 1][0]:
                weight = np.minimum(weight, (stop - centres) / (stop - spans[i + 1][0]))
            weights[i, start:stop] = weight
        axis[low] = {span: row / weights.sum(0) for span, row in zip(spans, weights, strict=True)}
    expected = np.zeros(size)
    for (left, top, right, bottom), values in zip(placement.windows, maps, strict=True):
        large = F.interpolate(torch.from_numpy(values)[None, None], size=(64, 64), mode="bilinear")[0, 0].numpy()
        weight = axis[1][top, bottom][top:bottom, None] * axis[0][left, right][None, left:right]
        expected[top:bottom, left:right] += weight * large
    np.testing.assert_allclose(placement.lay_back(iter(maps)), expected, atol=1e-5)


def test_a_wrong_number_of_maps_is_refused() -> None:
    placement = Geometry.tile(64).place((100, 100), (32, 32))
    with pytest.raises(ValueError, match="zip"):
        placement.lay_back(np.zeros((len(placement.windows) - 1, 32, 32), np.float32))


# Masks and the region of interest


@given(geometries(), st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_masks_and_regions_are_those_of_the_pixel_under_each_centre(
    case: tuple[Geometry, tuple[int, int], tuple[int, int]], seed: int
) -> None:
    geometry, size, image_size = case
    rng = np.random.default_rng(seed)
    mask = resize_mask(rng.random((6, 6)) < 0.5, size)
    placement = geometry.place(size, image_size)
    projected, inside = placement.project(mask), placement.inside()
    height, width = placement.input_size
    for (left, top, right, bottom), found, seen in zip(placement.windows, projected, inside, strict=True):
        y = top + (np.arange(height) + 0.5) * (bottom - top) / height
        x = left + (np.arange(width) + 0.5) * (right - left) / width
        on_image = ((y > 0) & (y < size[0]))[:, None] & ((x > 0) & (x < size[1]))
        np.testing.assert_array_equal(seen, on_image)
        rows, columns = (np.clip(np.floor(at).astype(int), 0, n - 1) for at, n in ((y, size[0]), (x, size[1])))
        expected = mask[rows[:, None], columns] & on_image
        # A centre on the border of two pixels may go to either.
        settled = (np.abs(y - np.rint(y)) > 1e-6)[:, None] & (np.abs(x - np.rint(x)) > 1e-6)
        np.testing.assert_array_equal(found[settled], expected[settled])


@given(geometries(), st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_nothing_outside_the_region_is_scored_or_read(
    case: tuple[Geometry, tuple[int, int], tuple[int, int]], seed: int
) -> None:
    geometry, size, image_size = case
    rng = np.random.default_rng(seed)
    roi = resize_mask(rng.random((3, 4)) < 0.5, size)
    if not roi.any():
        with pytest.raises(FlawmapError, match="no pixel"):
            geometry.place(size, image_size, roi=roi)
        return
    if not geometry.place(size, image_size).project(roi).any():
        with pytest.raises(ImageError, match="less than one model pixel"):
            geometry.place(size, image_size, roi=roi)
        return
    placement = geometry.place(size, image_size, roi=roi)
    inside = placement.inside()
    assert inside.any(axis=(1, 2)).all()
    maps = rng.normal(size=inside.shape).astype(np.float32)
    laid = placement.lay_back(maps)
    assert np.isnan(laid[~roi]).all()
    np.testing.assert_array_equal(placement.lay_back(np.where(inside, maps, np.float32(np.nan))), laid)
    # Each pixel of the region with a scored model pixel straight under it has a value, within the maps' range.
    scored = laid[~np.isnan(laid)]
    assert (scored >= maps[inside].min() - 1e-4).all()
    assert (scored <= maps[inside].max() + 1e-4).all()
    if geometry.kind == "stretch" and min(size[0] / image_size[0], size[1] / image_size[1]) >= 1:
        under = resize_mask(inside[0], size)
        assert not np.isnan(laid[under & roi]).any()


def test_tiles_beside_the_region_are_dropped() -> None:
    roi = np.zeros((400, 400), np.bool_)
    roi[250:, 250:] = True
    geometry = Geometry.tile(100, 0)
    placement = geometry.place((400, 400), (50, 50), roi=roi)
    assert [window[:2] for window in placement.windows] == [(200, 200), (300, 200), (200, 300), (300, 300)]
    np.testing.assert_array_equal(placement.inside()[3], np.ones((50, 50), np.bool_))
    assert placement.inside()[0].sum() == 25 * 25
    laid = placement.lay_back(np.ones((4, 50, 50), np.float32))
    np.testing.assert_array_equal(laid, np.where(roi, np.float32(1), np.float32(np.nan)))


def test_a_region_is_scaled_where_its_aspect_ratio_agrees() -> None:
    roi = np.zeros((100, 200), np.bool_)
    roi[:, 100:] = True
    placement = Geometry().place((303, 600), (64, 64), roi=roi)
    assert placement.region is not None
    np.testing.assert_array_equal(placement.region[:, :300], False)
    np.testing.assert_array_equal(placement.region[:, 300:], True)
    with pytest.raises(ImageError, match=r"100 x 200 .* 200 x 300 .*; ") as error:
        Geometry().place((200, 300), (64, 64), roi=roi)
    one_line(error)


def test_a_region_of_less_than_a_model_pixel_is_refused() -> None:
    roi = np.zeros((640, 640), np.bool_)
    roi[0, 0] = True
    with pytest.raises(ImageError, match=r"640 x 640 .*; draw a larger region") as error:
        Geometry().place((640, 640), (64, 64), roi=roi)
    one_line(error)
    with pytest.raises(FlawmapError, match=r"--roi: .*no pixel") as error:
        Geometry().place((640, 640), (64, 64), roi=np.zeros((640, 640), np.bool_))
    one_line(error)


# In the frame of a template


@dataclass(frozen=True)
class QuarterTurn:
    """A part that lies a quarter turn (counter-clockwise) off its template, whose last column the image misses."""

    size: tuple[int, int]

    @property
    def template_size(self) -> tuple[int, int]:
        return self.size[1], self.size[0]

    @property
    def valid(self) -> NDArray[np.bool_]:
        valid = np.ones(self.template_size, np.bool_)
        valid[:, -1] = False
        return valid

    def warp(self, pixels: NDArray) -> NDArray:
        return np.rot90(pixels, -1)

    def unwarp(self, anomaly_map: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.rot90(anomaly_map)


@pytest.mark.parametrize("geometry", [Geometry(), Geometry.keep_aspect(), Geometry.crop(48), Geometry.tile(40)])
def test_windows_and_region_lie_in_the_templates_frame(geometry: Geometry) -> None:
    size = (90, 60)
    alignment = QuarterTurn(size)
    roi = np.zeros((60, 90), np.bool_)
    roi[10:50] = True
    image = grey(*size)
    placement = geometry.place(size, (64, 64), roi=roi, alignment=alignment)
    turned = geometry.place((60, 90), (64, 64), roi=roi & alignment.valid)
    assert placement.windows == turned.windows
    for found, expected in zip(placement.inputs(image), turned.inputs(np.rot90(image, -1)), strict=True):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(placement.inside(), turned.inside())
    mask = image > 200
    np.testing.assert_array_equal(placement.project(mask), turned.project(np.rot90(mask, -1)))
    maps = RNG.random(placement.inside().shape, np.float32)
    laid = placement.lay_back(maps)
    assert laid.shape == size
    np.testing.assert_array_equal(laid, np.rot90(turned.lay_back(maps)))


# Settings


@pytest.mark.parametrize("geometry", [Geometry(), Geometry.keep_aspect(), Geometry.crop(224), Geometry.tile(512, 0)])
def test_settings_survive_json(geometry: Geometry) -> None:
    assert Geometry.from_json(json.loads(json.dumps(geometry.to_json()))) == geometry


def test_options() -> None:
    assert Geometry.from_options() == Geometry()
    assert Geometry.from_options(keep_aspect=True) == Geometry("keep_aspect")
    assert Geometry.from_options(crop=224) == Geometry("crop", 224)
    assert Geometry.from_options(tile="512") == Geometry("tile", 512, 128)
    assert Geometry.from_options(tile="512,0") == Geometry("tile", 512, 0)
    assert Geometry.crop(224).input_size((256, 320)) == (224, 224)
    assert Geometry.tile(512).input_size((256, 320)) == (256, 320)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"keep_aspect": True, "crop": 224}, "exclude each other"),
        ({"crop": 224, "tile": "512"}, "exclude each other"),
        ({"crop": 7}, "--crop 7 is too small"),
        ({"tile": "7"}, "--tile 7 is too small"),
        ({"tile": "64,64"}, "--tile 64,64: .* from 0 to 63"),
        ({"tile": "64,-1"}, "--tile 64,-1: .* from 0 to 63"),
        ({"tile": "wide"}, "--tile wide: .*512,64"),
        ({"tile": "64,"}, "--tile 64,: .*512,64"),
        ({"tile": "64,8,8"}, "--tile 64,8,8: .*512,64"),
    ],
)
def test_wrong_options(options: dict, reason: str) -> None:
    with pytest.raises(FlawmapError, match=reason) as error:
        Geometry.from_options(**options)
    one_line(error)


@pytest.mark.parametrize(
    "given_settings",
    [{"kind": "twist"}, {"kind": "stretch", "side": 9}, {"kind": "crop", "side": 64.0}, {"zoom": 2}, {"side": None}],
)
def test_wrong_settings(given_settings: dict) -> None:
    with pytest.raises(FlawmapError, match="geometry: ") as error:
        Geometry.from_json(given_settings)
    one_line(error)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(FlawmapError, match=r"--crop 300 .* 256 x 256 .*--image-size") as error:
        Geometry.crop(300).place((640, 640), (256, 256))
    one_line(error)
    with pytest.raises(ImageError, match=f"--tile 8,7 .* 300 x 300 .*{MOST_TILES}") as error:
        Geometry.tile(8, 7).place((300, 300), (64, 64))
    one_line(error)


def test_numpy_and_pillow_suffice() -> None:
    modules = "flawmap.imaging.geometry, flawmap.imaging.registration"
    code = f"import sys; import {modules}; print({{'torch', 'scipy', 'cv2'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
