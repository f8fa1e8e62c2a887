"""Methods that are not of this package: that of docs/plugins.md from a file, and from an installed package."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from flawmap import Detector, FlawmapError
from flawmap.methods import method_class, plugins
from flawmap.methods.plugins import add_plugin, known_methods

PAGE = (Path(__file__).parents[1] / "docs" / "plugins.md").read_text()
SPREAD = re.search(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)[1]
OPTIONS = ("--method", "spread", "--image-size", 64, "--max-false-reject", 0.2)


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """What a test makes known is forgotten after it."""
    monkeypatch.setattr(plugins, "_from_files", {})
    yield
    plugins._installed.cache_clear()
    for name in [name for name in sys.modules if name.startswith("flawmap_plugin_")]:
        del sys.modules[name]


@pytest.fixture
def plugin(tmp_path):
    path = tmp_path / "spread.py"
    path.write_text(SPREAD)
    return path


def test_the_example_trains_inspects_and_leaves_as_a_file_that_needs_it_no_more(
    flawmap, plugin, drawn, tmp_path, monkeypatch
):
    model, exported = tmp_path / "m.safetensors", tmp_path / "m.onnx"
    code, _, err = flawmap("train", drawn, "-o", model, "--plugin", plugin, *OPTIONS, "--set", "sigma=2")
    assert code == 0, err
    assert flawmap("export", model, "-o", exported, "--plugin", plugin)[0] == 0
    code, lab, _ = flawmap("inspect", model, drawn / "test", "--plugin", plugin, "--format", "csv")
    assert code == 0
    monkeypatch.setattr(plugins, "_from_files", {})
    code, _, err = flawmap("inspect", model, drawn / "test")
    assert code == 2
    assert "method spread" in err
    assert "--plugin" in err
    code, line, _ = flawmap("inspect", exported, drawn / "test", "--format", "csv")
    assert code == 0
    verdicts = [[row.split(",")[1] for row in out.splitlines()] for out in (lab, line)]
    assert verdicts[0] == verdicts[1]
    assert "defect" in verdicts[0]


def test_its_scores_are_what_it_says(plugin, drawn, good_image):
    add_plugin(plugin)
    detector = Detector("spread", image_size=64, engine="torch", sigma=0).fit(drawn)
    method = detector.method_
    found = detector.predict(good_image)
    with np.errstate(all="raise"):
        features = method.features(_input(detector, good_image))[0][0].numpy()
    far = (features - method.mean.numpy()[:, None, None]) / method.spread.numpy()[:, None, None]
    assert found.score == pytest.approx(np.sqrt((far**2).mean(0)).max(), rel=1e-4)


def _input(detector, pixels):
    import torch

    preprocessing = detector.preparation_.preprocessing
    placement = detector.preparation_.place(pixels)
    windows = np.stack(list(detector.preparation_.inputs(pixels, placement)))
    return torch.from_numpy(preprocessing.normalised(windows))


def test_methods_lists_it(flawmap, plugin):
    code, out, _ = flawmap("methods", "--plugin", plugin)
    assert code == 0
    assert any(line.startswith("spread ") for line in out.splitlines())
    code, out, _ = flawmap("methods", "spread", "--plugin", plugin)
    assert code == 0
    assert "sigma" in out
    assert "how far a patch is" in out


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("padim.py", SPREAD, "is the name of another method"),
        ("my-method.py", SPREAD, "is no name of a method"),
        ("broken.py", "import nothing_of_this_name", "cannot be run (ModuleNotFoundError"),
        ("empty.py", "x = 1", "holds no method"),
        ("two.py", SPREAD + "\n\nclass Other(Spread):\n    pass\n", "holds 2 methods (Spread, Other)"),
        ("text.txt", SPREAD, "is no Python file"),
    ],
)
def test_what_is_no_plugin_is_refused_in_one_line(flawmap, tmp_path, name, content, told):
    path = tmp_path / name
    path.write_text(content)
    code, _, err = flawmap("methods", "--plugin", path)
    assert code == 2
    assert told in err
    assert len(err.splitlines()) == 1
    with pytest.raises(FlawmapError):
        add_plugin(tmp_path / "missing.py")


def install(folder, name, target):
    """A distribution with an entry point, as pip leaves it."""
    info = folder / f"{name}_methods-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-methods\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[flawmap.methods]\n{name} = {target}\npadim = {target}\n")


def test_an_installed_package_brings_a_method_and_takes_no_name_of_ours(tmp_path, monkeypatch):
    (tmp_path / "spread_of_a_package.py").write_text(SPREAD)
    install(tmp_path, "spreading", "spread_of_a_package:Spread")
    install(tmp_path, "gone", "nothing_of_this_name:Gone")
    monkeypatch.syspath_prepend(tmp_path)
    plugins._installed.cache_clear()
    assert known_methods()["spreading"].paper == "of spreading-methods"
    assert method_class("spreading").__name__ == "Spread"
    assert method_class("padim").__module__ == "flawmap.methods.padim"
    with pytest.raises(FlawmapError, match="gone of gone-methods cannot be imported"):
        method_class("gone")
