"""Long runs, outside `make test`: leaks, kills at any moment, and corrupted files by the ten thousand.

FLAWMAP_SOAK is the share of each run that is done, 1 by default.
"""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flawmap import Detector, find_dataset
from flawmap.datasets.drawn import draw_dataset

SHARE = float(os.environ.get("FLAWMAP_SOAK", "1"))
COMMAND = [sys.executable, "-m", "flawmap", "train"]
PATCHCORE = ["--image-size", "128", "--seed", "1"]
CFA = ["--image-size", "128", "--seed", "1", "--method", "cfa", "--epochs", "20", "--set", "max_steps=0"]


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("soak") / "parts"
    draw_dataset(folder, "fabric", 0, train=16, good=4, per_defect=2, size=128)
    return folder


@pytest.fixture(scope="session")
def model(parts: Path) -> Path:
    path = parts.parent / "model.safetensors"
    Detector("patchcore", image_size=128).fit(parts).save(path)
    return path


def held() -> int:
    """Kilobytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_memory_does_not_grow_with_the_images_inspected(parts: Path, model: Path) -> None:
    detector = Detector.load(model)
    paths = [sample.path for sample in find_dataset(parts).test]
    for _ in detector.stream(paths * 20):
        pass
    before = held()
    for inspection in detector.stream(paths * round(400 * SHARE)):
        assert inspection.verdict != "error"
    assert held() - before < 50_000


def test_memory_does_not_grow_with_the_models_loaded(parts: Path, model: Path) -> None:
    path = find_dataset(parts).test[0].path
    for _ in range(40):  # the allocator's pools grow over some thirty loads, and then no more
        Detector.load(model, engine="torch").predict(path)
    before = held()
    for _ in range(round(200 * SHARE)):
        Detector.load(model, engine="torch").predict(path)
    assert held() - before < 50_000


def started(command: list[str]) -> subprocess.Popen[str]:
    """A training whose libraries are imported, which takes most of a short one's time."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    process.stderr.readline()
    return process


@pytest.mark.parametrize("options", [PATCHCORE, CFA], ids=["patchcore", "cfa"])
def test_a_training_killed_at_any_moment_goes_on_to_the_same_bytes(
    parts: Path, tmp_path: Path, options: list[str]
) -> None:
    """Each training is killed again and again, each time at another moment, and ends as one that never was."""
    rng = random.Random(0)
    whole, output = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"
    workspace = output.with_name(output.name + ".training")
    process = started([*COMMAND, str(parts), "-o", str(whole), *options])
    start = time.monotonic()
    process.communicate()
    seconds = time.monotonic() - start
    assert process.returncode == 0
    moments = []
    for _ in range(max(1, round(25 * SHARE))):
        output.unlink(missing_ok=True)
        resume: list[str] = []
        for _ in range(rng.randint(1, 3)):
            process = started([*COMMAND, str(parts), "-o", str(output), *options, *resume])
            time.sleep(rng.uniform(0, 1) * seconds)
            process.kill()
            process.communicate()
            moments.append("done" if output.exists() else "midway" if workspace.exists() else "nothing yet")
            if output.exists():
                break
            resume = ["--resume"]
        if output.exists():
            Detector.load(output)
        done = subprocess.run(
            [*COMMAND, str(parts), "-o", str(output), *options, "--resume"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert output.read_bytes() == whole.read_bytes(), moments
        assert not workspace.exists()
        left = {path.name for path in tmp_path.iterdir()} - {"whole.safetensors", "whole.html", "killed.html"}
        assert {name for name in left if not name.endswith(".tmp")} == {"killed.safetensors"}
    print({moment: moments.count(moment) for moment in moments})
    assert "midway" in moments


KILLED_AT = """
import os, sys
left, below = int(sys.argv.pop(1)), sys.argv.pop(1)
changes = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}
def count(event, arguments):
    global left
    if event in changes or event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        if any(below in str(one) for one in arguments):
            left -= 1
            if left < 0:
                os._exit(9)
sys.addaudithook(count)
sys.argv[0] = "flawmap"
from flawmap.cli import main
main()
"""
"""`flawmap` in a process that ends, as by a kill, before its n-th change of a file below a place."""


@pytest.mark.parametrize(
    "method",
    [["--method", "padim"], ["--method", "cfa", "--epochs", "20", "--set", "max_steps=0"]],
    ids=["padim", "cfa"],
)
def test_killed_before_any_change_of_a_file(parts: Path, tmp_path: Path, method: list[str]) -> None:
    """Up to 200 moments at which files change, one after the other: nothing is lost at any.

    A training that only collects has some 40 of them, one of 20 epochs more than are tried.
    """
    options = ["train", str(parts), "--image-size", "64", "--seed", "1", *method, "--engine", "torch"]
    whole = tmp_path / "whole.safetensors"
    subprocess.run([sys.executable, "-m", "flawmap", *options, "-o", str(whole)], check=True, capture_output=True)
    kills = 0
    for moment in range(max(1, round(200 * SHARE))):
        output = tmp_path / f"m{moment}.safetensors"
        command = [sys.executable, "-c", KILLED_AT, str(moment), output.stem, *options, "-o", str(output)]
        killed = subprocess.run(command, capture_output=True, text=True, check=False)
        kills += killed.returncode == 9
        assert not output.exists() or output.read_bytes() == whole.read_bytes(), moment
        again = [sys.executable, "-m", "flawmap", *options, "-o", str(output), "--resume"]
        done = subprocess.run(again, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert output.read_bytes() == whole.read_bytes(), moment
        assert not output.with_name(output.name + ".training").exists()
        if killed.returncode == 0:
            break  # there are no more
    print(f"killed at {kills} moments")
    assert kills > 0


def drawn_lines(folder: Path, channels: int) -> list[Path]:
    """Three pictures of a line scan of 16384 x 12288 pixels, the last with a glaring defect."""
    folder.mkdir()
    paths = []
    for number in range(3):
        rng = np.random.default_rng(number)
        block = rng.normal(0, 10, (512, 16384)).astype(np.float32)
        lines = 120 + 25 * np.sin(np.arange(16384) / (300 + 90 * number) + number)
        pixels = np.tile((block + lines).clip(0, 255).astype(np.uint8), (24, 1))
        if number == 2:
            pixels[4000:4200, 5000:5300] = 255
        shown = pixels if channels == 1 else np.repeat(pixels[..., None], 3, 2)
        paths.append(folder / f"{number}.tif")
        Image.fromarray(shown).save(paths[-1])
    return paths


def peak_of(command: list[str]) -> float:
    """Megabytes that a command of flawmap holds at most."""
    process = subprocess.Popen([sys.executable, "-m", "flawmap", *command], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return used.ru_maxrss / 1024


@pytest.mark.skipif(SHARE < 1, reason="there is no smaller one")
@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "colour"])
def test_a_line_scan_of_200_megapixels_takes_less_than_two_gigabytes(tmp_path: Path, channels: int) -> None:
    *good, bad = drawn_lines(tmp_path / "lines", channels)
    bad = bad.rename(tmp_path / "bad.tif")
    model, most = tmp_path / "model.safetensors", ["--max-pixels", "300000000"]
    tiles = ["--tile", "256,32", "--method", "patchcore", "--no-capture-check"]
    peaks = {
        "train": peak_of(["train", str(good[0].parent), "-o", str(model), *tiles, *most]),
        "inspect": peak_of(["inspect", str(model), str(bad), "-o", str(tmp_path / "out"), *most]),
    }
    print({verb: round(megabytes) for verb, megabytes in peaks.items()})
    assert max(peaks.values()) < 2000


def test_twenty_thousand_corruptions() -> None:
    """Those of tests/test_fuzz.py, ten times as many."""
    fuzz = Path(__file__).parents[1] / "tests" / "test_fuzz.py"
    times = str(max(1, round(10 * SHARE)))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(fuzz), "--tb=short"],
        env={**os.environ, "FLAWMAP_FUZZ_TIMES": times}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]


@pytest.mark.parametrize("method", ["draem", "pouta"])
def test_networks_trained_from_nothing_learn_to_see_a_glaring_defect(parts: Path, tmp_path: Path, method: str) -> None:
    """In `make test` they take a few steps only, which teach them nothing."""
    steps = max(1, round(600 * SHARE))
    detector = Detector(method, image_size=128, max_steps=steps, width=8, batch_size=4, learning_rate=3e-3).fit(parts)
    good = [sample.path for sample in find_dataset(parts).test if sample.label == 0]
    scores = [inspection.score for inspection in detector.stream(good)]
    pixels = np.array(Image.open(good[0]).convert("RGB"))
    pixels[30:70, 40:80] = (255, 0, 160)
    found = detector.predict(pixels)
    assert found.anomaly_map is not None
    y, x = np.unravel_index(found.anomaly_map.argmax(), found.anomaly_map.shape)
    if SHARE >= 1:  # fewer steps may teach them too little
        assert found.score > max(scores)
        assert 25 <= y < 75
        assert 35 <= x < 85
