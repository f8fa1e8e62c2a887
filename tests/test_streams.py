"""Standard streams that are closed or full, signals, and errors that should not be."""

import os
import signal
import subprocess
import sys
import time

import pytest

from flawmap import Detector, FlawmapError
from flawmap.errors import shortage
from flawmap.files import UNFINISHED

posix = pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell")
COMMAND = f"{sys.executable} -m flawmap"
SMALL = "--image-size 64 --method padim --set channels=8 --engine torch"


def shell(line, folder):
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=folder, timeout=120, check=False)


@posix
@pytest.mark.parametrize("end", ["2>&-", "<&- >&- 2>&-", "2>&1 | head -1", "| true", "2> >(true)"])
def test_training_does_not_need_to_be_read(drawn, tmp_path, end):
    done = shell(f"{COMMAND} train {drawn} -o m.safetensors {SMALL} {end}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    deadline = time.monotonic() + 60
    while not (tmp_path / "m.html").exists() and time.monotonic() < deadline:
        time.sleep(0.2)  # of a pipe the shell waits for its last command alone
    Detector.load(tmp_path / "m.safetensors", engine="torch")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.html", "m.safetensors"]


@posix
def test_an_inspection_goes_on_to_its_files(drawn, model_file, tmp_path):
    line = f"set -o pipefail; {COMMAND} inspect {model_file} {drawn / 'test'} --engine torch --coco c.json | head -1"
    done = shell(line, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("image")
    assert (tmp_path / "c.json").exists()


def children(pid):
    found = subprocess.run(["ps", "-eo", "pid=,ppid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in found.splitlines()]
    return [int(child) for child, parent, state in rows if int(parent) == pid and not state.startswith("Z")]


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ps and POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_parent_and_the_folder_can_be_used_again(drawn, flawmap, tmp_path, number):
    output = tmp_path / "made"
    arguments = ["synthesize", str(drawn), "-o", str(output), "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "flawmap", *arguments, "--count", "100000"], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not list(output.glob("test/synthetic/*.png")) and time.monotonic() < deadline:
        time.sleep(0.1)
    workers = children(process.pid)
    assert len(workers) >= 2
    process.send_signal(number)
    _, err = process.communicate(timeout=30)  # which waits for all who hold its pipe
    assert "Traceback" not in err
    if number == signal.SIGTERM:
        assert process.returncode == 143
        assert "ended by a signal" in err.splitlines()[-1]
        assert list(output.iterdir()) == []
    else:
        assert (output / UNFINISHED).exists()
    deadline = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, workers))
    code, _, err = flawmap(*arguments[:-1], 1, "--count", 2)
    assert code == 0, err
    assert not (output / UNFINISHED).exists()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_sample_that_was_killed_is_drawn_again(flawmap, tmp_path, monkeypatch):
    import flawmap.datasets.drawn as drawn

    output = tmp_path / "parts"
    process = subprocess.Popen([sys.executable, "-m", "flawmap", "sample", str(output)])
    deadline = time.monotonic() + 60
    while not list(output.glob("train/good/*.png")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    draw = drawn.draw_dataset
    few = {"train": 2, "good": 1, "per_defect": 1, "size": 64}
    monkeypatch.setattr(drawn, "draw_dataset", lambda folder, kind, seed: draw(folder, kind, seed, **few))
    code, _, err = flawmap("sample", output)
    assert code == 0, err
    assert len(list((output / "train" / "good").iterdir())) == 2
    assert not (output / UNFINISHED).exists()


# Errors that should not be


def failing(monkeypatch, error):
    def fail(*arguments, **more):
        raise error

    monkeypatch.setattr("flawmap.cli.listings.methods_command.callback", fail)


def test_any_other_error_is_one_line_that_asks_for_a_report(flawmap, monkeypatch):
    failing(monkeypatch, KeyError("a\nb\x1b[2J"))
    code, _, err = flawmap("methods")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "KeyError" in err
    assert "--traceback" in err
    assert "\x1b" not in err
    for command in (["methods", "--traceback"], ["--traceback", "methods"]):
        code, _, err = flawmap(*command)
        assert code == 2
        assert "Traceback (most recent call last)" in err


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (MemoryError(), "memory"),
        (RuntimeError("could not create a primitive"), "memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "memory"),
        (RuntimeError("std::bad_alloc"), "memory"),
        (OSError(12, "Cannot allocate memory"), "memory"),
        (RuntimeError("can't start new thread"), "threads"),
        (BlockingIOError(11, "Resource temporarily unavailable"), "threads"),
        (OSError(24, "Too many open files"), "files"),
        (OSError(28, "No space left on device"), "free some space"),
    ],
)  # fmt: skip
def test_what_has_run_out_is_named(flawmap, monkeypatch, error, named):
    failing(monkeypatch, error)
    code, _, err = flawmap("methods")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert named in err
    assert "report" not in err


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("could not create a primitive")])
def test_want_of_memory_is_not_told_as_a_damaged_model(model_file, monkeypatch, error):
    def fail(*arguments, **more):
        raise error

    monkeypatch.setattr("flawmap.detector.create_backbone", fail)
    with pytest.raises(FlawmapError, match="the memory is used up") as caught:
        Detector.load(model_file)
    assert "train again" not in str(caught.value)


def test_other_errors_are_no_shortage():
    assert shortage(ValueError("wrong")) is None
