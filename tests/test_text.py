"""Names of files in what is printed: they take one line, move no cursor, and are no formulas."""

import shutil
import sys
from pathlib import Path

import pytest

from flawmap import Detector, FlawmapError
from flawmap.model_file import read_model
from flawmap.text import cell, printable

SMALL = ("--image-size", 64, "--method", "padim", "--set", "channels=8", "--engine", "torch")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("Prüfling 1 (neu).png", "Prüfling 1 (neu).png"),
        ("部品.png", "部品.png"),
        ("a\nb", "a\\nb"),
        ("a\rb\tc", "a\\rb\\tc"),
        ("\x1b[2Jgood", "\\x1b[2Jgood"),
        ("\x9b2J\x7f", "\\x9b2J\\x7f"),
        ("☃ \u202e é \u200c.png", "☃ \u202e é \u200c.png"),
        ("a\u2028b", "a\\u2028b"),
        ("a\udcffb", "a\\udcffb"),
    ],
)
def test_what_is_not_shown_is_written_with_escapes(name, shown):
    assert printable(name) == printable(Path(name)) == shown
    assert str(FlawmapError(f"{name}: is wrong")) == f"{shown}: is wrong"


@pytest.mark.parametrize("text", ["=1+2", "+a", "-a", "@sum", "=\x1b"])
def test_a_cell_is_no_formula(text):
    assert cell(text) == "'" + printable(text)


@pytest.mark.parametrize("value", [-1.5, "-3e-05", 0, "a=b", "", "good"])
def test_other_cells_stay(value):
    assert cell(value) == str(value)


@pytest.mark.skipif(sys.platform == "win32", reason="names that Windows does not have")
def test_nothing_that_a_name_holds_reaches_the_terminal(flawmap, drawn, tmp_path):
    folder = tmp_path / "x\x1b]0;owned\x07\x1b[2J\rgood"
    shutil.copytree(drawn / "train" / "good", folder)
    (folder / "a\x1b[1A\nb.png").write_text("broken")
    model = tmp_path / "m\x1b[31m\n.safetensors"
    results = [
        flawmap("train", folder, "-o", model, *SMALL),
        flawmap("train", folder, "-o", model, "--shots", 3, *SMALL),
        flawmap("info", model),
        flawmap("validate", model, folder, "--engine", "torch"),
        flawmap("export", tmp_path / "\x1bmissing.safetensors", "-o", tmp_path / "m.onnx"),
        flawmap("train", folder, "-o", folder / "missing" / "m"),
        flawmap("synthesize", folder, "-o", folder),
        flawmap("\x1b[2J"),
    ]
    assert [code for code, _, _ in results] == [0, 0, 0, 3, 2, 2, 2, 2]
    for _, out, err in results:
        assert not {"\x1b", "\r", "\x07"} & set(out + err)
        assert not any(line.startswith("b.png") for line in (out + err).splitlines())


def test_a_model_does_not_say_where_textures_lay(drawn, tmp_path):
    textures = tmp_path / "private" / "textures"
    shutil.copytree(drawn / "train" / "good", textures)
    detector = Detector("draem", image_size=64, max_steps=1, width=2, batch_size=2, engine="torch", textures=textures)
    detector.fit(drawn).save(tmp_path / "m.safetensors")
    metadata = read_model(tmp_path / "m.safetensors")[1]
    assert metadata["config"]["textures"] == "textures"
    assert "private" not in str(metadata)
    Detector.load(tmp_path / "m.safetensors", engine="torch")
