"""What `flawmap inspect` leaves in files, and what becomes of a run when names, files and readers misbehave."""

import csv
import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flawmap.cli.inspect import exit_code
from flawmap.imaging.geometry import Geometry
from flawmap.judging.inspection import Inspection
from flawmap.report.drawings import drawing_names
from flawmap.report.overlays import CONTOUR, OVERRULED, HeatScale, captioned, overlay


@pytest.fixture
def parts(good_image, broken_image, tmp_path) -> Path:
    folder = tmp_path / "parts"
    folder.mkdir()
    for name, pixels in (("a.png", good_image), ("b.png", broken_image), ("c.png", good_image)):
        Image.fromarray(pixels).save(folder / name)
    return folder


def drawings(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))


def test_a_controller_that_moves_each_file_at_its_verdict_loses_nothing(model_file, parts, tmp_path):
    (tmp_path / "done").mkdir()
    command = [sys.executable, "-m", "flawmap", "inspect", model_file, parts, "-o", tmp_path / "out"]
    with subprocess.Popen([*map(str, command), "--format", "jsonl"], stdout=subprocess.PIPE, text=True) as process:
        names = []
        for line in process.stdout:
            path = Path(json.loads(line)["path"])
            stem = path.name.replace(".", "_")
            assert (tmp_path / "out" / f"{stem}_overlay.png").is_file()  # by the time it is printed
            assert (tmp_path / "out" / f"{stem}_map.png").is_file()
            path.rename(tmp_path / "done" / path.name)
            names.append(path.name)
    assert process.returncode == 0
    assert names == ["a.png", "b.png", "c.png"]


def test_the_picture_under_a_verdict_is_the_one_that_was_judged(detector, broken_image, tmp_path):
    """The file is overwritten by the next part before anything is drawn."""
    path = tmp_path / "part.png"
    Image.fromarray(broken_image).save(path)
    inspections = detector.inspector().stream([path], keep_pixels=True)
    inspection = next(inspections)
    Image.fromarray(np.zeros_like(broken_image)).save(path)
    np.testing.assert_array_equal(inspection.pixels, broken_image)
    assert next(detector.inspector().stream([path])).pixels is None


def test_names_that_would_meet_are_told_apart(flawmap, model_file, good_image, tmp_path):
    folder, other = tmp_path / "parts", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    long = "x" * 251 + ".png"
    for path in (folder / "part.1.png", folder / "part_1.png", folder / long, other / "part_1.png"):
        Image.fromarray(good_image).save(path)
    code, out, err = flawmap("inspect", model_file, folder, other, "-o", tmp_path / "out", "--format", "jsonl")
    assert (code, len(out.splitlines())) == (0, 4), err
    found = drawings(tmp_path / "out")
    assert len(found) == 8
    assert all(len(name) <= 255 for name in found)
    assert all(re.fullmatch(r"(part_1_png|x+)-[0-9a-f]{8}_(overlay|map)\.png", name) for name in found)


def test_only_names_that_meet_get_a_digest():
    images = [(Path("s/a.png"), Path("a.png")), (Path("s/A.PNG"), Path("A.PNG")), (Path("s/d/a.png"), Path("d/a.png"))]
    names = [str(name) for name in drawing_names(images)]
    assert names[2] == "d/a_png"
    assert re.fullmatch("a_png-[0-9a-f]{8}", names[0])  # one file where case makes no difference
    assert re.fullmatch("A_PNG-[0-9a-f]{8}", names[1])
    assert drawing_names([images[0], images[0]]) == [Path("a_png")] * 2
    assert len(drawing_names([(Path("ü" * 120), Path("ü" * 120))])[0].name.encode()) <= 240


def test_what_flawmap_wrote_is_never_inspected(flawmap, model_file, parts):
    inside = parts / "heat"
    for told in (0, 1):  # the second time its overlays are there
        code, out, err = flawmap("inspect", model_file, parts, "-o", inside, "--format", "jsonl")
        assert code == 0
        assert [Path(json.loads(line)["path"]).name for line in out.splitlines()] == ["a.png", "b.png", "c.png"]
        assert ("9 files are passed over, being written by flawmap itself" in err) == bool(told)
    code, out, err = flawmap("inspect", model_file, parts, "--format", "jsonl")  # nor without -o
    assert len(out.splitlines()) == 3
    assert "9 files are passed over" in err
    stray = inside / "stray.png"
    (parts / "c.png").rename(stray)  # below the output folder, whoever wrote it
    _, out, err = flawmap("inspect", model_file, parts, "-o", inside, "--format", "jsonl")
    assert len(out.splitlines()) == 2
    assert "1 image in the output folder is passed over" in err
    stray.rename(parts / "c.png")
    flawmap("inspect", model_file, parts, "-o", parts, "--format", "jsonl")  # beside the parts themselves
    _, out, _ = flawmap("inspect", model_file, parts, "-o", parts, "--format", "jsonl")
    assert len(out.splitlines()) == 3
    plain = parts / "c_overlay.png"  # a part that is merely called so
    (parts / "c.png").rename(plain)
    _, out, _ = flawmap("inspect", model_file, parts, "--format", "jsonl")
    assert plain.name in {Path(json.loads(line)["path"]).name for line in out.splitlines()}


def test_a_part_is_not_overwritten_by_another_ones_drawing(flawmap, model_file, parts):
    part = parts / "a_png_overlay.png"
    (parts / "c.png").rename(part)
    before = part.read_bytes()
    code, _, err = flawmap("inspect", model_file, parts, "-o", parts)
    assert code == 2
    assert f"{part} is to be inspected and would be overwritten" in err
    assert part.read_bytes() == before


def test_drawings_that_no_longer_hold_go(flawmap, model_file, parts, tmp_path):
    out = tmp_path / "out"
    assert flawmap("inspect", model_file, parts, "-o", out)[0] == 0
    assert len(drawings(out)) == 6
    (parts / "b.png").write_bytes(b"no picture any more")
    assert flawmap("inspect", model_file, parts, "-o", out)[0] == 3
    assert drawings(out) == ["a_png_map.png", "a_png_overlay.png", "c_png_map.png", "c_png_overlay.png"]
    assert not (out / "index_files" / "b_png.jpg").exists()


def test_a_drawing_that_cannot_be_written_does_not_end_the_run(flawmap, model_file, parts, tmp_path):
    (parts / "d").mkdir()
    (parts / "b.png").rename(parts / "d" / "b.png")
    out = tmp_path / "out"
    out.mkdir()
    (out / "d").write_text("a file where a folder is wanted")
    code, printed, err = flawmap("inspect", model_file, parts, "-o", out, "--format", "jsonl")
    assert (code, len(printed.splitlines())) == (3, 3)
    assert f"flawmap: {out / 'd'}" in err.splitlines()[-1]
    assert len(drawings(out)) == 4


def test_the_page_shows_all_worst_first(flawmap, model_file, parts, tmp_path):
    (parts / "broken<b>.png").write_bytes(b"none")
    out = tmp_path / "out"
    flawmap("inspect", model_file, parts, "-o", out)
    page = (out / "index.html").read_text()
    names = re.findall(r'class="name">([^<]*)<', page)
    assert names[0] == "b.png"
    assert names[1] == "broken&lt;b&gt;.png"
    assert sorted(names[2:]) == ["a.png", "c.png"]
    for link in re.findall(r'(?:src|href)="([^":]*)"', page):
        assert (out / link).is_file(), link
    assert 'data-verdict="error"' in page
    assert "is not a" in page  # the reason
    assert "1 region, the largest" in page
    assert "http" not in page.replace("http-equiv", "")  # it opens offline
    flawmap("inspect", model_file, parts, "-o", out)  # replaces its own
    (out / "index.html").write_text("<html>somebody else's</html>")
    code, _, err = flawmap("inspect", model_file, parts, "-o", out)
    assert code == 2
    assert "was not written by flawmap" in err.splitlines()[-1]


def test_a_run_that_is_broken_off_leaves_a_page_of_what_it_did(flawmap, model_file, parts, tmp_path):
    (parts / "b.png").write_bytes(b"none")
    code, _, _ = flawmap("inspect", model_file, parts, "-o", tmp_path / "out", "--strict")
    assert code == 2
    page = (tmp_path / "out" / "index.html").read_text()
    assert re.findall(r'class="name">([^<]*)<', page) == ["a.png"]
    assert "broken off" in page


def test_every_exit_code():
    """The table of the README."""
    for defects, unsure, unjudged, unwritten, failing in product((0, 1), (0, 1), (0, 1), (0, 1), (False, True)):
        found = exit_code(3 + unjudged, defects, unsure, unjudged, unwritten, fail_on_defect=failing)
        trouble = bool(unjudged or unwritten or (failing and unsure))
        assert found == (4 if failing and defects else 3 if trouble else 0)
    assert exit_code(2, 0, 0, 2, 0, fail_on_defect=True) == 2


def test_a_defect_beside_an_image_that_cannot_be_judged_ends_in_4(flawmap, model_file, parts):
    (parts / "a.png").write_bytes(b"none")
    assert flawmap("inspect", model_file, parts, "--fail-on-defect")[0] == 4
    assert flawmap("inspect", model_file, parts)[0] == 3


def test_a_region_in_an_image_called_good_is_said(flawmap, model_file, detector, parts, tmp_path):
    high = detector.predict(parts / "b.png").score * 2
    code, out, err = flawmap("inspect", model_file, parts / "b.png", "--threshold", high, "-o", tmp_path / "out")
    assert code == 0
    assert "1 image is called good though a region of it reaches the map's own threshold" in err
    assert out.splitlines()[1].endswith("1*")
    assert "A region is above its own threshold" in (tmp_path / "out" / "index.html").read_text()
    drawn = np.asarray(Image.open(tmp_path / "out" / "b_png_overlay.png"))
    assert (drawn == OVERRULED).all(2).any()
    assert not (drawn == CONTOUR).all(2).any()


def test_large_pictures_are_drawn_in_rows_as_in_one_piece():
    height, width = 700, 40
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (height, width, 3), np.uint8)
    heat = random.random((1, height, width)).astype(np.float32)
    place = Geometry().place((height, width), (height, width))
    whole = Inspection(None, "good", 1.0, 0.1, 2.0, 9.0, (height, width), maps=heat, placement=place)
    scale = HeatScale(0.2, 0.8)
    drawn = overlay(pixels, whole, scale)
    for rows in (slice(200, 300), slice(500, 700)):
        size = (rows.stop - rows.start, width)
        part = replace(whole, maps=heat[:, rows], size=size, placement=Geometry().place(size, size))
        np.testing.assert_array_equal(drawn[rows], overlay(pixels[rows], part, scale))


@pytest.mark.parametrize("width", [40, 300, 2000])
def test_a_caption_stands_above_the_picture(width):
    picture = np.full((200, width, 3), 90, np.uint8)
    inspection = Inspection(None, "defect", 12.345, 0.01, 4.5, 4.0, (200, width))
    drawn = captioned(picture, inspection)
    strip = drawn[: len(drawn) - 200]
    np.testing.assert_array_equal(drawn[-200:], picture)
    assert len(strip) > 10
    assert strip.max() > 200  # there is something to read
    assert strip[:, -2:].max() < 200 or width == 40  # and none of it is cut off


def test_names_cannot_steer_the_terminal_or_forge_a_row(flawmap, model_file, good_image, tmp_path):
    name = "a\x1b[2Kgood\r\nforged  good.png"
    Image.fromarray(good_image).save(tmp_path / name)
    _, out, err = flawmap("inspect", model_file, tmp_path)
    assert len(out.splitlines()) == 2
    assert "\x1b" not in out + err
    assert "\r" not in out
    assert r"a\x1b[2Kgood\r\nforged  good.png" in out


def test_a_csv_cell_is_no_formula(flawmap, model_file, good_image, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(good_image).save("=1+1.png")
    _, out, _ = flawmap("inspect", model_file, "=1+1.png", "--format", "csv")
    row = next(csv.DictReader(io.StringIO(out)))
    assert row["path"] == "./=1+1.png"
    assert Path(row["path"]).is_file()


def test_a_reader_that_goes_away_costs_no_file(model_file, parts, tmp_path):
    coco = tmp_path / "coco.json"
    command = [sys.executable, "-m", "flawmap", "inspect", model_file, parts, "-o", tmp_path / "out", "--coco", coco]
    done = subprocess.run(f"{' '.join(map(str, command))} | head -1; exit ${{PIPESTATUS[0]}}", shell=True, executable="/bin/bash", capture_output=True, text=True)  # fmt: skip  # noqa: E501
    assert done.returncode == 0, done.stderr
    assert len(json.loads(coco.read_text())["images"]) == 3
    assert len(drawings(tmp_path / "out")) == 6
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
