"""Every number that a user can give has a range, in Python and on the command line."""

import numpy as np
import pytest

from flawmap import Detector, FlawmapError
from flawmap.ranges import SCORES, finite, rate, whole

NO_NUMBERS = [float("nan"), float("inf"), -float("inf"), "0.1", None, True, [], 10**400]


@pytest.mark.parametrize("value", [*NO_NUMBERS, 3.5e38, -3.5e38])
def test_a_threshold(detector, value):
    if value is None:
        return
    for judged in (detector, detector.inspector()):
        with pytest.raises(FlawmapError, match="--threshold must be a number") as caught:
            judged.with_threshold(threshold=value)
        assert len(str(caught.value)) < 200
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [*NO_NUMBERS, 0, 1, 1.0, -0.1, 1e-320, 5e-324, 1e-10])
def test_a_rate(detector, value):
    with pytest.raises(FlawmapError, match="between 0 and 1"):
        Detector(max_false_reject=value)
    if value is not None:
        with pytest.raises(FlawmapError, match="between 0 and 1"):
            detector.with_threshold(max_false_reject=value)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"seed": -1}, "--seed -1 is too small"),
        ({"seed": 10**23}, "--seed 1.* is too large"),
        ({"seed": 0.5}, "--seed must be a whole number"),
        ({"seed": None}, "--seed must be a whole number"),
        ({"image_size": 100_000}, "--image-size 100000 is too large"),
        ({"image_size": (64, 10**30)}, "is too large"),
        ({"image_size": 31}, "is too small"),
        ({"image_size": 64.0}, "must be a whole number"),
        ({"image_size": "64"}, "must be a whole number"),
        ({"image_size": (64,)}, "give a side, or"),
        ({"guarantee": "eternal"}, "unknown guarantee"),
    ],
)
def test_what_a_detector_is_made_of(arguments, named):
    with pytest.raises(FlawmapError, match=named) as caught:
        Detector(**arguments)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("value", [-1, 0.5, None, "1"])
def test_how_many_are_dropped(value, tmp_path):
    with pytest.raises(FlawmapError, match="--drop-atypical"):
        Detector().fit(tmp_path, drop_atypical=value)


def test_numbers_of_numpy_are_numbers():
    assert (whole("n", np.int64(7), (0, 9)), finite("x", np.float32(0.5), SCORES)) == (7, 0.5)
    assert rate("r", np.float64(0.25)) == 0.25
    assert Detector(image_size=np.int64(64), seed=np.uint32(3)).image_size == (64, 64)


@pytest.mark.parametrize(
    "command",
    [
        *(f"inspect {{model}} {{data}} --threshold {value}" for value in ("nan", "inf", "-inf", "3.5e38")),
        *(f"inspect {{model}} {{data}} --max-false-reject {value}" for value in ("nan", "1e-320", "0", "1", "inf")),
        *(f"train {{data}} -o new --max-false-reject {value}" for value in ("nan", "1e-320", "inf", "-0.0")),
        *(f"train {{data}} -o new --seed {value} --shots 2" for value in ("-1", 10**23, "0.5")),
        *(f"train {{data}} -o new --image-size {value}" for value in ("100000", "-1", 10**23)),
        "train {data} -o new --crop 100000",
        *(f"train {{data}} -o new --{name} -1" for name in ("shots", "drop-atypical", "epochs", "views")),
        *(f"tune {{model}} {{data}} -o new --seed {value}" for value in ("-1", 10**23)),
        *(f"synthesize {{data}} -o new --{name} -1" for name in ("seed", "count", "size", "workers")),
        "sample new --seed -1",
        f"sample new --seed {10**23}",
        "export {model} -o new --max-drop nan",
    ],
)  # fmt: skip
def test_numbers_of_the_command_line(flawmap, model_file, drawn, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    code, out, err = flawmap(*command.format(model=model_file, data=drawn).split())
    assert code == 2, (out, err)
    assert len(err.splitlines()) == 1, err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
