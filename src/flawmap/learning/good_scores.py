"""Scores of good images by a method that has not seen them: held out, or cross-fitted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flawmap.errors import FlawmapError
from flawmap.imaging.image_files import find_images
from flawmap.learning.data import COLLECTED, Progress, TrainingData, batches, on_device
from flawmap.methods import Method

# Leaving out a third of many images changes a bank as little as leaving out a fifth of few.
_FOLDS, _FOLDS_OF_MANY, _MANY = 5, 3, 150
_HELD_OUT = 5  # one image in five

Fit = Callable[[Sequence[int], str], Method]
"""Fits a method on the images of some positions; the text says what for."""


@dataclass(frozen=True)
class Split:
    """Positions of images to fit on and to calibrate on; with "crossfit" the latter are the former.

    Images of one group, that is of the same content, never stand on both sides.
    """

    fitting: list[int]
    held_out: list[int]
    mode: str
    groups: Sequence[int] = ()


def calibration_images(calibration: str | Path) -> list[Path]:
    """The images of a calibration folder; none where `calibration` is a mode.

    Raises:
        FlawmapError: it is neither, or there are none.
    """
    if str(calibration) in ("auto", "holdout", "crossfit"):
        return []
    folder = Path(calibration)
    if not folder.is_dir():
        raise FlawmapError(f"--calibration {folder} is neither a folder of good images nor holdout or crossfit")
    paths = find_images(folder)
    if not paths:
        raise FlawmapError(f"--calibration {folder} holds no images: put good images there that are not trained on")
    return paths


def split_images(
    digests: Sequence[str],
    groups: Sequence[int],
    images: Sequence[int],
    calibration: str,
    optimises: bool,
    seed: int,
) -> Split:
    """Who is fitted on and who calibrates.

    Args:
        digests: of all images, those of a calibration folder last.
        groups: of all images; those of one group show the same.
        images: positions of the training images.
        calibration: "auto", "holdout", "crossfit" or a folder.
        optimises: whether the method trains by gradient, which is too dear to do once a fold.
        seed: of the split.

    Raises:
        FlawmapError: no two different images, or a calibration folder without new ones.
    """
    mode = calibration
    if mode == "auto":
        mode = "holdout" if optimises else "crossfit"
    if mode in ("crossfit", "holdout") and len({groups[i] for i in images}) < 2:
        raise FlawmapError("all training images show the same: give different ones, or --calibration FOLDER")
    if mode == "crossfit":
        return Split(list(images), [], mode, groups)
    if mode == "holdout":
        held_out = {images[i] for i in folds([groups[i] for i in images], _HELD_OUT, seed)[0]}
        return Split([i for i in images if i not in held_out], sorted(held_out), mode)
    known = {digests[i] for i in images}
    further = range(max(images) + 1, len(digests))
    apart = [i for i in further if digests[i] not in known]
    if not apart:
        raise FlawmapError(f"every image of --calibration {mode} is also trained on: give other good images")
    return Split(list(images), apart, "folder")


@dataclass(frozen=True)
class GoodScores:
    """Scores and map maxima (n,) of good images, each distinct image once, with their positions."""

    images: list[int]
    scores: NDArray[np.float32]
    peaks: NDArray[np.float32]


def good_scores(
    method: Method,
    data: TrainingData,
    split: Split,
    seed: int,
    device: str,
    progress: Progress,
    fit: Fit | None = None,
) -> GoodScores:
    """Scores the held-out images with `method`, or each training image with a method that `fit` makes without it."""
    found: dict[str, tuple[int, float, float]] = {}

    def score(method: Method, images: Sequence[int], closed: bool = False) -> None:
        owners = [i for i in images for _ in data.rows([i])]
        best: dict[int, tuple[float, float]] = {}
        read = data.of(method).features
        for part, of in zip(batches(data.rows(images), COLLECTED), batches(owners, COLLECTED), strict=True):
            features, inside = on_device(read(part), device)
            with torch.inference_mode():
                scored = (method.leave_one_out if closed else method.score)(features, inside)
                assert scored is not None
                peaks = method.enlarge(scored[0], inside).amax((1, 2, 3)).tolist()
            for image, value, peak in zip(of, scored[1].tolist(), peaks, strict=True):
                before = best.get(image, (value, peak))
                best[image] = (max(value, before[0]), max(peak, before[1]))
        for image, pair in best.items():
            found.setdefault(data.digests[image], (image, *pair))
        progress("calibration", min(len(found), total), total)

    images = split.held_out if split.mode != "crossfit" else split.fitting
    digests = [data.digests[i] for i in images]
    total = len(set(digests))
    if split.mode != "crossfit":
        for some in batches(images, COLLECTED):
            score(method, some)
    elif _has_closed_form(method, data, images, device):
        for some in batches(images, COLLECTED):
            score(method, some, closed=True)
    else:
        parts = folds([split.groups[i] for i in images], _FOLDS if len(images) < _MANY else _FOLDS_OF_MANY, seed)
        assert fit is not None
        for number, fold in enumerate(parts, start=1):
            left = {images[i] for i in fold}
            refit = fit([i for i in images if i not in left], f"fold {number} of {len(parts)}")
            score(refit, sorted(left))
    rows = list(found.values())
    peaks = np.array([row[2] for row in rows] if method.localises else [], np.float32)
    return GoodScores([row[0] for row in rows], np.array([row[1] for row in rows], np.float32), peaks)


def _has_closed_form(method: Method, data: TrainingData, images: Sequence[int], device: str) -> bool:
    """Leaving one out in closed form leaves out one model input: an image may not have two, nor a byte-identical twin.

    Near-duplicates stay in, which flatters the scores; to fit anew without each group would cost many times as much.
    """
    if len({data.digests[i] for i in images}) < len(images) or len(data.rows(images)) > len(images):
        return False
    with torch.inference_mode():
        return method.leave_one_out(*on_device(data.features(data.rows(images[:1])), device)) is not None


def folds(groups: Sequence[Any], count: int, seed: int) -> list[list[int]]:
    """Splits positions into `count` folds of nearly equal size; positions of one group (equal values) stay together."""
    members: dict[Any, list[int]] = {}
    for position, group in enumerate(groups):
        members.setdefault(group, []).append(position)
    order = np.random.default_rng(seed).permutation(len(members))
    keys = list(members)
    split: list[list[int]] = [[] for _ in range(min(count, len(members)))]
    for turn, key in enumerate(order):
        split[turn % len(split)] += members[keys[key]]
    return [sorted(fold) for fold in split]
