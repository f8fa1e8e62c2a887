"""Pictures of which only pieces are held beside their pixels: read, judged and drawn as any other."""

import io
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from flawmap.cli import main
from flawmap.errors import ImageError
from flawmap.imaging import decoding, pieces
from flawmap.imaging.decoding import PIXEL_LIMIT, pixel_limit, read_image
from flawmap.imaging.geometry import Geometry
from flawmap.imaging.png import png_of_rows
from flawmap.imaging.preparation import Preparation
from flawmap.imaging.preprocessing import Preprocessing
from flawmap.imaging.reading import read_batches
from flawmap.imaging.window_maps import WindowMaps, each
from flawmap.judging.inspection import Inspection, Region, find_regions
from flawmap.report.drawings import write_drawings
from flawmap.report.overlays import HeatScale, overlay, run_lengths

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (61, 43), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (61, 43, 3), dtype=np.uint8)
DEEP = RNG.integers(0, 4096, (61, 43), dtype=np.uint16)


def tiff(pixels, **options):
    out = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(out, format="TIFF", **options)
    return out.getvalue()


def saved(pixels, kind, **options):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format=kind, **options)
    return out.getvalue()


STRIPS = {"tiffinfo": {278: 7}}
TURNED = Image.Exif()
TURNED[274] = 6
CASES = {
    "grey-plain": tiff(GREY, **STRIPS),
    "grey-one-strip": tiff(GREY, tiffinfo={278: 61}),
    "grey-deflate": tiff(GREY, compression="tiff_adobe_deflate", **STRIPS),
    "grey-lzw": tiff(GREY, compression="tiff_lzw", **STRIPS),
    "grey-packbits": tiff(GREY, compression="packbits", **STRIPS),
    "colour-plain": tiff(COLOUR, **STRIPS),
    "colour-predicted": tiff(COLOUR, compression="tiff_lzw", tiffinfo={278: 7, 317: 2}),
    "deep-deflate": tiff(DEEP, compression="tiff_adobe_deflate", **STRIPS),
    "deep-plain": tiff(DEEP, **STRIPS),
    "alpha": tiff(Image.fromarray(COLOUR).convert("RGBA"), **STRIPS),
    "black-and-white": tiff(Image.fromarray(GREY).convert("1"), **STRIPS),
    "palette": tiff(Image.fromarray(COLOUR).quantize(17), **STRIPS),
    "white-is-zero": tiff(GREY, tiffinfo={278: 7, 262: 0}),
    "turned": tiff(GREY, exif=TURNED, **STRIPS),
    "bmp": saved(COLOUR, "BMP"),
    "bmp-grey": saved(GREY, "BMP"),
    "pgm": saved(GREY, "PPM"),
    "ppm": saved(COLOUR, "PPM"),
    "ppm-deep": b"P6 43 61 65535\n" + np.dstack([DEEP] * 3).astype(">u2").tobytes(),
    "png": saved(COLOUR, "PNG"),
    "png-turned": saved(COLOUR, "PNG", exif=TURNED),
    "png-deep": saved(DEEP, "PNG"),
    "jpeg": saved(COLOUR, "JPEG"),
}


@pytest.fixture
def everything_is_large(monkeypatch):
    monkeypatch.setattr(decoding, "WHOLE", 100)
    monkeypatch.setattr(decoding, "_BAND", 500)
    monkeypatch.setattr(pieces, "_PIECE", 1000)


@pytest.mark.parametrize("case", CASES)
def test_a_large_picture_is_read_as_a_small_one(case, tmp_path, request):
    path = tmp_path / "picture"
    path.write_bytes(CASES[case])
    expected = read_image(path)
    request.getfixturevalue("everything_is_large")
    found = read_image(path)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("case", ["grey-plain", "grey-lzw", "deep-deflate", "bmp", "ppm", "png"])
@pytest.mark.usefixtures("everything_is_large")
def test_a_large_picture_that_is_cut_off_is_refused(case, tmp_path):
    path = tmp_path / "picture"
    path.write_bytes(CASES[case][: len(CASES[case]) // 2])
    with pytest.raises(ImageError):
        read_image(path)


def tiled(pixels, side=16, compress=bytes):
    """A TIFF of tiles, which Pillow does not write."""
    height, width = pixels.shape
    down, across = -(-height // side), -(-width // side)
    padded = np.zeros((down * side, across * side), np.uint8)
    padded[:height, :width] = pixels
    tiles = [
        compress(padded[y * side : (y + 1) * side, x * side : (x + 1) * side].tobytes())
        for y in range(down)
        for x in range(across)
    ]
    count = len(tiles)
    tags = [(256, width), (257, height), (258, 8), (259, 1 if compress is bytes else 8), (262, 1), (277, 1)]
    tags += [(322, side), (323, side)]
    after = 8 + 2 + 12 * (len(tags) + 2) + 4
    starts = np.cumsum([after + 8 * count, *map(len, tiles)])[:-1].astype("<u4")
    entry = b"".join(np.array([tag, 4], "<u2").tobytes() + np.array([1, value], "<u4").tobytes() for tag, value in tags)
    for tag, at in ((324, after), (325, after + 4 * count)):
        entry += np.array([tag, 4], "<u2").tobytes() + np.array([count, at], "<u4").tobytes()
    lengths = np.array([len(tile) for tile in tiles], "<u4")
    head = b"II*\0\x08\0\0\0" + np.array([len(tags) + 2], "<u2").tobytes() + entry + bytes(4)
    return head + starts.tobytes() + lengths.tobytes() + b"".join(tiles)


@pytest.mark.parametrize("compressed", [False, True])
def test_tiles_are_read_row_by_row(compressed, tmp_path, request):
    import zlib

    path = tmp_path / "picture.tif"
    path.write_bytes(tiled(GREY, compress=zlib.compress if compressed else bytes))
    np.testing.assert_array_equal(read_image(path), GREY)
    request.getfixturevalue("everything_is_large")
    np.testing.assert_array_equal(read_image(path), GREY)


def test_pieces_are_what_is_decoded_of_a_large_tiff(tmp_path, monkeypatch, everything_is_large):
    """And never the whole: the largest picture that Pillow makes is a piece."""
    sizes = []
    load = decoding.TiffImageFile.load
    monkeypatch.setattr(decoding.TiffImageFile, "load", lambda image: (sizes.append(image.height), load(image))[1])
    for case in ("grey-plain", "grey-one-strip", "grey-deflate", "grey-lzw", "colour-predicted"):
        path = tmp_path / case
        path.write_bytes(CASES[case])
        read_image(path)
    assert 0 < max(sizes) <= 23


def test_the_limit_can_be_raised_and_names_the_option(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding._Limit, "pixels", 2000)
    path = tmp_path / "picture.png"
    path.write_bytes(CASES["png"])
    with pytest.raises(ImageError, match=r"over the limit of 2000; .*--max-pixels 2623"):
        read_image(path)
    with pixel_limit(2623):
        assert read_image(path).shape == (61, 43, 3)
    with pytest.raises(ImageError):
        read_image(path)
    before = Image.MAX_IMAGE_PIXELS
    with pixel_limit(10**9):
        assert Image.MAX_IMAGE_PIXELS == 10**9
    assert before == Image.MAX_IMAGE_PIXELS


def layout(geometry, size=(173, 211), region=None):
    return geometry.place(size, (32, 32), roi=region)


REGION = np.zeros((173, 211), bool)
REGION[20:150, 30:200] = True
LAYOUTS = {
    "stretch": layout(Geometry()),
    "tile": layout(Geometry.tile(50, 12)),
    "tile-within-a-region": layout(Geometry.tile(50, 12), region=REGION),
    "crop": Geometry.crop(20).place((173, 211), (32, 32)),
    "keep-aspect": layout(Geometry.keep_aspect()),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_large_map_is_worked_on_in_rows_with_the_same_result(name, tmp_path, monkeypatch):
    placement = LAYOUTS[name]
    maps = RNG.random((len(placement.windows), *placement.input_size), np.float32) ** 4
    pixels = RNG.integers(0, 256, (173, 211, 3), dtype=np.uint8)
    given = (None, "defect", 1.0, 0.1, 0.5, 0.6, placement.size)
    scale = HeatScale(0.2, 0.9)

    def drawn(folder):
        inspection = Inspection(*given, maps=maps, placement=placement, pixels=pixels)
        write_drawings(tmp_path / folder, Path("part"), inspection, scale)
        over, values = (np.asarray(Image.open(tmp_path / folder / f"part_{end}.png")) for end in ("overlay", "map"))
        return inspection, over, values

    one, *pictures = drawn("whole")
    laid = one.anomaly_map
    np.testing.assert_array_equal(np.concatenate(list(placement.lay_back_rows(maps))), laid)
    np.testing.assert_array_equal(pictures[0], overlay(pixels, one, scale))
    monkeypatch.setattr("flawmap.judging.inspection.LARGE", 1000)
    monkeypatch.setattr("flawmap.report.pictures.LARGE", 1000)
    monkeypatch.setattr("flawmap.report.overlays._PIXELS", 1500)
    monkeypatch.setattr(Inspection, "anomaly_map", None)  # nobody makes the whole
    other, *in_rows = drawn("rows")
    for whole, of_rows in zip(pictures, in_rows, strict=True):
        np.testing.assert_array_equal(of_rows, whole)
    assert len(one.regions) > 5
    assert_same_regions(other.regions, one.regions)


def test_what_drawing_takes_does_not_grow_with_the_rows_of_a_large_image(tmp_path, monkeypatch):
    """Beside its pixels; a map of the whole takes four bytes a pixel, and an overlay three."""
    for name in ("judging.inspection.LARGE", "report.pictures.LARGE", "report.overlays._PIXELS"):
        monkeypatch.setattr(f"flawmap.{name}", 1 << 14)
    monkeypatch.setattr("flawmap.report.pictures._SIDE", 36)
    peaks = []
    for height in (700, 2100):
        size = (height, 600)
        placement = Geometry.tile(256, 32).place(size, (32, 32))
        maps = np.zeros((len(placement.windows), 32, 32), np.float32)
        maps[4, 10:20, 5:15] = 1
        pixels = np.full(size, 90, np.uint8)
        given = (None, "defect", 1.0, 0.1, 0.5, 0.6, size)
        inspection = Inspection(*given, maps=maps, placement=placement, pixels=pixels)
        tracemalloc.start()
        try:
            write_drawings(tmp_path, Path("part"), inspection, HeatScale(0.2, 0.9))
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        assert len(inspection.regions) == 1
    assert peaks[1] - peaks[0] < (2100 - 700) * 600


def assert_same_regions(found, expected):
    assert [(r.box, r.area, r.peak) for r in found] == [(r.box, r.area, r.peak) for r in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.mask, other.mask)


@pytest.mark.parametrize("share", [0.2, 0.4, 0.6])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_regions_are_the_same_however_the_map_is_cut(share, rows):
    """Of equal peaks as well, where the order is that of their first pixels."""
    rng = np.random.default_rng(rows)
    values = (rng.random((40, 31)) < share).astype(np.float32)
    values *= rng.integers(1, 4, values.shape)
    bands = [values[i : i + rows] for i in range(0, 40, rows)]
    labels, count = ndimage.label(values >= 1, np.ones((3, 3)))
    found = find_regions(bands, 1)
    assert_same_regions(found, find_regions([values], 1))
    assert sum(region.area for region in found) == (values >= 1).sum()
    peaks = [values[labels == label].max() for label in range(1, count + 1)]
    boxes = ndimage.find_objects(labels)
    order = sorted(range(count), key=lambda i: -peaks[i])
    assert [region.rows_and_columns for region in found] == [boxes[i] for i in order]


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_run_lengths_are_those_of_the_whole_mask(share):
    for _ in range(50):
        height, width = RNG.integers(1, 9, 2)
        mask = np.ones((8, 8), bool) if share > 0.8 else RNG.random((8, 8)) < share
        mask = mask[:height, :width]
        left, top = int(RNG.integers(0, 9 - width)), int(RNG.integers(0, 9 - height))
        region = Region((left, top, left + int(width), top + int(height)), int(mask.sum()), 1.0, mask)
        whole = np.zeros((8, 8), bool)
        whole[region.rows_and_columns] = mask
        counts = run_lengths(region, (8, 8))["counts"]
        rebuilt = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
        np.testing.assert_array_equal(rebuilt, whole.ravel(order="F"))
        assert 0 not in counts[1:]


@pytest.mark.parametrize("pixels", [GREY, COLOUR, DEEP], ids=["grey", "colour", "deep"])
def test_a_png_of_rows_is_a_png(pixels):
    content = b"".join(png_of_rows(pixels.shape[:2], [pixels[:1], pixels[1:20], pixels[20:]], software="flawmap"))
    image = Image.open(io.BytesIO(content))
    assert image.info["Software"] == "flawmap"
    np.testing.assert_array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize("verb", ["train", "inspect", "evaluate", "validate", "tune"])
def test_the_option_holds_for_the_verb_alone(verb, monkeypatch, tmp_path):
    """Every verb that reads images takes it, and what is called afterwards in the process has the old limit."""
    seen = []
    monkeypatch.setattr("flawmap.cli.progress.quiet_libraries", lambda: seen.append(decoding._Limit.pixels))
    places = [str(tmp_path / "a.safetensors"), str(tmp_path)][verb == "train" :]
    output = ["-o", str(tmp_path / "b.safetensors")] if verb in ("train", "tune") else []
    monkeypatch.setattr("sys.argv", ["flawmap", verb, *places, *output, "--max-pixels", "300000000"])
    with pytest.raises(SystemExit):
        main()
    assert seen == [300_000_000]
    assert decoding._Limit.pixels == PIXEL_LIMIT


def test_the_pages_of_a_tiff_are_not_counted(tmp_path):
    """64,000 pages: it is refused for the second."""
    entries = struct.pack("<HHII", 256, 4, 1, 8) + struct.pack("<HHII", 257, 4, 1, 8)
    entries += struct.pack("<HHIHxx", 258, 3, 1, 8) + struct.pack("<HHIHxx", 259, 3, 1, 1)
    entries += struct.pack("<HHIHxx", 262, 3, 1, 1) + struct.pack("<HHII", 273, 4, 1, 8)
    entries += struct.pack("<HHII", 279, 4, 1, 64)
    size = 2 + len(entries) + 4
    directories = [
        struct.pack("<H", 7) + entries + struct.pack("<I", 72 + (i + 1) * size if i < 63_999 else 0)
        for i in range(64_000)
    ]
    path = tmp_path / "pages.tif"
    path.write_bytes(b"II*\0" + struct.pack("<I", 72) + bytes(64) + b"".join(directories))
    start = time.process_time()
    with pytest.raises(ImageError, match="several pictures"):
        read_image(path)
    assert time.process_time() - start < 0.2


def test_many_maps_of_one_image_lie_in_a_file(monkeypatch):
    monkeypatch.setattr("flawmap.imaging.window_maps.IN_MEMORY", 1000)
    kept = WindowMaps()
    assert kept.take() is None
    for count in (300, 3):  # of one image, and of the next
        maps = RNG.random((count, 8, 8), np.float32)
        for one in maps:
            kept.add(one)
        taken = kept.take()
        assert isinstance(taken, np.memmap) == (count == 300)
        np.testing.assert_array_equal(np.stack(list(each(taken))), maps)
        np.testing.assert_array_equal(taken, maps)


def preparation(geometry):
    return Preparation(Preprocessing((32, 32), (0.5,) * 3, (0.5,) * 3), (32, 32), geometry)


@pytest.mark.parametrize("geometry", [Geometry(), Geometry.tile(40, 10)], ids=str)
def test_the_image_after_a_large_one_is_read_when_that_one_is_dealt_with(geometry, monkeypatch):
    """Whose pixels are kept; what comes of them is what comes of small ones."""
    images = [RNG.integers(0, 256, (90, 100, 3), dtype=np.uint8) for _ in range(5)]
    prepare = preparation(geometry)
    expected = list(read_batches(images, prepare, keep_pixels=True))
    monkeypatch.setattr("flawmap.imaging.reading._LARGE", 1000)
    taken = []

    def sources():
        for number, image in enumerate(images):
            taken.append(number)
            yield image

    inputs, pictures = [], []
    for batch in read_batches(sources(), prepare, keep_pixels=True):
        inputs.append(batch.inputs)
        pictures += batch.pictures
        time.sleep(0.05)
        # The one after has been asked for, and is not read; of tiles, the last batch may be ready too.
        assert taken[-1] <= len(pictures) + (geometry.kind == "tile")
        assert len(batch.pictures) <= 1
    np.testing.assert_array_equal(np.concatenate(inputs), np.concatenate([batch.inputs for batch in expected]))
    for picture, image in zip(pictures, images, strict=True):
        np.testing.assert_array_equal(picture.pixels, image)


def test_whoever_breaks_off_at_a_large_image_does_not_wait(monkeypatch):
    monkeypatch.setattr("flawmap.imaging.reading._LARGE", 1000)
    images = [RNG.integers(0, 256, (90, 100, 3), dtype=np.uint8) for _ in range(5)]
    batches = read_batches(images, preparation(Geometry()), keep_pixels=True)
    assert len(next(batches).pictures) == 1
    batches.close()


def test_pixels_kept_of_a_batch_are_bounded(monkeypatch):
    monkeypatch.setattr("flawmap.imaging.reading._KEPT", 3 * 90 * 100 * 2)
    images = [RNG.integers(0, 256, (90, 100, 3), dtype=np.uint8) for _ in range(7)]
    batches = list(read_batches(images, preparation(Geometry()), keep_pixels=True))
    assert [len(batch.pictures) for batch in batches] == [3, 3, 1]
    assert [len(batch.pictures) for batch in read_batches(images, preparation(Geometry()))] == [7]
