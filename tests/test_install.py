"""The two sizes of the installation: what is built, and the line in an environment that has nothing of the lab."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

from flawmap import Inspector
from flawmap.export import export
from flawmap.imaging.decoding import read_image
from flawmap.imaging.image_files import find_images
from flawmap.report.drawings import drawing_names, write_drawings

ROOT = Path(__file__).parents[1]
LAB = ("torch", "torchvision", "timm", "onnx", "safetensors", "matplotlib", "openvino")


def run(*command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel and an sdist, made from a copy of the sources."""
    folder = tmp_path_factory.mktemp("build")
    for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "MANIFEST.in"):
        shutil.copyfile(ROOT / name, folder / name)
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", folder / "src", ignore=ignored)
    run(sys.executable, "-m", "build", "--outdir", folder / "dist", folder)
    return sorted((folder / "dist").iterdir())


@pytest.fixture(scope="module")
def line(built, tmp_path_factory):
    """The programs of an environment with the wheel and what it asks for."""
    folder = tmp_path_factory.mktemp("line")
    run(sys.executable, "-m", "venv", folder)
    programs = folder / ("Scripts" if sys.platform == "win32" else "bin")
    (wheel,) = (path for path in built if path.suffix == ".whl")
    run(programs / "python", "-m", "pip", "install", "--quiet", wheel)
    return programs


@pytest.fixture(scope="module")
def exported(detector, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "screws.onnx"
    export(detector, path)
    return path


def test_wheel_and_sdist_can_be_published_under_one_version(built):
    assert [path.name for path in built] == [
        f"flawmap-{version('flawmap')}-py3-none-any.whl",
        f"flawmap-{version('flawmap')}.tar.gz",
    ]
    assert "FAILED" not in run(sys.executable, "-m", "twine", "check", "--strict", *built)
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert changes.index(f"## {version('flawmap')}") == changes.index("## ")  # its own entry comes first


def test_the_line_needs_little_and_nothing_of_the_lab(line):
    code = "import sys, flawmap.line; print(sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = run(line / "python", "-c", code)
    assert not [name for name in (*LAB, "scipy", "onnxruntime", "pydantic") if f"'{name}'" in loaded]
    code = f"import importlib.util as u; print([name for name in {LAB} if u.find_spec(name)])"
    assert run(line / "python", "-c", code) == "[]\n"
    code = "import flawmap, pathlib; print(pathlib.Path(flawmap.__file__).parents[1])"
    installed = Path(run(line / "python", "-c", code).strip())
    own = [path for path in installed.rglob("*") if path.relative_to(installed).parts[0] not in ("pip", "setuptools")]
    assert sum(path.stat().st_size for path in own if path.is_file()) < 400e6


def test_an_exported_model_says_on_the_line_what_the_lab_says(line, exported, drawn, tmp_path):
    arguments = ("inspect", exported, drawn / "test", "--format", "jsonl", "-o", tmp_path / "line")
    lines = [json.loads(text) for text in run(line / "flawmap", *arguments).splitlines()]
    inspector = Inspector.load(exported, engine="onnxruntime")
    paths = find_images(drawn / "test")
    assert len(lines) == len(paths) == 12
    for path, found, expected in zip(paths, lines, inspector.predict(drawn / "test"), strict=True):
        own = json.loads(json.dumps(expected.to_json()))
        for key in ("path", "verdict", "p_value", "threshold", "error"):
            assert found[key] == own[key], key
        assert found["score"] == pytest.approx(own["score"], rel=1e-5)
        assert [region["box"] for region in found["regions"]] == [region["box"] for region in own["regions"]]
        target = path.relative_to(drawn / "test")
        shown = replace(expected, pixels=read_image(path))
        write_drawings(tmp_path / "lab", drawing_names([(path, target)])[0], shown, inspector.heat_scale())
    drawn_there = sorted(path.relative_to(tmp_path / "line") for path in (tmp_path / "line").rglob("*.png"))
    assert len(drawn_there) == 24
    for name in drawn_there:
        assert (tmp_path / "line" / name).read_bytes() == (tmp_path / "lab" / name).read_bytes(), name


def test_verbs_of_the_line_run_and_those_of_the_lab_say_what_they_need(line, exported, model_file, drawn, tmp_path):
    assert "patchcore" in run(line / "flawmap", "info", exported)
    assert "images judged   4" in run(line / "flawmap", "validate", exported, drawn / "test" / "good")
    figures = json.loads(run(line / "flawmap", "evaluate", exported, drawn, "--json", "-"))
    assert 0 <= figures["image_auroc"] <= 1
    run(line / "flawmap", "sample", tmp_path / "parts", "--kind", "fabric")
    run(line / "flawmap", "doctor")
    for arguments in (
        ("train", drawn, "-o", tmp_path / "m.safetensors"),
        ("inspect", model_file, drawn / "test"),
        ("evaluate", exported, drawn, "--html", tmp_path / "report.html"),
        ("methods",),
    ):
        done = subprocess.run([line / "flawmap", *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 2
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("flawmap: ")
        assert "pip install 'flawmap[train]'" in last
        assert "Traceback" not in done.stderr
