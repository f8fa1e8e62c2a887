"""Decoding, masks, arrays and preprocessing against values that are known, torchvision, torch and hashlib."""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from torchvision.io import ImageReadMode, decode_image

from flawmap.errors import FlawmapError, ImageError
from flawmap.imaging import decoding
from flawmap.imaging.arrays import as_pixels
from flawmap.imaging.decoding import image_size, infer_white, read_image
from flawmap.imaging.image_files import digest, find_images
from flawmap.imaging.masks import read_mask, resize_mask
from flawmap.imaging.preprocessing import Preprocessing, lay_back

DATA = Path(__file__).parents[2] / "shared" / "data"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

RNG = np.random.default_rng(7)
GREY = RNG.integers(0, 256, (6, 10), np.uint8)
COLOUR = RNG.integers(0, 256, (6, 10, 3), np.uint8)
DEEP = RNG.integers(0, 65536, (6, 10), np.uint16)
ALPHA = RNG.integers(0, 256, (6, 10), np.uint8)


def smooth(height: int, width: int) -> NDArray[np.uint8]:
    """An RGB picture that JPEG keeps closely."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * y / height, 255 * x / width, 127 + 0 * x], 2).astype(np.uint8)


def png(pixels: NDArray[Any], colour_type: int, extra: bytes = b"", size: tuple[int, int] | None = None) -> bytes:
    """A PNG written out by hand, for kinds that Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = size or pixels.shape[:2]
    big_endian = pixels.astype(pixels.dtype.newbyteorder(">"))
    header = struct.pack(">IIBBBBB", width, height, 8 * pixels.dtype.itemsize, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in big_endian)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def over_black(colours: NDArray[Any], alpha: NDArray[Any]) -> NDArray[Any]:
    weights = alpha / 255 if colours.ndim == 2 else alpha[:, :, None] / 255
    return np.rint(colours * weights).astype(np.uint8)


def one_line(error: pytest.ExceptionInfo[FlawmapError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# --- reading


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "tiff"])
@pytest.mark.parametrize("pixels", [GREY, COLOUR, GREY[:1, :1], COLOUR[:1, :1], GREY[:, :1], COLOUR[:1]])
def test_lossless_files_give_back_their_pixels(tmp_path: Path, suffix: str, pixels: NDArray[Any]) -> None:
    path = tmp_path / f"bild größe 図.{suffix}"
    Image.fromarray(pixels).save(path)
    read = read_image(path)
    assert read.dtype == np.uint8
    assert read.flags.writeable
    assert read.flags.c_contiguous
    np.testing.assert_array_equal(read, pixels)
    assert image_size(path) == pixels.shape[:2]


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"])
def test_tiff_compressions(tmp_path: Path, compression: str) -> None:
    path, pixels = tmp_path / "a.tif", smooth(40, 56)
    Image.fromarray(pixels).save(path, compression=compression)
    np.testing.assert_allclose(read_image(path).astype(int), pixels, atol=12 if compression == "jpeg" else 0)


def test_webp_lossless_colour_and_alpha(tmp_path: Path) -> None:
    path = tmp_path / "a.webp"
    Image.fromarray(COLOUR).save(path, lossless=True)
    np.testing.assert_array_equal(read_image(path), COLOUR)
    Image.fromarray(np.dstack([COLOUR, ALPHA])).save(path, lossless=True, exact=True)
    np.testing.assert_array_equal(read_image(path), over_black(COLOUR, ALPHA))


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("largest", [1, 1023, 65535])
def test_16_bit_grey_keeps_its_values(tmp_path: Path, suffix: str, largest: int) -> None:
    path, pixels = tmp_path / f"a.{suffix}", np.minimum(DEEP, largest)
    Image.fromarray(pixels).save(path)
    read = read_image(path)
    assert read.dtype == np.uint16
    np.testing.assert_array_equal(read, pixels)


def test_big_endian_16_bit_tiff(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    data = DEEP.astype(">u2").tobytes()
    tags = [(256, 4, 10), (257, 4, 6), (258, 3, 16 << 16), (259, 3, 1 << 16), (262, 3, 1 << 16)]
    tags += [(273, 4, 200), (277, 3, 1 << 16), (278, 4, 6), (279, 4, len(data))]
    head = b"MM\0*" + struct.pack(">IH", 8, len(tags))
    head += b"".join(struct.pack(">HHII", tag, kind, 1, value) for tag, kind, value in tags) + struct.pack(">I", 0)
    path.write_bytes(head.ljust(200, b"\0") + data)
    read = read_image(path)
    assert read.dtype == np.dtype(np.uint16)
    assert read.dtype.isnative
    np.testing.assert_array_equal(read, DEEP)


def test_32_bit_tiff_is_read_where_its_values_fit_16_bits(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(DEEP.astype(np.int32)).save(path)
    read = read_image(path)
    assert read.dtype == np.uint16
    np.testing.assert_array_equal(read, DEEP)
    for value in (65536, -1):
        Image.fromarray(np.full((2, 2), value, np.int32)).save(path)
        with pytest.raises(ImageError, match=f"from {value} to {value}.*16-bit grey") as error:
            read_image(path)
        assert str(path) in one_line(error)


def test_1_bit(tmp_path: Path) -> None:
    bits = GREY > 127
    for suffix in ("png", "bmp", "tif"):
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(bits).save(path)
        read = read_image(path)
        assert read.dtype == np.uint8
        np.testing.assert_array_equal(read, bits * 255)


def test_palette_with_and_without_transparency(tmp_path: Path) -> None:
    colours, indices = RNG.integers(0, 256, (16, 3), np.uint8), GREY % 16
    alpha = RNG.integers(0, 256, 16, np.uint8)
    picture = Image.frombytes("P", (10, 6), indices.tobytes())
    picture.putpalette(colours.tobytes())
    for suffix in ("png", "bmp", "tif"):
        path = tmp_path / f"a.{suffix}"
        picture.save(path)
        np.testing.assert_array_equal(read_image(path), colours[indices])
    path = tmp_path / "b.png"
    picture.save(path, transparency=alpha.tobytes())
    np.testing.assert_array_equal(read_image(path), over_black(colours[indices], alpha[indices]))
    picture.save(path, transparency=3)
    np.testing.assert_array_equal(read_image(path), colours[indices] * (indices != 3)[:, :, None])


def test_alpha_is_laid_onto_black(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.dstack([COLOUR, ALPHA])).save(path)
    np.testing.assert_array_equal(read_image(path), over_black(COLOUR, ALPHA))
    Image.fromarray(np.dstack([GREY, ALPHA])).save(path)
    np.testing.assert_array_equal(read_image(path), over_black(GREY, ALPHA))
    Image.fromarray(np.dstack([COLOUR, np.full_like(ALPHA, 255)])).save(path)
    np.testing.assert_array_equal(read_image(path), COLOUR)


def test_transparent_key_colour(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    grey = GREY % 4
    Image.fromarray(grey).save(path, transparency=2)
    np.testing.assert_array_equal(read_image(path), grey * (grey != 2))
    Image.fromarray(COLOUR).save(path, transparency=tuple(int(value) for value in COLOUR[2, 3]))
    expected = COLOUR.copy()
    expected[2, 3] = 0
    np.testing.assert_array_equal(read_image(path), expected)


def test_cmyk(tmp_path: Path) -> None:
    inks = smooth(16, 24)
    inks = np.dstack([inks, np.full(inks.shape[:2], 60, np.uint8)])
    picture = Image.frombytes("CMYK", (24, 16), inks.tobytes())
    expected = (255 - inks[:, :, :3].astype(float)) * (255 - inks[:, :, 3:].astype(float)) / 255
    picture.save(tmp_path / "a.tif")
    np.testing.assert_allclose(read_image(tmp_path / "a.tif"), expected, atol=1.01)
    picture.save(tmp_path / "a.jpg", quality=95)  # Adobe's inverted inks
    np.testing.assert_allclose(read_image(tmp_path / "a.jpg"), expected, atol=10)


@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_as_torchvision_reads_it(tmp_path: Path, progressive: bool) -> None:
    path = tmp_path / "a.jpg"
    for pixels in (smooth(30, 44), smooth(30, 44)[:, :, 0]):
        Image.fromarray(pixels).save(path, progressive=progressive)
        expected = decode_image(str(path)).permute(1, 2, 0).squeeze(2).numpy()
        np.testing.assert_allclose(read_image(path).astype(int), expected, atol=2)


EXIF_TURNS: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {  # stored -> upright, from the EXIF standard's table
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).swapaxes(0, 1),
    8: lambda stored: np.rot90(stored, 1),
}


@pytest.mark.parametrize("orientation", EXIF_TURNS)
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for suffix, stored in [
        ("png", COLOUR),
        ("png", DEEP),
        ("tif", COLOUR),
        ("tif", GREY),
        ("tif", DEEP),
        ("webp", COLOUR),
    ]:
        path, expected = tmp_path / f"a.{suffix}", EXIF_TURNS[orientation](stored)
        Image.fromarray(stored).save(path, exif=exif, lossless=True)  # only WebP heeds lossless
        np.testing.assert_array_equal(read_image(path), expected)
        assert image_size(path) == expected.shape[:2]

    path, stored = tmp_path / "a.jpg", smooth(32, 48)
    Image.fromarray(stored).save(path, exif=exif, quality=95, subsampling=0)
    read = read_image(path)
    np.testing.assert_allclose(read.astype(int), EXIF_TURNS[orientation](stored), atol=6)
    turned = decode_image(str(path), ImageReadMode.RGB, apply_exif_orientation=True).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(read.astype(int), turned, atol=2)
    assert image_size(path) == read.shape[:2]


def test_multi_picture_jpeg_gives_its_first_picture(tmp_path: Path) -> None:
    path = tmp_path / "phone.jpg"
    first, second = smooth(32, 48), 255 - smooth(32, 48)
    Image.fromarray(first).save(path, "MPO", save_all=True, append_images=[Image.fromarray(second)], quality=95)
    np.testing.assert_allclose(read_image(path).astype(int), first, atol=8)


def test_content_decides_not_the_suffix(tmp_path: Path) -> None:
    path = tmp_path / "really a png.jpg"
    Image.fromarray(COLOUR).save(path, "PNG")
    np.testing.assert_array_equal(read_image(path), COLOUR)


@pytest.mark.parametrize("folder", ["mtd", "cookie"])
def test_real_images_as_torchvision_reads_them(folder: str) -> None:
    if not (DATA / folder).is_dir():
        pytest.skip(f"the real images of {folder} are not beside this checkout")
    paths = find_images(DATA / folder)
    assert [path.as_posix() for path in paths] == sorted(
        path.as_posix() for path in (DATA / folder).rglob("*.[jp][pn]g")
    )
    for path in paths[:: len(paths) // 12]:
        expected = decode_image(str(path)).permute(1, 2, 0).squeeze(2).numpy()
        np.testing.assert_allclose(read_image(path).astype(int), expected, atol=3)


# --- what cannot be read


def save_bytes(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


_file = io.BytesIO()
pillow_heif.from_pillow(Image.fromarray(smooth(64, 64))).save(_file, quality=80)
HEIC = _file.getvalue()
FRAMES = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (0, 128, 255)]
BAD_FILES = {
    "empty": (b"", "empty"),
    "text": (b"these are not the pixels you are looking for", "not a JPEG, PNG"),
    "animated gif": (save_bytes(FRAMES[0], format="GIF", save_all=True, append_images=FRAMES[1:]), "several pictures"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a JPEG, PNG"),
    "header only": (b"\x89PNG\r\n\x1a\n", "cannot be decoded"),
    "riff sound": (b"RIFF\x24\0\0\0WAVEfmt ", "cannot be decoded"),
    "animated png": (save_bytes(FRAMES[0], format="PNG", save_all=True, append_images=FRAMES[1:]), "several pictures"),
    "animated webp": (
        save_bytes(FRAMES[0], format="WEBP", save_all=True, append_images=FRAMES[1:]),
        "several pictures",
    ),
    "multi-page": (save_bytes(FRAMES[0], format="TIFF", save_all=True, append_images=FRAMES[1:]), "several pictures"),
    "float": (save_bytes(Image.fromarray(np.zeros((4, 4), np.float32)), format="TIFF"), "floating-point"),
    "bomb": (png(GREY, 0, size=(30_000, 30_000)), "900000000 pixels, over the limit"),
    "wide": (png(GREY, 0, size=(2**31 - 1, 2**31 - 1)), "over the limit"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(tmp_path: Path, name: str) -> None:
    content, reason = BAD_FILES[name]
    path = tmp_path / f"{name}.png"
    path.write_bytes(content)
    limit = Image.MAX_IMAGE_PIXELS
    for read in (read_image, read_mask):
        with pytest.raises(ImageError, match=reason) as error:
            read(path)
        message = one_line(error)
        assert message.startswith(f"{path}: ")
        assert ";" in message  # the remedy
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("read", [read_image, image_size, read_mask, digest])
def test_missing_folder_and_forbidden(
    tmp_path: Path, read: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ImageError, match=r"no\.png: .*; check the path"):
        read(tmp_path / "no.png")
    folder = tmp_path / "folder.png"
    folder.mkdir()
    with pytest.raises(ImageError, match=r"folder\.png: "):
        read(folder)

    path = tmp_path / "a.png"
    Image.fromarray(GREY).save(path)

    def forbid(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", forbid)
    with pytest.raises(ImageError, match=r"(?i)a\.png: .*permission denied.*; .*permissions") as error:
        read(path)
    one_line(error)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="not a file"):
        read_image(tmp_path / "pipe.png")


def test_a_large_picture_is_read_without_pillows_warning(tmp_path: Path) -> None:
    path = tmp_path / "line scan.tif"
    Image.new("1", (9_500, 9_500), 1).save(path, compression="group4")
    assert Image.MAX_IMAGE_PIXELS is not None
    assert Image.MAX_IMAGE_PIXELS < 9_500 * 9_500 < decoding.PIXEL_LIMIT
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        pixels = read_image(path)
        assert list(warnings.filters) == before
    assert pixels.shape == (9_500, 9_500)
    assert pixels.min() == 255


def fuzz_seeds() -> dict[str, bytes]:
    """Small valid files of every format and coding."""
    colour, noise = Image.fromarray(smooth(24, 32)), Image.fromarray(RNG.integers(0, 256, (24, 32, 3), np.uint8))
    grey, deep = colour.convert("L"), Image.fromarray(RNG.integers(0, 65536, (24, 32), np.uint16))
    alpha, palette, exif = colour.convert("RGBA"), colour.quantize(16), Image.Exif()
    exif[0x0112] = 6
    return {
        "jpeg": save_bytes(colour, format="JPEG", exif=exif),
        "jpeg grey": save_bytes(grey, format="JPEG"),
        "jpeg progressive": save_bytes(noise, format="JPEG", progressive=True),
        "jpeg cmyk": save_bytes(colour.convert("CMYK"), format="JPEG"),
        "mpo": save_bytes(colour, format="MPO", save_all=True, append_images=[noise]),
        "png": save_bytes(noise, format="PNG", exif=exif),
        "png deep": save_bytes(deep, format="PNG"),
        "png palette": save_bytes(palette, format="PNG", transparency=2),
        "apng": save_bytes(colour, format="PNG", save_all=True, append_images=[noise]),
        "bmp": save_bytes(noise, format="BMP"),
        "bmp palette": save_bytes(palette, format="BMP"),
        "bmp bits": save_bytes(grey.convert("1"), format="BMP"),
        "tiff": save_bytes(noise, format="TIFF", exif=exif),
        "png deep colour": png(RNG.integers(0, 65536, (24, 32, 3), np.uint16), 2),
        "gif": save_bytes(palette, format="GIF"),
        "ppm": save_bytes(noise, format="PPM"),
        "ppm deep": b"P6 3 2 4095\n" + bytes(range(36)),
        "jpeg 2000": save_bytes(colour, format="JPEG2000"),
        "avif": save_bytes(colour, format="AVIF", exif=exif),
        "heic": HEIC,
        "tiff deep": save_bytes(deep, format="TIFF"),
        "tiff lzw": save_bytes(noise, format="TIFF", compression="tiff_lzw"),
        "tiff jpeg": save_bytes(colour, format="TIFF", compression="jpeg"),
        "tiff fax": save_bytes(grey.convert("1"), format="TIFF", compression="group4"),
        "tiff float": save_bytes(grey.convert("F"), format="TIFF"),
        "webp": save_bytes(colour, format="WEBP", exif=exif),
        "webp lossless": save_bytes(alpha, format="WEBP", lossless=True),
        "webp animated": save_bytes(colour, format="WEBP", save_all=True, append_images=[noise]),
    }


def corrupt(content: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """One random damage: cut, flipped bits, other bytes, a run of zeros, a gap, a doubled piece, a foreign tail."""
    data = bytearray(content)
    at, length = int(rng.integers(len(data))), int(rng.integers(1, 33))
    kind = rng.integers(8)
    if kind == 0:
        del data[at:]
    elif kind <= 3:  # the first bytes, where headers lie, most often
        reach = (len(data), 40, 160)[kind - 1]
        for place in rng.integers(0, min(reach, len(data)), int(rng.integers(1, 9))):
            data[place] = rng.choice([0, 1, 127, 128, 255, int(rng.integers(256))])
    elif kind == 4:
        data[at : at + length] = bytes(len(data[at : at + length]))
    elif kind == 5:
        del data[at : at + length]
    elif kind == 6:
        data[at:at] = data[at : at + length]
    else:
        data[at:] = other[at:]
    return bytes(data)


def fuzz(path: Path, rounds: int, seed: int) -> tuple[int, int]:
    """Damage every seed file `rounds` times; how many were read and how many refused. Nothing else may come out."""
    rng, read, refused = np.random.default_rng(seed), 0, 0
    seeds = fuzz_seeds()
    others = list(seeds.values())
    for content in others:
        for _ in range(rounds):
            path.write_bytes(corrupt(content, others[int(rng.integers(len(others)))], rng))
            os.utime(path, (0, 0))  # nobody is still writing it
            try:
                pixels = read_image(path)
            except ImageError as error:
                message = str(error)
            else:
                message = ""
            if message:
                assert message.startswith(f"{path}: ")
                assert "\n" not in message
                refused += 1
            else:
                assert pixels.dtype in (np.uint8, np.uint16)
                assert pixels.ndim == 2 or pixels.shape[2:] == (3,)
                assert pixels.size > 0
                read += 1
    return read, refused


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_files_give_pixels_or_an_image_error(tmp_path: Path) -> None:
    read, refused = fuzz(tmp_path / "damaged.png", rounds=25, seed=0)
    assert read > 50
    assert refused > 100


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["jpeg", "png", "png deep", "bmp", "tiff", "tiff lzw", "webp"])
def test_every_cut_is_noticed(tmp_path: Path, kind: str) -> None:
    content, path = fuzz_seeds()[kind], tmp_path / "cut.png"
    for length in np.linspace(1, 0.95 * len(content), 25, dtype=int):
        path.write_bytes(content[:length])
        os.utime(path, (0, 0))
        with pytest.raises(ImageError):
            read_image(path)


# --- folders


def test_find_images(tmp_path: Path) -> None:
    names = ["b/2.PNG", "b/10.jpeg", "a 1/größe.Tif", "a 1/図.webp", "z.bmp", "b/deep/er/x.TIFF", "c.JPG"]
    others = ["Thumbs.db", ".hidden.png", ".cache/1.png", "._z.bmp", "b/notes.txt", "b/desktop.ini", "png", "d.psd"]
    for name in names + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder.png").mkdir()
    assert [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)] == sorted(names)


def test_find_images_survives_circles_of_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(b"x")
    try:
        (tmp_path / "a" / "up").symlink_to(tmp_path, target_is_directory=True)
        (tmp_path / "a" / "self").symlink_to(tmp_path / "a", target_is_directory=True)
        (tmp_path / "z").symlink_to(tmp_path / "a", target_is_directory=True)
    except OSError:
        pytest.skip("this user may not make links")
    assert find_images(tmp_path) == [tmp_path / "a" / "1.png"]
    assert find_images(tmp_path / "z") == [tmp_path / "z" / "1.png"]  # as given, not resolved
    monkeypatch.chdir(tmp_path)
    assert find_images(Path()) == [Path("a/1.png")]


def test_find_images_refuses_what_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FlawmapError, match=r"nowhere: .*; check the path") as error:
        find_images(tmp_path / "nowhere")
    one_line(error)


# --- arrays


@pytest.mark.parametrize(
    ("given_array", "expected"),
    [
        (GREY, GREY),
        (GREY[:, :, None], GREY),
        (COLOUR, COLOUR),
        (COLOUR[::-1, ::2], COLOUR[::-1, ::2]),
        (np.dstack([COLOUR, ALPHA]), over_black(COLOUR, ALPHA)),
        (DEEP, DEEP),
        (DEEP.astype(">u2"), DEEP),
        (np.dstack([DEEP] * 3 + [np.full_like(DEEP, 65535)]), np.dstack([DEEP] * 3)),
        (GREY / 255, (GREY / 255).astype(np.float32)),
        ((GREY > 9).astype(np.float16), (GREY > 9).astype(np.float32)),
        (torch.from_numpy(GREY), GREY),
    ],
)
def test_as_pixels(given_array: Any, expected: NDArray[Any]) -> None:
    pixels = as_pixels(given_array)
    assert pixels.dtype == expected.dtype
    assert pixels.dtype.isnative
    np.testing.assert_array_equal(pixels, expected)


def test_as_pixels_of_a_file_is_the_file(tmp_path: Path) -> None:
    rgba = np.dstack([COLOUR, ALPHA])
    Image.fromarray(rgba).save(tmp_path / "a.png")
    np.testing.assert_array_equal(as_pixels(rgba), read_image(tmp_path / "a.png"))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16"])
def test_as_pixels_of_a_picture_of_pillow_is_its_file(tmp_path: Path, mode: str) -> None:
    picture = Image.fromarray(DEEP) if mode == "I;16" else Image.fromarray(COLOUR).convert(mode)
    picture.save(tmp_path / "a.tif")
    np.testing.assert_array_equal(as_pixels(picture), read_image(tmp_path / "a.tif"))
    if mode in ("LA", "CMYK"):  # no such PNG
        return
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "b.png", exif=exif)
    with Image.open(tmp_path / "b.png") as turned:
        np.testing.assert_array_equal(as_pixels(turned), read_image(tmp_path / "b.png"))


def test_as_pixels_of_tensors() -> None:
    values = torch.rand(6, 10, 3, requires_grad=True)
    np.testing.assert_array_equal(as_pixels(values), values.detach().numpy())
    with pytest.raises(ImageError, match=r"float32, shape \(3, 6, 10\); expected .*; bring the channels last") as error:
        as_pixels(values.detach().permute(2, 0, 1))
    one_line(error)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (None, "got None; expected"),
        ([[1, 2], [3]], "got a list, which is no array .*; give a NumPy array"),
        (torch.zeros(2, 2, dtype=torch.bfloat16), "got a Tensor, which is no array .*; give a NumPy array"),
        (Image.new("F", (2, 2)), "got a picture that holds floating-point values; save it"),
        (Image.new("LAB", (2, 2)), "got a picture that holds CIELAB colours; save it"),
        ("text", "got an array of <U4.*; expected"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_as_pixels_names_the_remedy_for_what_is_no_image(bad: Any, says: str) -> None:
    with pytest.raises(ImageError, match=says) as error:
        as_pixels(bad)
    one_line(error)


@pytest.mark.parametrize(
    ("bad", "got"),
    [
        (GREY > 127, "bool"),
        (GREY.astype(np.int64), "int64"),
        (GREY.astype(np.uint32), "uint32"),
        (COLOUR.astype(np.float32), "values from 0 to 25"),
        (np.full((2, 2), np.nan), "nan"),
        (GREY - 300.0, "values from -"),
        (COLOUR.transpose(2, 0, 1), r"shape \(3, 6, 10\)"),
        (COLOUR[None], r"shape \(1, 6, 10, 3\)"),
        (GREY[0], r"shape \(10,\)"),
        (GREY[:0], "no pixels"),
        (np.array([["a"]]), "U1"),
    ],
)
def test_as_pixels_says_what_was_got_and_expected(bad: Any, got: str) -> None:
    with pytest.raises(ImageError, match=f"got an array of .*{got}.*expected") as error:
        as_pixels(bad)
    one_line(error)


# --- preprocessing


@pytest.mark.parametrize("size", [(224, 224), (64, 96), (7, 5), (1, 1)])
@pytest.mark.parametrize("shape", [(250, 350), (31, 500), (5, 3), (1, 1)])
def test_preprocessing_is_torchvisions(size: tuple[int, int], shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
    resized = TF.resize(Image.fromarray(pixels), list(size), TF.InterpolationMode.BILINEAR)
    expected = TF.normalize(TF.to_tensor(resized), list(MEAN), list(STD)).numpy()
    preprocess = Preprocessing(size, MEAN, STD)
    inputs = preprocess(pixels)
    assert inputs.flags.c_contiguous
    np.testing.assert_array_equal(inputs, np.asarray(resized).transpose(2, 0, 1))
    got = preprocess.normalised(inputs)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=1e-6)
    deep = Preprocessing(size, MEAN, STD, deep=True)
    # Not rounded, where Pillow rounds 8-bit rows, and then columns.
    np.testing.assert_allclose(deep.normalised(deep(pixels)), expected, atol=1 / 255 / min(STD) + 1e-5)


@pytest.mark.parametrize("pixels", [GREY, DEEP, (GREY / 255).astype(np.float32)])
def test_grey_gives_what_three_equal_channels_give(pixels: NDArray[Any]) -> None:
    for deep in (False, True):
        preprocess = Preprocessing((9, 4), MEAN, STD, deep=deep)
        np.testing.assert_array_equal(preprocess(pixels), preprocess(np.dstack([pixels] * 3)))


def test_floats_are_resized_as_torch_resizes() -> None:
    pixels = np.random.default_rng(2).random((250, 350)).astype(np.float32)
    for size in [(224, 224), (300, 400)]:
        resized = F.interpolate(torch.from_numpy(pixels)[None, None], size, mode="bilinear", antialias=True)
        preprocess = Preprocessing(size, (0.5, 0.4, 0.3), (0.5, 0.25, 1.0), deep=True)
        got = preprocess.normalised(preprocess(pixels))
        for channel, (mean, std) in enumerate([(0.5, 0.5), (0.4, 0.25), (0.3, 1.0)]):
            # torch computes its filter's weights in float32, Pillow in float64
            np.testing.assert_allclose(got[channel], (resized[0, 0].numpy() - mean) / std, atol=5e-5)


def test_16_bit_images_are_scaled_so_that_white_is_white() -> None:
    grey = np.random.default_rng(3).integers(0, 256, (40, 40), np.uint8)
    identity = ((40, 40), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    expected = Preprocessing(*identity)(grey)
    for white in (1023, 4095, 65535):
        deep = np.rint(grey * (white / 255)).astype(np.uint16)
        inputs = Preprocessing(*identity, white=white, deep=True)(deep)
        assert inputs.dtype == np.float32
        np.testing.assert_allclose(inputs, expected / 255, atol=1 / white)
        np.testing.assert_array_equal(Preprocessing(*identity, white=white)(deep), expected)  # rounded to 8 bit
    over = Preprocessing((1, 1), *identity[1:], white=1023, deep=True)(np.full((3, 3), 4000, np.uint16))
    np.testing.assert_allclose(over, 1, rtol=1e-6)  # clipped


def test_preprocessing_through_json() -> None:
    preprocess = Preprocessing((224, 256), MEAN, STD, white=4095, deep=True)
    expected = {"size": [224, 256], "mean": list(MEAN), "std": list(STD), "white": 4095, "deep": True}
    assert preprocess.to_json() == expected
    assert Preprocessing.from_json(json.loads(json.dumps(preprocess.to_json()))) == preprocess


@pytest.mark.parametrize(
    "change",
    [
        {"size": [0, 4]},
        {"size": [4]},
        {"size": 4},
        {"size": [4.5, 4]},
        {"mean": [0.1, 0.2]},
        {"mean": "abc"},
        {"mean": [0.1, 0.2, float("nan")]},
        {"std": [0.1, 0.0, 0.1]},
        {"std": [0.1, None, 0.1]},
        {"white": 0},
        {"white": 70000},
        {"white": "white"},
        {"deep": 1},
        {"blur": 1},
    ],
)
def test_faulty_settings_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(FlawmapError, match=r"^preprocessing: ") as error:
        Preprocessing.from_json({**Preprocessing((4, 4), MEAN, STD).to_json(), **change})
    one_line(error)


def test_missing_settings_are_refused() -> None:
    incomplete: list[Any] = [{}, {"size": [4, 4]}, None, []]
    for settings_given in incomplete:
        with pytest.raises(FlawmapError, match=r"^preprocessing: "):
            Preprocessing.from_json(settings_given)


@pytest.mark.parametrize(
    ("largest", "white"), [(0, 255), (255, 255), (256, 1023), (1023, 1023), (4000, 4095), (4096, 16383), (65535, 65535)]
)
def test_infer_white(tmp_path: Path, largest: int, white: int, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = np.zeros((4, 4), np.uint16)
    Image.fromarray(deep).save(tmp_path / "a.png")
    deep[1, 2] = largest
    Image.fromarray(deep).save(tmp_path / "b.tif")
    Image.fromarray(GREY).save(tmp_path / "c.png")
    (tmp_path / "d.png").write_bytes(b"damaged")
    read: list[str] = []

    def count(path: Path) -> NDArray[Any]:
        read.append(path.name)
        return read_image(path)

    monkeypatch.setattr(decoding, "read_image", count)
    assert infer_white(find_images(tmp_path)) == white
    assert read == ["a.png", "b.tif"]
    assert infer_white([tmp_path / "c.png", tmp_path / "d.png"]) is None


# --- the way back


@pytest.mark.parametrize(("shape", "size"), [((56, 56), (250, 350)), ((28, 40), (31, 700)), ((64, 64), (20, 30))])
def test_lay_back_is_torchs_half_pixel_bilinear(shape: tuple[int, int], size: tuple[int, int]) -> None:
    anomaly_map = np.random.default_rng(4).normal(50, 20, shape).astype(np.float32)
    expected = F.interpolate(torch.from_numpy(anomaly_map)[None, None], size, mode="bilinear", antialias=True)
    laid = lay_back(anomaly_map, size)
    assert laid.dtype == np.float32
    np.testing.assert_allclose(laid, expected[0, 0].numpy(), atol=1e-3)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_marked_block_lands_where_it_was(data: st.DataObject) -> None:
    size = (data.draw(st.integers(16, 300)), data.draw(st.integers(16, 300)))
    model = (data.draw(st.integers(16, 256)), data.draw(st.integers(16, 256)))
    image = np.zeros(size, np.uint8)
    block, pitch = [], []
    for length, cells in zip(size, model, strict=True):
        # Neither grid can say more than its own pixel, and a block far below a model pixel is lost in rounding.
        pitch.append(max(1.0, length / cells))
        extent = data.draw(st.integers(int(np.ceil(pitch[-1] / 2)), max(int(np.ceil(pitch[-1])), length // 4)))
        start = data.draw(st.integers(0, length - extent))
        block.append((start, extent))
    (top, height), (left, width) = block
    image[top : top + height, left : left + width] = 255

    seen = Preprocessing(model, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))(image)[0]
    marked = (seen > 0.5 * seen.max()).astype(np.float32)
    centre = ndimage.center_of_mass(lay_back(marked, size))
    truth = ndimage.center_of_mass(image)
    for found, true, step in zip(centre, truth, pitch, strict=True):
        assert abs(found - true) <= 0.5 * step


# --- masks


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16"])
def test_read_mask_in_any_mode(tmp_path: Path, mode: str) -> None:
    path, truth = tmp_path / "mask.png", GREY > 100
    if mode == "I;16":
        Image.fromarray(truth.astype(np.uint16) * 65535).save(path)
    else:
        Image.fromarray(truth.astype(np.uint8) * 255).convert(mode).save(path)
    mask = read_mask(path, (6, 10))
    assert mask.dtype == np.bool_
    np.testing.assert_array_equal(mask, truth)


def test_mask_values(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"

    def read(values: list[int]) -> Any:
        Image.fromarray(np.array([values], np.uint8)).save(path)
        return read_mask(path)[0].tolist()

    assert read([0, 1, 0, 2, 31]) == [False, True, False, True, True]  # class indices
    assert read([0, 127, 128, 255, 31]) == [False, True, True, True, True]  # kinds of defect as grey values
    assert read([0, 100]) == [False, True]
    assert read([0, 0]) == [False, False]
    Image.fromarray(np.array([[[0, 0, 0], [200, 0, 0], [0, 0, 200]]], np.uint8)).save(path)
    assert read_mask(path)[0].tolist() == [False, True, True]


def test_a_palette_mask_is_read_by_colour_or_index_whichever_tells_the_background(tmp_path: Path) -> None:
    path, indices = tmp_path / "mask.png", np.array([[0, 1, 2, 0, 1]], np.uint8)

    def read(*colours: tuple[int, int, int]) -> Any:
        picture = Image.frombytes("P", (5, 1), indices.tobytes())
        picture.putpalette([value for colour in colours for value in colour])
        picture.save(path)
        return read_mask(path)[0].tolist()

    assert read((0, 0, 0), (128, 0, 0), (0, 128, 0)) == [False, True, True, False, True]
    assert read((90, 0, 90), (0, 0, 0), (0, 128, 0)) == [True, False, True, True, False]  # black is the background
    assert read((68, 1, 84), (33, 144, 140), (253, 231, 37)) == [False, True, True, False, True]  # no black at all
    assert read((0, 0, 0), (0, 0, 0), (0, 0, 0)) == [False, True, True, False, True]  # nothing but black


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "AVIF", "TIFF"])
def test_a_mask_saved_with_losses_is_cut_at_half(tmp_path: Path, form: str) -> None:
    path, truth = tmp_path / "mask", np.zeros((64, 64), bool)
    truth[16:48, 24:40] = True
    options: dict[str, Any] = {"compression": "jpeg"} if form == "TIFF" else {"quality": 80}
    for mode in ("L", "RGB"):
        Image.fromarray(truth).convert(mode).save(path, form, **options)
        np.testing.assert_array_equal(read_mask(path), truth)
    Image.new("L", (64, 64)).save(path, form, **options)
    assert not read_mask(path).any()
    Image.new("L", (64, 64), 100).save(path, form, **options)
    with pytest.raises(ImageError, match=r"mask: no mask value is over 127 .*; save defects as white") as error:
        read_mask(path)
    one_line(error)


def test_webp_without_losses_keeps_every_value_of_a_mask(tmp_path: Path) -> None:
    path = tmp_path / "mask.webp"
    Image.fromarray(np.array([[0, 1, 40, 255]], np.uint8)).convert("RGB").save(path, lossless=True)
    assert read_mask(path)[0].tolist() == [False, True, True, True]


def test_a_folder_of_masks_is_one_mask(tmp_path: Path) -> None:
    folder = tmp_path / "000"
    folder.mkdir()
    with pytest.raises(ImageError, match=r"000: holds no mask; "):
        read_mask(folder)
    for name, column in (("000.png", 1), ("001.png", 3)):
        mask = np.zeros((2, 5), np.uint8)
        mask[:, column] = 254 + column // 3
        Image.fromarray(mask).save(folder / name)
    assert read_mask(folder, (2, 5)).tolist() == [[False, True, False, True, False]] * 2
    with pytest.raises(ImageError, match=r"000\.png: the mask is 2 x 5 .* image is 3 x 5 "):
        read_mask(folder, (3, 5))
    Image.new("L", (4, 4)).save(folder / "002.png")
    with pytest.raises(ImageError, match=r"002\.png: the mask is 4 x 4 "):
        read_mask(folder)


def test_mask_of_another_size(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    Image.fromarray(GREY).save(path)
    with pytest.raises(ImageError, match=r"mask\.png: the mask is 6 x 10 .* image is 10 x 6 ") as error:
        read_mask(path, (10, 6))
    one_line(error)


def test_resize_mask_is_nearest() -> None:
    mask = GREY > 127
    np.testing.assert_array_equal(resize_mask(mask, (18, 30)), mask.repeat(3, 0).repeat(3, 1))
    assert resize_mask(mask, (6, 10)).dtype == np.bool_
    expected = F.interpolate(torch.from_numpy(mask.astype(np.float32))[None, None], (4, 7), mode="nearest-exact")
    np.testing.assert_array_equal(resize_mask(mask, (4, 7)), expected[0, 0].numpy() > 0)


def test_digest(tmp_path: Path) -> None:
    content = RNG.bytes((1 << 20) + 5)
    (tmp_path / "a").write_bytes(content)
    assert digest(tmp_path / "a") == hashlib.sha256(content).hexdigest()
