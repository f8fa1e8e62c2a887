import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from flawmap.judging.evaluation import CURVES, FIGURES, Scored, evaluate

KEYS = (
    "image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro", "escape_rate",
    "overkill_rate", "escape_rate_oracle", "caught_at_overkill_0.001_oracle", "caught_at_overkill_0.01_oracle",
    "caught_at_overkill_0.05_oracle",
)  # fmt: skip


def scored(masks=True, count=60):
    random = np.random.default_rng(0)
    for number in range(count):
        defective = number % 3 == 0
        mask = np.zeros((24, 32), bool)
        if defective:
            mask[4:12, 6:20] = True
        heat = (random.random((24, 32)) + 0.6 * mask).astype(np.float32)
        score = float(np.float32(random.normal(1.0 * defective)))
        verdict = "defect" if score > 0.8 else "good"
        yield Scored(
            "scratch" if defective else "good",
            defective,
            score,
            verdict,
            heat,
            mask if defective and masks else None,
            5.0,
        )


def test_the_keys_are_those_of_the_design():
    assert FIGURES == KEYS
    values = evaluate(scored(), {"method": "toy", "seed": 3}).to_json()
    assert set(values) == {
        *KEYS, *(f"{key}_interval" for key in KEYS), "images", "errors", "unsure", "without_mask",
        "refused_good", "refused_defective", "caught_with_mask", "caught_on_defect",
        "milliseconds_per_image", "method", "seed",
    }  # fmt: skip
    json.dumps(values, allow_nan=False)
    for key in KEYS:
        low, high = values[f"{key}_interval"]
        assert 0 <= low <= values[key] <= high <= 1, key


def test_figures_are_those_of_sklearn():
    images = list(scored())
    values = evaluate(images).to_json()
    labels, scores = [i.defective for i in images], [i.score for i in images]
    precision, recall, _ = precision_recall_curve(labels, scores)
    assert values["image_auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-9)
    assert values["image_ap"] == pytest.approx(average_precision_score(labels, scores), abs=1e-9)
    assert values["image_f1_max"] == pytest.approx((2 * precision * recall / (precision + recall)).max(), abs=1e-9)
    pixels = np.concatenate([i.anomaly_map.ravel() for i in images])
    truth = np.concatenate([(i.mask if i.mask is not None else np.zeros((24, 32), bool)).ravel() for i in images])
    assert values["pixel_auroc"] == pytest.approx(roc_auc_score(truth, pixels), abs=1e-3)
    assert values["pixel_ap"] == pytest.approx(average_precision_score(truth, pixels), abs=2e-3)
    missed = sum(i.defective and i.verdict == "good" for i in images)
    rejected = sum(not i.defective and i.verdict == "defect" for i in images)
    assert (values["escape_rate"], values["overkill_rate"]) == (missed / 20, rejected / 40)
    interval = binomtest(missed, 20).proportion_ci(0.95, "exact")
    assert values["escape_rate_interval"] == pytest.approx([interval.low, interval.high], abs=1e-6)
    assert (values["images"], values["milliseconds_per_image"]) == (60, 5.0)


def test_oracle_rates_are_the_best_of_all_thresholds():
    images = list(scored())
    values = evaluate(images).to_json()
    good, defective = ([i.score for i in images if i.defective == kind] for kind in (False, True))
    own = sum(i.verdict == "defect" for i in images if not i.defective)
    caught = {
        most: max(
            sum(score >= at for score in defective) / 20
            for at in [*good, *defective, 1e9]
            if sum(score >= at for score in good) <= most
        )
        for most in (own, 0, 2)
    }
    assert own > 2
    assert values["escape_rate_oracle"] == pytest.approx(1 - caught[own])
    assert values["escape_rate_oracle"] <= values["escape_rate"]
    assert values["caught_at_overkill_0.001_oracle"] == values["caught_at_overkill_0.01_oracle"] == caught[0]
    assert values["caught_at_overkill_0.05_oracle"] == caught[2] > caught[0]  # of 40 good images


def test_the_unsure_neither_escape_nor_are_overkill():
    def unsure(image):
        return replace(image, verdict="unsure") if 0.3 < image.score < 1.2 else image

    images = [unsure(image) for image in scored()]
    report = evaluate(images)
    assert report.escape_rate == sum(i.verdict == "good" for i in images if i.defective) / 20
    assert report.overkill_rate == sum(i.verdict == "defect" for i in images if not i.defective) / 40
    for kind, defective in (("good", False), ("scratch", True)):
        count = sum(i.verdict == "unsure" for i in images if i.defective == defective)
        assert report.kinds[kind]["unsure"] == count > 0
    assert report.to_json()["unsure"] == report.unsure == sum(i.verdict == "unsure" for i in images)


def test_without_masks_pixel_figures_are_null():
    values = evaluate(scored(masks=False)).to_json()
    assert values["without_mask"] == 20
    for key in ("pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro"):
        assert values[key] is None, key
        assert values[f"{key}_interval"] is None, key
    assert values["image_auroc"] is not None


def test_only_good_images_leave_an_overkill_rate_alone():
    report = evaluate(image for image in scored() if not image.defective)
    assert report.overkill_rate is not None
    for key in set(KEYS) - {"overkill_rate"}:
        assert getattr(report, key) is None, key
    json.dumps(report.to_json(), allow_nan=False)
    with pytest.raises(AttributeError):
        _ = report.no_such_figure


def test_what_could_not_be_judged_is_counted_apart():
    broken = Scored("good", False, None, "error", None, None, 0.0, "x.png: broken")
    report = evaluate([*scored(), broken])
    assert (report.images, report.errors, report.unjudged) == (60, 1, ["x.png: broken"])
    assert report.kinds["good"] == {
        "images": 40,
        "rejected": report.kinds["good"]["rejected"],
        "unsure": 0,
        "refused": 0,
        "located": 0,
        "on_defect": 0,
        "errors": 1,
    }
    nothing = evaluate([broken])
    assert nothing.images == 0
    assert all(value is None for value in nothing.figures.values())


def test_a_refused_image_counts_by_its_score_and_is_called_neither():
    """Left out, a good image that looks like no other would flatter the AUROC, and a defective one the escape rate."""
    images = list(scored())
    refused = [
        replace(image, verdict="error", error=f"{i}.png: blurred") for i, image in enumerate(images) if i % 7 < 2
    ]
    mixed = [*(image for i, image in enumerate(images) if i % 7 >= 2), *refused]
    report, all_judged = evaluate(mixed), evaluate(images)
    for name in ("image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "aupro"):
        assert report.figures[name] == pytest.approx(all_judged.figures[name], rel=1e-6), name
    defects = [image for image in mixed if image.defective]
    good = [image for image in mixed if not image.defective]
    assert report.escape_rate == sum(image.verdict == "good" for image in defects) / 20
    assert report.overkill_rate == sum(image.verdict == "defect" for image in good) / 40
    assert report.errors == len(refused) == report.counted("refused")
    values = report.to_json()
    assert values["refused_good"] == sum(not image.defective for image in refused) > 0
    assert values["refused_defective"] == sum(image.defective for image in refused) > 0
    assert values["errors"] == len(refused)
    assert values["images"] == 60


def test_rejects_in_the_wrong_place_are_counted():
    found = [True, False, None, True, False]
    images = [
        replace(image, verdict=verdict, on_defect=on_defect)
        for image, on_defect in zip((image for image in scored() if image.defective), found, strict=False)
        for verdict in ("defect", "good")
    ]
    report = evaluate(images)
    assert report.kinds["scratch"]["located"] == 4
    assert report.kinds["scratch"]["on_defect"] == 2
    assert (report.to_json()["caught_with_mask"], report.to_json()["caught_on_defect"]) == (4, 2)


def test_every_image_is_kept_without_its_pixels():
    broken = Scored("good", False, None, "error", None, None, 0.0, "x.png: broken", Path("x.png"))
    image = next(iter(scored()))
    image = replace(image, path=Path("a/000.png"), p_value=0.25)
    first, second = evaluate([image, broken]).results
    assert (first.path, first.kind, first.defective, first.p_value) == (Path("a/000.png"), "scratch", True, 0.25)
    assert (first.score, first.verdict, first.error) == (image.score, image.verdict, None)
    assert (second.path, second.score, second.verdict, second.error) == (Path("x.png"), None, "error", "x.png: broken")
    assert "results" not in evaluate([image]).to_json()


def test_each_kind_is_held_against_all_good_images():
    random = np.random.default_rng(5)
    kinds = ["good"] * 30 + ["scratch"] * 10 + ["dent"] * 10
    scores = np.concatenate([random.normal(0, 1, 30), random.normal(1, 1, 10), random.normal(3, 1, 10)])
    rows = zip(kinds, scores.tolist(), strict=True)
    report = evaluate(Scored(kind, kind != "good", score, "good", None, None, 1.0) for kind, score in rows)
    for kind, part in (("scratch", slice(0, 40)), ("dent", [*range(30), *range(40, 50)])):
        assert report.auroc_of(kind) == pytest.approx(roc_auc_score(np.arange(50)[part] >= 30, scores[part]))
    assert report.auroc_of("good") is None
    assert report.auroc_of("no such kind") is None


def test_image_curves_are_those_of_sklearn():
    images = list(scored())
    curves = evaluate(images).curves
    labels, scores = [i.defective for i in images], [i.score for i in images]
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    precision, recall, _ = precision_recall_curve(labels, scores)
    np.testing.assert_allclose(curves["image_roc"], [fpr, tpr])
    np.testing.assert_allclose(curves["image_pr"], [recall[::-1], precision[::-1]])


def test_pixel_curves_are_thinned_and_keep_their_area():
    report = evaluate(scored())
    areas = {"pixel_roc": report.pixel_auroc, "pixel_pro": report.aupro}
    for name in ("pixel_roc", "pixel_pr", "pixel_pro"):
        x, y = report.curves[name]
        assert 300 < len(x) == len(y) <= 500, name
        assert (np.diff(x) >= 0).all(), name
        assert (x[0], x[-1]) == (0, 1), name
        if name in areas:
            reach = 0.3 if name == "pixel_pro" else 1.0
            inside = np.append(x[x < reach], reach)
            area = auc(inside, np.interp(inside, x, y)) / reach
            assert area == pytest.approx(areas[name], abs=3e-3), name
    recall, precision = report.curves["pixel_pr"]
    assert np.sum(np.diff(recall) * precision[1:]) == pytest.approx(report.pixel_ap, abs=3e-3)


def test_there_are_no_curves_where_there_are_no_figures():
    without_masks = evaluate(scored(masks=False)).curves
    assert {name for name in CURVES if without_masks[name] is not None} == {"image_roc", "image_pr"}
    only_good = evaluate(image for image in scored() if not image.defective).curves
    assert only_good == dict.fromkeys(CURVES)


def test_a_detector_reports_what_made_the_figures(detector, drawn):
    report = detector.evaluate(drawn)
    values = report.to_json()
    assert report.kinds.keys() == {path.name for path in (drawn / "test").iterdir()}
    assert (values["method"], values["image_size"], values["training_images"]) == ("patchcore", [128, 128], 12)
    inspections = detector.predict(drawn / "test")
    labels = [inspection.path.parent.name != "good" for inspection in inspections]
    scores = [inspection.score for inspection in inspections]
    assert values["image_auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-9)
    assert values["pixel_auroc"] > 0.7
    full = detector.evaluate(drawn, full_resolution=True).to_json()
    assert full["pixel_auroc"] == pytest.approx(values["pixel_auroc"], abs=1e-6)  # drawn at the input size
