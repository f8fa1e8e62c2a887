"""What a model file says of its model beside the network: how images are prepared, judged and what was learnt from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flawmap.errors import FlawmapError
from flawmap.files import other_kind
from flawmap.imaging.captures import CaptureLimits
from flawmap.imaging.image_files import IMAGE_SUFFIXES
from flawmap.imaging.preparation import Preparation
from flawmap.imaging.registration import LONGEST
from flawmap.judging.calibration import GUARANTEES, Calibration, Threshold
from flawmap.judging.judge import Judge
from flawmap.ranges import SCORES, SEEDS, SIDES, finite, rate, whole

_LARGEST = 100_000  # pixels of a picture's side


@dataclass(frozen=True)
class ModelCard:
    """All that inspection needs to know.

    Attributes:
        method, config: the method's name and its settings.
        backbone, backbone_digest, levels: the pretrained network and which of its levels are read.
        preparation: what is done to images first.
        captures: what a capture must be like to be judged.
        calibration: scores of good images; None where all were learnt from, and after a setting was moved, until they
            are scored anew.
        max_false_reject, guarantee: what the threshold is to keep.
        training: what it was fitted on: number of images, their digests, seed, engine, libraries.
        localises: whether the method has a map.
        heat: without a calibration, what heatmap colours mean: `HeatScale.low` and `high`, from the images learnt from.
    """

    method: str
    config: Mapping[str, Any]
    backbone: str
    backbone_digest: str
    levels: tuple[str, ...]
    preparation: Preparation
    captures: CaptureLimits
    calibration: Calibration | None
    max_false_reject: float
    guarantee: str
    training: Mapping[str, Any]
    localises: bool
    heat: tuple[float, float] | None = None

    @property
    def capture_check(self) -> bool:
        """Whether captures unlike the good images are refused."""
        return bool(self.training.get("capture_check", True))

    def threshold(self) -> Threshold | None:
        """The threshold that keeps the rate asked for in training."""
        return None if self.calibration is None else self.calibration.threshold(self.max_false_reject, self.guarantee)

    def judge(self) -> Judge:
        """What judges by that threshold; without a calibration it gives no verdicts."""
        if self.calibration is None:
            return Judge(self.max_false_reject, self.guarantee)
        return Judge.of(self.calibration, self.max_false_reject, self.guarantee)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; `preparation.arrays()` holds the rest."""
        kept = self.calibration
        return {
            "method": self.method,
            "config": dict(self.config),
            "backbone": self.backbone,
            "backbone_digest": self.backbone_digest,
            "levels": list(self.levels),
            "preparation": self.preparation.to_json(),
            "captures": self.captures.to_json(),
            "calibration": None
            if kept is None
            else {"mode": kept.mode, "scores": kept.scores.tolist(), "peaks": kept.peaks.tolist()},
            **({} if self.heat is None else {"heat": list(self.heat)}),
            "max_false_reject": self.max_false_reject,
            "guarantee": self.guarantee,
            "training": dict(self.training),
            "localises": self.localises,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> ModelCard:
        """Undoes `to_json`.

        Raises:
            FlawmapError, KeyError, TypeError, ValueError: a value is missing or cannot be used.
        """
        _check_preparation(content["preparation"], arrays)
        kept, calibration, heat = content["calibration"], None, content.get("heat")
        if kept is not None:
            scores, peaks = np.array(kept["scores"], np.float32), np.array(kept["peaks"], np.float32)
            calibration = Calibration(scores, peaks, kept["mode"])
        if heat is not None:
            low, high = (finite("heat", value, SCORES) for value in heat)
            if not low < high:
                raise ValueError("its heat scale has no reach")
            heat = low, high
        if calibration is None and heat is None and content["localises"]:
            raise ValueError("it has neither scores of good images nor a scale for its maps")
        kept_rate = rate("max_false_reject", content["max_false_reject"])
        if content["guarantee"] not in GUARANTEES:
            raise ValueError("its guarantee is unknown")
        training = content["training"]
        whole("seed", training["seed"], SEEDS)
        whole("images", training["images"], (0, 10**9))
        if not {"images", "seed", "engine"} <= training.keys():
            raise KeyError("training")
        return cls(
            str(content["method"]),
            dict(content["config"]),
            str(content["backbone"]),
            str(content["backbone_digest"]),
            tuple(map(str, content["levels"])),
            Preparation.from_json(content["preparation"], arrays),
            CaptureLimits.from_json(content["captures"]),
            calibration,
            kept_rate,
            content["guarantee"],
            dict(training),
            bool(content["localises"]),
            heat,
        )


def _check_preparation(settings: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Raises FlawmapError, KeyError, TypeError or ValueError where it could not be made, or not for want of memory."""
    for name in ("size", "image_size"):
        height, width = settings[name]
        for side in (height, width):
            whole(name, side, SIDES)
    finite("lowest_quality", settings["lowest_quality"], (-1, 1))
    if not set(arrays) <= {"region", "template"}:
        raise ValueError(f"it holds {min(set(arrays) - {'region', 'template'})}, which is not known")
    if (settings["template_size"] is None) != ("template" not in arrays):
        raise ValueError("the template is not whole")
    for name, most in (("region", _LARGEST), ("template", LONGEST)):
        if name not in arrays:
            continue
        array = arrays[name]
        if array.ndim != 2 or not all(1 <= side <= most for side in array.shape):
            raise ValueError(f"the {name} has shape {array.shape}")
        if array.dtype != (np.float32 if name == "template" else np.uint8):
            raise ValueError(f"the {name} holds values of type {array.dtype}")
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 255):
            raise ValueError(f"the {name} is no picture")
    if "template" in arrays:
        height, width = settings["template_size"]
        for side in (height, width):
            whole("template_size", side, (1, _LARGEST))


def check_model_path(path: Path) -> None:
    """Refuses what is given as a model and is none for certain.

    Raises:
        FlawmapError: a folder, an image, or no file at all, such as a pipe.
    """
    first = "MODEL comes first, then the images"
    if path.is_dir():
        raise FlawmapError(f"{path}: is a folder, not a model; {first}")
    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise FlawmapError(f"{path}: is an image, not a model; {first}")
    if path.suffix.lower() == ".csv":
        raise FlawmapError(f"{path}: is a table, not a model; {first}")
    if path.exists() and (kind := other_kind(path.stat().st_mode)) is not None:
        raise FlawmapError(f"{path}: is {kind}, not a model; give a file of `flawmap train` or `flawmap export`")
