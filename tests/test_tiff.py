"""Every kind of TIFF: read as its tags say, or refused in one line. The files are written by hand."""

from __future__ import annotations

import itertools
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flawmap.errors import ImageError
from flawmap.imaging.decoding import read_image

HEIGHT, WIDTH = 6, 11
RNG = np.random.default_rng(3)
PALETTE = RNG.integers(0, 65536, (3, 256), np.uint16)


def packed(row: NDArray[Any], bits: int, order: str, fill: int) -> bytes:
    """One row of samples of any size."""
    if bits < 8 or bits in (10, 12, 14):
        streamed = "".join(f"{value:0{bits}b}" for value in row.tolist())
        data = bytes(int(streamed[at : at + 8].ljust(8, "0"), 2) for at in range(0, len(streamed), 8))
    else:
        data = row.astype(row.dtype.newbyteorder(order)).tobytes()
    return bytes(int(f"{byte:08b}"[::-1], 2) for byte in data) if fill == 2 else data


def tiff(
    samples: NDArray[Any],
    photometric: int | None,
    *,
    bits: int,
    form: int = 1,
    planar: int = 1,
    order: str = "<",
    fill: int = 1,
    extra: tuple[int, ...] | None = None,
    deflate: bool = False,
    predictor: bool = False,
) -> bytes:
    """A TIFF in one strip (one for each plane) of samples (H, W, N)."""
    height, width, count = samples.shape
    strips = []
    for plane in [samples] if planar == 1 else [samples[:, :, i : i + 1] for i in range(count)]:
        if predictor:
            first = np.zeros_like(plane[:, :1])
            plane = plane - np.concatenate([first, plane[:, :-1]], axis=1)
        rows = b"".join(packed(row.reshape(-1), bits, order, fill) for row in plane)
        strips.append(zlib.compress(rows) if deflate else rows)
    tags: dict[int, tuple[str, list[int]]] = {
        256: ("I", [width]),
        257: ("I", [height]),
        258: ("H", [bits] * count),
        259: ("H", [8 if deflate else 1]),
        266: ("H", [fill]),
        273: ("I", list(itertools.accumulate([8] + [len(strip) for strip in strips[:-1]]))),
        277: ("H", [count]),
        278: ("I", [height]),
        279: ("I", [len(strip) for strip in strips]),
        284: ("H", [planar]),
        339: ("H", [form] * count),
    }
    if photometric is not None:
        tags[262] = ("H", [photometric])
    if photometric == 3:
        tags[320] = ("H", PALETTE[:, : 1 << bits].reshape(-1).tolist())
    if extra is not None:
        tags[338] = ("H", list(extra))
    if predictor:
        tags[317] = ("H", [2])
    body = b"".join(strips)
    start = 8 + len(body)
    later, directory = b"", struct.pack(order + "H", len(tags))
    after = start + 2 + 12 * len(tags) + 4
    for tag, (kind, values) in sorted(tags.items()):
        data = struct.pack(f"{order}{len(values)}{kind}", *values)
        if len(data) > 4:
            data, later = struct.pack(order + "I", after + len(later)), later + data
        directory += struct.pack(order + "HHI", tag, {"H": 3, "I": 4}[kind], len(values)) + data.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", start)
    return head + body + directory + struct.pack(order + "I", 0) + later


def drawn(bits: int, form: int, count: int) -> NDArray[Any]:
    """Random samples (H, W, count), no negative ones."""
    size = next(size for size in (8, 16, 32, 64) if size >= bits)
    top = 1 << (bits if form != 2 else bits - 1)
    values = RNG.integers(0, min(top, 65536), (HEIGHT, WIDTH, count))
    kind = {1: "u", 2: "i", 3: "f", 4: "u"}[form]
    return values.astype(f"{kind}{size // 8}" if form != 3 or size > 8 else "u1")


def truth(samples: NDArray[Any], photometric: int | None, bits: int, extra: tuple[int, ...] | None) -> NDArray[Any]:
    """What the tags say, as `read_image` gives it."""
    top = (1 << bits) - 1
    values = samples.astype(np.int64)
    if photometric == 3:
        return (PALETTE[:, : 1 << bits] >> 8).T[values[:, :, 0]].astype(np.uint8)
    if photometric == 5:  # inks
        inks = values * 255 // top if bits == 8 else values >> (bits - 8)
        return np.rint((255 - inks[:, :, :3]) * (255 - inks[:, :, 3:4]) / 255).astype(np.uint8)
    channels = 3 if photometric == 2 else 1
    colours = values[:, :, :channels]
    if photometric == 0:
        colours = top - colours
    if bits < 8:
        colours = colours * 255 // top
    if extra and extra[0] == 2:
        colours = np.rint(colours * values[:, :, channels : channels + 1] / top).astype(np.int64)
    laid = colours.astype(np.uint8 if bits <= 8 else np.uint16)
    return laid if channels == 3 else laid[:, :, 0]


GREY = [(photometric, 1, None) for photometric in (0, 1)] + [(1, 2, (kind,)) for kind in (0, 1, 2)] + [(1, 2, None)]
COLOUR = [(2, 3, None), (2, 4, None), *((2, 4, (kind,)) for kind in (0, 1, 2)), (2, 5, (2, 0)), (2, 5, None)]
OTHERS = [(3, 1, None), (5, 4, None), (5, 5, (0,)), (8, 3, None), (9, 3, None), (4, 1, None), (32803, 1, None)]
KINDS = [(bits, form) for bits in (1, 2, 4, 8, 10, 12, 14, 16, 32, 64) for form in (1, 2, 3, 4)]


@pytest.mark.parametrize(("photometric", "count", "extra"), GREY + COLOUR + OTHERS)
def test_every_kind_is_read_as_its_tags_say_or_refused(
    tmp_path: Path, photometric: int, count: int, extra: tuple[int, ...] | None
) -> None:
    path = tmp_path / "a.tif"
    read: set[tuple[Any, ...]] = set()
    for (bits, form), planar, order, fill, coding in itertools.product(
        KINDS, (1, 2), "<>", (1, 2), ("plain", "deflate", "predictor")
    ):
        if (form == 3 and bits < 32) or (planar == 2 and count == 1) or (photometric == 3 and bits > 8):
            continue
        if fill == 2 and coding != "plain":
            continue
        if coding == "predictor" and (bits not in (8, 16, 32) or form == 3):
            continue
        samples = drawn(bits, form, count)
        if extra == (1,):  # colours are stored multiplied by alpha
            samples = np.minimum(samples, samples[:, :, -1:])
        options = {"deflate": coding != "plain", "predictor": coding == "predictor"}
        kind = (bits, form, planar, order, fill, coding)
        path.write_bytes(
            tiff(
                samples,
                photometric,
                bits=bits,
                form=form,
                planar=planar,
                order=order,
                fill=fill,
                extra=extra,
                **options,
            )
        )
        os.utime(path, (0, 0))  # nobody is still writing it
        try:
            pixels = read_image(path)
        except ImageError as error:
            told = str(error)
        else:
            told = ""
        if told:
            assert told.startswith(f"{path}: ")
            assert ";" in told
            assert "\n" not in told
            continue
        expected = truth(samples, photometric, bits, extra)
        assert pixels.dtype == expected.dtype, kind
        np.testing.assert_allclose(pixels.astype(int), expected.astype(int), atol=1 if extra else 0, err_msg=str(kind))
        read.add(kind)
    plain = [(bits, 1, 1, order, 1, "plain") for order in "<>" for bits in (8, 16)]
    if (photometric, count, extra) in [GREY[1], *COLOUR[:5]]:
        assert read.issuperset(plain)
    if photometric == 0:
        assert read.issuperset(plain[:3])


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_negative_values_are_refused(tmp_path: Path, bits: int) -> None:
    path = tmp_path / "a.tif"
    samples = drawn(bits, 2, 1)
    samples[2, 3] = -1
    path.write_bytes(tiff(samples, 1, bits=bits, form=2))
    with pytest.raises(ImageError, match=r"a\.tif: holds (negative )?values.*; save it as 8- or 16-bit grey"):
        read_image(path)


def test_what_does_not_say_whether_0_is_white_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(tiff(drawn(8, 1, 1), None, bits=8))
    with pytest.raises(ImageError, match=r"a\.tif: does not say whether 0 is black or white.*; save it again"):
        read_image(path)
