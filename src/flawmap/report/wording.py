"""Numbers, settings and promises in the words that pages use."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flawmap.text import counted

if TYPE_CHECKING:
    from flawmap.judging.calibration import Threshold

_FACTS = {
    "data": "Data set",
    "method": "Method",
    "backbone": "Backbone",
    "image_size": "Image size",
    "training_images": "Good training images",
    "engine": "Engine",
    "seed": "Seed",
    "max_false_reject": "False rejects asked for",
    "full_resolution": "Pixel figures",
}


def percent(value: float) -> str:
    """A share from 0 to 1 such as "12.5 %", with more digits where it is small."""
    digits = 0 if value in (0, 1) else 1 if value >= 0.1 else 2
    return f"{100 * value:.{digits}f}\N{NO-BREAK SPACE}%"


def number(value: float) -> str:
    """A score, to five digits."""
    return f"{value:.5g}"


def facts(settings: Mapping[str, Any], *, pixels: bool) -> list[tuple[str, str]]:
    """What was asked and with what: the settings in the order of `_FACTS`, then those it does not name."""
    elsewhere = ("threshold", "guarantee") if pixels else ("threshold", "guarantee", "full_resolution")
    names = [name for name in _FACTS if name in settings] + [name for name in settings if name not in _FACTS]
    return [
        (_FACTS.get(name, name.replace("_", " ").capitalize()), _fact(name, settings[name]))
        for name in names
        if name not in elsewhere
    ]


def _fact(name: str, value: Any) -> str:
    if value is None:
        return "none"
    if name == "image_size":
        return f"{value[0]} × {value[1]} pixels"
    if name == "full_resolution":
        return "on the original pixels" if value else "at the model's image size"
    if name == "max_false_reject":
        return percent(value)
    return _text(value)


def settings_rows(config: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """The method's own settings, by name."""
    return [(name, _text(value)) for name, value in (config or {}).items()]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(item) for item in value)
    return str(value)


def promise(threshold: Threshold | None) -> dict[str, list[str]]:
    """What the calibration means and what it does not, in sentences."""
    if threshold is None:
        means = ["All good images were learnt from, so none of them tells what new good parts score."]
        return {"means": means, "does_not": ["There is no threshold, so no image is called good or defective."]}
    rate, upper = percent(threshold.rate), percent(threshold.upper)
    one = threshold.images == 1
    images = counted(threshold.images, "calibration image")
    kept_out = f"{'This image was' if one else 'These images were'} kept out of training."
    each = "This image was scored by a model that had not seen it, but the model in use has learnt from it."
    if not one:
        each = (
            "Each of these images was scored by a model that had not seen it, but the model in use has learnt from all "
            "of them."
        )
    low, high = map(percent, threshold.interval or (0.0, 1.0))
    means = {
        "marginal": [
            f"Of good parts like the {images}, at most {rate} are rejected on average. {kept_out}",
            "On average is meant over many such calibrations. This one may be better or worse: "
            f"with 95 % confidence its own rate is below {upper}.",
        ],
        "confidence": [
            f"With 95 % confidence, at most {rate} of good parts like the {images} are rejected. {kept_out}",
        ],
        "estimate": [
            f"About {rate} of good parts like the {images} are rejected; the upper bound, with 95 % confidence, is "
            f"{upper}.",
            f"{each} So this is a fair estimate, and not a promise. For a promise, keep good images out of training: "
            "train with --calibration holdout, or with a folder of further good images.",
        ],
        "tail": [
            f"About {rate} of good parts like the {images} are rejected, and with 95 % confidence {low} to "
            f"{high}, if the highest of their scores go on as a generalised Pareto distribution does.",
            "So this is an estimate, and not a promise. The conformal threshold needs no such distribution.",
        ],
        "none": ["You chose this threshold. No good images were kept to tell how many of them reach it."]
        if not threshold.images
        else [
            f"You chose this threshold. {rate} of the {images} {'reaches' if one else 'reach'} it. With 95 % "
            f"confidence no more than {upper} of good parts like {'it' if one else 'them'} do.",
        ],
    }[threshold.guarantee]
    does_not = [
        "It says nothing about defects. How many of them escape can only be measured, on defective test images.",
        "It does not hold for parts unlike the calibration images. After a change of light, camera, lens, material or "
        "supplier, calibrate again.",
    ]
    if threshold.guarantee == "none":
        does_not.insert(0, "A threshold chosen by hand comes without any promise.")
    return {"means": means, "does_not": does_not}


def short_path(path: Path) -> str:
    """The file with its folder: enough to find it, and nothing of the machine it lies on."""
    return "/".join(path.parts[-2:])
