"""Scores of good images by a method that has not seen them: held out, left out one by one, or cross-fitted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flawmap.errors import FlawmapError, InputError
from flawmap.imaging.image_files import find_images
from flawmap.learning.alignment import LOOKED_AT, find_alignment
from flawmap.learning.data import COLLECTED, Progress, TrainingData, batches, on_device
from flawmap.learning.highest_maps import HighestMaps
from flawmap.methods import Method
from flawmap.methods.blocks.levelling import ENOUGH, FEWEST, GoodMaps
from flawmap.methods.blocks.smoothing import largest, on_grid
from flawmap.text import counted

# Leaving out a third of many images changes a bank as little as leaving out a fifth of few.
_FOLDS, _FOLDS_OF_MANY, _MANY = 5, 3, 150
_HELD_OUT = 5  # one image in five

Fit = Callable[[Sequence[int], str], Method]
"""Fits a method on the images of some positions; the text says what for."""


@dataclass(frozen=True)
class Split:
    """Positions of images to fit on and to calibrate on; with "loo" and "crossfit" the latter are the former, and with
    "none" there are none.

    Images of one group, that is of the same content, never stand on both sides.
    """

    fitting: list[int]
    held_out: list[int]
    mode: str
    groups: Sequence[int] = ()

    @property
    def calibrates(self) -> bool:
        """Whether any images do."""
        return self.mode != "none"

    @property
    def reused(self) -> bool:
        """Whether the images that are fitted on calibrate too."""
        return self.mode in ("loo", "crossfit")


def calibration_images(calibration: str | Path) -> list[Path]:
    """The images of a calibration folder; none where `calibration` is a mode.

    Raises:
        FlawmapError: it is neither, or there are none.
    """
    if str(calibration) in ("auto", "holdout", "loo", "crossfit", "none"):
        return []
    folder = Path(calibration)
    if not folder.is_dir():
        raise FlawmapError(
            f"--calibration {folder} is neither a folder of good images nor loo, holdout, crossfit or none"
        )
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
        calibration: "auto", "holdout", "loo", "crossfit", "none" or a folder.
        optimises: whether the method trains by gradient: it cannot leave images out afterwards, and is too dear to be
            trained once a fold.
        seed: of the split.

    Raises:
        FlawmapError: no two different images, a calibration folder without new ones, or leaving one out of a method
            that trains by gradient.
    """
    mode = calibration
    if mode == "loo" and optimises:
        raise InputError("--calibration loo: what was trained by gradient cannot forget an image; take holdout")
    if mode == "auto":
        mode = "holdout" if optimises else "loo"
    if mode in ("loo", "crossfit", "holdout") and len({groups[i] for i in images}) < 2:
        raise InputError("all training images show the same: give different ones, or --calibration FOLDER")
    if mode == "none":
        return Split(list(images), [], mode)
    if mode in ("loo", "crossfit"):
        return Split(list(images), [], mode, groups)
    if mode == "holdout":
        held_out = {images[i] for i in folds([groups[i] for i in images], _HELD_OUT, seed)[0]}
        return Split([i for i in images if i not in held_out], sorted(held_out), mode)
    known = {digests[i] for i in images}
    further = range(max(images) + 1, len(digests))
    apart = [i for i in further if digests[i] not in known]
    if not apart:
        raise InputError(f"every image of --calibration {mode} is also trained on: give other good images")
    return Split(list(images), apart, "folder")


@dataclass(frozen=True)
class GoodScores:
    """Scores and map maxima (n,) of good images, each distinct image once, with their positions.

    Attributes:
        mode: how they were come by, as `Split.mode`: "crossfit" where "loo" was wanted and cannot be had.
        maps: (T, H, W) float32 of the windows of the images that score highest, by the same methods as their scores.
        levelling: what the method's `level=auto` decided and by which evidence, one line; None where it is not set.
    """

    images: list[int]
    scores: NDArray[np.float32]
    peaks: NDArray[np.float32]
    mode: str
    maps: Mapping[int, NDArray[np.float32]]
    levelling: str | None = None


@dataclass(frozen=True)
class _Part:
    """Some model inputs as a method that had not learnt them scored them."""

    owners: Sequence[int]  # the image of each
    scored: tuple[Tensor, Tensor]  # maps and image scores
    inside: Tensor | None

    def to(self, device: str) -> _Part:
        maps, scores = self.scored
        return _Part(
            self.owners, (maps.to(device), scores.to(device)), None if self.inside is None else self.inside.to(device)
        )


_Of = TypeVar("_Of")  # what is kept of a part
_Rated = list[tuple[int, float, float]]  # image, score and largest map value, of each input


def good_scores(
    method: Method,
    data: TrainingData,
    split: Split,
    seed: int,
    device: str,
    progress: Progress,
    fit: Fit | None = None,
    *,
    level: bool = True,
) -> GoodScores:
    """Scores the held-out images with `method`, or each training image with a method that has not learnt it.

    A method that levels its maps learns to do so from these; each image is then scored by what the others taught.
    Without `level` it keeps to what it has learnt. Where images cannot be left out in closed form, "loo" becomes
    "crossfit". With "none" the images that were learnt from are scored, which says nothing of new ones.
    """

    def rated(part: _Part) -> _Rated:
        maps, scores = method.enlarge(part.scored[0], part.inside), part.scored[1].tolist()
        if method.localises:
            highest.add(part.owners, scores, maps)
        return list(zip(part.owners, scores, maps.amax((1, 2, 3)).tolist(), strict=True))

    def inspected(part: _Part) -> _Rated:
        return rated(_Part(part.owners, method.levelled(*part.scored, part.inside), part.inside))

    levelling, highest = None, HighestMaps()
    with torch.no_grad():
        if method.levelling is not None and not split.calibrates:
            levelling = "maps are not levelled: --calibration none leaves no good image to learn their usual level from"
        if method.levelling is not None and level and split.calibrates:  # only this needs all maps at once
            parts, mode = _score(method, data, split, seed, device, progress, fit, lambda part: part.to("cpu"))
            parts, levelling = _levelled(method, data, split, parts)
            ratings = [rated(part.to(device)) for part in parts]
        else:
            ratings, mode = _score(method, data, split, seed, device, progress, fit, inspected)
    best: dict[int, tuple[float, float]] = {}
    for image, value, peak in chain.from_iterable(ratings):
        before = best.get(image, (value, peak))
        best[image] = (max(value, before[0]), max(peak, before[1]))
    distinct = {data.digests[image]: image for image in sorted(best, reverse=True)}
    images = sorted(distinct.values())
    peaks_of = np.array([best[image][1] for image in images] if method.localises else [], np.float32)
    scores = np.array([best[image][0] for image in images], np.float32)
    return GoodScores(images, scores, peaks_of, mode, highest.of(), levelling)


def _score(
    method: Method,
    data: TrainingData,
    split: Split,
    seed: int,
    device: str,
    progress: Progress,
    fit: Fit | None,
    kept: Callable[[_Part], _Of],
) -> tuple[list[_Of], str]:
    """What is `kept` of each part that is scored, and how it was: a mode of `Split`."""
    images = split.held_out or split.fitting
    found: list[_Of] = []
    done: set[int] = set()

    def score(method: Method, images: Sequence[int]) -> None:
        read = data.of(method).features
        owners = [i for i in images for _ in data.rows([i])]
        for part, of in zip(batches(data.rows(images), COLLECTED), batches(owners, COLLECTED), strict=True):
            features, inside = on_device(read(part), device)
            found.append(kept(_Part(of, method.score(features, inside), inside)))
        done.update(images)
        progress("calibration", len(done), total)

    total = len(images)
    if not split.reused:
        for some in batches(images, COLLECTED):
            score(method, some)
        return found, split.mode
    if split.mode == "loo":
        left_out = _left_out(method, data, split, device, progress, kept)
        if left_out is not None:
            return left_out, "loo"
    parts = folds([split.groups[i] for i in images], _FOLDS if len(images) < _MANY else _FOLDS_OF_MANY, seed)
    assert fit is not None
    for number, fold in enumerate(parts, start=1):
        left = {images[i] for i in fold}
        refit = fit([i for i in images if i not in left], f"fold {number} of {len(parts)}")
        score(refit, sorted(left))
    return found, "crossfit"


def _left_out(
    method: Method,
    data: TrainingData,
    split: Split,
    device: str,
    progress: Progress,
    kept: Callable[[_Part], _Of],
) -> list[_Of] | None:
    """What is `kept` of each group's images, scored by the method without them; None where that cannot be."""
    grouped: dict[int, list[tuple[int, int]]] = {}  # image and row
    for image in split.fitting:
        grouped.setdefault(split.groups[image], []).extend((image, row) for row in data.rows([image]))
    found: list[_Of] = []
    done: set[int] = set()
    for numbers in _batched(grouped):
        owners = [image for number in numbers for image, _ in grouped[number]]
        rows = [row for number in numbers for _, row in grouped[number]]
        groups = torch.tensor([number for number in numbers for _ in grouped[number]], device=device)
        features, inside = on_device(data.of(method).features(rows), device)
        scored = method.leave_one_out(features, inside, groups)
        if scored is None:
            return None
        found.append(kept(_Part(owners, scored, inside)))
        done.update(owners)
        progress("calibration", len(done), len(split.fitting))
    return found


def _batched(grouped: Mapping[int, Sequence[Any]]) -> Iterator[list[int]]:
    """The keys in ascending order, some at a time: so many that their values are no more than `COLLECTED`, or one."""
    some: list[int] = []
    held = 0
    for number in sorted(grouped):
        if some and held + len(grouped[number]) > COLLECTED:
            yield some
            some, held = [], 0
        some.append(number)
        held += len(grouped[number])
    yield some


def _levelled(method: Method, data: TrainingData, split: Split, parts: list[_Part]) -> tuple[list[_Part], str]:
    """Lets the method learn to level; the parts as the others' maps level them, and what was decided and why."""
    assert method.levelling is not None
    if data.prepare.geometry.kind == "tile":
        return parts, "maps are not levelled: a place in a tile is no place of the part"
    maps = torch.cat([part.scored[0] for part in parts])
    if len(maps) < FEWEST:
        found = counted(len(maps), "good image is", "good images are")
        few = f"{found} too few to know each place by, {FEWEST} are needed"
        return parts, f"maps are not levelled: {few}"
    rows = data.rows(split.fitting or split.held_out)
    chosen = [rows[i] for i in np.linspace(0, len(rows) - 1, min(len(rows), LOOKED_AT)).astype(int)]
    alignment = find_alignment([data.pixels(row)[0] for row in chosen])
    if alignment.lie == "any pose":
        return parts, f"maps are not levelled: {alignment.describe()}"
    held = [part.inside for part in parts if part.inside is not None]
    good = GoodMaps(maps, on_grid(torch.cat(held), maps.shape[-2:]) if held else None)
    means = alignment.lie == "texture"
    method.levelling.learn(good, means=means)
    groups = torch.tensor([split.groups[i] if split.groups else i for part in parts for i in part.owners])
    level = torch.empty_like(maps)
    for group in groups.unique():
        members = (groups == group).nonzero()[:, 0]
        shift, gain = good.level(members, means=means)
        level[members] = (maps[members] - shift) * gain
    others = []
    for part, own in zip(parts, level.split([len(part.owners) for part in parts]), strict=True):
        scores = largest(own, part.inside) if method.levelling.scores else part.scored[1]
        others.append(_Part(part.owners, (own, scores), part.inside))
    by = "mean and spread" if means else "spread"
    line = (
        f"maps are levelled by the {by} of each place: {alignment.describe()}; "
        f"the place explains {good.explained():.0%} of what good images' maps vary by"
    )
    few = f"{line}; image scores are not: {len(maps)} images are few, {ENOUGH} do"
    return others, line if method.levelling.scores else few


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
