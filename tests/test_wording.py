"""What users read: numbers agree with their nouns, and nothing is said twice."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from flawmap.cli.training_report import notes, threshold_lines
from flawmap.datasets import Dataset, Sample
from flawmap.judging.calibration import Calibration, Threshold
from flawmap.report.wording import promise
from flawmap.text import counted

NO_PEAKS = np.empty(0, np.float32)


def calibration(count: int, mode: str) -> Calibration:
    return Calibration(np.random.default_rng(0).gumbel(size=count).astype(np.float32), NO_PEAKS, mode)


def detector(count: int, mode: str, guarantee: str = "marginal", rate: float = 0.1) -> SimpleNamespace:
    found = calibration(count, mode)
    return SimpleNamespace(
        max_false_reject=rate,
        calibration_=found,
        guarantee=guarantee,
        threshold_=found.threshold(rate, guarantee),
        atypical_=[],
        near_duplicates_=[],
    )


def test_a_count_agrees_with_its_noun():
    assert [counted(n, "image") for n in (0, 1, 2)] == ["0 images", "1 image", "2 images"]
    assert [counted(n, "file is", "files are") for n in (1, 2)] == ["1 file is", "2 files are"]


@pytest.mark.parametrize(("mode", "guarantee"), [("loo", "marginal"), ("loo", "tail"), ("holdout", "marginal")])
def test_training_says_once_that_an_estimate_promises_nothing(mode, guarantee):
    told = "\n".join(threshold_lines(detector(40, mode, guarantee)))
    assert "--tail" in told or guarantee == "tail"
    assert told.count("promises nothing") == 1
    assert told.count("an estimate") == (2 if mode == "loo" else 1)


@pytest.mark.parametrize("mode", ["holdout", "loo"])
def test_the_upper_bound_stands_beside_the_rate(mode):
    beside = {"holdout": " on average (conformal; ", "loo": " ("}
    threshold = calibration(99, mode).threshold(0.02)
    assert threshold.upper > threshold.rate
    rate, upper = f"{threshold.rate:.2%} of good parts are rejected", f"95 % upper bound {threshold.upper:.2%})"
    assert rate + beside[mode] + upper in threshold.describe()
    assert f"{threshold.upper:.2%}".split("%")[0] in " ".join(promise(threshold)["means"])


def test_a_named_threshold_has_its_upper_bound_beside_its_rate():
    threshold = calibration(50, "holdout").threshold_at(1e9)
    assert f"0.00% of 50 good images reach it (95 % upper bound {threshold.upper:.2%})" in threshold.describe()


def test_one_calibration_image_is_no_images():
    one = Calibration(np.ones(1, np.float32), NO_PEAKS, "holdout")
    for threshold in (one.threshold(0.5), one.threshold(0.01), one.threshold_at(0.5)):
        told = " ".join([threshold.describe(), *promise(threshold)["means"]])
        assert "1 good image" in told
        assert "1 good images" not in told
        assert "1 calibration images" not in told
        assert "These images" not in told


def test_one_missing_image_is_is():
    threshold = Threshold(1.0, 0.02, 0.01, "marginal", 0.05, 98, 1)
    assert threshold.describe().endswith("1.00% was asked for: 1 more good image is needed for it")


def test_one_copy_shows():
    found = detector(20, "loo")
    found.near_duplicates_ = [["a.png", "b.png"]]
    assert notes(found, False)[0].startswith("1 image shows what another one shows")


def test_a_data_set_of_one_image(tmp_path):
    path = tmp_path / "a.png"
    told = Dataset("a", tmp_path, "layout", (Sample(path, "train", 0, "good"),), ()).describe()
    assert "1 of 1 image looked at" in told
