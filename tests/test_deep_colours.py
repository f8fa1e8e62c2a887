"""Colours of 16 bits a channel against the numbers that were written, and what is inferred of white."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from flawmap.datasets import find_dataset
from flawmap.errors import ImageError
from flawmap.imaging.decoding import image_size, infer_white, read_image
from flawmap.imaging.deep_colours import png_of_deep_colours
from flawmap.imaging.image_files import find_images
from flawmap.imaging.preprocessing import Preprocessing
from flawmap.synthesis.dataset import write_defects
from test_images import EXIF_TURNS, png
from test_tiff import tiff

RNG = np.random.default_rng(11)
DEEP = RNG.integers(0, 65536, (7, 10, 3), np.uint16)
ALPHA = RNG.integers(0, 65536, (7, 10), np.uint16)


def laid(colours: NDArray[Any], alpha: NDArray[Any]) -> NDArray[Any]:
    weights = alpha / 65535
    return np.rint(colours * (weights if colours.ndim == 2 else weights[:, :, None])).astype(np.uint16)


def check(path: Path, expected: NDArray[Any]) -> None:
    pixels = read_image(path)
    assert pixels.dtype == np.uint16
    assert pixels.dtype.isnative
    assert pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, expected)
    assert image_size(path) == expected.shape[:2]


def test_png(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    for pixels in (DEEP, DEEP[:1, :1], DEEP >> 4):
        path.write_bytes(png(pixels, 2))
        check(path, pixels)
    path.write_bytes(png(np.dstack([DEEP, ALPHA]), 6))
    check(path, laid(DEEP, ALPHA))
    path.write_bytes(png(np.dstack([DEEP[:, :, 0], ALPHA]), 4))
    check(path, laid(DEEP[:, :, 0], ALPHA))


def test_png_with_filters(tmp_path: Path) -> None:
    """Every row filtered as another one of the five kinds: the filters work on bytes, over the bytes of a pixel."""
    rows = DEEP.astype(">u2").tobytes()
    length, step = 60, 6
    lines = [bytes(length), *(rows[at : at + length] for at in range(0, len(rows), length))]
    made = b""
    for number in range(1, len(lines)):
        line, above, kind = lines[number], lines[number - 1], number % 5
        made += bytes([kind])
        for i in range(length):
            a = line[i - step] if i >= step else 0
            b, c = above[i], above[i - step] if i >= step else 0
            paeth = min((abs(b - c), 0, a), (abs(a - c), 1, b), (abs(a + b - 2 * c), 2, c))[2]
            made += bytes([(line[i] - (0, a, b, (a + b) // 2, paeth)[kind]) % 256])
    plain = png(DEEP, 2)
    start, end = plain.index(b"IDAT") - 4, plain.index(b"IEND") - 4
    data = b"IDAT" + zlib.compress(made)
    chunk = struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    (tmp_path / "a.png").write_bytes(plain[:start] + chunk + plain[end:])
    check(tmp_path / "a.png", DEEP)


def test_png_with_a_transparent_colour(tmp_path: Path) -> None:
    path, key = tmp_path / "a.png", DEEP[2, 3].astype(">u2").tobytes()
    chunk = b"tRNS" + key
    path.write_bytes(png(DEEP, 2, struct.pack(">I", 6) + chunk + struct.pack(">I", zlib.crc32(chunk))))
    expected = DEEP.copy()
    expected[2, 3] = 0
    check(path, expected)


@pytest.mark.parametrize("way", EXIF_TURNS)
def test_png_turned(tmp_path: Path, way: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = way
    chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    extra = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "a.png").write_bytes(png(DEEP, 2, extra))
    check(tmp_path / "a.png", EXIF_TURNS[way](DEEP))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("coding", [{}, {"deflate": True}, {"deflate": True, "predictor": True}])
def test_tiff(tmp_path: Path, order: str, coding: dict[str, bool]) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(tiff(DEEP, 2, bits=16, order=order, **coding))
    check(path, DEEP)
    four = np.dstack([DEEP, ALPHA])
    for extra, expected in [(None, DEEP), ((0,), DEEP), ((2,), laid(DEEP, ALPHA)), ((1,), DEEP)]:
        path.write_bytes(tiff(four, 2, bits=16, order=order, extra=extra, **coding))
        check(path, expected)


@pytest.mark.parametrize("white", [300, 4095, 65535])
def test_ppm(tmp_path: Path, white: int) -> None:
    path, pixels = tmp_path / "a.ppm", np.minimum(DEEP, white)
    head = f"P6\n# made by a camera\n10 7\n{white}\n".encode()
    path.write_bytes(head + pixels.astype(">u2").tobytes())
    check(path, np.floor(pixels.astype(float) * 65535 / white + 0.5).astype(np.uint16))
    path.write_bytes(head + pixels.astype(">u2").tobytes()[:-2])
    with pytest.raises(ImageError, match="cut off; copy it again"):
        read_image(path)


def test_what_counts_as_white_is_inferred_of_colour_as_of_grey(tmp_path: Path) -> None:
    for name, pixels in [("colour.png", png(DEEP >> 4, 2)), ("grey.png", png(DEEP[:, :, 0] >> 2, 0))]:
        (tmp_path / name).write_bytes(pixels)
    (tmp_path / "tiff.tif").write_bytes(tiff(DEEP >> 6, 2, bits=16))
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "shallow.png")
    assert infer_white([tmp_path / "colour.png", tmp_path / "shallow.png"]) == 4095
    assert infer_white([tmp_path / "tiff.tif"]) == 1023
    assert infer_white(sorted(tmp_path.iterdir())) == 16383
    assert infer_white([tmp_path / "shallow.png"]) is None


@pytest.mark.parametrize("colour", [False, True])
def test_a_hot_pixel_of_the_sensor_is_not_white(tmp_path: Path, colour: bool) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(4)]
    for path in paths:
        pixels = RNG.integers(0, 4096, (48, 64, 3) if colour else (48, 64), np.uint16)
        pixels[20, 30] = 65535
        path.write_bytes(png(pixels, 2 if colour else 0))
    assert infer_white(paths) == 4095


def test_a_bright_part_in_one_image_is(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(10)]
    for path in paths:
        pixels = RNG.integers(0, 1024, (48, 64), np.uint16)
        if path == paths[-1]:
            pixels[10:20, 10:20] = 4000
        path.write_bytes(png(pixels, 0))
    assert infer_white(paths) == 4095


def test_deep_colour_becomes_a_model_input_of_as_many_levels() -> None:
    identity = ((7, 10), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    inputs = Preprocessing(*identity, white=4095, deep=True)(DEEP >> 4)
    np.testing.assert_allclose(inputs, (DEEP >> 4).transpose(2, 0, 1) / 4095, atol=1e-6)


def test_deep_grey_with_a_transparent_value(tmp_path: Path) -> None:
    buffer, grey = io.BytesIO(), DEEP[:, :, 0] // 16384
    Image.fromarray(grey).save(buffer, format="PNG", transparency=2)
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    check(tmp_path / "a.png", grey * (grey != 2))


@pytest.mark.parametrize("size", [None, 64])
def test_synthetic_defects_on_deep_colours_keep_them(tmp_path: Path, size: int | None) -> None:
    good = tmp_path / "good"
    good.mkdir()
    for number in range(6):
        pixels = RNG.integers(1500, 1700, (80, 96, 3), np.uint16)
        pixels[20:60, 20:70] += 1800
        (good / f"{number}.png").write_bytes(png_of_deep_colours(pixels))
        np.testing.assert_array_equal(read_image(good / f"{number}.png"), pixels)
    write_defects(find_dataset(good), tmp_path / "made", count=4, size=size)
    made = find_images(tmp_path / "made" / "test" / "synthetic")
    assert len(made) == 4
    for path in (*made, *find_images(tmp_path / "made" / "train")):
        pixels = read_image(path)
        assert pixels.dtype == np.uint16
        assert pixels.ndim == 3
        assert len(np.unique(pixels)) > 300
