"""Long runs, outside `make test`: leaks, kills at any moment, and corrupted files by the thousand."""

from __future__ import annotations

import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flawmap import Detector, FlawmapError, find_dataset
from flawmap.datasets.drawn import draw_dataset


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


def test_memory_does_not_grow_with_the_images_inspected(parts: Path, model: Path) -> None:
    detector = Detector.load(model)
    paths = [sample.path for sample in find_dataset(parts).test]
    for _ in detector.stream(paths * 20):
        pass
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for inspection in detector.stream(paths * 400):
        assert inspection.verdict != "error"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes


def test_a_kill_at_any_moment_leaves_a_whole_model_or_none(parts: Path) -> None:
    rng = random.Random(0)
    output = parts.parent / "killed.safetensors"
    for _ in range(25):
        output.unlink(missing_ok=True)
        command = [sys.executable, "-m", "flawmap", "train", str(parts), "-o", str(output), "--image-size", "128"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(1, 14))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if output.exists():
            Detector.load(output)


def test_no_corrupted_image_is_ever_good(parts: Path, model: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    detector = Detector.load(model)
    whole = find_dataset(parts).test[0].path.read_bytes()
    for number in range(2000):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 20)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path = tmp_path / "corrupted.png"
        path.write_bytes(content[: rng.randrange(len(content))])
        inspection = detector.predict(path)
        assert not isinstance(inspection, list)
        assert inspection.verdict == "error", number


def test_no_corrupted_model_is_ever_loaded(model: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    whole = model.read_bytes()
    path = tmp_path / "corrupted.safetensors"
    for _ in range(500):
        content = bytearray(whole)
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        with pytest.raises(FlawmapError):
            Detector.load(path)
