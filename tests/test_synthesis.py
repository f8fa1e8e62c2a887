"""Synthetic defects: masks, foregrounds, blends and labels against independent computations, and bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from scipy import ndimage
from scipy.sparse import lil_array
from scipy.sparse.linalg import spsolve

from flawmap.datasets import find_dataset
from flawmap.datasets.drawn import draw_dataset, draw_part
from flawmap.errors import FlawmapError, ImageError
from flawmap.imaging.decoding import read_image
from flawmap.imaging.masks import read_mask
from flawmap.synthesis import (
    CLS_CNF,
    DRAEM,
    POUTA,
    SynthesisSettings,
    TextureFolder,
    draw_texture,
    find_foreground,
    generator,
    soft_label,
    synthesize,
)
from flawmap.synthesis.augmentation import OPERATIONS, augment
from flawmap.synthesis.blending import alpha_blend, seamless_blend
from flawmap.synthesis.contact_sheet import caption, contact_sheet
from flawmap.synthesis.cutpaste import cutpaste, scar
from flawmap.synthesis.dataset import write_defects
from flawmap.synthesis.defects import KINDS, VISIBLE
from flawmap.synthesis.foreground import otsu_threshold
from flawmap.synthesis.perlin import _turned, perlin_mask, perlin_noise
from flawmap.synthesis.rearrangement import rearrange
from flawmap.synthesis.textures import RECIPES

SHARED = Path(__file__).parents[2] / "shared"
seeds = st.integers(0, 2**32 - 1)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def smooth_image(seed: int, shape: tuple[int, ...] = (40, 50, 3)) -> np.ndarray:
    noise = ndimage.gaussian_filter(rng(seed).random(shape), (2, 2, 0)[: len(shape)])
    return (noise - noise.min()) / np.ptp(noise)


def disc(size: int, radius: float, middle: tuple[float, float] | None = None) -> np.ndarray:
    y, x = np.mgrid[:size, :size]
    top, left = middle or (size / 2, size / 2)
    return np.hypot(y - top, x - left) < radius


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# Perlin


def test_perlin_noise_agrees_with_its_definition_pixel_by_pixel() -> None:
    height, width, cell = 12, 20, (4.0, 5.5)
    noise = perlin_noise(rng(5), (height, width), cell)
    angles = rng(5).uniform(0, 2 * np.pi, (int((height - 1) / 4) + 2, int((width - 1) / 5.5) + 2))

    def fade(t: float) -> float:
        return 6 * t**5 - 15 * t**4 + 10 * t**3

    for row in range(height):
        for column in range(width):
            y, x = row / cell[0], column / cell[1]
            total = 0.0
            for i in (int(y), int(y) + 1):
                for j in (int(x), int(x) + 1):
                    gradient = (np.sin(angles[i, j]), np.cos(angles[i, j]))
                    weight = fade(1 - abs(y - i)) * fade(1 - abs(x - j))
                    total += weight * (gradient[0] * (y - i) + gradient[1] * (x - j))
            assert noise[row, column] == pytest.approx(np.sqrt(2) * total, abs=1e-5)


def test_noise_is_centred_within_its_range_and_zero_at_the_corners() -> None:
    fields = np.stack([perlin_noise(rng(seed), (64, 96), (8, 12)) for seed in range(30)])
    assert np.abs(fields).max() <= 1
    assert fields.mean() == pytest.approx(0, abs=0.05)
    assert fields[:, ::8, ::12] == pytest.approx(0, abs=1e-6)


def test_corners_are_masked_as_often_as_the_middle() -> None:
    masks = np.stack([perlin_mask(rng(seed), (64, 64), (2, 3), 0.2) for seed in range(300)])
    corners = np.concatenate([masks[:, y, x] for y in (slice(8), slice(-8, None)) for x in (slice(8), slice(-8, None))])
    assert corners.mean() == pytest.approx(masks[:, 24:40, 24:40].mean(), rel=0.25)


@pytest.mark.parametrize("angle", [-90.0, -33.0, 45.0, 80.0])
def test_turning_turns_about_the_middle(angle: float) -> None:
    y, x = np.mgrid[:90, :100] + 0.5
    half_plane = 3 * (y - 45) - 2 * (x - 50) > 4
    cosine, sine = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    v, u = np.mgrid[:30, :40] + 0.5 - np.array([15, 20])[:, None, None]
    side = 3 * (sine * u + cosine * v) - 2 * (cosine * u - sine * v) - 4
    turned = _turned(half_plane, (30, 40), np.radians(angle))
    clear = np.abs(side) > 3  # further from the edge than a pixel is wide
    assert np.array_equal(turned[clear], side[clear] > 0)


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(1, 70), st.integers(1, 70))
def test_perlin_masks_of_any_size_and_seed_are_reproducible(seed: int, height: int, width: int) -> None:
    mask = perlin_mask(rng(seed), (height, width))
    assert mask.shape == (height, width)
    assert mask.dtype == np.bool_
    assert np.array_equal(mask, perlin_mask(rng(seed), (height, width)))


def test_a_twentieth_of_the_image_is_over_the_usual_threshold() -> None:
    assert np.mean([perlin_mask(rng(seed), (128, 128)).mean() for seed in range(60)]) == pytest.approx(0.05, abs=0.02)


# Foreground


@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=1, max_dims=2, max_side=12)))
def test_otsu_has_the_least_variance_within_the_classes(values: np.ndarray) -> None:
    def within(threshold: int) -> float:
        parts = (values[values <= threshold], values[values > threshold])
        return sum(part.size * part.var() for part in parts if part.size)

    found = otsu_threshold(values)
    assert within(found) == pytest.approx(min(within(t) for t in range(256)), abs=1e-6)


@pytest.mark.parametrize(("part", "ground", "polarity"), [(200, 60, "bright"), (50, 180, "dark")])
@pytest.mark.parametrize("size", [64, 300])
def test_polarity_is_found_and_the_mask_is_the_part(part: int, ground: int, polarity: str, size: int) -> None:
    images, parts = [], []
    for seed in range(4):
        where = disc(size, size * 0.28, (size * (0.45 + 0.03 * seed), size * 0.5))
        noise = rng(seed).normal(0, 8, (size, size))
        images.append(np.clip(np.where(where, part, ground) + noise, 0, 255).astype(np.uint8))
        parts.append(where)
    found = find_foreground(images)
    assert found.polarity == polarity
    assert "defects lie on it" in found.describe()
    for image, where in zip(images, parts, strict=True):
        mask = found.mask(image)
        assert (mask & where).sum() / (mask | where).sum() > 0.95


def test_small_holes_are_filled_large_ones_and_dirt_on_the_ground_are_not() -> None:
    image = np.full((128, 128), 40, np.uint8)
    image[disc(128, 45)] = 200
    image[disc(128, 5, (45, 64))] = 40
    image[disc(128, 15, (80, 64))] = 40
    image[disc(128, 5, (10, 10))] = 200
    mask = find_foreground([image]).mask(image)
    assert mask[45, 64]
    assert not mask[80, 64]
    assert not mask[10, 10]


def test_textures_and_falling_light_are_no_parts() -> None:
    cloth = [draw_part("fabric", None, rng(seed), 128)[0] for seed in range(3)]
    y, x = np.mgrid[:128, :128]
    light = np.clip(220 - np.hypot(y - 64, x - 64) * 2 + rng().normal(0, 4, (128, 128)), 0, 255).astype(np.uint8)
    noise = rng().integers(0, 256, (128, 128)).astype(np.uint8)
    flat = np.full((20, 30, 3), 7, np.uint8)
    for images in (cloth, [light], [noise], [flat], [flat[:1, :1]]):
        found = find_foreground(images)
        assert found.polarity is None
        assert found.describe().startswith("texture: no foreground mask")
        assert found.mask(images[0]).all()


def test_drawn_screws_and_boards_are_parts() -> None:
    for kind, share in (("screws", 0.08), ("boards", 0.85)):
        images = [draw_part(kind, None, rng(seed), 256)[0] for seed in range(5)]
        found = find_foreground(images)
        assert found.polarity is not None
        assert np.median([found.mask(image).mean() for image in images]) == pytest.approx(share, rel=0.3)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data sets are not there")
@pytest.mark.parametrize(("name", "polarity"), [("cookie", "bright"), ("mtd", None)])
def test_real_sets(name: str, polarity: str | None) -> None:
    samples = find_dataset(SHARED / "data" / name).train
    found = find_foreground(read_image(sample.path) for sample in samples[:: len(samples) // 8])
    assert found.polarity == polarity


def test_no_images_no_foreground() -> None:
    with pytest.raises(FlawmapError, match="at least one"):
        find_foreground([])


# Textures and sources


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_texture_has_contrast_and_any_size(recipe: str) -> None:
    fields = [RECIPES[recipe](rng(seed), (96, 64)) for seed in range(12)]
    assert all(field.shape == (96, 64) and field.dtype == np.float32 for field in fields)
    assert np.median([np.clip(field, 0, 1).std() for field in fields]) > 0.05
    for size in ((1, 1), (1, 9), (5, 2)):
        assert RECIPES[recipe](rng(1), size).shape == size


def test_textures_vary_and_repeat_with_their_seed() -> None:
    drawn = [draw_texture(rng(seed), (64, 64)) for seed in range(40)]
    assert np.array_equal(drawn[3], draw_texture(rng(3), (64, 64)))
    assert len({texture.tobytes() for texture in drawn}) == 40
    colours = np.array([texture.mean(axis=(0, 1)) for texture in drawn])
    assert (colours.std(axis=0) > 30).all()
    # fine and coarse: the share of the variance that 8 x 8 averages keep
    kept = [t.mean(2).reshape(8, 8, 8, 8).mean((1, 3)).var() / max(t.mean(2).var(), 1e-6) for t in drawn]
    assert min(kept) < 0.1
    assert max(kept) > 0.6


def test_augmentation_is_reproducible_and_invert_inverts() -> None:
    picture = draw_texture(rng(1), (32, 48))
    for seed in range(20):
        changed = augment(rng(seed), picture)
        assert changed.shape == picture.shape
        assert changed.dtype == np.uint8
        assert np.array_equal(changed, augment(rng(seed), picture))
    assert np.array_equal(np.asarray(OPERATIONS["invert"](rng(), Image.fromarray(picture))), 255 - picture)
    assert len(OPERATIONS) == 9


def test_texture_folder(tmp_path: Path) -> None:
    with pytest.raises(FlawmapError, match="holds no images"):
        TextureFolder(tmp_path)
    (tmp_path / "deep").mkdir()
    Image.new("L", (7, 9), 99).save(tmp_path / "deep" / "grey.png")
    texture = TextureFolder(tmp_path)(rng(), (20, 30))
    assert np.array_equal(texture, np.full((20, 30, 3), 99, np.uint8))
    (tmp_path / "deep" / "grey.png").write_bytes(b"broken")
    with pytest.raises(ImageError, match=r"grey\.png"):
        TextureFolder(tmp_path)(rng(), (20, 30))


# Blending


masks = hnp.arrays(np.bool_, (9, 11), elements=st.booleans())


@given(masks, st.floats(0, 1))
def test_alpha_blending_changes_the_mask_only(mask: np.ndarray, opacity: float) -> None:
    image, source = smooth_image(0, (9, 11, 3)), smooth_image(1, (9, 11, 3))
    blended = alpha_blend(image, source, mask, opacity)
    assert np.array_equal(blended[~mask], image[~mask])
    expected = (1 - opacity) * image + opacity * source
    assert blended[mask] == pytest.approx(expected[mask])


def poisson(image: np.ndarray, source: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The Poisson equation of Pérez et al. written pixel by pixel and solved directly, (H, W)."""
    numbers = {tuple(at): n for n, at in enumerate(np.argwhere(mask))}
    matrix, right = lil_array((len(numbers), len(numbers))), np.zeros(len(numbers))
    for (y, x), n in numbers.items():
        for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            if not (0 <= v < mask.shape[0] and 0 <= u < mask.shape[1]):
                continue
            matrix[n, n] += 1
            right[n] += source[y, x] - source[v, u]
            if (v, u) in numbers:
                matrix[n, numbers[v, u]] -= 1
            else:
                right[n] += image[v, u]
    solved = image.copy()
    solved[mask] = spsolve(matrix.tocsr(), right)
    return solved


@settings(max_examples=30, deadline=None)
@given(masks.filter(lambda mask: mask.any() and not mask.all()))
def test_seamless_blending_solves_the_poisson_equation(mask: np.ndarray) -> None:
    image, source = smooth_image(0, (9, 11, 2)), smooth_image(1, (9, 11, 2))
    blended = seamless_blend(image, source, mask, tolerance=1e-10)
    assert np.array_equal(blended[~mask], image[~mask])
    for channel in range(2):
        expected = poisson(image[..., channel], source[..., channel], mask)
        assert blended[..., channel] == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("shape", [(120, 90), (65, 130)])
def test_seamless_blending_of_large_masks_in_single_precision(shape: tuple[int, int]) -> None:
    image, source = smooth_image(2, (*shape, 3)).astype(np.float32), smooth_image(3, (*shape, 3)).astype(np.float32)
    mask = perlin_mask(rng(4), shape, (1, 2), 0.0)  # about half of the image, up to its border
    assert 0.2 < mask.mean() < 0.8
    blended = seamless_blend(image, source, mask)
    assert blended.dtype == np.float32
    for channel in range(3):
        expected = poisson(image[..., channel], source[..., channel], mask)
        assert blended[..., channel] == pytest.approx(expected, abs=0.02)
    sides = np.pad(blended - source, ((1, 1), (1, 1), (0, 0)), mode="edge")  # no flow over the image's border
    residual = sides[:-2, 1:-1] + sides[2:, 1:-1] + sides[1:-1, :-2] + sides[1:-1, 2:] - 4 * sides[1:-1, 1:-1]
    assert np.abs(residual[mask]).max() < 1.5e-3


def test_a_brighter_copy_of_the_image_blends_into_the_image() -> None:
    image = smooth_image(0)
    mask = perlin_mask(rng(1), image.shape[:2], (1, 1), 0.0)
    assert seamless_blend(image, image + 0.3, mask) == pytest.approx(image, abs=1e-3)
    everywhere = np.ones_like(mask)
    assert seamless_blend(image, image + 0.3, everywhere) == pytest.approx(image, abs=1e-9)
    assert np.array_equal(seamless_blend(image, image + 0.3, ~everywhere), image)


# CutPaste and rearrangement


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(1, 40), st.integers(1, 40))
def test_rearranging_keeps_every_pixel(seed: int, height: int, width: int) -> None:
    image = rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    arranged = rearrange(rng(seed), image)
    assert np.array_equal(np.sort(arranged.reshape(-1, 3), axis=0), np.sort(image.reshape(-1, 3), axis=0))


def test_rearranged_patches_are_patches_of_the_image() -> None:
    numbered = np.arange(32 * 24).reshape(32, 24)
    arranged = rearrange(rng(2), numbered, grid=4)
    wanted = {numbered[y : y + 8, x : x + 6].tobytes() for y in range(0, 32, 8) for x in range(0, 24, 6)}
    wanted |= {np.frombuffer(patch, numbered.dtype)[::-1].tobytes() for patch in wanted}
    got = {arranged[y : y + 8, x : x + 6].tobytes() for y in range(0, 32, 8) for x in range(0, 24, 6)}
    assert got <= wanted
    assert len(got) == 16
    assert not np.array_equal(arranged, numbered)


def test_cutpaste_moves_a_rectangle_of_the_stated_area() -> None:
    image = rng().permutation(256 * 256).reshape(256, 256).astype(np.float32) / 65536
    region = disc(256, 40)
    for seed in range(20):
        source, mask = cutpaste(rng(seed), image, region, jitter=0.0)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert mask.sum() == len(rows) * len(columns)  # upright
        assert 0.018 < mask.mean() < 0.155
        assert 0.28 < len(rows) / len(columns) < 3.5
        assert region[round(rows.mean()), round(columns.mean())]
        assert np.array_equal(source[~mask], image[~mask])
        shift = np.argwhere(np.abs(image - source[rows[0], columns[0]]) < 1e-7)[0] - (rows[0], columns[0])
        assert (source[rows[0], columns[0] + 1] - image[rows[0] + shift[0], columns[0] + shift[1] + 1]) < 1e-6


def test_scars_are_thin_and_lie_about_a_point_of_the_region() -> None:
    image = rng().integers(0, 65536, (256, 256)).astype(np.uint16)
    region = disc(256, 20)
    for seed in range(20):
        source, mask = scar(rng(seed), image, region)
        assert source.dtype == np.uint16
        assert 2 * 10 * 0.5 < mask.sum() < 16 * 25 * 1.3
        centre = np.rint(ndimage.center_of_mass(mask)).astype(int)
        assert disc(256, 22)[tuple(centre)]


# Soft labels


@settings(deadline=None)
@given(seeds, hnp.arrays(np.bool_, (6, 5)))
def test_soft_labels_lie_in_their_ranges(seed: int, mask: np.ndarray) -> None:
    image, defective = rng(seed).random((6, 5, 3)), rng(seed + 1).random((6, 5, 3))
    for reading, low, high in (
        ("abs_pixelwise", 0.5, 0.9934),
        ("official_signed_scalar", 0.0066, 0.9934),
        ("binary", 1.0, 1.0),
    ):
        label = soft_label(image, defective, mask, reading)  # type: ignore[arg-type]
        assert label.dtype == np.float32
        assert (label[~mask] == 0).all()
        assert ((label[mask] >= low) & (label[mask] <= high)).all()
        if reading == "official_signed_scalar" and mask.any():
            assert np.ptp(label[mask]) == 0


def test_soft_labels_by_hand() -> None:
    image = np.full((2, 3), 0.5)
    defective = np.array([[0.7, 0.1, 0.5], [0.5, 0.5, 0.9]])
    mask = np.array([[True, True, True], [False, False, False]])
    by_pixel = soft_label(image, defective, mask, "abs_pixelwise")
    assert by_pixel == pytest.approx(np.array([[0.731059, 0.880797, 0.5], [0, 0, 0]]), abs=1e-6)
    # The pixel that did not change does not count: the mean of sigmoid(1) and sigmoid(-2).
    scalar = soft_label(image, defective, mask, "official_signed_scalar")
    assert scalar[0] == pytest.approx((0.731059 + 0.119203) / 2, abs=1e-6)
    assert soft_label(image, image, mask, "official_signed_scalar")[mask] == pytest.approx(0.5)
    darker = np.where(mask, 0.2, 0.5)
    assert (soft_label(image, darker, mask, "official_signed_scalar")[mask] < 0.5).all()


# Defects

forms = st.sampled_from([("uint8", 0), ("uint8", 3), ("uint16", 0), ("float32", 0), ("float32", 3)])


def random_image(seed: int, height: int, width: int, form: tuple[str, int]) -> np.ndarray:
    values = rng(seed).random((height, width, form[1]) if form[1] else (height, width))
    scale = {"uint8": 255, "uint16": 65535, "float32": 1}[form[0]]
    return (values * scale).astype(form[0])


@settings(max_examples=60, deadline=None)
@given(
    seeds, st.integers(1, 48), st.integers(1, 48), forms, st.sampled_from(sorted(KINDS)), st.sampled_from([0.0, 1.0])
)
def test_any_image_and_seed(
    seed: int, height: int, width: int, form: tuple[str, int], kind: str, seamless: float
) -> None:
    image = random_image(seed, height, width, form)
    before = image.copy()
    others = [random_image(seed + 1, width, height, form)]
    region = rng(seed).random((height, width)) < 0.7
    chosen = SynthesisSettings(kinds={kind: 1.0}, seamless=seamless)
    made = synthesize(image, generator(seed, 0), others, region=region, settings=chosen)
    assert np.array_equal(image, before)
    assert made.image.dtype == image.dtype
    assert made.image.shape == image.shape
    assert not (made.mask & ~region).any()
    assert np.array_equal(made.image[~made.mask], image[~made.mask])
    assert made.mask.any() == (made.kind != "none")
    assert made.kind in ("none", kind, f"{kind} (seamless)")
    if made.image.dtype == np.float32:
        assert made.image.min() >= 0
        assert made.image.max() <= 1
    again = synthesize(image, generator(seed, 0), others, region=region, settings=chosen)
    assert np.array_equal(made.image, again.image)
    assert np.array_equal(made.mask, again.mask)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_shows_on_a_part(kind: str) -> None:
    image = draw_part("boards", None, rng(1), 128)[0]
    others = [draw_part("boards", None, rng(2), 128)[0]]
    chosen = SynthesisSettings(kinds={kind: 1.0})
    made = [synthesize(image, generator(0, n), others, settings=chosen) for n in range(12)]
    assert sum(defect.kind != "none" for defect in made) >= 11
    for defect in made:
        if defect.kind != "none":
            change = np.abs(defect.image.astype(int) - image)[defect.mask].mean()
            assert change > 0.03 * 255 * 0.9


def test_grey_stays_grey_and_16_bit_stays_below_white() -> None:
    grey = draw_part("screws", None, rng(0), 64)[0][..., :1].repeat(3, axis=2)
    deep = grey[..., 0].astype(np.uint16) * 16
    for number in range(20):
        made = synthesize(grey, generator(1, number), settings=DRAEM)
        assert (made.image == made.image[..., :1]).all()
        assert synthesize(deep, generator(1, number), white=4095).image.max() <= 4095


def test_nothing_to_see_gives_the_image_back() -> None:
    flat = np.full((32, 32), 100, np.uint8)
    for image, region, chosen in (
        (flat, np.zeros((32, 32), bool), None),
        (np.zeros((32, 32, 3), np.uint8), None, SynthesisSettings(kinds={"cutpaste": 1})),
        (flat, None, SynthesisSettings(kinds={"texture": 1}, opacity=(0, 0), seamless=0)),
    ):
        made = synthesize(image, rng(), region=region, settings=chosen)
        assert made.kind == "none"
        assert not made.mask.any()
        assert np.array_equal(made.image, image)
    one = synthesize(np.array([[7]], np.uint8), rng(), settings=SynthesisSettings(kinds={"cutpaste": 1}))
    assert one.image.shape == (1, 1)


def test_what_is_merged_is_a_foreign_texture_by_a_fifth_at_least() -> None:
    black = np.zeros((64, 64, 3), np.uint8)

    def white(_: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
        return np.full((*size, 3), 255, np.uint8)

    settings = replace(POUTA, augmented=False)
    made = [synthesize(black, generator(0, n), textures=white, settings=settings) for n in range(60)]
    shares = [np.unique(defect.image[defect.mask]) / 255 for defect in made if defect.mask.any()]
    assert all(len(share) == 1 for share in shares)  # laid in as it is, not blended once more
    assert 0.2 - 1 / 255 <= min(shares) < 0.3
    assert 0.9 < max(shares) <= 1


@pytest.mark.parametrize("preset", [CLS_CNF, DRAEM, POUTA])
def test_the_papers_settings_draw_masks_from_all_of_perlin(preset: SynthesisSettings) -> None:
    image = draw_part("fabric", None, rng(0), 96)[0]
    made = [synthesize(image, generator(3, n), [image[::-1]], settings=preset) for n in range(15)]
    assert {defect.kind for defect in made} <= set(preset.kinds)
    assert max(ndimage.label(defect.mask)[1] for defect in made) > 10


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kinds": {"rust": 1.0}}, "rust"),
        ({"kinds": {}}, "none"),
        ({"kinds": {"texture": 0.0}}, "not all 0"),
        ({"kinds": {"texture": -1.0, "scar": 2.0}}, "0 or more"),
        ({"seamless": 1.5}, "seamless is 1.5"),
        ({"opacity": (0.8, 0.2)}, "the lower first"),
        ({"scales": (3, 40)}, "scales"),
    ],
)
def test_settings_out_of_range_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(FlawmapError, match=message):
        SynthesisSettings(**values)


def test_a_region_of_another_size_is_refused() -> None:
    with pytest.raises(FlawmapError, match="resize one of them"):
        synthesize(np.zeros((8, 8), np.uint8), rng(), region=np.ones((4, 4), bool))


def test_contact_sheet_shows_image_and_outline() -> None:
    image = np.full((50, 100), 80, np.uint8)
    defect = synthesize(image, generator(0, 1))
    sheet = np.asarray(contact_sheet([defect] * 5, columns=3, side=100))
    assert sheet.shape[2] == 3
    assert (sheet == (255, 0, 90)).all(axis=2).any()
    assert (sheet == 80).all(axis=2).any()


# On disk


@pytest.fixture(scope="module")
def folder(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("synthetic") / "out"
    write_defects(find_dataset(drawn), output, count=10, seed=3)
    return output


def test_layout_is_read_with_every_mask(drawn: Path, folder: Path) -> None:
    dataset = find_dataset(folder)
    assert dataset.layout == "MVTec AD layout"
    assert (len(dataset.train), len(dataset.good_test), len(dataset.defect_test)) == (12, 4, 10)
    good = [read_image(sample.path) for sample in dataset.good_test]
    for number, sample in enumerate(dataset.defect_test):
        assert sample.kind == "synthetic"
        assert sample.mask is not None
        image, base = read_image(sample.path), good[number % 4]
        mask = read_mask(sample.mask, image.shape[:2])  # type: ignore[arg-type]
        assert mask.any()
        assert np.array_equal(image[~mask], base[~mask])
        assert not np.array_equal(image, base)
    with Image.open(folder / "contact_sheet.png") as sheet:
        assert sheet.width > 500
    originals = sorted((drawn / "train" / "good").iterdir())
    assert sorted(p.read_bytes() for p in originals) == sorted(s.path.read_bytes() for s in dataset.train)


def test_neither_workers_nor_count_change_a_defect(drawn: Path, folder: Path, tmp_path: Path) -> None:
    write_defects(find_dataset(drawn), tmp_path / "two", count=12, seed=3, workers=2)
    write_defects(find_dataset(drawn), tmp_path / "other", count=10, seed=4)
    one, two, other = (files(at) for at in (folder, tmp_path / "two", tmp_path / "other"))
    shared = [name for name in one if "synthetic" in name]
    assert len(shared) == 20
    assert all(one[name] == two[name] for name in shared)
    assert not {one[name] for name in shared if "test" in name} & {other[name] for name in other if "synthetic" in name}


def test_command(flawmap: Any, drawn: Path, tmp_path: Path) -> None:
    roi = np.zeros((100, 100), np.uint8)
    roi[:, :50] = 255
    Image.fromarray(roi).save(tmp_path / "roi.png")
    (tmp_path / "textures").mkdir()
    Image.fromarray(draw_texture(rng(), (30, 40))).save(tmp_path / "textures" / "a.png")
    output = tmp_path / "out"
    options = ["--count", 6, "--size", 64, "--workers", 1, "--roi", tmp_path / "roi.png"]
    code, out, err = flawmap("synthesize", drawn, "-o", output, *options, "--textures", tmp_path / "textures")
    assert code == 0, err
    assert "foreground: the part is" in out
    assert "made from 4 good test images" in out
    for sample in find_dataset(output).defect_test:
        mask = read_mask(sample.mask, (64, 64))  # type: ignore[arg-type]
        assert not mask[:, 32:].any()
    before = files(output)
    code, _, err = flawmap("synthesize", drawn, "-o", output, *options)
    assert code == 2
    assert "is not empty" in err
    assert files(output) == before


def test_command_on_good_images_only_holds_some_out_and_names_the_broken(
    flawmap: Any, drawn: Path, tmp_path: Path
) -> None:
    good = tmp_path / "good"
    good.mkdir()
    for number in range(6):
        pixels = read_image(drawn / "train" / "good" / f"{number:03d}.png")[..., 0].astype(np.uint16) * 16
        Image.fromarray(pixels).save(good / f"{number}.png")
    (good / "0a.png").write_bytes(b"broken")
    code, out, err = flawmap("synthesize", good, "-o", tmp_path / "out", "--count", 3, "--workers", 1)
    assert code == 3
    assert "the last 1 of 7 good images" in out
    assert "0a.png" in err
    dataset = find_dataset(tmp_path / "out")
    assert (len(dataset.train), len(dataset.good_test)) == (5, 1)
    for sample in dataset.defect_test:
        pixels = read_image(sample.path)
        assert pixels.dtype == np.uint16
        assert pixels.max() <= 4095


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--count", 0], "count is 0"),
        (["--size", 4], "size is 4"),
        (["--seed", -1], "seed is -1"),
        (["--workers", -2], "workers is -2"),
        (["--textures", "nowhere"], "nowhere"),
        (["--roi", "nowhere.png"], "nowhere.png"),
    ],
)
def test_wrong_options_are_one_line_and_write_nothing(
    options: list[Any], message: str, flawmap: Any, drawn: Path, tmp_path: Path
) -> None:
    code, _, err = flawmap("synthesize", drawn, "-o", tmp_path / "out", *options)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_evaluate_reads_what_was_written(flawmap: Any, model_file: Path, folder: Path) -> None:
    code, out, _ = flawmap("evaluate", model_file, folder, "--json", "-")
    assert code == 0
    report = json.loads(out)
    assert report["images"] == 14
    assert 0 < report["image_auroc"] < 1
    assert report["pixel_auroc"] > 0.7


def test_defects_on_disk_can_be_seen(tmp_path: Path) -> None:
    draw_dataset(tmp_path / "screws", "screws", 0, size=128)
    output = tmp_path / "out"
    written = write_defects(find_dataset(tmp_path / "screws"), output, count=40, seed=1)
    dataset = find_dataset(output)
    good = [read_image(sample.path) for sample in dataset.good_test]
    for sample in dataset.defect_test:
        image, base = read_image(sample.path), good[int(sample.path.name[:5]) % len(good)]
        mask = read_mask(sample.mask, image.shape[:2])  # type: ignore[arg-type]
        assert mask.sum() >= VISIBLE.least_pixels >= 16
        assert np.abs(image.astype(float) - base)[mask].mean() >= VISIBLE.least_contrast >= 16
    assert written.failed <= 2


def test_a_defect_below_the_contrast_asked_for_is_drawn_anew_and_then_given_up() -> None:
    flat = np.full((48, 48), 100, np.uint8)
    settings = SynthesisSettings(kinds={"texture": 1}, opacity=(0.05, 1.0), seamless=0)
    contrasts = [
        float(np.abs(made.image.astype(float) - flat)[made.mask].mean())
        for made in (
            synthesize(flat, generator(5, n), settings=replace(settings, least_contrast=40.0)) for n in range(20)
        )
        if made.kind != "none"
    ]
    assert len(contrasts) >= 10
    assert min(contrasts) >= 40
    assert synthesize(flat, generator(5, 0), settings=replace(settings, least_contrast=255.0)).kind == "none"
    assert synthesize(flat, generator(5, 0), settings=replace(settings, least_pixels=48 * 48 + 1)).kind == "none"


def test_the_contact_sheet_names_the_kind_and_number_of_each_defect() -> None:
    for kind in KINDS:
        assert caption(kind).startswith(f"{kind}: ")
        assert caption(f"{kind} (seamless)", 7).startswith(f"00007 {kind} (seamless): ")
    image = np.full((50, 100), 80, np.uint8)
    defect = synthesize(image, generator(0, 1))
    one, other = (
        np.asarray(contact_sheet([defect._replace(kind=kind)], side=192, numbers=[number]))
        for kind, number in (("scar", 1), ("texture", 2))
    )
    changed = np.flatnonzero((one != other).any(axis=(1, 2)))
    assert len(changed)
    assert changed.min() > 192  # below the pictures
