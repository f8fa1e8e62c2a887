import csv
import io
import json
import re
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone

import numpy as np
import pytest
from PIL import Image

from flawmap import Detector
from flawmap.cli import VERBS
from flawmap.methods import METHODS
from flawmap.model_file import read_model


def decode(segmentation):
    """COCO's uncompressed runs, down the columns, background first."""
    height, width = segmentation["size"]
    values = np.arange(len(segmentation["counts"])) % 2
    return np.repeat(values, segmentation["counts"]).astype(bool).reshape(width, height).T


def test_train_then_inspect_then_evaluate(flawmap, drawn, tmp_path):
    model = tmp_path / "model.safetensors"
    code, out, err = flawmap(
        "train", drawn, "-o", model, "--image-size", 96, "--method", "padim", "--set", "channels=10",
        "--max-false-reject", "0.2", "--seed", 3,
    )  # fmt: skip
    assert code == 0, err
    assert f"wrote {model}" in out
    assert "12 good images" in out
    assert "of memory at its highest" in err
    loaded = Detector.load(model)
    assert (loaded.method, loaded.image_size, loaded.max_false_reject, loaded.seed) == ("padim", (96, 96), 0.2, 3)
    assert loaded.method_.config.channels == 10
    code, out, err = flawmap("inspect", model, drawn / "test")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].split() == ["image", "verdict", "score", "p-value", "regions"]
    assert len(lines) == 13
    expected = loaded.predict(drawn / "test")
    for line, inspection in zip(lines[1:], expected, strict=True):
        path, verdict, score, p_value, regions = line.split()
        assert (path, verdict, int(regions)) == (str(inspection.path), inspection.verdict, len(inspection.regions))
        assert float(score) == pytest.approx(inspection.score, rel=1e-3)
        assert float(p_value) == pytest.approx(inspection.p_value, abs=1e-4)
    code, out, _ = flawmap("evaluate", model, drawn)
    assert code == 0
    assert "image AUROC" in out


def test_inspect_writes_one_json_object_a_line(flawmap, model_file, detector, drawn):
    before = datetime.now(timezone.utc)
    code, out, _ = flawmap("inspect", model_file, drawn / "test", "--format", "jsonl")
    assert code == 0
    judged = [datetime.fromisoformat(json.loads(line)["time"]) for line in out.splitlines()]
    assert before - timedelta(milliseconds=1) <= min(judged)
    assert judged == sorted(judged)
    assert max(judged) <= datetime.now(timezone.utc)
    for line, inspection in zip(out.splitlines(), detector.predict(drawn / "test"), strict=True):
        values = json.loads(line)
        assert values.pop("milliseconds") > 0
        assert values.pop("time")
        assert (values.pop("schema"), values.pop("model")) == (1, read_model(model_file)[2])
        expected = inspection.to_json()
        expected.pop("milliseconds")
        assert values == expected


def test_inspect_writes_csv(flawmap, model_file, drawn, detector):
    code, out, _ = flawmap("inspect", model_file, drawn / "test", "--format", "csv")
    assert code == 0
    rows = list(csv.DictReader(io.StringIO(out)))
    for row, inspection in zip(rows, detector.predict(drawn / "test"), strict=True):
        assert (row["path"], row["verdict"], row["error"]) == (str(inspection.path), inspection.verdict, "")
        assert float(row["score"]) == inspection.score
        assert int(row["regions"]) == len(inspection.regions)


def test_inspect_draws_maps_and_regions_on_the_original_pixels(flawmap, model_file, detector, broken_image, tmp_path):
    parts = tmp_path / "parts"
    (parts / "line 1").mkdir(parents=True)
    Image.fromarray(broken_image).resize((200, 150), Image.Resampling.NEAREST).save(parts / "line 1" / "a.png")
    Image.fromarray(broken_image).resize((160, 220), Image.Resampling.NEAREST).save(parts / "a.jpg")
    output, coco = tmp_path / "heat", tmp_path / "regions.json"
    code, _, err = flawmap("inspect", model_file, parts, "-o", output, "--coco", coco)
    assert code == 0, err
    assert sorted(str(path.relative_to(output).as_posix()) for path in output.rglob("*.png")) == [
        "a_jpg_map.png",
        "a_jpg_overlay.png",
        "line 1/a_png_map.png",
        "line 1/a_png_overlay.png",
    ]
    scale = detector.heat_scale()
    content = json.loads(coco.read_text())
    assert content["categories"] == [{"id": 1, "name": "defect"}]
    for image in content["images"]:
        inspection = detector.predict(image["file_name"])
        assert (image["height"], image["width"]) == inspection.size
        name = "a_jpg" if image["file_name"].endswith("jpg") else "line 1/a_png"
        overlay, heat = Image.open(output / f"{name}_overlay.png"), Image.open(output / f"{name}_map.png")
        assert overlay.size == heat.size == (image["width"], image["height"])
        assert heat.mode == "I;16"
        values = np.asarray(heat).astype(float) / 65535 * 2 * scale.high
        step = 2 * scale.high / 65535
        np.testing.assert_allclose(values, np.clip(inspection.anomaly_map, 0, 2 * scale.high), atol=step)
        found = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        assert len(found) == len(inspection.regions) > 0
        together = np.zeros(inspection.size, bool)
        for annotation in found:
            mask = decode(annotation["segmentation"])
            rows, columns = np.nonzero(mask)
            left, top, width, height = annotation["bbox"]
            assert (left, top) == (columns.min(), rows.min())
            assert (left + width, top + height) == (columns.max() + 1, rows.max() + 1)
            assert annotation["area"] == mask.sum()
            assert annotation["iscrowd"] == 0
            assert not (together & mask).any()
            together |= mask
        np.testing.assert_array_equal(together, inspection.anomaly_map >= inspection.pixel_threshold)


def test_another_threshold(flawmap, model_file, detector, drawn):
    good = drawn / "test" / "good"
    scores = sorted(inspection.score for inspection in detector.predict(good))
    _, out, err = flawmap("inspect", model_file, good, "--format", "jsonl", "--threshold", scores[2])
    verdicts = [json.loads(line)["verdict"] for line in out.splitlines()]
    assert verdicts.count("defect") == 2
    assert "given by the user" in err
    code, out, _ = flawmap("inspect", model_file, good, "--format", "jsonl", "--max-false-reject", "0.5")
    assert code == 0
    expected = detector.with_threshold(max_false_reject=0.5)
    assert {json.loads(line)["threshold"] for line in out.splitlines()} == {expected.threshold_.value}


def lines_with(text, part):
    return [line for line in text.splitlines() if part in line]


def test_training_says_which_image_sets_the_threshold(flawmap, drawn, tmp_path):
    arguments = ["train", drawn, "-o", tmp_path / "model.safetensors", "--method", "padim", "--image-size", 64]
    arguments += ["--set", "channels=10", "--max-false-reject", "0.05"]
    code, out, err = flawmap(*arguments)
    assert code == 0, err
    plain = Detector.load(tmp_path / "model.safetensors")
    scores = np.sort(plain.calibration_.scores)
    (said,) = lines_with(out, "the threshold is set by good/")
    assert f"(score {scores[-1]:.6g})" in said
    assert said.endswith(f"without it it would be {scores[-2]:.6g}")
    path = drawn / "train" / said.split()[5]
    assert path.is_file()
    assert path.name in lines_with(out, "most unusual")[0].split(",")[0]
    assert plain.guarantee == "marginal"
    tail = plain.with_threshold(tail=True).threshold_
    assert lines_with(out, "not used, --tail keeps it") == [f"not used, --tail keeps it: {tail.describe_again()}"]

    code, out, err = flawmap(*arguments, "--tail")
    assert code == 0, err
    kept = Detector.load(tmp_path / "model.safetensors")
    assert (kept.guarantee, kept.threshold_) == ("tail", tail)
    assert tail.describe() in out.splitlines()
    assert f"not used: {plain.threshold_.describe_again()}" in out.splitlines()
    assert lines_with(out, "the conformal threshold is set by good/")
    assert tail.describe() in flawmap("info", tmp_path / "model.safetensors")[1]
    code, _, err = flawmap(*arguments, "--tail", "--guarantee", "confidence")
    assert code == 2
    assert "--tail or --guarantee" in err


def test_training_is_not_lost_where_there_is_no_tail(flawmap, drawn, tmp_path):
    model = tmp_path / "model.safetensors"
    arguments = ["train", drawn, "-o", model, "--method", "padim", "--image-size", 64, "--set", "channels=10"]
    code, out, err = flawmap(*arguments, "--shots", 6, "--tail")
    assert code == 0, err
    assert Detector.load(model).guarantee == "marginal"
    assert "the tail of 6 calibration scores cannot be estimated" in err
    assert "no threshold from the tail: the tail of 6" in out
    for verb in (["inspect", model, drawn / "test"], ["evaluate", model, drawn], ["validate", model, drawn / "test"]):
        code, out, err = flawmap(*verb, "--tail")
        assert (code, out) == (2, "")
        assert "the tail of 6 calibration scores cannot be estimated" in err.splitlines()[-1]


@pytest.fixture(scope="module")
def parts(good_image, broken_image, tmp_path_factory):
    """A folder of a good part on its way to a broken one."""
    folder = tmp_path_factory.mktemp("parts")
    for number, share in enumerate(np.linspace(0, 1, 41)):
        mixed = good_image + share * (broken_image.astype(float) - good_image)
        Image.fromarray(mixed.round().astype(np.uint8)).save(folder / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="module")
def between(detector, parts):
    """A false-reject rate at which some of the parts are unsure, some good and some defects, and the inspections."""
    for rate in (0.02, 0.05, 0.1, 0.2):
        unsure = detector.with_threshold(max_false_reject=rate, unsure=True)
        inspections = unsure.predict(parts)
        if len({inspection.verdict for inspection in inspections}) == 3:
            return rate, inspections
    pytest.fail("no part lies between the thresholds")


@pytest.mark.parametrize("form", ["table", "jsonl", "csv"])
def test_unsure_is_a_verdict_of_its_own(flawmap, model_file, parts, between, form):
    rate, expected = between
    code, out, err = flawmap("inspect", model_file, parts, "--unsure", "--max-false-reject", rate, "--format", form)
    assert code == 0
    if form == "jsonl":
        rows = [json.loads(line) for line in out.splitlines()]
        assert {tuple(row["unsure_between"]) for row in rows} == {expected[0].unsure_between}
        verdicts = [row["verdict"] for row in rows]
    elif form == "csv":
        verdicts = [row["verdict"] for row in csv.DictReader(io.StringIO(out))]
    else:
        verdicts = [line.split()[1] for line in out.splitlines()[1:]]
    assert verdicts == [inspection.verdict for inspection in expected]
    counts = [verdicts.count(verdict) for verdict in ("good", "defect", "unsure")]
    assert err.splitlines()[-1] == "{} good, {} defect, {} unsure, 0 not judged".format(*counts)
    assert len(lines_with(err, "unsure from")) == 1


def test_unsure_is_not_good_where_defects_fail(flawmap, model_file, between):
    rate, expected = between
    paths = {inspection.verdict: inspection.path for inspection in expected}
    asked = ["--unsure", "--max-false-reject", rate]
    for verdicts, code in ((["unsure"], 3), (["unsure", "good"], 3), (["unsure", "defect"], 4), (["good"], 0)):
        given = ["inspect", model_file, *(paths[verdict] for verdict in verdicts), *asked]
        assert flawmap(*given, "--fail-on-defect")[0] == code, verdicts
        assert flawmap(*given)[0] == 0


def test_the_tail_gives_the_threshold_of_inspect_and_evaluate(flawmap, model_file, detector, drawn):
    tail = detector.with_threshold(tail=True).threshold_
    _, out, err = flawmap("inspect", model_file, drawn / "test" / "good", "--tail", "--format", "jsonl")
    assert {json.loads(line)["threshold"] for line in out.splitlines()} == {tail.value}
    assert err.splitlines()[0] == tail.describe()
    _, out, _ = flawmap("evaluate", model_file, drawn, "--tail", "--json", "-")
    values = json.loads(out)
    assert (values["threshold"], values["guarantee"], values["unsure"]) == (tail.value, "tail", 0)
    for wrong in (["--tail", "--threshold", 1], ["--unsure", "--threshold", 1], ["--tail", "--guarantee", "marginal"]):
        code, _, err = flawmap("inspect", model_file, drawn / "test", *wrong)
        assert code == 2
        assert "--tail" in err


def test_evaluate_prints_what_an_oracle_would_reach(flawmap, model_file, detector, drawn):
    _, out, _ = flawmap("evaluate", model_file, drawn)
    report = detector.evaluate(drawn)
    names = {
        "best escape rate (oracle)": "escape_rate_oracle",
        "caught at 0.1 % overkill (oracle)": "caught_at_overkill_0.001_oracle",
        "caught at 1 % overkill (oracle)": "caught_at_overkill_0.01_oracle",
        "caught at 5 % overkill (oracle)": "caught_at_overkill_0.05_oracle",
    }
    for title, name in names.items():
        (line,) = lines_with(out, title)
        assert f"{report.figures[name]:.3f}  [{report.intervals[name][0]:.3f}" in line


def test_evaluate_counts_the_unsure(flawmap, model_file, detector, drawn, tmp_path):
    code, out, _ = flawmap("evaluate", model_file, drawn, "--unsure", "--json", tmp_path / "figures.json")
    assert code == 0
    values = json.loads((tmp_path / "figures.json").read_text())
    judge = detector.with_threshold(unsure=True).inspector().judge
    assert values["unsure_between"] == list(judge.between)
    verdicts = [judge.verdict(inspection.score) for inspection in detector.predict(drawn / "test")]
    assert values["unsure"] == verdicts.count("unsure")
    assert len(lines_with(out, "unsure from")) == 1


def test_defects_end_in_4_only_where_asked_for(flawmap, model_file, drawn, broken_image, tmp_path):
    Image.fromarray(broken_image).save(tmp_path / "broken.png")
    assert flawmap("inspect", model_file, tmp_path / "broken.png")[0] == 0
    assert flawmap("inspect", model_file, tmp_path / "broken.png", "--fail-on-defect")[0] == 4
    good = drawn / "test" / "good" / "000.png"
    assert flawmap("inspect", model_file, good, "--fail-on-defect", "--threshold", "1e9")[0] == 0


def test_images_that_cannot_be_judged(flawmap, model_file, drawn, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_text("not an image")
    good = drawn / "test" / "good"
    code, out, err = flawmap("inspect", model_file, good, bad, tmp_path / "missing.png", "--format", "jsonl")
    assert code == 3
    verdicts = [json.loads(line)["verdict"] for line in out.splitlines()]
    assert set(verdicts[:4]) <= {"good", "defect"}
    assert verdicts[4:] == ["error", "error"]
    last = err.splitlines()[-3:]
    assert last[0].endswith("2 not judged")
    assert str(bad) in last[1]
    assert str(tmp_path / "missing.png") in last[2]
    code, _, err = flawmap("inspect", model_file, bad)
    assert code == 2
    assert str(bad) in err.splitlines()[-1]
    code, _, err = flawmap("inspect", model_file, bad, good, "--strict")
    assert code == 2
    assert str(bad) in err.splitlines()[-1]


def test_evaluate_writes_one_flat_json_object(flawmap, model_file, drawn, tmp_path):
    code, out, _ = flawmap("evaluate", model_file, drawn, "--json", "-")
    assert code == 0
    values = json.loads(out)
    code, text, _ = flawmap("evaluate", model_file, drawn, "--json", tmp_path / "figures.json")
    assert code == 0
    assert "kind" in text
    again = json.loads((tmp_path / "figures.json").read_text())
    assert again.pop("milliseconds_per_image") > 0
    assert values.pop("milliseconds_per_image") > 0
    assert again == values
    assert not any(isinstance(value, dict) for value in values.values())
    assert values["images"] == 12
    assert values["method"] == "patchcore"


def test_sample_draws_a_data_set(tmp_path, monkeypatch, flawmap):
    import flawmap.datasets.drawn as drawn

    draw = drawn.draw_dataset
    monkeypatch.setattr(
        drawn,
        "draw_dataset",
        lambda folder, kind, seed: draw(folder, kind, seed, train=2, good=1, per_defect=1, size=64),
    )
    code, out, err = flawmap("sample", tmp_path / "parts", "--kind", "fabric", "--seed", 4)
    assert code == 0, err
    assert "2" in out
    assert len(list((tmp_path / "parts" / "train" / "good").glob("*.png"))) == 2
    code, _, err = flawmap("sample", tmp_path / "parts")
    assert code == 2
    assert str(tmp_path / "parts") in err


def test_methods_backbones_and_doctor_put_the_name_first(flawmap):
    code, out, _ = flawmap("methods")
    assert code == 0
    assert {line.split()[0] for line in out.splitlines() if line and not line.startswith(" ")} >= set(METHODS)
    code, out, _ = flawmap("backbones")
    assert code == 0
    first = [line.split()[0] for line in out.splitlines() if line and not line.startswith(" ")]
    assert "tf_efficientnet_lite0" in first
    assert "wide_resnet50_2.tv_in1k" in first
    code, out, _ = flawmap("doctor")
    assert code == 0
    assert "all is well" in out
    assert re.search(r"engine torch: agrees", out)


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_explains_itself(flawmap, verb):
    code, out, _ = flawmap(verb, "--help")
    assert code == 0
    assert out.startswith(f"Usage: flawmap {verb}")


def test_help_lists_the_verbs_and_loads_nothing_heavy():
    code = (
        "import sys; sys.argv = ['flawmap', '--help']\n"
        "from flawmap.cli import main\n"
        "try: main()\n"
        "except SystemExit as left: assert not left.code\n"
        "heavy = {'torch', 'numpy', 'timm', 'scipy', 'PIL', 'onnxruntime', 'openvino', 'pydantic'}\n"
        "loaded = heavy & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for verb in VERBS:
        assert f"\n  {verb} " in done.stdout


def start_training(drawn, output, temporary):
    """Starts a training that would take long, and returns once it is under way."""
    import os

    process = subprocess.Popen(
        [sys.executable, "-m", "flawmap", "train", drawn, "-o", output, "--image-size", "512", "--set", "coreset=1",
         "--set", "stride=4"],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env={**os.environ, "TMPDIR": str(temporary)},
        # A shell's background jobs, such as the tests may be, pass on that they ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    for line in process.stderr:
        if line.startswith("features ..."):
            break
    assert process.poll() is None
    time.sleep(0.3)
    return process


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_ends_in_130_and_leaves_what_resume_needs(drawn, tmp_path):
    temporary, output = tmp_path / "temporary", tmp_path / "out"
    temporary.mkdir(), output.mkdir()
    process = start_training(drawn, output / "m.safetensors", temporary)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "interrupted" in err.splitlines()[-1]
    assert [path.name for path in output.iterdir()] == ["m.safetensors.training"]
    assert list(temporary.glob("flawmap-*")) == []


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_killed_training_leaves_no_model(drawn, tmp_path):
    process = start_training(drawn, tmp_path / "m.safetensors", tmp_path)
    process.kill()
    process.communicate(timeout=60)
    assert not (tmp_path / "m.safetensors").exists()
