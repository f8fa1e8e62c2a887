"""What is given as a model and is none: one line, and nothing is waited for."""

import os
import sys
from pathlib import Path

import pytest

from flawmap import Detector, FlawmapError
from flawmap.line import Inspector


@pytest.mark.parametrize("verb", ["inspect", "evaluate", "validate", "info", "export", "tune"])
@pytest.mark.parametrize("given", ["parts", "a.png", "a.JPG", "table.csv"])
def test_the_images_given_first(flawmap, tmp_path, monkeypatch, verb, given):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parts").mkdir()
    for name in ("parts/0.png", "a.png", "a.JPG", "table.csv", "m.safetensors"):
        (tmp_path / name).write_bytes(b"")
    second = {"info": [], "export": ["-o", "m.onnx"], "tune": ["parts", "-o", "n.safetensors"]}.get(verb, ["parts"])
    code, _, err = flawmap(verb, given, *second)
    assert code == 2
    assert f"{given}: is a" in err
    assert "MODEL comes first, then the images" in err
    assert len(err.splitlines()) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX files")
@pytest.mark.parametrize("suffix", [".safetensors", ".onnx"])
def test_what_is_no_file_is_not_waited_for(tmp_path, suffix):
    os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / f"link{suffix}").symlink_to("/dev/zero")
    for name, kind in (("pipe", "a pipe"), ("link", "a device")):
        for load in (Inspector.load, Detector.load) if suffix == ".safetensors" else (Inspector.load,):
            with pytest.raises(FlawmapError, match=f"{name}{suffix}: is {kind}, not a model"):
                load(tmp_path / f"{name}{suffix}")
        with pytest.raises(FlawmapError, match=f"is {kind}, not a file"):
            Detector(weights=tmp_path / f"{name}{suffix}", image_size=64).fit([Path("a"), Path("b")])
