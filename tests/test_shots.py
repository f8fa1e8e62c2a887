"""`flawmap train --shots K`: a few good images, drawn by the seed."""

import shutil

import pytest

from flawmap import Detector, FlawmapError, find_dataset
from flawmap.datasets.shots import draw_shots
from flawmap.imaging.image_files import digest


def test_the_draw_is_the_seeds(drawn):
    dataset = find_dataset(drawn)
    first = draw_shots(dataset, 4, 0)
    assert first == draw_shots(dataset, 4, 0)
    assert len(first.train) == 4
    assert first.test == dataset.test
    assert set(first.train) < set(dataset.train)
    assert len({tuple(s.path for s in draw_shots(dataset, 4, seed).train) for seed in range(10)}) > 8
    assert set(draw_shots(dataset, 3, 0).train) < set(first.train)  # more shots are further ones
    assert draw_shots(dataset, 12, 0).train == dataset.train


def test_copies_and_broken_files_are_no_shots(drawn, tmp_path):
    good = sorted((drawn / "train" / "good").iterdir())[:3]
    for path in good:
        for copy in range(4):
            shutil.copy(path, tmp_path / f"{path.stem}-{copy}.png")
    (tmp_path / "broken.png").write_bytes(good[0].read_bytes()[:200])
    dataset = find_dataset(tmp_path)
    for seed in range(5):
        drawn_now = draw_shots(dataset, 3, seed)
        assert {digest(s.path) for s in drawn_now.train} == {digest(path) for path in good}
    with pytest.raises(FlawmapError, match="--shots 4 is more than the 3 different good images"):
        draw_shots(dataset, 4, 0)
    with pytest.raises(FlawmapError, match="--shots 1 is too few"):
        draw_shots(dataset, 1, 0)


@pytest.mark.parametrize("calibration", ["crossfit", "holdout"])
def test_two_shots_are_enough(drawn, tmp_path, flawmap, calibration):
    model = tmp_path / "m.safetensors"
    settings = ("--image-size", 64, "--engine", "torch", "--seed", 3, "--set", "min_vectors=40")
    code, out, err = flawmap(
        "train", drawn, "-o", model, "--shots", 2, "--calibration", calibration, *settings, "--set", "deep_levels="
    )
    assert code == 0, err
    chosen = [sample.path for sample in draw_shots(find_dataset(drawn), 2, 3).train]
    line = next(line for line in out.splitlines() if line.startswith("shots"))
    assert line.startswith("shots: 2 of 12 good images, drawn by seed 3: ")
    assert all(path.name in line for path in chosen)
    assert "2 images say little of how good parts vary" in err
    fitted = set(Detector.load(model, engine="torch").training_["fitted"])
    assert fitted <= {digest(path)[:16] for path in chosen}
    assert len(fitted) == (2 if calibration == "crossfit" else 1)


def test_shots_with_a_calibration_folder_need_no_warning(drawn, tmp_path, flawmap):
    folder = drawn / "test" / "good"
    settings = ("--method", "padim", "--image-size", 64, "--engine", "torch", "--set", "channels=10")
    arguments = ("train", drawn, "-o", tmp_path / "m.safetensors", "--shots", 4, "--calibration", folder, *settings)
    code, out, err = flawmap(*arguments)
    assert code == 0, err
    assert "say little" not in err
    assert "from 4 good images" in out


def test_too_many_shots_are_told_in_a_line(drawn, tmp_path, flawmap):
    code, _, err = flawmap("train", drawn, "-o", tmp_path / "m.safetensors", "--shots", 13)
    assert code == 2
    assert err.count("\n") == 1
    assert "--shots 13 is more than the 12 different good images" in err


def test_shots_of_a_table(flawmap, drawn, tmp_path):
    table = tmp_path / "parts.csv"
    images = sorted((drawn / "train" / "good").iterdir())
    table.write_text("path,label\n" + "".join(f"{path},good\n" for path in images))
    code, out, err = flawmap(
        "train",
        table,
        "-o",
        tmp_path / "m.safetensors",
        "--shots",
        4,
        "--method",
        "padim",
        "--image-size",
        64,
        "--set",
        "channels=8",
        "--engine",
        "torch",
    )
    assert code == 0, err
    assert "shots: 4 of" in out
