"""A model held against new good images, by Python and by the command line; and what the other verbs say of a file."""

import json
import re
import sys
from dataclasses import replace
from datetime import datetime, timedelta, timezone

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from flawmap import FlawmapError
from flawmap.datasets.drawn import draw_part
from flawmap.imaging.captures import STATISTICS, capture_statistics
from flawmap.imaging.image_files import find_images
from flawmap.line import Inspector
from flawmap.line.validating import validate


@pytest.fixture(scope="module")
def new(tmp_path_factory):
    """Ten good screws that no model of the fixtures has learnt from."""
    folder = tmp_path_factory.mktemp("new") / "good"
    folder.mkdir()
    for number in range(10):
        Image.fromarray(draw_part("screws", None, np.random.default_rng([7, number]), 128)[0]).save(
            folder / f"{number}.png"
        )
    return folder


@pytest.fixture(scope="module")
def inspector(exported):
    return Inspector.load(exported)


def test_figures_are_those_of_the_inspections(inspector, new):
    paths = find_images(new)
    scores = np.array([inspector.predict(path).score for path in paths], np.float32)
    at = inspector.with_threshold(threshold=float(np.sort(scores)[-3]))  # three of ten are rejected
    told = []
    found = validate(at, paths, progress=lambda *step: told.append(step))
    assert (found.images, found.known, found.unjudged, found.rejected) == (10, 0, [], 3)
    assert found.interval == pytest.approx((stats.beta.ppf(0.025, 3, 8), stats.beta.ppf(0.975, 4, 7)), abs=1e-9)
    expected = stats.ks_2samp(scores, inspector.judge.calibration.scores)
    assert found.probability == pytest.approx(float(expected.pvalue), rel=1e-9)
    assert found.threshold == at.judge.threshold
    assert found.engine == inspector.engine.name
    assert told == [("validation", number, 10) for number in range(1, 11)]
    p50, p95, p99 = found.milliseconds
    assert 0 < p50 <= p95 <= p99
    shown = np.array([capture_statistics(np.asarray(Image.open(path))) for path in paths])
    assert [one.name for one in found.statistics] == list(STATISTICS)
    np.testing.assert_allclose([one.low for one in found.statistics], shown.min(0))
    np.testing.assert_allclose([one.high for one in found.statistics], shown.max(0))
    learnt = inspector.card.captures
    assert [(one.good_low, one.good_high) for one in found.statistics] == list(
        zip(learnt.good_low, learnt.good_high, strict=True)
    )


def test_what_is_unsure_is_counted_by_the_threshold(inspector, new):
    paths = find_images(new)
    unsure = inspector.with_threshold(max_false_reject=0.4, unsure=True)
    scores = np.array([unsure.predict(path).score for path in paths])
    assert validate(unsure, paths).rejected == (scores >= unsure.judge.threshold.value).sum()


def test_a_tail_is_held_to_the_end_of_its_interval(inspector, new):
    paths = find_images(new)
    found = validate(inspector.with_threshold(tail=True), paths)
    assert found.threshold == inspector.judge.calibration.threshold(0.1, "tail")
    assert "estimated       threshold" in found.describe()
    for low, kept in ((found.threshold.interval[1] - 1e-6, True), (found.threshold.interval[1] + 1e-6, False)):
        held = replace(found, interval=(low, 1.0))
        assert held.kept == kept
        assert ("NOT KEPT: more are rejected than estimated" in held.describe()) != kept


def test_none_and_all_rejected_have_the_one_sided_ends(inspector, new):
    paths = find_images(new)
    none = validate(inspector.with_threshold(threshold=1e6), paths)
    assert none.rejected == 0
    assert none.interval == pytest.approx((0, stats.beta.ppf(0.975, 1, 10)), abs=1e-9)
    assert none.kept
    every = validate(inspector.with_threshold(threshold=-1e6), paths)
    assert every.rejected == 10
    assert every.interval == pytest.approx((stats.beta.ppf(0.025, 10, 1), 1), abs=1e-9)


def test_a_promise_that_is_broken_is_said_to_be(inspector, new):
    paths = find_images(new)
    calibration = inspector.judge.calibration
    low = np.linspace(0, 0.1, 99, dtype=np.float32)
    promising = replace(calibration, scores=low, peaks=low, mode="holdout")
    other = Inspector(inspector.card, inspector.engine, inspector.judge, None)
    other.judge = type(inspector.judge).of(promising, 0.01, "marginal")
    found = validate(other, paths)
    assert (found.rejected, found.threshold.rate) == (10, 0.01)
    assert not found.kept
    assert not found.alike
    text = found.describe()
    assert "NOT KEPT" in text
    assert "NOT UNIFORM" in text
    assert "10 (100.00%" in text
    kept = validate(inspector, paths)
    assert kept.kept
    assert "NOT KEPT" not in kept.describe()


def test_what_was_learnt_from_and_what_comes_twice_is_left_out(inspector, drawn, new, tmp_path):
    learnt, fresh = find_images(drawn / "train"), find_images(new)
    copied = tmp_path / "copy.png"
    copied.write_bytes(fresh[0].read_bytes())
    found = validate(inspector, [*learnt, *fresh, copied, fresh[1]])
    assert (found.images, found.known) == (len(fresh), len(learnt) + 2)
    assert f"{len(learnt) + 2} left out" in found.describe()
    with pytest.raises(FlawmapError, match="learnt from"):
        validate(inspector, learnt)


def test_what_cannot_be_judged_is_listed_and_counts_nowhere(inspector, new, tmp_path):
    (tmp_path / "cut.png").write_bytes(find_images(new)[0].read_bytes()[:300])
    Image.new("RGB", (128, 128)).save(tmp_path / "black.png")
    bad = [tmp_path / "cut.png", tmp_path / "missing.png", tmp_path / "black.png"]
    found = validate(inspector, [*bad, *find_images(new)])
    assert found.images == 10
    assert len(found.unjudged) == 3
    for path, line in zip(bad, found.unjudged, strict=True):
        assert line.startswith(f"{path}: ")
        assert line.count(str(path)) == 1
        assert "\n" not in line
    nothing = validate(inspector, bad)
    assert (nothing.images, nothing.interval) == (0, (0.0, 1.0))
    assert nothing.describe() == "no image could be judged"


def test_a_model_without_calibration_is_refused(exported_live, new):
    moved = Inspector.load(exported_live, engine="onnxruntime").with_settings(alpha=0.5, calibrate=False)
    with pytest.raises(FlawmapError, match="not calibrated"):
        validate(moved, find_images(new))


# The command line


def test_validate_prints_what_python_finds(flawmap, exported, inspector, new, tmp_path):
    code, out, err = flawmap("validate", exported, new)
    assert code == 0, err
    expected = validate(inspector, find_images(new)).describe()
    assert out.splitlines()[:-1] == expected.splitlines()[:-1]
    assert re.fullmatch(
        r"latency +p50 [\d.]+ ms, p95 [\d.]+ ms, p99 [\d.]+ ms \(\w+, one at a time\)", out.splitlines()[-1]
    )
    (tmp_path / "cut.png").write_bytes(b"\x89PNG")
    code, out, err = flawmap("validate", exported, tmp_path)
    assert (code, out) == (2, "no image could be judged\n")
    assert str(tmp_path / "cut.png") in err
    (tmp_path / "new.png").write_bytes((new / "0.png").read_bytes())
    code, out, err = flawmap("validate", exported, tmp_path)
    assert code == 3
    assert "images judged   1\n" in out
    assert str(tmp_path / "cut.png") in err


def test_validate_refuses_in_one_line(flawmap, exported, drawn, tmp_path):
    (tmp_path / "empty").mkdir()
    for arguments, named in (
        ((exported, tmp_path / "empty"), "holds no images"),
        ((exported, drawn / "train"), "learnt from"),
        ((tmp_path / "no.onnx", drawn), "no.onnx"),
        ((exported, drawn, "--engine", "torch"), "engine torch"),
        ((exported, drawn, "--device", "cuda"), "CPU"),
    ):
        code, out, err = flawmap("validate", *arguments)
        lines = [line for line in err.splitlines() if not line.endswith("...")]
        assert (code, out, len(lines)) == (2, "", 1), err
        assert named in lines[0]


def facts(text):
    return dict(re.split(r"  +", line, maxsplit=1) for line in text.splitlines())


@pytest.mark.parametrize("suffix", [".safetensors", ".onnx"])
def test_info_says_what_a_file_holds(flawmap, live, live_file, exported_live, suffix):
    code, out, err = flawmap("info", live_file.with_suffix(suffix))
    assert code == 0, err
    said = facts(out)
    assert said["method"] == "f2r"
    assert said["digest"] == live.digest_
    assert said["can be moved"] == "alpha, beta"
    assert said["calibration"] == f"{live.calibration_.mode}, {len(live.calibration_.scores)} good images"
    assert said["promise"] == live.threshold_.describe()
    assert said["learnt from"].startswith(f"{live.training_['images']} good images, seed 0")
    assert said["input"].startswith("128 x 128 pixels")
    assert said["bits"] == "8"
    assert "beta=" in said["settings"]
    assert (suffix == ".onnx") == ("exported, fp32" in said["file"])
    assert exported_live == live_file.with_suffix(".onnx")


def test_info_refuses_what_is_no_model(flawmap, drawn, tmp_path):
    for path in (tmp_path / "no.onnx", drawn / "train" / "good" / "000.png"):
        code, out, err = flawmap("info", path)
        assert (code, out) == (2, "")
        assert str(path) in err
        assert len(err.splitlines()) == 1


def test_export_writes_the_file_and_says_how_far_it_is_off(flawmap, model_file, exported, drawn, tmp_path):
    path = tmp_path / "x.onnx"
    code, out, err = flawmap("export", model_file, "-o", path, "--check", drawn / "test" / "good")
    assert code == 0, err
    assert path.read_bytes() == exported.read_bytes()  # whoever exports it
    *proofs, last = out.splitlines()
    assert last == f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)"
    assert {proof.partition(":")[0] for proof in proofs} == {"openvino", "onnxruntime"}
    for proof in proofs:
        shares = [float(share) for share in re.findall(r"\(([\de.+-]+)\)", proof)]
        assert "4 images" in proof
        assert len(shares) == 2
        assert max(shares) < 1e-4


def test_export_refuses_in_one_line_and_writes_nothing(flawmap, model_file, tmp_path, drawn):
    (tmp_path / "empty").mkdir()
    for arguments, named in (
        (("-o", tmp_path / "x.pt"), ".onnx"),
        (("-o", tmp_path / "no" / "x.onnx"), "does not exist"),
        (("-o", tmp_path / "x.onnx", "--check", tmp_path / "empty"), "holds no images"),
        (("-o", tmp_path / "x.onnx", "--precision", "int8"), "--check"),
    ):
        code, out, err = flawmap("export", model_file, *arguments)
        lines = [line for line in err.splitlines() if not line.endswith("...")]
        assert (code, out, len(lines)) == (2, "", 1), err
        assert named in lines[0]
    assert [entry.name for entry in tmp_path.iterdir()] == ["empty"]


def test_inspect_writes_json_lines_of_a_schema(flawmap, exported, detector, drawn, tmp_path):
    (tmp_path / "cut.png").write_bytes(b"\x89PNG")
    before = datetime.now(timezone.utc) - timedelta(seconds=1)
    code, out, err = flawmap("inspect", exported, drawn / "test", tmp_path, "--format", "jsonl")
    assert code == 3, err
    lines = [json.loads(line) for line in out.splitlines()]
    assert len(lines) == 13
    said = facts(flawmap("info", exported)[1])["digest"]
    expected = {str(inspection.path): inspection for inspection in detector.predict(drawn / "test")}
    for line in lines:
        assert list(line)[:3] == ["schema", "time", "model"]
        assert line["schema"] == 1
        assert line["model"] == said == detector.digest_
        judged = datetime.fromisoformat(line["time"])
        assert judged.utcoffset() == timedelta(0)
        assert before <= judged <= datetime.now(timezone.utc)
        if line["path"] in expected:
            inspection = expected[line["path"]]
            assert line["verdict"] == inspection.verdict
            assert line["score"] == pytest.approx(inspection.score, rel=1e-4)
            assert len(line["regions"]) == len(inspection.regions)
            assert line["error"] is None
        else:
            assert (line["verdict"], line["score"], line["regions"]) == ("error", None, [])
            assert line["error"].startswith(line["path"])


def test_inspect_moves_settings_of_an_exported_file(flawmap, exported_live, live, drawn):
    image = drawn / "test" / "good" / "000.png"
    code, out, err = flawmap(
        "inspect", exported_live, image, "--format", "jsonl", "--set", "alpha=0.4", "--max-false-reject", "0.6"
    )
    assert code == 0, err
    moved = live.with_settings(alpha=0.4).with_threshold(max_false_reject=0.6)
    found, expected = json.loads(out), moved.predict(image)
    assert found["score"] == pytest.approx(expected.score, rel=1e-4)
    assert found["threshold"] == pytest.approx(expected.threshold, rel=1e-4)
    assert abs(found["score"] / live.predict(image).score - 1) > 1e-3
    for given, named in (("steps=3", "steps of f2r is fixed"), ("alpha=11", "alpha=11"), ("alpha=x", "alpha=x")):
        code, out, err = flawmap("inspect", exported_live, image, "--set", given)
        assert (code, out, len(err.splitlines())) == (2, "", 1), err
        assert named in err


# Where the lab is not installed


@pytest.fixture
def no_lab(monkeypatch):
    """As where torch is missing: flawmap.detector cannot be imported."""

    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name in ("flawmap.detector", "flawmap.export"):
                raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.delitem(sys.modules, "flawmap.detector")
    monkeypatch.delitem(sys.modules, "flawmap.export", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])


@pytest.mark.parametrize("verb", ["inspect", "validate", "info", "evaluate"])
def test_a_file_of_the_lab_names_what_is_missing_and_how_to_get_it(flawmap, model_file, drawn, no_lab, verb):
    arguments = [model_file] if verb == "info" else [model_file, drawn]
    code, out, err = flawmap(verb, *arguments)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    for named in (str(model_file), "torch is not installed", "pip install 'flawmap[train]'", "flawmap export"):
        assert named in err


def test_exported_files_need_no_lab(flawmap, exported, drawn, new, no_lab):
    assert flawmap("inspect", exported, drawn / "test" / "good", "--format", "jsonl")[0] == 0
    assert flawmap("validate", exported, new)[0] == 0
    assert flawmap("info", exported)[0] == 0
    assert "flawmap.detector" not in sys.modules
    code, out, err = flawmap("export", exported, "-o", exported.with_name("again.onnx"))
    assert (code, out) == (2, "")
    assert "pip install 'flawmap[train]'" in err
    assert len(err.splitlines()) == 1
