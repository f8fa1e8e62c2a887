"""Results that would destroy what is read, or one another, are refused before any work is done."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from flawmap import Detector
from flawmap.cli.options import beside
from flawmap.datasets.drawn import draw_dataset

SMALL = ("--image-size", 64, "--method", "padim", "--set", "channels=8", "--engine", "torch")
posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX files")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small data set and a model of it."""
    folder = tmp_path_factory.mktemp("made")
    draw_dataset(folder / "parts", "screws", 0, train=6, good=2, per_defect=1, size=64)
    Detector("padim", image_size=64, channels=8, engine="torch").fit(folder / "parts").save(folder / "m.safetensors")
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A copy, in which the command line runs."""
    shutil.copytree(made, tmp_path / "here")
    (tmp_path / "here" / "link").symlink_to("m.safetensors")
    (tmp_path / "here" / "table.csv").write_text(
        "path,label\nparts/train/good/000.png,good\nparts/train/good/001.png,good\n"
    )
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "command",
    [
        "evaluate m.safetensors parts --json m.safetensors",
        "evaluate m.safetensors parts --json link",
        "evaluate m.safetensors parts --html ./parts/../m.safetensors",
        "evaluate m.safetensors parts --html parts/test/good/000.png",
        "evaluate m.safetensors parts --json new --html ./new",
        "inspect m.safetensors parts --coco m.safetensors",
        "inspect m.safetensors parts --coco parts/test/good/000.png",
        "inspect m.safetensors parts/test/good/000.png --coco parts/test/good/000.png",
        "train parts -o parts/train/good/000.png",
        "train parts -o new.safetensors --html parts/test/good/001.png",
        "train parts -o new --html new",
        "train parts -o new --html ../here/new",
        "train parts -o new --roi parts/mask.png --html parts/mask.png",
        "train table.csv -o table.csv",
        "train parts --update m.safetensors -o new --html m.safetensors",
        "tune m.safetensors parts -o m.safetensors",
        "tune m.safetensors parts -o parts/test/good/000.png",
        "export m.safetensors -o m.safetensors",
        "export m.safetensors -o link",
        "export m.safetensors -o parts/test/good/000.png --check parts/test/good",
    ],
)  # fmt: skip
def test_what_is_read_is_not_overwritten(flawmap, here, command):
    mask = next(iter((here / "parts" / "ground_truth").rglob("*.png")))
    shutil.copy(mask, here / "parts" / "mask.png")
    before = contents(here)
    code, _, err = flawmap(*command.split())
    assert code == 2
    assert len(err.splitlines()) == 1, err
    assert "give another name" in err
    assert contents(here) == before


@posix
@pytest.mark.parametrize("kind", ["pipe", "device", "socket", "folder", "nowhere"])
def test_a_model_is_written_to_a_file(flawmap, here, kind):
    import socket

    path = {"device": Path("/dev/null"), "nowhere": here / "missing" / "m"}.get(kind, here / kind)
    if kind == "pipe":
        os.mkfifo(path)
    if kind == "folder":
        path.mkdir()
    with socket.socket(socket.AF_UNIX) as bound:
        if kind == "socket":
            bound.bind(str(path.relative_to(here)))
        for command in (["train", "parts"], ["tune", "m.safetensors", "parts"], ["export", "m.safetensors"]):
            code, _, err = flawmap(*command, "-o", path)
            assert code == 2
            assert len(err.splitlines()) == 1, err
    assert Path("/dev/null").is_char_device()


def test_an_empty_name_is_refused(flawmap, here):
    for command in (["train", "parts"], ["tune", "m.safetensors", "parts"], ["export", "m.safetensors"]):
        code, _, err = flawmap(*command, "-o", "")
        assert code == 2
        assert len(err.splitlines()) == 1, err


@posix
def test_figures_go_to_a_device_and_leave_it(flawmap, here):
    code, _, err = flawmap("evaluate", "m.safetensors", "parts", "--json", "/dev/null", "--engine", "torch")
    assert code == 0, err
    assert Path("/dev/null").is_char_device()


def test_models_of_one_stem_have_a_report_each():
    names = {"m.safetensors": "m.html", "m.v1": "m.v1.html", "m.v2": "m.v2.html", "m": "m.html"}
    assert {model: str(beside(Path(model))) for model in names} == names


def test_without_a_name_the_model_has_that_of_the_images(flawmap, here):
    code, out, err = flawmap("train", "parts", *SMALL)
    assert code == 0, err
    assert "wrote parts.safetensors" in out
    assert (here / "parts.html").exists()
    first = (here / "parts.safetensors").read_bytes()
    assert flawmap("train", here / "parts", *SMALL, "--seed", 1)[0] == 0  # an earlier model is replaced
    assert (here / "parts.safetensors").read_bytes() != first
    (here / "parts.safetensors").write_text("mine")
    code, _, err = flawmap("train", "parts", *SMALL)
    assert code == 2
    assert "parts.safetensors is there and is no model: give -o" in err
    assert (here / "parts.safetensors").read_text() == "mine"


@pytest.mark.parametrize(
    ("data", "options", "name"),
    [("table.csv", [], "table"), ("parts/train/..", [], "parts"), (".", ["--category", "parts"], "parts")],
)
def test_what_the_model_is_called(flawmap, here, data, options, name):
    code, out, err = flawmap("train", data, *options, *SMALL)
    assert code == 0, err
    assert f"wrote {name}.safetensors" in out


def test_a_named_file_that_is_no_model_is_told_before_it_is_replaced(flawmap, here):
    (here / "notes").write_text("mine")
    code, _, err = flawmap("train", "parts", "-o", "notes", *SMALL)
    assert code == 0, err
    assert "notes is no model of flawmap; it is replaced by one" in err
    code, _, err = flawmap("train", "parts", "-o", "notes", *SMALL)
    assert "is replaced" not in err
