"""flawmap.imaging.registration against poses that are known, scipy's resampling, and parts drawn in any pose."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from flawmap.datasets.drawn import draw_part
from flawmap.datasets.drawn.boards import Board
from flawmap.datasets.drawn.screws import Screw
from flawmap.errors import FlawmapError, ImageError
from flawmap.imaging.geometry import Geometry
from flawmap.imaging.registration import LONGEST, Template
from flawmap.imaging.rigid import Alignment


def draw(kind: str, number: int, defect: str | None = None, size: int = 256) -> NDArray[np.uint8]:
    return draw_part(kind, defect, np.random.default_rng([11, number]), size)[0]


def scene_generator(number: int) -> np.random.Generator:
    """The state from which `draw` makes a part's pose."""
    return np.random.default_rng(int(np.random.default_rng([11, number]).integers(2**63, size=5)[0]))


def turned(
    pixels: NDArray, angle: float, shift: tuple[float, float], size: tuple[int, int] | None = None
) -> NDArray[np.float64]:
    """The picture turned clockwise (as seen) by degrees, its centre moved (right, down) from that of the new one."""
    height, width = size or pixels.shape[:2]
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    back = np.array([[cos, -sin], [sin, cos]])  # rows first: (y, x) on the new picture to (y, x) on the old
    centre = np.array([height / 2 - 0.5 + shift[1], width / 2 - 0.5 + shift[0]])
    offset = np.array(pixels.shape[:2]) / 2 - 0.5 - back @ centre
    planes = [pixels] if pixels.ndim == 2 else np.moveaxis(pixels, 2, 0)
    warped = [
        ndimage.affine_transform(plane.astype(float), back, offset, (height, width), order=3, mode="constant", cval=95)
        for plane in planes
    ]
    return warped[0] if pixels.ndim == 2 else np.stack(warped, axis=2)


def photographed(picture: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Other exposure, other black, and the noise of a sensor."""
    seen = rng.uniform(0.6, 1.1) * picture + rng.uniform(-10, 25) + rng.normal(0, 6, picture.shape)
    return np.clip(np.rint(seen), 0, 255).astype(np.uint8)


def off(angle: float, truth: float) -> float:
    return abs((angle - truth + 180) % 360 - 180)


@pytest.fixture(scope="module")
def screws() -> list[NDArray[np.uint8]]:
    return [draw("screws", number) for number in range(11)]


@pytest.fixture(scope="module")
def board() -> NDArray[np.uint8]:
    return draw("boards", 0)


# Poses


@pytest.mark.parametrize("kind", ["screws", "boards", "fabric"])
def test_known_warps_are_recovered(kind: str) -> None:
    part, rng = draw(kind, 0), np.random.default_rng(5)
    template = Template.from_image(part)
    for _ in range(8):
        angle, shift = rng.uniform(-180, 180), rng.uniform(-25, 25, 2)
        found = template.align(photographed(turned(part, angle, shift), rng))
        assert off(found.angle, angle) < 0.3
        np.testing.assert_allclose(found.shift, shift, atol=1)
        assert found.quality > 0.6


def test_the_template_itself_is_found_where_it_is(board: NDArray[np.uint8]) -> None:
    found = Template.from_image(board).align(board)
    assert abs(found.angle) < 0.01
    np.testing.assert_allclose(found.shift, 0, atol=0.01)
    np.testing.assert_allclose(found.matrix, [[1, 0, 0], [0, 1, 0]], atol=0.02)
    assert found.quality == pytest.approx(1, abs=1e-3)


def test_boards_are_found_as_their_fixture_held_them() -> None:
    """Against the poses they were drawn in; their components, solder and light differ."""
    poses = [Board(scene_generator(number), 64).pose for number in range(6)]
    template = Template.from_image(draw("boards", 0))
    first = poses[0]
    for number, pose in list(enumerate(poses))[1:]:
        found = template.align(draw("boards", number))
        angle = math.degrees(pose.turn - first.turn)
        cos, sin = math.cos(pose.turn - first.turn), math.sin(pose.turn - first.turn)
        x, y = first.shift
        shift = pose.shift[0] - (cos * x - sin * y), pose.shift[1] - (sin * x + cos * y)
        assert off(found.angle, angle) < 0.2
        np.testing.assert_allclose(found.shift, shift, atol=0.6)
        assert found.quality > 0.8


def test_screws_in_any_pose_are_found_and_other_things_are_not(screws: list[NDArray[np.uint8]]) -> None:
    """No two screws have the same thread, recess, lean, light or shadow, so the angle is known to a few degrees."""
    angles = [math.degrees(Screw(scene_generator(number), 64).angle) for number in range(11)]
    template = Template.from_image(screws[0])
    for screw, angle in zip(screws[1:], angles[1:], strict=True):
        found = template.align(screw)
        assert off(found.angle, angle - angles[0]) < 10
        assert found.quality > 0.55
    for defect in ("bent", "broken_tip", "stripped_thread"):
        assert template.align(draw("screws", 20, defect)).quality > 0.5

    noise = np.random.default_rng(0).integers(0, 256, (256, 256), np.uint8)
    ramp = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    others = [draw("boards", 1), draw("fabric", 1), noise, ramp, np.full((256, 256), 90, np.uint8)]
    for other in others:
        assert template.align(other).quality < 0.35


def test_a_part_that_lies_mostly_outside_counts_as_not_found(board: NDArray[np.uint8]) -> None:
    template = Template.from_image(board)
    qualities = [template.align(turned(board, 0, (shift, 0)).astype(np.uint8)).quality for shift in (0, 60, 120, 200)]
    assert qualities == sorted(qualities, reverse=True)
    assert qualities[1] > 0.6
    assert qualities[3] < 0.5


@pytest.mark.parametrize(
    ("small", "size"), [((300, 520), (300, 520)), ((480, 640), (640, 480)), ((90, 120), (150, 140)), ((600, 150), None)]
)
def test_pictures_of_any_shape(small: tuple[int, int], size: tuple[int, int] | None) -> None:
    rng = np.random.default_rng(2)
    part = ndimage.zoom(rng.uniform(0, 255, (small[0] // 12, small[1] // 12)), 13, order=3)[: small[0], : small[1]]
    part = np.clip(part, 0, 255)
    assert part.shape == small
    template = Template.from_image(part.astype(np.uint8))
    assert max(template.grey.shape) <= LONGEST
    for angle in (0.0, 90.0, -151.0, 12.3):
        shift = rng.uniform(-0.1, 0.1, 2) * min(small)
        found = template.align(photographed(turned(part, angle, shift, size), rng))
        if found.quality < 0.5:  # a long picture turned in a frame of its own shape shows a small part of itself
            assert size is None
            continue
        assert found.template_size == small
        assert off(found.angle, angle) < 0.3 * max(1, 256 / max(small))
        np.testing.assert_allclose(found.shift, shift, atol=max(1, max(small) / 256))


def test_the_angle_can_be_limited(board: NDArray[np.uint8]) -> None:
    template = Template.from_image(board)
    image = turned(board, 8, (4, -6)).astype(np.uint8)
    found = template.align(image, max_angle=10)
    assert off(found.angle, 8) < 0.3
    assert template.align(image, max_angle=3).angle == pytest.approx(3, abs=1e-6)
    upright = template.align(turned(board, 0, (4, -6)).astype(np.uint8), max_angle=0)
    assert upright.angle == 0
    np.testing.assert_allclose(upright.shift, (4, -6), atol=0.2)
    with pytest.raises(FlawmapError, match="from 0 to 180"):
        template.align(image, max_angle=-1)


def test_all_kinds_of_pixels_give_one_pose(board: NDArray[np.uint8]) -> None:
    image = turned(board, 33, (9, 5))
    template = Template.from_image(board)
    eight = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    found = template.align(eight)
    as_float = (eight / 255).astype(np.float32)
    for pixels in (as_float, eight @ np.array((0.299, 0.587, 0.114), np.float32) / 255):
        other = template.align(pixels)
        np.testing.assert_allclose(other.matrix, found.matrix, atol=0.05)
    deep = np.rint(eight.mean(axis=2) * 257).astype(np.uint16)
    np.testing.assert_allclose(template.align(deep).matrix, found.matrix, atol=0.3)


def test_a_template_restored_from_its_arrays_is_the_same(screws: list[NDArray[np.uint8]]) -> None:
    large = np.repeat(np.repeat(screws[0], 2, axis=0), 2, axis=1)
    template = Template.from_image(large)
    assert template.grey.dtype == np.float32
    assert template.grey.shape == (256, 256)
    restored = Template(template.grey.copy(), template.size)
    image = np.repeat(np.repeat(screws[1], 2, axis=0), 2, axis=1)
    np.testing.assert_array_equal(restored.align(image).matrix, template.align(image).matrix)


def test_what_cannot_be_registered_is_refused(board: NDArray[np.uint8]) -> None:
    for flat in (np.full((50, 60), 7, np.uint8), np.zeros((1, 1), np.uint8)):
        with pytest.raises(FlawmapError, match=r"flat tone; give"):
            Template.from_image(flat)
    template = Template.from_image(board)
    for size in ((600, 600), (100, 100)):
        with pytest.raises(ImageError, match=rf"{size[0]} x {size[1]} .* 256 x 256 .*; take") as error:
            template.align(np.zeros(size, np.uint8))
        assert "\n" not in str(error.value)


# Pixels


def alignment(angle: float, shift: tuple[float, float], size: tuple[int, int], frame: tuple[int, int]) -> Alignment:
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    back = np.array([[cos, sin], [-sin, cos]])  # (x, y) on the image to (x, y) on the template
    centre = np.array([size[1] / 2 + shift[0], size[0] / 2 + shift[1]])
    offset = np.array([frame[1] / 2, frame[0] / 2]) - back @ centre
    return Alignment(size, frame, np.column_stack([back, offset]), angle, shift, 1.0)


POSES = [
    alignment(0, (0, 0), (60, 80), (60, 80)),
    alignment(0, (3, -2), (60, 80), (50, 90)),
    alignment(90, (0, 0), (60, 80), (80, 60)),
    alignment(37.5, (5.3, -7.1), (120, 90), (100, 110)),
]


def test_found_angle_shift_and_matrix_belong_together(board: NDArray[np.uint8]) -> None:
    image = turned(board, 33, (9, 5), (280, 260)).astype(np.uint8)
    found = Template.from_image(board).align(image)
    expected = alignment(found.angle, found.shift, (280, 260), (256, 256))
    np.testing.assert_allclose(found.matrix, expected.matrix, atol=1e-9)


@pytest.mark.parametrize("pose", POSES)
def test_warp_is_bilinear_and_repeats_the_edge(pose: Alignment) -> None:
    """Against scipy's linear interpolation; where the image ends, against its nearest pixel."""
    rng = np.random.default_rng(1)
    image = ndimage.gaussian_filter(rng.uniform(0, 1, pose.size), 2).astype(np.float32)
    image = (image - image.min()) / np.ptp(image)
    y, x = np.mgrid[: pose.template_size[0], : pose.template_size[1]] + 0.5
    inverse = np.linalg.inv(np.vstack([pose.matrix, [0, 0, 1]]))
    at = np.einsum("ij,jhw->ihw", inverse, np.stack([x, y, np.ones_like(x)]))[:2]
    expected = ndimage.map_coordinates(image, at[::-1] - 0.5, order=1, mode="nearest")
    found = pose.warp(image)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[pose.valid], expected[pose.valid], atol=1e-5)
    # Beyond the edge the nearest pixel is repeated, not a blend of the nearest two.
    assert np.abs(found - expected).max() < 0.2
    inside = (at[0] >= 0) & (at[0] < pose.size[1]) & (at[1] >= 0) & (at[1] < pose.size[0])
    on_border = np.abs(at - np.rint(at)).min(axis=0) < 1e-6
    np.testing.assert_array_equal(pose.valid[~on_border], inside[~on_border])

    eight, deep = np.rint(image * 255).astype(np.uint8), np.rint(image * 65535).astype(np.uint16)
    colour = np.stack([eight, 255 - eight, eight // 2], axis=2)
    np.testing.assert_allclose(pose.warp(eight)[pose.valid], expected[pose.valid] * 255, atol=1.5)
    np.testing.assert_allclose(pose.warp(deep)[pose.valid], expected[pose.valid] * 65535, atol=2)
    assert pose.warp(deep).dtype == np.uint16
    np.testing.assert_array_equal(pose.warp(colour)[:, :, 0], pose.warp(eight))
    planes = np.stack([image, 1 - image, image / 2], axis=2)
    np.testing.assert_array_equal(pose.warp(planes)[:, :, 2], pose.warp(image / 2))

    mask = image > 0.5
    nearest = mask[
        np.clip(np.floor(at[1]), 0, pose.size[0] - 1).astype(int),
        np.clip(np.floor(at[0]), 0, pose.size[1] - 1).astype(int),
    ]
    settled = np.abs(at - np.rint(at)).min(axis=0) > 0.01
    np.testing.assert_array_equal(pose.warp(mask)[settled], (nearest & inside)[settled])


@pytest.mark.parametrize("pose", POSES)
def test_unwarp_undoes_warp(pose: Alignment) -> None:
    rng = np.random.default_rng(4)
    image = ndimage.gaussian_filter(rng.normal(size=pose.size), 6).astype(np.float32)
    image /= np.abs(image).max()
    warped = pose.warp(image)
    back = pose.unwarp(np.where(pose.valid, warped, np.float32(np.nan)))
    assert back.dtype == np.float32
    assert back.shape == pose.size
    y, x = np.mgrid[: pose.size[0], : pose.size[1]] + 0.5
    at = np.einsum("ij,jhw->ihw", pose.matrix, np.stack([x, y, np.ones_like(x)]))
    reached = (at[0] > 1) & (at[0] < pose.template_size[1] - 1) & (at[1] > 1) & (at[1] < pose.template_size[0] - 1)
    beyond = (at[0] < -1) | (at[0] > pose.template_size[1] + 1) | (at[1] < -1) | (at[1] > pose.template_size[0] + 1)
    inner = np.zeros(pose.size, np.bool_)
    inner[2:-2, 2:-2] = True
    np.testing.assert_allclose(back[reached & inner], image[reached & inner], atol=0.06)
    assert np.isnan(back[beyond]).all()


def test_unwarp_neither_spreads_nor_blends_what_was_not_scored() -> None:
    pose = POSES[3]
    anomaly_map = np.full(pose.template_size, 5, np.float32)
    anomaly_map[30:60, 40:70] = np.nan
    back = pose.unwarp(anomaly_map)
    whole = pose.unwarp(np.full(pose.template_size, 5, np.float32))
    np.testing.assert_allclose(back[~np.isnan(back)], 5, rtol=1e-6)
    missing = np.isnan(back) & ~np.isnan(whole)
    assert missing.sum() == pytest.approx(30 * 30, rel=0.03)


# Together with the windows


@given(
    st.sampled_from([Geometry(), Geometry.keep_aspect(), Geometry.crop(56), Geometry.tile(48, 16)]),
    st.floats(-180, 180),
    st.tuples(st.floats(-15, 15), st.floats(-15, 15)),
    st.tuples(st.floats(0.3, 0.7), st.floats(0.3, 0.7)),
)
@settings(max_examples=80, deadline=None)
def test_a_marked_pixel_lands_where_it_was(
    geometry: Geometry, angle: float, shift: tuple[float, float], place: tuple[float, float]
) -> None:
    size, frame = (120, 100), (110, 130)
    pose = alignment(angle, shift, size, frame)
    y, x = int(place[0] * size[0]), int(place[1] * size[1])
    mask = np.zeros(size, np.bool_)
    mask[y : y + 6, x : x + 6] = True
    placement = geometry.place(size, (64, 64), alignment=pose)
    laid = placement.lay_back(placement.inputs(mask.astype(np.float32)))
    assert laid.shape == size
    # A model pixel covers 110/64 x 130/64 original pixels, in any direction.
    row, column = np.unravel_index(np.nanargmax(laid), size)
    assert math.hypot(max(y - row, row - y - 5, 0), max(x - column, column - x - 5, 0)) <= 2.5
    projected = placement.project(mask)
    assert projected.any()
    laid = placement.lay_back(projected)
    middle = np.array(ndimage.center_of_mass(np.nan_to_num(laid)))
    np.testing.assert_allclose(middle, (y + 2.5, x + 2.5), atol=2.5)


def test_the_region_follows_the_part(board: NDArray[np.uint8]) -> None:
    """A region drawn on the template lies on the same component of every board, however it is turned."""
    template = Template.from_image(board)
    roi = np.zeros((256, 256), np.bool_)
    roi[80:120, 60:130] = True
    image = turned(board, 25, (12, -8)).astype(np.uint8)
    placement = Geometry().place((256, 256), (128, 128), roi=roi, alignment=template.align(image))
    laid = placement.lay_back(np.ones((1, 128, 128), np.float32))
    expected = turned(roi.astype(np.uint8) * 255, 25, (12, -8))
    scored = ~np.isnan(laid)
    assert not scored[expected < 20].any()
    assert scored[expected > 235].all()
    (found,) = placement.inputs(image)
    (reference,) = Geometry().place((256, 256), (128, 128)).inputs(board)
    inside = placement.inside()[0]
    assert inside.sum() == 20 * 35
    assert np.abs(found[inside].astype(float) - reference[inside]).mean() < 4
