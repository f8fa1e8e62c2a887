"""Formats beyond the first five, damaged EXIF around intact pixels, and files that are no files, or not yet."""

from __future__ import annotations

import hashlib
import io
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pytest
from numpy.typing import NDArray
from PIL import Image

from flawmap.errors import ImageError
from flawmap.imaging import decoding
from flawmap.imaging.decoding import image_size, read_image, read_image_and_digest
from flawmap.imaging.geometry import Geometry
from flawmap.imaging.image_files import digest, find_images, open_regular, search_folder
from flawmap.imaging.preparation import Preparation
from flawmap.imaging.preprocessing import Preprocessing
from flawmap.imaging.reading import pack
from test_images import EXIF_TURNS, png, smooth

RNG = np.random.default_rng(5)
GREY = RNG.integers(0, 256, (6, 10), np.uint8)
COLOUR = RNG.integers(0, 256, (6, 10, 3), np.uint8)


def saved(pixels: NDArray[Any], form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


def heic(pixels: NDArray[Any], **options: Any) -> bytes:
    buffer = io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(pixels)).save(buffer, quality=95, **options)
    return buffer.getvalue()


# --- formats


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jp2", saved(COLOUR, "JPEG2000", irreversible=False), COLOUR),
        ("a.j2k", saved(GREY, "JPEG2000", no_jp2=True), GREY),
        ("a.gif", saved(GREY // 2, "GIF"), GREY // 2),
        ("a.pgm", saved(GREY, "PPM"), GREY),
        ("a.ppm", saved(COLOUR, "PPM"), COLOUR),
        ("a.pbm", saved(GREY > 99, "PPM"), (GREY > 99) * np.uint8(255)),
        ("plain.pgm", b"P2\n# plain\n3 2\n15\n0 5 10\n15 1 2\n", np.array([[0, 85, 170], [255, 17, 34]])),
        ("deep.pgm", b"P5 2 1 65535\n" + np.array([1, 40_000], ">u2").tobytes(), np.array([[1, 40_000]])),
        ("a.dib", saved(COLOUR, "BMP"), COLOUR),
    ],
)
def test_formats_without_losses(tmp_path: Path, name: str, content: bytes, expected: NDArray[Any]) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    pixels = read_image(path)
    pixels = pixels[:, :, 0] if name.endswith("gif") and pixels.ndim == 3 else pixels
    np.testing.assert_array_equal(pixels, expected)
    assert image_size(path) == expected.shape[:2]
    assert find_images(tmp_path) == [path]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jfif", saved(smooth(64, 96), "JPEG", quality=95)),
        ("a.jpe", saved(smooth(64, 96), "JPEG", quality=95)),
        ("a.avif", saved(smooth(64, 96), "AVIF", quality=95)),
        ("a.heic", heic(smooth(64, 96))),
        ("a.heif", heic(smooth(64, 96))),
        ("without", saved(smooth(64, 96), "PNG")),
        ("also without", heic(smooth(64, 96))),
    ],
)
def test_formats_with_losses_and_files_without_a_suffix(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    np.testing.assert_allclose(read_image(path).astype(int), smooth(64, 96), atol=12)
    assert find_images(tmp_path) == [path]


@pytest.mark.parametrize("way", EXIF_TURNS)
def test_pictures_of_phones_are_upright(tmp_path: Path, way: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = way
    stored = smooth(64, 96)
    for name, content in [
        ("a.heic", heic(stored, exif=exif.tobytes())),
        ("a.avif", saved(stored, "AVIF", exif=exif, quality=95)),
    ]:
        path, expected = tmp_path / name, EXIF_TURNS[way](stored)
        path.write_bytes(content)
        np.testing.assert_allclose(read_image(path).astype(int), expected, atol=14)
        assert image_size(path) == expected.shape[:2]


def test_heic_of_several_pictures_gives_the_main_one(tmp_path: Path) -> None:
    file = pillow_heif.from_pillow(Image.fromarray(smooth(64, 96)))
    file.add_from_pillow(Image.fromarray(255 - smooth(64, 96)))
    file.save(tmp_path / "a.heic", quality=95)
    np.testing.assert_allclose(read_image(tmp_path / "a.heic").astype(int), smooth(64, 96), atol=12)


@pytest.mark.parametrize("form", ["JPEG2000", "GIF", "PPM", "AVIF", "HEIC", "deep PNG"])
def test_every_cut_is_noticed(tmp_path: Path, form: str) -> None:
    noise, path = RNG.integers(0, 256, (24, 32, 3), np.uint8), tmp_path / "a"
    deep = RNG.integers(0, 65536, (24, 32, 3), np.uint16)
    content = png(deep, 2) if form == "deep PNG" else heic(noise) if form == "HEIC" else saved(noise, form)
    for length in np.linspace(1, 0.95 * len(content), 20, dtype=int):
        path.write_bytes(content[:length])
        os.utime(path, (0, 0))  # nobody is still writing it
        with pytest.raises(ImageError, match=";"):
            read_image(path)


# --- damaged EXIF


def test_damaged_exif_leaves_the_pixels(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A], exif[0x0128] = 6, "Camera", 72.0, 2
    exif.get_ifd(0x8769)[0x829A] = 0.01
    stored, path = smooth(32, 48), tmp_path / "a"
    for form in ("JPEG", "PNG", "WEBP", "AVIF"):
        content = saved(stored, form, exif=exif, **({"quality": 95} if form != "PNG" else {}))
        start = max(content.rfind(mark, 0, content.find(b"Camera")) for mark in (b"II*\0", b"MM\0*"))
        for _ in range(60):
            damaged = bytearray(content)
            for at in RNG.integers(start, start + len(exif.tobytes()) - 6, 4):
                damaged[at] = RNG.choice([0, 1, 127, 255, int(RNG.integers(256))])
            path.write_bytes(damaged)
            pixels = read_image(path).astype(int)
            assert pixels.shape in ((48, 32, 3), (32, 48, 3))
            if pixels.shape == (48, 32, 3) or form != "AVIF":
                expected = [turn(stored) for turn in EXIF_TURNS.values()]
                assert min(abs(pixels - one).max() for one in expected if one.shape == pixels.shape) < 30


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_the_orientation_is_used_where_it_alone_can_be_read(tmp_path: Path, form: str) -> None:
    # A resolution of ASCII text at an offset beyond the block, of a negative number, and of a kind that is none.
    for kind, offset in [(2, 90_000), (10, 38), (99, 0)]:
        entries = [(0x0112, 3, 1, 6), (0x011A, kind, 1, offset), (0x0128, 3, 1, 2)]
        block = b"II*\0" + (8).to_bytes(4, "little") + len(entries).to_bytes(2, "little")
        for tag, code, count, value in entries:
            block += tag.to_bytes(2, "little") + code.to_bytes(2, "little")
            block += count.to_bytes(4, "little") + value.to_bytes(4, "little")
        block += bytes(4) + b"\xff" * 8
        path = tmp_path / "a"
        path.write_bytes(saved(smooth(32, 48), form, exif=b"Exif\0\0" + block))
        expected = EXIF_TURNS[6](smooth(32, 48))
        np.testing.assert_allclose(read_image(path).astype(int), expected, atol=30)
        assert image_size(path) == (48, 32)


def test_a_png_whose_exif_has_another_checksum(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = saved(COLOUR, "PNG", exif=exif)
    at = content.index(b"eXIf") + 4 + len(exif.tobytes().removeprefix(b"Exif\0\0"))
    (tmp_path / "a.png").write_bytes(content[:at] + b"\xab\xcd\xef\x01" + content[at + 4 :])
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), EXIF_TURNS[6](COLOUR))


# --- files that are no files, or not yet


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    kinds = {"folder.png": "is a folder, not a file", "null.png": "is a device", "endless.png": "is a device"}
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "null.png").symlink_to("/dev/null")
    (tmp_path / "endless.png").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as listening:
        here = Path.cwd()
        os.chdir(tmp_path)  # the names of sockets are short
        try:
            listening.bind("socket.png")
        finally:
            os.chdir(here)
        for name, kind in {**kinds, "pipe.png": "is a pipe", "socket.png": "is a socket"}.items():
            for read in (read_image, image_size, digest, open_regular):
                start = time.monotonic()
                with pytest.raises(ImageError, match=rf"{name}: {kind}.*; give a file"):
                    read(tmp_path / name)
                assert time.monotonic() - start < 1


def test_a_name_that_is_no_path() -> None:
    with pytest.raises(ImageError, match=r"is no path.*; check it"):
        read_image(Path("a\0b.png"))


def test_a_file_still_being_written_is_waited_for(tmp_path: Path) -> None:
    path, content = tmp_path / "a.png", saved(RNG.integers(0, 256, (300, 400, 3), np.uint8), "PNG")
    path.write_bytes(content[:1000])

    def write() -> None:
        with path.open("ab") as file:
            for at in range(1000, len(content), len(content) // 12):
                time.sleep(0.05)
                file.write(content[at : at + len(content) // 12])
                file.flush()

    writer = threading.Thread(target=write)
    writer.start()
    pixels, judged = read_image_and_digest(path)
    writer.join()
    assert pixels.shape == (300, 400, 3)
    assert judged == hashlib.sha256(content).hexdigest()


def test_a_file_that_never_settles_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flawmap.imaging.decoding.PATIENCE", 0.3)
    path, taken = tmp_path / "a.png", decoding._taken
    path.write_bytes(saved(COLOUR, "PNG"))

    def taken_while_it_grows(*given: Any) -> Any:
        with path.open("ab") as file:
            file.write(b"\0")
        return taken(*given)

    monkeypatch.setattr(decoding, "_taken", taken_while_it_grows)
    with pytest.raises(ImageError, match=r"a\.png: is still being written; wait"):
        read_image(path)


def test_the_digest_is_of_the_bytes_that_were_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(saved(COLOUR, "PNG"))
    prepare = Preparation(Preprocessing((8, 8), (0.5,) * 3, (0.5,) * 3), (8, 8), Geometry())  # type: ignore[arg-type]
    pictures = [picture for batch in pack([path, COLOUR], prepare) for picture in batch.pictures]
    assert [picture.digest for picture in pictures] == [digest(path), None]
    monkeypatch.setattr("flawmap.imaging.decoding.IN_MEMORY", 10)  # too large to be held beside its pixels
    pixels, judged = read_image_and_digest(path)
    np.testing.assert_array_equal(pixels, COLOUR)
    assert judged == hashlib.sha256(path.read_bytes()).hexdigest()


# --- what lies in folders


def test_what_is_passed_over_is_counted(tmp_path: Path) -> None:
    for name in ("a.png", "b.dng", "sub/c.DNG", "notes.txt", "README"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" if name != "README" else b"these are the parts of June")
    for name in (".DS_Store", "Thumbs.db", "sub/desktop.ini", "@eaDir/a.png/SYNO_THUMB.jpg", "__MACOSX/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(b"x")
    found = search_folder(tmp_path)
    assert found.images == [tmp_path / "a.png"]
    assert found.passed_over == {".dng": 2, ".txt": 1, "": 1}
    assert found.note() == "4 files are passed over, being no image by name: no suffix 1, .dng 2, .txt 1"
    assert search_folder(tmp_path / "__MACOSX").note() is None
