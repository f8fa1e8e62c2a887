"""What a user can do wrong: exit code 2, and one line that names the thing."""

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def folder(tmp_path):
    """Six small good images."""
    good = tmp_path / "parts"
    good.mkdir()
    random = np.random.default_rng(0)
    for number in range(6):
        Image.fromarray(random.integers(90, 110, (64, 64, 3), dtype=np.uint8)).save(good / f"{number}.png")
    return good


def check_refused(result, *named):
    code, _, err = result
    progress = re.compile(r".* \.\.\.$|features of .* while training$|.*of memory at its highest$")
    lines = [line for line in err.splitlines() if not progress.match(line)]
    assert code == 2, err
    assert len(lines) == 1, err
    assert "Traceback" not in err
    for name in named:
        assert str(name) in lines[0]


def test_a_missing_folder(flawmap, tmp_path):
    check_refused(flawmap("train", tmp_path / "nowhere", "-o", tmp_path / "m.safetensors"), tmp_path / "nowhere")


def test_an_empty_folder(flawmap, tmp_path):
    (tmp_path / "empty").mkdir()
    check_refused(flawmap("train", tmp_path / "empty", "-o", tmp_path / "m.safetensors"), tmp_path / "empty")


def test_no_good_images(flawmap, tmp_path, folder):
    (tmp_path / "set").mkdir()
    folder.rename(tmp_path / "set" / "bad")
    (tmp_path / "set" / "good").mkdir()
    check_refused(flawmap("train", tmp_path / "set", "-o", tmp_path / "m.safetensors"), tmp_path / "set", "good")


def test_one_good_image(flawmap, tmp_path, folder):
    for path in sorted(folder.iterdir())[1:]:
        path.unlink()
    check_refused(flawmap("train", folder, "-o", tmp_path / "m.safetensors"), folder, "at least 2")
    assert not (tmp_path / "m.safetensors").exists()


@pytest.mark.parametrize("calibration", ["crossfit", "holdout"])
@pytest.mark.parametrize("method", ["patchcore", "padim"])
def test_all_images_the_same(flawmap, tmp_path, folder, method, calibration):
    for path in sorted(folder.iterdir())[1:]:
        shutil.copy(folder / "0.png", path)
    result = flawmap(
        "train", folder, "-o", tmp_path / "m.safetensors", "--image-size", 64, "--method", method,
        "--calibration", calibration, "--engine", "torch",
    )  # fmt: skip
    check_refused(result, "show the same", "--calibration FOLDER")


def test_a_text_file_among_the_good_is_named_and_left_out(flawmap, tmp_path, folder):
    (folder / "3.png").write_text("not an image")
    arguments = ["train", folder, "-o", tmp_path / "m.safetensors", "--image-size", 64, "--engine", "torch"]
    code, out, err = flawmap(*arguments)
    assert code == 0
    warnings = [line for line in err.splitlines() if "3.png" in line]
    assert len(warnings) == 1
    assert "left out of training" in warnings[0]
    assert "wrote" in out
    (tmp_path / "m.safetensors").unlink()
    check_refused(flawmap(*arguments, "--strict"), folder / "3.png")
    assert not (tmp_path / "m.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--method", "nothing"], "nothing"),
        (["--backbone", "no_such_net"], "no_such_net"),
        (["--set", "colour=red"], "colour"),
        (["--set", "coreset=much"], "coreset=much"),
        (["--set", "coreset=2"], "coreset=2"),
        (["--set", "levels=blocks.77"], "blocks.77"),
        (["--set", "coreset"], "coreset"),
        (["--preset", "best"], "best"),
        (["--engine", "steam"], "steam"),
        (["--device", "abacus"], "abacus"),
        (["--image-size", "16"], "16"),
        (["--image-size", "big"], "big"),
        (["--max-false-reject", "0"], "0"),
        (["--max-false-reject", "1.5"], "1.5"),
        (["--max-false-reject", "nan"], "nan"),
        (["--max-false-reject", "few"], "few"),
        (["--guarantee", "eternal"], "eternal"),
        (["--calibration", "nowhere"], "nowhere"),
        (["--weights", "nowhere.pth"], "nowhere.pth"),
        (["--category", "bolts"], "leave out the category"),
        (["--colour", "red"], "--colour"),
    ],
    ids=lambda value: "=".join(value) if isinstance(value, list) else None,
)
def test_options_that_cannot_be_taken(flawmap, tmp_path, folder, options, named):
    result = flawmap("train", folder, "-o", tmp_path / "m.safetensors", "--image-size", 64, *options)
    check_refused(result, named)
    assert not (tmp_path / "m.safetensors").exists()


def test_weights_that_cannot_be_had(flawmap, tmp_path, folder, monkeypatch):
    import socket

    def no_network(*arguments, **options):
        raise socket.gaierror("no network")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    result = flawmap("train", folder, "-o", tmp_path / "m.safetensors", "--backbone", "resnet18.a1_in1k")
    check_refused(result, "resnet18.a1_in1k", "--weights FILE")


def test_places_that_cannot_be_written(flawmap, tmp_path, folder):
    check_refused(flawmap("train", folder, "-o", tmp_path / "missing" / "m.safetensors"), tmp_path / "missing")
    check_refused(flawmap("train", folder, "-o", tmp_path), tmp_path)


def test_inspecting_without_a_model_or_an_image(flawmap, tmp_path, model_file, drawn):
    check_refused(flawmap("inspect", tmp_path / "no.safetensors", drawn / "test"), tmp_path / "no.safetensors")
    check_refused(flawmap("inspect", model_file, tmp_path / "no.png"), tmp_path / "no.png")
    (tmp_path / "empty").mkdir()
    check_refused(flawmap("inspect", model_file, tmp_path / "empty"), tmp_path / "empty")
    good = drawn / "test" / "good"
    check_refused(flawmap("inspect", model_file, good, "--max-false-reject", "2"), "2")
    check_refused(flawmap("inspect", model_file, good, "--max-false-reject", "0.1", "--threshold", "3"), "--threshold")
    check_refused(flawmap("inspect", model_file, good, "--coco", tmp_path / "missing" / "c.json"), "missing")
    (tmp_path / "file").write_text("")
    check_refused(flawmap("inspect", model_file, good, "-o", tmp_path / "file"), tmp_path / "file")
    check_refused(flawmap("inspect", model_file, good, "--engine", "steam"), "steam")


def test_a_truncated_model(flawmap, tmp_path, model_file, drawn):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(model_file.read_bytes()[:-1000])
    check_refused(flawmap("inspect", cut, drawn / "test"), cut)
    check_refused(flawmap("evaluate", cut, drawn), cut)


def test_evaluating_without_labels(flawmap, model_file, folder):
    code, _, err = flawmap("evaluate", model_file, folder)
    assert code == 2
    assert err.count("\n") == 1
    assert str(folder) in err


def test_no_arguments_at_all_show_what_there_is():
    done = subprocess.run([sys.executable, "-m", "flawmap"], capture_output=True, text=True, check=False)
    assert "train" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
