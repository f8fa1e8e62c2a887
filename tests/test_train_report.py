import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from sklearn.metrics import roc_auc_score

from flawmap import Detector
from flawmap.datasets.drawn import draw_part
from flawmap.learning.highest_maps import HighestMaps
from test_report import Page

OPTIONS = ("--method", "padim", "--image-size", 64, "--set", "channels=8", "--engine", "torch")


@pytest.fixture(scope="module")
def planted(drawn, tmp_path_factory):
    """`drawn`, with an inverted image and a copy among the good, and a training image in the test."""
    root = tmp_path_factory.mktemp("planted") / "screws"
    shutil.copytree(drawn, root)
    good = root / "train" / "good"
    pixels = np.asarray(Image.open(good / "004.png").convert("RGB"))
    Image.fromarray(255 - pixels).save(good / "inverted.png")
    Image.open(good / "007.png").convert("RGB").save(good / "again.jpg", quality=88)
    shutil.copy(good / "002.png", root / "test" / "good" / "leaked.png")
    return root


@pytest.fixture
def trained(flawmap, planted, tmp_path):
    model = tmp_path / "model.safetensors"
    code, out, err = flawmap("train", planted, "-o", model, *OPTIONS)
    assert code == 0, err
    return model, out, err


def test_the_report_lies_beside_the_model_and_names_what_is_odd(trained, planted):
    model, out, _ = trained
    report = model.with_suffix(".html")
    assert sorted(path.name for path in model.parent.iterdir()) == ["model.html", "model.safetensors"]
    assert str(report) in out
    page = Page(report)
    assert "Learnt from 14 good images" in page["page"]
    names = re.findall(r"[\w/]*\w+\.(?:png|jpg)", page["atypical"])
    assert names[0].endswith("good/inverted.png")
    assert len(names) == 12
    assert "most unusual good images: inverted.png" in out
    assert sorted(name.rpartition("/")[2] for name in re.findall(r"[\w/]+\.(?:png|jpg)", page["duplicates"])) == [
        "007.png", "again.jpg",
    ]  # fmt: skip
    assert "1 group of training images" in page["duplicates"]
    assert "1 image shows what another one shows" in out
    leaks = [name.rpartition("/")[2] for name in re.findall(r"[\w/]+\.(?:png|jpg)", page["leaks"])]
    assert leaks == ["002.png", "leaked.png"]
    assert "1 pair" in page["leaks"]
    assert page["left-out"].endswith("None: every training file was learnt from.")
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page.source)
    loaded = Detector.load(model)
    assert loaded.threshold_.describe() in page["promise"]


def test_the_listed_scores_are_those_of_the_calibration(planted):
    detector = Detector("padim", image_size=64, channels=8, engine="torch").fit(planted)
    listed = detector.atypical_
    assert len(listed) == 14
    assert listed[0].path.name == "inverted.png"
    assert [one.score for one in listed] == sorted((one.score for one in listed), reverse=True)
    np.testing.assert_array_equal(np.sort(detector.calibration_.scores), [one.score for one in reversed(listed)])
    assert listed[0].p_value == 1 / 15 * 2  # itself is among the scores it is held against
    assert [sorted(path.name for path in group) for group in detector.near_duplicates_] == [["007.png", "again.jpg"]]


def test_dropping_the_most_atypical_leaves_exactly_it_out(flawmap, trained, planted, tmp_path):
    model, html = tmp_path / "dropped.safetensors", tmp_path / "elsewhere.html"
    code, out, err = flawmap("train", planted, "-o", model, "--drop-atypical", 1, "--html", html, *OPTIONS)
    assert code == 0, err
    assert not model.with_suffix(".html").exists()
    assert "inverted.png" not in Page(html)["atypical"]
    assert "most unusual good images: inverted" not in out
    rest = [path for path in sorted((planted / "train" / "good").iterdir()) if path.name != "inverted.png"]
    without = Detector("padim", image_size=64, channels=8, engine="torch").fit(rest)
    dropped = Detector.load(model, engine="torch")
    assert dropped.training_ == without.training_
    assert dropped.training_["images"] == 13
    assert dropped.threshold_ == without.threshold_
    without.save(tmp_path / "without")
    assert (tmp_path / "without").read_bytes() == model.read_bytes()
    assert Detector.load(trained[0]).training_["images"] == 14
    # What the report listed is the score by a model that has not seen it; only PaDiM's epsilon differs a little.
    everything = Detector("padim", image_size=64, channels=8, engine="torch").fit(planted)
    unseen = dropped.predict(planted / "train" / "good" / "inverted.png").score
    assert everything.atypical_[0].score == pytest.approx(unseen, rel=0.02)


@pytest.mark.parametrize(
    ("drop", "named", "left"),
    [(-1, "--drop-atypical", []), (13, "--drop-atypical 13 leaves 1 image:", ["m.safetensors.training"])],
)
def test_dropping_too_many_is_refused(flawmap, planted, tmp_path, drop, named, left):
    code, _, err = flawmap("train", planted, "-o", tmp_path / "m.safetensors", "--drop-atypical", drop, *OPTIONS)
    assert code == 2
    assert named in err.splitlines()[-1]
    # The workspace, from which fewer can be dropped without training again.
    assert [path.name for path in tmp_path.iterdir()] == left


def test_files_left_out_are_listed_with_their_reason(flawmap, drawn, tmp_path):
    root = tmp_path / "parts"
    shutil.copytree(drawn / "train", root / "train")
    (root / "train" / "good" / "zero.png").write_bytes(b"")
    code, _, err = flawmap("train", root, "-o", tmp_path / "m.safetensors", *OPTIONS)
    assert code == 0, err
    page = Page(tmp_path / "m.html")
    assert page.rows("left-out")[1][0].endswith("zero.png")
    assert "is empty" in page.rows("left-out")[1][1]
    assert "Learnt from 12 good images" in page["page"]
    assert page["leaks"].endswith("No image was found in both.")
    assert page["duplicates"].endswith("None were found.")


# Captures that cannot be judged


def failed_captures(drawn):
    good = Image.open(drawn / "test" / "good" / "000.png").convert("RGB")
    size = good.size
    return {
        "black": Image.new("RGB", size),
        "white": Image.new("RGB", size, (255, 255, 255)),
        "blurred": good.filter(ImageFilter.GaussianBlur(8)),
    }


REASONS = {"black": "black|too dark", "white": "over-exposed|too bright", "blurred": "blurred"}


def test_failed_captures_are_errors_with_a_reason(padim, drawn, tmp_path):
    for name, image in failed_captures(drawn).items():
        image.save(tmp_path / f"{name}.png")
        for inspection in (padim.predict(tmp_path / f"{name}.png"), padim.predict(np.asarray(image))):
            assert inspection.verdict == "error"
            assert re.search(REASONS[name], inspection.error)
            assert inspection.score is inspection.p_value is inspection.maps is inspection.anomaly_map is None
            assert inspection.regions == []
            assert "\n" not in inspection.error
        assert padim.predict(tmp_path / f"{name}.png").path == tmp_path / f"{name}.png"
    mixed = padim.predict([tmp_path / "black.png", drawn / "test" / "good" / "001.png", tmp_path / "white.png"])
    assert [inspection.verdict == "error" for inspection in mixed] == [True, False, True]


@pytest.mark.parametrize("kind", ["boards", "fabric"])
def test_another_part_is_not_called_good(padim, kind):
    pixels, _ = draw_part(kind, None, np.random.default_rng(0), 128)
    inspection = padim.predict(pixels)
    assert inspection.verdict == "error"
    assert "the array: " in inspection.error


def test_evaluate_and_inspect_count_them_as_not_judged(flawmap, padim, drawn, tmp_path):
    root = tmp_path / "screws"
    shutil.copytree(drawn, root)
    captures = failed_captures(drawn)
    for name in ("black", "white", "blurred"):
        captures[name].save(root / "test" / "good" / f"x{name}.png")
    shutil.copy(root / "test" / "good" / "xblack.png", next((root / "test").glob("[!g]*")) / "xblack.png")
    model = tmp_path / "m.safetensors"
    padim.save(model)
    before, report = padim.evaluate(drawn), padim.evaluate(root)
    assert (report.images, report.errors) == (16, 4)
    assert report.kinds["good"]["refused"] == 3
    unchecked = padim.inspector().without_capture_check()
    found = [unchecked.predict(judged.path) for judged in report.results]
    assert sum(inspection.refused is not None for inspection in found) == 4
    labels = [judged.defective for judged in report.results]
    assert report.image_auroc == pytest.approx(roc_auc_score(labels, [inspection.score for inspection in found]))
    assert report.image_auroc != pytest.approx(before.image_auroc, abs=1e-4)
    good = sum(not judged.defective and judged.verdict == "defect" for judged in before.results)
    assert report.overkill_rate == good / 7
    code, out, err = flawmap("evaluate", model, root, "--json", "-", "--engine", "torch")
    assert code == 3
    values = json.loads(out)
    assert (values["images"], values["errors"]) == (16, 4)
    assert (values["refused_good"], values["refused_defective"]) == (3, 1)
    assert sum((line.startswith("flawmap: ") and "xb" in line) or "xwhite" in line for line in err.splitlines()) == 4
    code, out, _ = flawmap("evaluate", model, root, "--engine", "torch")
    assert "4 images are refused by the capture check (3 good, 1 defective)" in out
    code, out, err = flawmap("evaluate", model, root, "--no-capture-check", "--engine", "torch")
    assert code == 0
    assert "refused" not in out
    code, out, err = flawmap("inspect", model, root / "test", "--format", "jsonl", "--engine", "torch")
    assert code == 3
    verdicts = {json.loads(line)["path"]: json.loads(line) for line in out.splitlines()}
    unjudged = [line for line in verdicts.values() if line["verdict"] == "error"]
    assert len(unjudged) == 4
    assert all(line["error"] and line["score"] is None for line in unjudged)
    assert "4 not judged" in err
    black = root / "test" / "good" / "xblack.png"
    assert flawmap("inspect", model, black, "--engine", "torch")[0] == 2


def test_a_failed_capture_gets_no_heatmap(flawmap, padim, drawn, tmp_path):
    model, folder, output = tmp_path / "m.safetensors", tmp_path / "in", tmp_path / "heat"
    padim.save(model)
    folder.mkdir()
    failed_captures(drawn)["black"].save(folder / "black.png")
    shutil.copy(drawn / "test" / "good" / "000.png", folder / "part.png")
    code, _, err = flawmap("inspect", model, folder, "-o", output, "--coco", tmp_path / "c.json", "--engine", "torch")
    assert code == 3, err
    assert sorted(path.name for path in output.rglob("*.png")) == ["part_png_map.png", "part_png_overlay.png"]


def test_a_black_image_among_the_held_out_is_shown_without_a_map(flawmap, drawn, tmp_path):
    """What calibrates need not lie within the limits of what was learnt: the report must stand it."""
    good, further = tmp_path / "good", tmp_path / "further"
    shutil.copytree(drawn / "train" / "good", good)
    shutil.copytree(drawn / "test" / "good", further)
    failed_captures(drawn)["black"].save(further / "black.png")
    code, _, err = flawmap("train", good, "-o", tmp_path / "m.safetensors", "--calibration", further, *OPTIONS)
    assert code == 0, err
    page = Page(tmp_path / "m.html")
    assert "further/black.png" in page["atypical"]
    assert page["leaks"].endswith("No image was found in both.")


def test_a_model_trained_without_the_check_judges_every_capture(flawmap, drawn, tmp_path):
    model, exported, black = (tmp_path / name for name in ("m.safetensors", "m.onnx", "black.png"))
    failed_captures(drawn)["black"].save(black)
    small = ("--method", "padim", "--set", "channels=24", "--image-size", 64, "--engine", "torch")
    for arguments, codes, said in (((), (2, 2), "refused"), (("--no-capture-check",), (0, 0), "not checked")):
        assert flawmap("train", drawn, "-o", model, *small, *arguments)[0] == 0
        assert flawmap("export", model, "-o", exported, "--check", drawn / "test" / "good")[0] == 0
        assert flawmap("inspect", model, black, "--engine", "torch")[0] == codes[0]
        assert flawmap("inspect", exported, black)[0] == codes[1]
        assert said in next(line for line in flawmap("info", exported)[1].splitlines() if line.startswith("captures"))
    assert Detector.load(model).capture_check is False


@pytest.mark.parametrize("mode", ["loo", "crossfit", "holdout", "folder"])
def test_the_maps_of_unusual_images_are_by_the_method_that_gave_their_scores(planted, tmp_path, mode):
    folder = tmp_path / "further"
    shutil.copytree(planted / "test" / "good", folder)
    options = {"image_size": 64, "channels": 8, "engine": "torch"}
    detector = Detector("padim", calibration=folder if mode == "folder" else mode, **options).fit(planted)
    kept = [one for one in detector.atypical_ if one.maps is not None]
    assert kept == detector.atypical_[:12]
    for one in kept:
        assert one.maps.shape == (1, 64, 64)
        assert one.maps.dtype == np.float32
        assert one.maps.max() == np.float32(one.score)  # PaDiM's score is its map's largest
    if mode == "loo":
        known = detector.predict(kept[0].path)
        assert known.maps.max() < 0.9 * kept[0].maps.max()


def test_the_report_shows_the_heat_of_the_method_that_had_not_seen_the_image(planted, monkeypatch, tmp_path):
    from flawmap.cli.training_report import write_report
    from flawmap.datasets import find_dataset
    from flawmap.report import pictures

    detector = Detector("padim", image_size=64, channels=8, engine="torch").fit(planted)
    shown = []
    monkeypatch.setattr(pictures, "overlay_rows", lambda pixels, found, scale: shown.append(found) or [pixels])
    write_report(tmp_path / "page.html", detector, find_dataset(planted))
    assert len(shown) == 12
    for one, found in zip(detector.atypical_, shown, strict=False):
        assert found.path == one.path
        assert (found.score, found.p_value) == (one.score, one.p_value)
        np.testing.assert_array_equal(found.maps, one.maps)


def test_maps_of_many_windows_are_kept_by_their_images_highest_score():
    drawn = torch.from_numpy(np.random.default_rng(0).random((120, 1, 4, 4), np.float32))
    owners = [row // 4 for row in range(120)]
    scores = drawn.amax((1, 2, 3)).tolist()
    highest = HighestMaps()
    for start in range(0, 120, 7):  # windows of one image come in two batches
        part = slice(start, start + 7)
        highest.add(owners[part], scores[part], drawn[part])
    of_image = drawn.reshape(30, 4, 4, 4).numpy()
    order = np.argsort(-of_image.max((1, 2, 3)), kind="stable")[:12]
    assert set(highest.of()) == set(order.tolist())
    for image, maps in highest.of().items():
        np.testing.assert_array_equal(maps, of_image[image])
