"""Drawn parts: exact masks, the same bytes for the same seed, and nothing that gives the defects away too easily."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import binary_dilation, distance_transform_edt, label
from sklearn.metrics import roc_auc_score

from flawmap.datasets.drawn import KINDS, draw_dataset, draw_part
from flawmap.datasets.drawn.board_components import Pose
from flawmap.datasets.drawn.board_layout import LAYOUT
from flawmap.datasets.drawn.boards import SMALL
from flawmap.datasets.drawn.camera import Camera, develop, expose
from flawmap.datasets.drawn.lighting import Light, sample_light, shade
from flawmap.datasets.drawn.noise import smooth_noise
from flawmap.datasets.drawn.surface import Surface, local_window, rounded_box
from flawmap.errors import FlawmapError

EVERY_DEFECT = [(kind, defect) for kind in KINDS for defect in KINDS[kind].defects]


def draw(kind: str, defect: str | None, seed: int | list[int], size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    return draw_part(kind, defect, np.random.default_rng(seed), size)


def files(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_three_kinds_with_four_defects_each() -> None:
    assert list(KINDS) == ["screws", "fabric", "boards"]
    assert all(len(set(kind.defects)) == 4 for kind in KINDS.values())


@pytest.mark.parametrize(("kind", "defect"), EVERY_DEFECT)
def test_mask_is_where_the_part_differs_from_its_good_twin(kind: str, defect: str) -> None:
    for seed in range(3):
        image, mask = draw(kind, defect, seed, 256)
        twin, nothing = draw(kind, None, seed, 256)
        assert image.shape == (256, 256, 3)
        assert image.dtype == np.uint8
        assert mask.shape == (256, 256)
        assert mask.dtype == bool
        assert not nothing.any()
        assert 0 < mask.mean() < 0.4
        difference = np.abs(image.astype(int) - twin).max(axis=2)
        near = distance_transform_edt(~mask) <= 3 * np.sqrt(2)  # a square of 3 pixels around each pixel of the mask
        assert np.array_equal(image[~near], twin[~near])
        # The twins share their noise, so a difference beyond rounding and the mask's threshold is the defect's.
        assert not (difference[~mask] > 8).any()
        # Closing bridges at most 6 pixels, so what is marked lies close to what has changed.
        assert (distance_transform_edt(difference < 4)[mask] <= 4).mean() > 0.9
        # and every separate region holds a change of its own
        regions, count = label(mask, np.ones((3, 3)))
        assert all(difference[regions == number].max() >= 4 for number in range(1, count + 1))
        assert np.sum(difference > 16) >= 30  # a person sees it


def test_place_of_a_missing_component_is_marked() -> None:
    for seed in range(4):
        _, mask = draw("boards", "missing_component", seed, 256)
        covered = []
        for part in SMALL:
            half = part.half if part.turn == 0 else part.half[::-1]
            inset = 3.5  # shift, turn and placement of a good board
            rows = slice(int(part.y - half[1] + inset), int(part.y + half[1] - inset) + 1)
            columns = slice(int(part.x - half[0] + inset), int(part.x + half[0] - inset) + 1)
            covered.append(mask[rows, columns].mean())
        assert sum(share > 0.97 for share in covered) == 1
        assert sum(share > 0.5 for share in covered) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_mean_brightness_does_not_tell_good_from_defective(kind: str) -> None:
    # 20 images a side: without any relation the AUROC has a standard error of sqrt(41 / 4800) = 0.09 about 0.5.
    good = [draw(kind, None, [1, n], 64)[0].mean() for n in range(20)]
    bad = [draw(kind, KINDS[kind].defects[n % 4], [2, n], 64)[0].mean() for n in range(20)]
    assert 0.3 < roc_auc_score([0] * 20 + [1] * 20, good + bad) < 0.7
    assert np.std(good) > 4  # exposure and light do vary


@pytest.mark.parametrize(("kind", "aligned"), [("screws", False), ("fabric", False), ("boards", True)])
def test_good_parts_vary_and_only_boards_are_aligned(kind: str, aligned: bool) -> None:
    parts = np.stack([draw(kind, None, [3, n], 96)[0].mean(axis=2).ravel() for n in range(6)])
    correlation = np.corrcoef(parts)[np.triu_indices(6, 1)]
    assert correlation.max() < 0.98
    assert np.median(correlation) > 0.7 if aligned else np.median(correlation) < 0.3


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(EVERY_DEFECT), st.integers(0, 2**32 - 1), st.integers(64, 101))
def test_any_seed_and_size_gives_a_visible_defect(which: tuple[str, str], seed: int, size: int) -> None:
    image, mask = draw(*which, seed, size)
    assert image.shape == (size, size, 3)
    assert 0 < mask.mean() < 0.4


def test_layout_on_disk(tmp_path: Path) -> None:
    target = tmp_path / "new" / "boards"
    draw_dataset(target, "boards", 5, train=2, good=1, per_defect=1, size=64)
    expected = {"train/good/000.png", "train/good/001.png", "test/good/000.png"}
    for defect in KINDS["boards"].defects:
        expected |= {f"test/{defect}/000.png", f"ground_truth/{defect}/000_mask.png"}
    assert set(files(target)) == expected
    for name in expected:
        with Image.open(target / name) as image:
            assert image.size == (64, 64)
            assert image.format == "PNG"
            if name.startswith("ground_truth"):
                assert image.mode == "L"
                assert set(np.unique(np.asarray(image))) == {0, 255}
            else:
                assert image.mode == "RGB"


def test_written_mask_belongs_to_the_written_image(tmp_path: Path) -> None:
    draw_dataset(tmp_path, "fabric", 1, train=0, good=0, per_defect=2, size=64)
    for index in range(2):
        image = np.asarray(Image.open(tmp_path / "test" / "hole" / f"{index:03d}.png")).mean(axis=2)
        mask = np.asarray(Image.open(tmp_path / "ground_truth" / "hole" / f"{index:03d}_mask.png")) > 0
        assert image[mask].mean() < image[~mask].mean() - 10  # the plate under the cloth is dark


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_bytes_whatever_the_counts(kind: str, tmp_path: Path) -> None:
    sizes = {"train": 2, "good": 1, "per_defect": 1}
    draw_dataset(tmp_path / "a", kind, 7, **sizes, size=64)
    draw_dataset(tmp_path / "b", kind, 7, train=1, good=2, per_defect=2, size=64)
    draw_dataset(tmp_path / "c", kind, 8, **sizes, size=64)
    first, second, third = (files(tmp_path / name) for name in "abc")
    shared = first.keys() & second.keys()
    assert len(shared) == 2 + 2 * 4
    assert all(first[name] == second[name] for name in shared)
    assert all(first[name] != third[name] for name in first)
    images = [content for name, content in second.items() if not name.startswith("ground_truth")]
    assert len(set(images)) == len(images)


def test_an_empty_folder_is_accepted_and_a_full_one_is_not(tmp_path: Path) -> None:
    draw_dataset(tmp_path, "screws", 0, train=1, good=0, per_defect=0, size=64)
    before = files(tmp_path)
    assert set(before) == {"train/good/000.png"}
    with pytest.raises(FlawmapError, match=r"is not empty \(train\); give a new or an empty folder") as caught:
        draw_dataset(tmp_path, "screws", 0, train=1, good=0, per_defect=0, size=64)
    assert str(tmp_path) in str(caught.value)
    assert files(tmp_path) == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FlawmapError, match=r"\(notes\.txt and 1 more\)"):
        draw_dataset(tmp_path)
    with pytest.raises(FlawmapError, match=r"notes\.txt: is a file"):
        draw_dataset(tmp_path / "notes.txt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "bolts"}, "'bolts' is not a kind of part that can be drawn; choose one of screws, fabric, boards"),
        ({"seed": -1}, "seed is -1"),
        ({"train": -2}, "train is -2"),
        ({"size": 63}, "size is 63 pixels; give 64 or more"),
    ],
)
def test_wrong_arguments_are_named_in_one_line(arguments: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(FlawmapError) as caught:
        draw_dataset(tmp_path / "out", **arguments)  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_unknown_defect_is_named() -> None:
    with pytest.raises(FlawmapError, match="'rust' is not a defect of screws; choose one of bent, broken_tip"):
        draw("screws", "rust", 0)


def test_a_full_disk_leaves_no_image_under_its_final_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Image.Image, target: BinaryIO, **_: object) -> None:
        target.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(FlawmapError, match="the disk is full") as caught:
        draw_dataset(tmp_path, "screws", 0, train=1, good=0, per_defect=0, size=64)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.png"))


def test_a_matte_plane_follows_lamberts_law() -> None:
    direction = (0.48, 0.6, 0.64)
    flat = shade(Surface.flat(64, (0.5, 0.25, 0.125)), Light(direction, 0.9, 0.3, (0.0, 0.0)))
    assert flat == pytest.approx(np.broadcast_to([[[0.5]], [[0.25]], [[0.125]]], (3, 64, 64)) * (0.9 * 0.64 + 0.3))
    slope = Surface.flat(64, (0.5, 0.5, 0.5))
    slope.height += -0.75 * np.arange(64, dtype=np.float32)  # falls to the right, towards the lamp's side
    cosine = np.dot(np.array([0.75, 0.0, 1.0]) / 1.25, direction)
    inner = shade(slope, Light(direction, 0.9, 0.0, (0.0, 0.0)))[:, 24:40, 24:40]
    assert inner == pytest.approx(np.full((3, 16, 16), 0.5 * 0.9 * cosine), rel=1e-5)


def test_steps_between_layers_throw_shadows_but_have_no_slope() -> None:
    surface = Surface.flat(128, (0.5, 0.5, 0.5))
    surface.height[40:80, 40:80] = 20
    surface.layer[40:80, 40:80] = 1
    row = shade(surface, Light((-0.6, 0.0, 0.8), 1.0, 0.0, (0.0, 0.0)))[0, 60]
    lit = 0.5 * 0.8
    assert row[:36] == pytest.approx(lit)
    assert row[44:76] == pytest.approx(lit)
    assert row[84:88] == pytest.approx(0, abs=0.05)  # the full shadow reaches 20 / (0.8 / 0.6) = 15 pixels,
    assert row[100:] == pytest.approx(lit)  # its soft edge ends there


def test_box_distance_agrees_with_the_distance_transform() -> None:
    _, x, y = local_window(120, (60, 60), 0.0, 60)
    distance = rounded_box(x, y, 30, 20, 0)
    inside = (np.abs(x) <= 30) & (np.abs(y) <= 20)
    outside = distance_transform_edt(~inside)
    assert distance[~inside] == pytest.approx(outside[~inside], abs=1e-4)
    assert np.array_equal(
        rounded_box(x, y, 30, 20, 5) <= 0, binary_dilation(rounded_box(x, y, 25, 15, 0) <= 0, _disc(5))
    )


def _disc(radius: int) -> np.ndarray:
    axis = np.arange(-radius, radius + 1)
    return axis[:, None] ** 2 + axis**2 <= radius**2


@given(st.floats(-0.5, 0.5), st.floats(-5, 5), st.floats(-5, 5), st.floats(0, 256), st.floats(0, 256))
def test_board_pose_and_its_inverse_agree(turn: float, right: float, down: float, x: float, y: float) -> None:
    pose = Pose(512, turn, (right, down))
    a, b, c, d, e, f = pose.back()
    px, py = pose.at(x, y)
    assert (a * px + b * py + c, d * px + e * py + f) == pytest.approx((2 * x, 2 * y), abs=1e-6)


def test_no_two_parts_of_the_layout_overlap() -> None:
    boxes = [(p.x, p.y, *(p.half if p.turn == 0 else p.half[::-1])) for p in LAYOUT]
    for n, (x, y, half_x, half_y) in enumerate(boxes):
        for other_x, other_y, other_half_x, other_half_y in boxes[n + 1 :]:
            assert abs(x - other_x) > half_x + other_half_x or abs(y - other_y) > half_y + other_half_y


def test_camera_encodes_gamma_and_adds_the_stated_noise() -> None:
    camera = Camera(1.0, (1.0, 0.5, 1.0), 0.5, 0.0, 0.01, 0.02)
    picture = develop(np.full((3, 256, 256), 0.25, dtype=np.float32), camera)
    assert picture[0] == pytest.approx(np.full((128, 128), 0.25 ** (1 / 2.2)), rel=1e-5)
    assert picture[1] == pytest.approx(np.full((128, 128), 0.125 ** (1 / 2.2)), rel=1e-5)
    image = expose(picture, camera, np.random.default_rng(0))
    for channel, level in ((0, 0.25 ** (1 / 2.2)), (1, 0.125 ** (1 / 2.2))):
        deviation = 255 * np.sqrt(0.01**2 + 0.02**2 * level + 1 / (12 * 255**2))  # rounding adds its own
        assert image[..., channel].mean() == pytest.approx(255 * level, abs=5 * deviation / 128)
        assert image[..., channel].std() == pytest.approx(deviation, rel=0.03)


def test_noise_is_standard_and_light_points_up() -> None:
    noise = np.stack([smooth_noise(np.random.default_rng(n), (100, 80), (9, 4)) for n in range(20)])
    assert noise.shape == (20, 100, 80)
    assert noise.dtype == np.float32
    assert noise.mean() == pytest.approx(0, abs=0.1)
    assert 0.7 < noise.std() < 1.3
    for n in range(20):
        light = sample_light(np.random.default_rng(n))
        assert np.linalg.norm(light.direction) == pytest.approx(1)
        assert light.direction[2] > 0.6
