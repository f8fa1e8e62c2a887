"""2,000 random corruptions, seeded: files are read, or refused in one line; what cannot be read is never good.

FLAWMAP_FUZZ_TIMES multiplies their number.
"""

import copy
import io
import itertools
import json
import math
import os
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from flawmap import Detector, FlawmapError
from flawmap.imaging.decoding import read_image
from flawmap.model_file import read_model, write_model

TIMES = int(os.environ.get("FLAWMAP_FUZZ_TIMES", "1"))
SECONDS = 5  # of computing, for any one file
SIZE = 32


def part(rng, height=48, width=64):
    """A striped part, uint8 (H, W, 3), different each time."""
    y, x = np.mgrid[:height, :width]
    stripes = 128 + 50 * np.sin(x / 5 + y / 9 + rng.uniform(0, 6))
    return (stripes[..., None] * (1, 0.8, 0.6) + rng.normal(0, 6, (height, width, 3))).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "parts"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(12):
        Image.fromarray(part(rng)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def small(folder):
    """PaDiM on a backbone of 60,000 random weights: a model file of 230 kB that loads at once."""
    return Detector(
        "padim", backbone="test_efficientnet", weights="random", image_size=SIZE, engine="torch", channels=4,
        max_false_reject=0.1,
    ).fit(folder)  # fmt: skip


def attempt(read, path):
    """What was read, or the line with which it was refused; anything else that is raised goes on."""
    try:
        return read(path), ""
    except FlawmapError as error:
        return None, str(error)


# Images


def saved(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def whole_files(rng):
    """The content of one good part in many formats and codings."""
    colour = Image.fromarray(part(rng))
    grey, palette = colour.convert("L"), colour.quantize(32)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    return {
        "jpeg": saved(colour, "JPEG"),
        "jpeg grey": saved(grey, "JPEG"),
        "jpeg progressive": saved(colour, "JPEG", progressive=True),
        "jpeg cmyk": saved(colour.convert("CMYK"), "JPEG"),
        "png": saved(colour, "PNG"),
        "png grey": saved(grey, "PNG"),
        "png deep": saved(deep, "PNG"),
        "png palette": saved(palette, "PNG", transparency=3),
        "bmp": saved(colour, "BMP"),
        "bmp palette": saved(palette, "BMP"),
        "tiff": saved(colour, "TIFF"),
        "tiff deep": saved(deep, "TIFF"),
        "tiff lzw": saved(colour, "TIFF", compression="tiff_lzw"),
        "tiff jpeg": saved(colour, "TIFF", compression="jpeg"),
        "webp": saved(colour, "WEBP"),
        "webp lossless": saved(colour.convert("RGBA"), "WEBP", lossless=True),
    }


def truncate(content, others, rng):
    return content[: rng.integers(len(content))]


def flip(content, others, rng):
    """Other bits, most often near the beginning, where headers lie."""
    data = bytearray(content)
    reach = int(rng.choice([32, 128, len(data)]))
    for place in rng.integers(0, min(reach, len(data)), rng.integers(1, 12)):
        data[place] ^= 1 << int(rng.integers(8))
    return bytes(data)


def number(content, others, rng):
    """An extreme number of two or four bytes, of either byte order, in the header."""
    data, place = bytearray(content), int(rng.integers(4, 80))
    value = int(rng.choice([0, 1, 127, 255, 256, 32767, 65535, 65536, 2**31 - 1, 2**32 - 1]))
    form = "<>"[rng.integers(2)] + ("H" if value < 65536 and rng.integers(2) else "I")
    data[place : place + struct.calcsize(form)] = struct.pack(form, value)
    return bytes(data)


def splice(content, others, rng):
    other = others[rng.integers(len(others))]
    at, then = sorted(rng.integers(0, len(content), 2))
    return content[:at] + other[at:then] + content[then:]


def join(content, others, rng):
    """The beginning of one file and the end of another."""
    other, at = others[rng.integers(len(others))], int(rng.integers(1, len(content)))
    return content[:at] + other[at:]


def blank(content, others, rng):
    at, length = int(rng.integers(len(content))), int(rng.integers(1, 600))
    return content[:at] + bytes(len(content[at : at + length])) + content[at + length :]


def cut_out(content, others, rng):
    at, length = int(rng.integers(len(content))), int(rng.integers(1, 60))
    return content[:at] + content[at + length :]


def repeat(content, others, rng):
    at, length = int(rng.integers(len(content))), int(rng.integers(1, 60))
    return content[:at] + content[at : at + length] * int(rng.integers(2, 5)) + content[at + length :]


def chunks(content, others, rng):
    """A PNG whose damage its checksums do not show; other formats have none to show it."""
    if not content.startswith(b"\x89PNG"):
        return flip(content, others, rng)
    out, at, found = content[:8], 8, []
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        found.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    at = int(rng.integers(len(found)))
    kind, data = found[at]
    if kind == b"IDAT" and rng.integers(2):
        pixels = zlib.decompress(data)
        data = zlib.compress(pixels[: rng.integers(len(pixels))] if rng.integers(2) else flip(pixels, others, rng))
    elif data:
        data = flip(data, others, rng)
    found[at : at + 1] = [[], [(kind, data)], [(kind, data)] * 2][rng.choice(3, p=[0.1, 0.8, 0.1])]
    for kind, data in found:
        out += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return out


DAMAGES = (truncate, flip, number, splice, join, blank, cut_out, repeat, chunks)
SUFFIXES = (".jpg", ".png", ".bmp", ".tif", ".webp")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_corrupted_images(small, tmp_path, monkeypatch):
    monkeypatch.setattr("flawmap.imaging.decoding.PATIENCE", 0)  # none of them grows
    rng = np.random.default_rng(1)
    read, refused, slowest, files = [], [], 0.0, {}
    for number in range(1400 * TIMES):
        if number % 200 == 0:
            files = whole_files(rng)
        kind, damage = list(files)[rng.integers(len(files))], DAMAGES[rng.integers(len(DAMAGES))]
        content = damage(files[kind], list(files.values()), rng)
        path = tmp_path / f"{number} {kind} {damage.__name__}{SUFFIXES[rng.integers(len(SUFFIXES))]}"
        path.write_bytes(content)
        start = time.thread_time()
        pixels, line = attempt(read_image, path)
        slowest = max(slowest, time.thread_time() - start)
        if line:
            refused.append(path)
            assert line.startswith(f"{path}: ")
            assert "\n" not in line
            assert "; " in line  # the remedy
        else:
            read.append(path)
            assert damage is not truncate or len(content) > 0.9 * len(files[kind]), path
            assert pixels.dtype in (np.uint8, np.uint16)
            assert pixels.size > 0
            assert pixels.ndim == 2 or pixels.shape[2:] == (3,)
    assert slowest < SECONDS
    assert min(len(read), len(refused)) > 200 * TIMES  # else the damages are too mild or too rough to show anything

    paths = sorted([*read, *refused])
    inspections = {inspection.path: inspection for inspection in small.stream(paths)}
    assert sorted(inspections) == paths
    for path in refused:
        assert inspections[path].verdict == "error", path
        assert str(path) in inspections[path].error
    for path in read:
        inspection = inspections[path]
        assert inspection.verdict in ("good", "defect", "error")
        assert inspection.verdict == "error" or (math.isfinite(inspection.score) and 0 < inspection.p_value <= 1)
    assert any(inspections[path].verdict == "good" for path in read)


# Models


def header_edits(content, others, rng):
    """The JSON before the tensors, or its length, which comes first."""
    (length,) = struct.unpack("<Q", content[:8])
    if rng.integers(3) == 0:
        length = int(rng.choice([0, 1, length - 1, length + 1, 2**31, 2**63 - 1]))
        return struct.pack("<Q", length) + content[8:]
    text = content[8 : 8 + length]
    old, new = (
        (b"F32", b"F16"), (b"F32", b"F64"), (b"I64", b"F64"), (b"[64", b"[65"), (b"0,", b"9,"),
        (b"data_offsets", b"shape"),
        (b'"flawmap"', b'"flawmat"'), (b'\\"format\\":3', b'\\"format\\":4'), (b"padim", b"patch"), (b"{", b"["),
        (b"}", b""), (b":", b":-"), (b"1", b"1e999"), (b"0.", b"NaN"),
    )[rng.integers(14)]  # fmt: skip
    places = [at for at in range(len(text)) if text.startswith(old, at)]
    at = places[rng.integers(len(places))]
    text = text[:at] + new + text[at + len(old) :]
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def test_corrupted_model_files(small, tmp_path):
    rng = np.random.default_rng(2)
    path = tmp_path / "whole.safetensors"
    small.save(path)
    whole = path.read_bytes()
    tensors, metadata, digest = read_model(path)
    damaged = tmp_path / "damaged.safetensors"
    kept = 0
    damages = (truncate, flip, blank, cut_out, repeat, number, splice, header_edits, header_edits, header_edits)
    others = [rng.bytes(len(whole)), bytes(len(whole)), whole[::-1]]
    for _ in range(250 * TIMES):
        damage = damages[rng.integers(len(damages))]
        damaged.write_bytes(damage(whole, others, rng))
        start = time.thread_time()
        result, line = attempt(read_model, damaged)
        assert time.thread_time() - start < SECONDS
        if line:
            assert str(damaged) in line
            assert "\n" not in line
            assert "train" in line
        else:  # the spelling of the header changed, and nothing that it says
            kept += 1
            found, described, same = result
            assert (described, same) == (metadata, digest)
            assert found.keys() == tensors.keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert kept < 50 * TIMES


WRONG = (
    None, True, -1, 0, 1, 0.5, 1e308, -1e308, 10**12, 10**40, "", "nowhere", "x" * 1000, "a\nb", "../../etc", [], {},
    [[]], [1, 2], [0.5], ["x"], {"a": 1},
)  # fmt: skip


def places(value, at=()):
    """Where something stands in the metadata; the first two entries of a list are enough."""
    if at:
        yield at
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*at, key))
    elif isinstance(value, list):
        for i in range(min(len(value), 2)):
            yield from places(value[i], (*at, i))


def forged_metadata(metadata, rng):
    """One entry missing, of another kind or beyond all measure; or one too many."""
    forged = copy.deepcopy(metadata)
    known = list(places(metadata))
    at = known[rng.integers(len(known))]
    holder = forged
    for key in at[:-1]:
        holder = holder[key]
    what = int(rng.integers(8))
    if what == 0:
        del holder[at[-1]]
        return forged, f"{at} is missing"
    value = WRONG[rng.integers(len(WRONG))]
    if what == 1 and isinstance(holder, dict):
        holder["unknown"] = value
        return forged, f"{at[:-1]} has one more: {value!r:.40}"
    holder[at[-1]] = value
    return forged, f"{at} is {value!r:.40}"


def forged_tensor(tensors, rng):
    forged = dict(tensors)
    name = (
        sorted(forged)[rng.integers(len(forged))]
        if rng.integers(2)
        else str(rng.choice(["gaussians.mean", "gaussians.whiten_lower", "gaussians.reduce"]))
    )
    tensor = forged[name]
    what = str(rng.choice(["missing", "further", "shape", "longer", "empty", "kind", "nan", "infinite", "huge"]))
    if what == "missing":
        del forged[name]
    elif what == "further":
        forged[f"{name}.more"] = tensor.clone()
    elif what == "shape":
        forged[name] = tensor.unsqueeze(0)
    elif what == "longer":
        forged[name] = torch.cat([tensor, tensor]) if tensor.ndim else tensor.repeat(2)
    elif what == "empty":
        forged[name] = tensor.flatten()[:0]
    elif what == "kind":
        forged[name] = tensor.to(
            [torch.int8, torch.bool, torch.float16, torch.bfloat16, torch.float64][rng.integers(5)]
        )
    elif tensor.is_floating_point():
        value = {"nan": math.nan, "infinite": math.inf, "huge": 1e30}[what]
        forged[name] = tensor.clone()
        forged[name].flatten()[rng.integers(tensor.numel())] = value
    return forged, f"{name}: {what}"


def use(detector, image):
    """What any caller would do with a model; the verdict."""
    assert math.isfinite(detector.threshold_.value)
    assert detector.pixel_threshold_ is None or math.isfinite(detector.pixel_threshold_)
    json.dumps(detector.settings())
    detector.threshold_.describe()
    detector.heat_scale()
    detector.with_threshold(max_false_reject=0.5)
    inspection = detector.predict(image)
    json.dumps(inspection.to_json())
    assert inspection.verdict == "error" or math.isfinite(inspection.score)
    return inspection.verdict


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("forge", ["metadata", "tensor"])
def test_forged_models(small, folder, tmp_path, forge):
    """Damage under a digest that is right: what a program that is not flawmap, or another flawmap, may have written."""
    rng = np.random.default_rng(3)
    path = tmp_path / "forged.safetensors"
    small.save(path)
    tensors, metadata, _ = read_model(path)
    images = itertools.cycle(sorted(folder.iterdir()))
    wrong, accepted = {}, 0
    for _ in range((250 if forge == "metadata" else 100) * TIMES):
        if forge == "metadata":
            changed, what = forged_metadata(metadata, rng)
            write_model(path, tensors, changed)
        else:
            changed, what = forged_tensor(tensors, rng)
            write_model(path, changed, metadata)
        start = time.thread_time()
        try:
            detector = Detector.load(path, engine="torch")
        except FlawmapError as error:
            line = str(error)
            if str(path) not in line or "\n" in line or len(line) > len(str(path)) + 300:
                wrong[what] = f"refused with {line!r}"
        except Exception as error:
            wrong[what] = f"load raised {error!r}"
        else:
            accepted += 1
            try:
                verdict = use(detector, next(images))
                if what.endswith(": nan") and not what.startswith("images") and verdict != "error":
                    wrong[what] = f"verdict {verdict}"
            except Exception as error:
                wrong[what] = f"use raised {error!r}"
        if time.thread_time() - start > SECONDS:
            wrong[what] = f"took {time.thread_time() - start:.1f} s"
    assert not wrong, "\n" + "\n".join(f"{what}: {result:.200}" for what, result in sorted(wrong.items()))
    assert accepted > 5 * TIMES
