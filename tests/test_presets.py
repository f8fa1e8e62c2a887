"""Presets: what the papers print, each value with its source, and what the user's own options leave of it."""

import pytest

from flawmap import Detector, FlawmapError
from flawmap.backbones import weights
from flawmap.backbones.catalogue import CATALOGUE, DEFAULT_BACKBONE
from flawmap.cli.method_lines import method_lines
from flawmap.imaging.geometry import Geometry
from flawmap.methods import METHODS, configure, method_class, preset_of
from flawmap.methods.presets import DETECTOR, Choice, Preset, in_words, read_presets

TABLED = [name for name in METHODS if name != "gaussbank"]
NAMED = [(name, preset) for name in TABLED for preset in method_class(name).presets]

# What the papers print, typed here once more.
PRINTED = {
    "f2r": {
        "backbone": "wide_resnet50_2.tv_in1k",
        "levels": ("layer2", "layer3"),
        "image_size": 256,
        "crop": 224,
        "gamma": 0.001,
        "steps": 6,
        "epochs": 300,
        "batch_size": 32,
        "learning_rate": 2e-4,
        "weight_decay": 0.05,
        "rotation": 30.0,
        "semantics": "cls",
        "alpha": 1.0,
        "beta": 1.0,
    },
    "cainnflow": {
        "backbone": "resnet18.tv_in1k",
        "subnet": "CAC",
        "steps": 2,
        "epochs": 750,
        "learning_rate": 5e-4,
        "weight_decay": 1e-5,
        "two_sided": True,
        "st_shared": False,
        "clamp": "none",
        "activation": False,
        "scoring": "likelihood",
        "score_logdet": 1.0,
        "image_logdet": 1.0,
        "sigma": 0.0,
    },
    "cfa": {
        "backbone": "wide_resnet50_2.tv_in1k",
        "image_size": 256,
        "crop": 224,
        "radius": 1e-5,
        "alpha": 0.1,
        "k": 3,
        "j": 3,
        "epochs": 30,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "weight_decay": 5e-4,
        "sigma": 4.0,
        "bank": "ema",
        "distance": "plain",
        "r_mode": "fixed",
    },
    "cls_cnf": {
        "backbone": "wide_resnet50_2.tv_in1k",
        "image_size": 256,
        "blocks": 6,
        "two_sided": True,
        "soft_label": "abs_pixelwise",
    },
    "cflow": {"backbone": "wide_resnet50_2.tv_in1k", "blocks": 8, "learning_rate": 2e-4, "batch_size": 32},
    "padim": {"backbone": "wide_resnet50_2.tv_in1k", "crop": 224, "channels": 550, "epsilon": 0.01, "sigma": 4.0},
    "patchcore": {"backbone": "wide_resnet50_2.tv_in1k", "crop": 224, "coreset": 0.01, "reweight": True, "sigma": 4.0},
    "differnet": {"image_size": 448, "scales": 3, "blocks": 8, "hidden": 2048, "epochs": 192, "learning_rate": 2e-4},
    "draem": {"image_size": 256, "epochs": 700, "batch_size": 8, "learning_rate": 1e-4, "width": 128},
    "pouta": {
        "image_size": 224,
        "epochs": 600,
        "batch_size": 8,
        "learning_rate": 2e-4,
        "lambda_1": 0.4,
        "lambda_2": 0.3,
        "lambda_3": 0.2,
        "lambda_4": 0.1,
        "pool": 21,
    },
}


def held(name, preset, **given):
    """Every value that a detector of a preset has, by its setting."""
    detector = Detector(name, preset=preset, **given)
    size = detector.image_size[0] if len(set(detector.image_size)) == 1 else detector.image_size
    crop = detector.geometry.side if detector.geometry.kind == "crop" else None
    own = {"backbone": detector.backbone, "image_size": size, "crop": crop, "calibration": detector.calibration}
    return {**detector.config.model_dump(), **own}


@pytest.mark.parametrize(("name", "preset"), NAMED)
def test_a_preset_is_its_table_and_every_value_has_a_source(name, preset):
    method, table = method_class(name), method_class(name).presets[preset]
    values = held(name, preset)
    for choice in table.choices:
        assert choice.setting in (*DETECTOR, *method.Config.model_fields)
        assert len(choice.source.split()) >= 2 or ":" in choice.source or "Eq" in choice.source
        if choice.setting in ("image_size", "crop"):
            assert values[choice.setting] == int(choice.value)
        elif choice.setting in DETECTOR:
            assert values[choice.setting] == choice.value
        else:
            alone = configure(method, {choice.setting: choice.value})
            assert values[choice.setting] == getattr(alone, choice.setting)
    assert len({choice.setting for choice in table.choices}) == len(table.choices)


@pytest.mark.parametrize("name", TABLED)
def test_the_papers_preset_has_what_the_paper_prints(name):
    values = held(name, "paper")
    assert values["calibration"] == "none"
    assert {key: values[key] for key in PRINTED[name]} == PRINTED[name]
    if name not in ("draem", "pouta", "differnet"):  # networks of their own, and AlexNet
        assert values["backbone"] in CATALOGUE


def test_presets_need_no_level_twice():
    for name in TABLED:
        for preset in method_class(name).presets.values():
            values = preset.values
            if "levels" in values and "backbone" in values:
                assert values["levels"]


def test_what_the_user_gives_wins_and_is_named():
    plain = Detector("f2r", preset="paper")
    assert plain.preset == "paper"
    assert plain.geometry == Geometry.crop(224)
    same = Detector("f2r", preset="paper", image_size=256, epochs=300, learning_rate="0.0002", levels="layer2, layer3")
    assert same.preset == "paper"
    assert same.geometry == Geometry.crop(224)
    other = Detector("f2r", preset="paper", backbone="resnet18.tv_in1k", epochs=5, calibration="holdout")
    assert other.preset == "paper, except backbone, levels, calibration, epochs"
    assert (other.backbone, other.config.levels, other.config.epochs) == ("resnet18.tv_in1k", None, 5)
    assert other.calibration == "holdout"
    smaller = Detector("f2r", preset="paper", image_size=128)
    assert smaller.preset == "paper, except image-size, crop"
    assert (smaller.image_size, smaller.geometry) == ((128, 128), Geometry())
    cropped = Detector("f2r", preset="paper", geometry=Geometry.crop(192))
    assert cropped.preset == "paper, except crop"
    assert (cropped.image_size, cropped.geometry.side) == ((256, 256), 192)
    padded = Detector("f2r", preset="paper", geometry=Geometry.keep_aspect())
    assert padded.preset == "paper, except crop"


def test_without_a_preset_all_is_as_ever():
    for preset in (None, "default"):
        detector = Detector("f2r", preset=preset)
        assert detector.preset is None
        assert (detector.backbone, detector.image_size) == (DEFAULT_BACKBONE, (256, 256))
        assert (detector.calibration, detector.geometry) == ("auto", Geometry())
    assert preset_of(method_class("f2r"), "default") == Preset()
    with pytest.raises(FlawmapError, match="unknown preset authors: choose default, paper"):
        Detector("f2r", preset="authors")


def test_text_and_program_part_where_they_do():
    cfa = {name: preset.values for name, preset in read_presets("cfa").items()}
    parted = {key for key in cfa["paper"] if cfa["paper"][key] != cfa["authors"].get(key)}
    assert {"bank", "distance", "nu", "pool", "r_mode"} <= parted
    assert list(read_presets("cls_cnf")) == ["paper", "authors"]


def test_a_preset_beside_another_value():
    preset = Preset((Choice("backbone", "a", "x"), Choice("levels", "b", "x"), Choice("sigma", "4", "x")))
    assert preset.beside({"backbone": "a", "sigma": 4.0}) == (preset, [])
    kept, other = preset.beside({"backbone": "z", "epochs": 3})
    assert (kept.values, other) == ({"sigma": "4"}, ["backbone", "levels"])
    assert in_words("paper", ["image_size", "batch_size"]) == "paper, except image-size, batch_size"
    assert (preset["levels"], preset.settings) == ("b", {"levels": "b", "sigma": "4"})


def test_weights_that_cannot_be_had_are_one_line_with_two_ways_out(drawn, monkeypatch, tmp_path, flawmap):
    monkeypatch.setattr(weights, "_resolves", lambda url: False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    code, _, err = flawmap(
        "train", drawn, "-o", tmp_path / "m.safetensors", "--method", "patchcore", "--preset", "paper"
    )
    assert code == 2
    last = err.splitlines()[-1]
    assert "wide_resnet50_2.tv_in1k" in last
    assert "--weights FILE" in last
    assert "online" in last
    code, _, err = flawmap(
        "train", drawn, "-o", tmp_path / "m.safetensors", "--method", "differnet", "--preset", "paper"
    )
    assert code == 2
    assert "unknown backbone alexnet" in err.splitlines()[-1]


def test_training_says_what_was_overridden_and_the_model_keeps_it(drawn, tmp_path, flawmap):
    model = tmp_path / "m.safetensors"
    train = ["train", drawn, "-o", model, "--method", "patchcore", "--preset", "paper"]
    train += ["--backbone", DEFAULT_BACKBONE, "--image-size", 64]
    code, out, err = flawmap(*train)
    assert code == 0, err
    said = "preset paper, except backbone, levels, deep_levels, image-size, crop"
    assert said in out.splitlines()
    assert "no threshold" in out
    assert said.removeprefix("preset ") in flawmap("info", model)[1]
    assert "paper, except backbone" in model.with_suffix(".html").read_text()
    code, _, err = flawmap(*train, "--max-false-reject", "0.1")
    assert (code, "no rate can be kept" in err) == (2, True)


def test_a_methods_page_shows_the_tables():
    lines = method_lines(METHODS["f2r"])
    row = next(line for line in lines if line.startswith("  paper  gamma"))
    assert row.split()[:3] == ["paper", "gamma", "0.001"]
    assert row.endswith("Eq. 6: the default weight")
