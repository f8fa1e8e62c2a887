"""Models fitted with calibration "none": all good images are learnt from, and there is no threshold."""

import json

import numpy as np
import pytest

from flawmap import Calibration, Detector, FlawmapError
from flawmap.export import export
from flawmap.imaging.geometry import Geometry
from flawmap.judging.evaluation import Scored, evaluate
from flawmap.judging.judge import Judge
from flawmap.line import Inspector
from flawmap.line.validating import validate
from flawmap.report.charts import ScoreRow, score_histograms
from flawmap.report.overlays import HeatScale
from flawmap.tuning.live import tune
from flawmap.tuning.oracle import oracle_grid

SIZE = 64


@pytest.fixture(scope="module")
def plain(drawn) -> Detector:
    return Detector("patchcore", image_size=SIZE, calibration="none").fit(drawn)


@pytest.fixture(scope="module")
def plain_file(plain, tmp_path_factory):
    path = tmp_path_factory.mktemp("uncalibrated") / "screws.safetensors"
    plain.save(path)
    return path


@pytest.fixture(scope="module")
def moving(drawn) -> Detector:
    small = {"epochs": 1, "views": 1, "components": 8, "steps": 1, "max_vectors": 40}
    return Detector("f2r", image_size=SIZE, calibration="none", **small).fit(drawn)


def test_all_images_are_learnt_from_and_none_calibrates(plain, moving, drawn):
    count = len(list((drawn / "train" / "good").iterdir()))
    for detector in (plain, moving):
        assert detector.training_["images"] == count
        assert detector.calibration_ is detector.threshold_ is detector.pixel_threshold_ is None
        assert detector.atypical_ == []
    calibrated = Detector("f2r", image_size=SIZE, epochs=0, components=8, steps=1).fit(drawn)
    assert calibrated.training_["images"] < count


def test_it_scores_and_judges_nothing(plain, plain_file, drawn):
    image = next((drawn / "test" / "good").iterdir())
    there = plain.predict(image)
    assert (there.verdict, there.p_value, there.threshold, there.regions) == (None, None, None, [])
    assert there.score is not None
    for other in (Detector.load(plain_file), Inspector.load(plain_file)):
        again = other.predict(image)
        assert (again.verdict, again.score) == (None, there.score)


def test_a_threshold_of_the_users_own_gives_verdicts(plain_file, drawn):
    inspector, image = Inspector.load(plain_file), next((drawn / "test" / "good").iterdir())
    score = inspector.predict(image).score
    for threshold, verdict in ((score * 2, "good"), (score, "defect")):
        given = inspector.with_threshold(threshold=threshold)
        judged = given.predict(image)
        assert (judged.verdict, judged.p_value) == (verdict, None)
        assert "given by the user: no good images" in given.judge.describe()
    for asked in ({"max_false_reject": 0.1}, {"tail": True}, {"unsure": True}):
        with pytest.raises(FlawmapError, match="no scores of good images"):
            inspector.with_threshold(**asked)
    with pytest.raises(FlawmapError, match="promises nothing"):
        validate(given, [image])


def test_heat_comes_from_the_images_learnt_from(plain, plain_file):
    scale = plain.heat_scale()
    assert scale.learnt
    assert scale.low < scale.high
    assert Inspector.load(plain_file).heat_scale() == scale == Detector.load(plain_file).heat_scale()
    peaks = np.array([1, 2, 6], np.float32)
    assert HeatScale.from_learnt(peaks) == HeatScale(2, 10, learnt=True)
    differnet = Detector("differnet", calibration="none")
    assert not differnet._method_class.localises  # and so has no colours


def test_figures_that_rank_remain_and_rates_are_null(plain, drawn):
    report = plain.evaluate(drawn)
    for name in ("image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "aupro", "caught_at_overkill_0.01_oracle"):
        assert report.figures[name] is not None
    for name in ("escape_rate", "overkill_rate", "escape_rate_oracle"):
        assert report.figures[name] is report.intervals[name] is None
    assert not report.decides
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["threshold"] is None


def test_a_mixed_set_without_verdicts_still_ranks():
    report = evaluate(Scored("k", bool(i % 2), i, None, None, None, 1.0) for i in range(6))
    assert report.figures["image_auroc"] == pytest.approx(2 / 3)
    assert report.counted("rejected") == 0
    assert report.figures["overkill_rate"] is None


def test_its_export_says_the_same_and_judges_nothing(plain, plain_file, drawn):
    path = plain_file.with_suffix(".onnx")
    export(Detector.load(plain_file), path)
    image = next((drawn / "test" / "good").iterdir())
    line, lab = Inspector.load(path), plain.predict(image)
    assert line.predict(image).verdict is None
    assert line.predict(image).score == pytest.approx(lab.score, rel=1e-3)
    assert line.heat_scale() == plain.heat_scale()
    assert line.with_threshold(threshold=0.0).predict(image).verdict == "defect"


def test_settings_that_are_left_open_move_all_the_same(moving, drawn, tmp_path):
    image = next((drawn / "test" / "good").iterdir())
    before, after = moving.predict(image), moving.with_settings(alpha=0.2).predict(image)
    assert after.score != before.score
    assert after.verdict is None
    path = tmp_path / "live.safetensors"
    moving.save(path)
    assert Inspector.load(path).with_settings(alpha=0.2).predict(image).score == pytest.approx(after.score, rel=1e-4)
    export(Detector.load(path), path.with_suffix(".onnx"))
    line = Inspector.load(path.with_suffix(".onnx")).with_settings(alpha=0.2)
    assert line.predict(image).score == pytest.approx(after.score, rel=1e-3)
    assert line.predict(image).verdict is None
    with pytest.raises(FlawmapError, match="none is left to tune on"):
        tune(moving, drawn)


def test_the_oracle_has_no_need_of_a_calibration(moving, drawn, monkeypatch):
    monkeypatch.setattr(type(moving.method_), "searched", {"alpha": (0.0, 1.0), "beta": (1.0,)})
    assert len(oracle_grid(moving, drawn).figures) == 2


def test_further_images_are_learnt_without_calibrating(plain_file, drawn):
    updated = Detector.load(plain_file).update(drawn / "test" / "good")
    assert updated.calibration_ is None
    assert updated.training_["images"] > 12


def test_levelling_and_dropping_need_scores(drawn):
    level = Detector("patchcore", image_size=SIZE, level="auto", calibration="none").fit(drawn)
    assert "--calibration none" in level.training_["levelling"]
    with pytest.raises(FlawmapError, match="drop-atypical"):
        Detector("patchcore", calibration="none").fit(drawn, drop_atypical=1)


def test_the_commands_say_what_is_missing(drawn, tmp_path, flawmap):
    model, pictures = tmp_path / "screws.safetensors", tmp_path / "pictures"
    train = ["train", drawn, "-o", model, "--method", "patchcore", "--image-size", SIZE, "--calibration", "none"]
    code, _, told = flawmap(*train, "--max-false-reject", 0.1)
    assert "no rate can be kept" in told
    assert code == 2
    code, told, _ = flawmap(*train)
    assert (code, told.count("no threshold, so no verdicts")) == (0, 1)
    assert "There is no threshold" in model.with_suffix(".html").read_text()

    good = drawn / "test" / "good"
    code, out, told = flawmap("inspect", model, good, "-o", pictures, "--caption")
    assert (code, "4 scored, 0 not judged" in told, "no verdicts" in told) == (0, True, True)
    assert [line.split()[1] for line in out.splitlines()[1:]] == ["-"] * 4
    assert "images learnt from" in (pictures / "index.html").read_text()
    assert len(list(pictures.rglob("*_overlay.png"))) == 4
    assert json.loads(flawmap("inspect", model, good, "--format", "jsonl")[1].splitlines()[0])["verdict"] is None
    assert flawmap("inspect", model, good, "--threshold", 0, "--fail-on-defect")[0] == 4
    for refused in (["--max-false-reject", 0.1], ["--fail-on-defect"], ["--tail"]):
        code, _, told = flawmap("inspect", model, good, *refused)
        assert (code, len(told.splitlines())) == (2, 1)

    page = tmp_path / "evaluation.html"
    code, told, _ = flawmap("evaluate", model, drawn, "--html", page)
    assert (code, "no threshold" in told, "rejected" in told) == (0, True, False)
    assert "Defects with the lowest scores" in page.read_text()
    assert "Dashed line" not in page.read_text()
    assert "calibration   none" in flawmap("info", model)[1]
    code, _, told = flawmap("validate", model, good)
    assert (code, "promises nothing" in told) == (2, True)


def test_without_a_threshold_a_chart_draws_none():
    rows = [ScoreRow("good", np.arange(5.0), False), ScoreRow("bad", np.arange(9.0), True)]
    assert "threshold" not in score_histograms(rows, None, width=400)
    assert "threshold" in score_histograms(rows, 3.0, width=400)


def test_a_judge_without_scores_holds_what_the_user_names():
    judge = Judge(0.01, "marginal")
    placement = Geometry().place((8, 8), (8, 8))
    assert judge.judge(None, [1.0], None, placement, 1.0).verdict is None
    named = judge.with_threshold(threshold=1.0)
    assert (named.threshold.rate, named.threshold.upper, named.threshold.images) == (1.0, 1.0, 0)
    assert named.judge(None, [1.0], None, placement, 1.0).verdict == "defect"
    counted = Judge.of(Calibration(np.arange(3, dtype=np.float32), np.zeros(3, np.float32), "holdout"), 0.5, "marginal")
    assert counted.with_threshold(threshold=1.0).threshold.images == 3
