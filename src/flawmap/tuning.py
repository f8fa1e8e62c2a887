"""Settings that papers choose on test labels, chosen on synthetic defects in good images instead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flawmap.datasets import Dataset
from flawmap.detector import Detector, source_name, training_paths
from flawmap.errors import FlawmapError
from flawmap.fitting import SHORT
from flawmap.images import digest
from flawmap.methods import Method, configure
from flawmap.oracle import Point, grid_points
from flawmap.preparation import Preparation
from flawmap.sweep import Labelled, Sweep
from flawmap.synthesis import GoodImages, find_foreground, generator, synthesize
from flawmap.training_data import Progress, quiet

DEFECTS = 4
"""Synthetic defects made from each good image."""
_ENOUGH, _FEWEST = 20, 4  # good images to tune on
_LOOKED_AT = 20  # images by which it is decided whether they show a part on a ground
_LIMIT = 0.3  # of the false-positive rate, as AUPRO's
_STRIDE = 4  # every so many good pixels give their distribution
_RESAMPLES = 1000


@dataclass(frozen=True)
class Tuning:
    """What tuning found.

    Attributes:
        points: what was tried.
        values: (P,) the criterion at each, in 0..1: see `search`.
        interval: 95 % bootstrap interval, over good images, of the chosen point's lead over the point before tuning.
        confidence: share of the resamples in which the chosen point is the best.
        images, defects: how many good images it was chosen on, and the defects made from them.
        before: the point that was set before.
    """

    points: list[Point]
    values: NDArray[np.float64]
    interval: tuple[float, float]
    confidence: float
    images: int
    defects: int
    before: Point

    @property
    def chosen(self) -> Point:
        return self.points[int(self.values.argmax())]

    def describe(self) -> str:
        """Some lines for the terminal."""
        chosen, best = _named(self.chosen), int(self.values.argmax())
        before = self.points.index(self.before)
        lead = self.values[best] - self.values[before]
        lines = [
            f"chosen {chosen} on {self.defects} synthetic defects in {self.images} good images, best in "
            f"{self.confidence:.0%} of bootstrap resamples",
            f"criterion {self.values[best]:.3f}, before ({_named(self.before)}) {self.values[before]:.3f}: "
            f"{lead:+.3f} [{self.interval[0]:+.3f}, {self.interval[1]:+.3f}]",
        ]
        order = np.argsort(-self.values, kind="stable")[1:5]
        next_best = "; ".join(f"{_named(self.points[i])} {self.values[i]:.3f}" for i in order)
        return "\n".join([*lines, f"next best: {next_best}"] if next_best else lines)


def synthetic_images(paths: Sequence[Path], preparation: Preparation, seed: int) -> Iterator[Labelled]:
    """Each good image, followed by up to `DEFECTS` copies with a synthetic defect each, on the part and where it is
    scored."""
    others = GoodImages(paths)
    foreground = find_foreground(others[i] for i in range(min(len(paths), _LOOKED_AT)))
    white = preparation.preprocessing.white
    for number in range(len(paths)):
        pixels = others[number]
        yield Labelled(pixels, False)
        region = foreground.mask(pixels)
        placement = preparation.place(pixels)
        inside = placement.inside()
        for copy in range(DEFECTS):
            rng = generator(seed, number * DEFECTS + copy)
            defect = synthesize(pixels, rng, others, region=region, white=white)
            if (placement.project(defect.mask) & inside).any():
                yield Labelled(defect.image, True, defect.mask)


def tune(
    detector: Detector,
    source: str | Path | Dataset | Sequence[str | Path],
    *,
    grid: Mapping[str, Sequence[float]] | None = None,
    category: str | None = None,
    seed: int = 0,
    progress: Progress = quiet,
) -> tuple[Detector, Tuning]:
    """Chooses the settings that can still be moved on synthetic defects, made from good images not fitted on.

    If `source` holds at least 20 good images that the detector has never seen, it is tuned on those. Else half of those
    it was calibrated on serve, and the other half calibrates what is returned.

    Args:
        detector: a fitted one.
        source: the good images, as for `Detector.fit`.
        grid: values to try of some settings; every other one of the paper's by default.
        category: of a data set root.
        seed: of the defects and of the split.
        progress: is told how it goes.

    Raises:
        FlawmapError: no setting can be moved, a value is not valid, or too few good images are left.
    """
    detector.check_live()
    assert detector.latents_ is not None
    method, preparation = detector.method_, detector.preparation_
    points = grid_points(grid or {name: values[::2] for name, values in method.searched.items()})
    for point in points:
        detector.moved_config(point)  # before anything is computed
    fitted, calibrating = set(detector.training_["fitted"]), list(dict.fromkeys(detector.latents_.digests))
    held_out: dict[str, Path] = {}
    new: dict[str, Path] = {}
    for path in training_paths(source, category):
        kept = digest(path)
        if kept[:SHORT] not in fitted:
            (held_out if kept in calibrating else new).setdefault(kept, path)
    chosen = new
    if len(new) < _ENOUGH:
        order = np.random.default_rng(seed).permutation(len(held_out))
        half = {list(held_out)[i] for i in order[: len(held_out) // 2]}
        chosen = {kept: path for kept, path in held_out.items() if kept in half}
        calibrating = [kept for kept in calibrating if kept not in half]
    if len(chosen) < _FEWEST:
        raise FlawmapError(
            f"{len(chosen)} good images in {source_name(source)} are left to tune on, beside those that were fitted "
            f"and those that have to calibrate: give at least {_FEWEST} more"
        )
    images = synthetic_images(list(chosen.values()), preparation, seed)
    count = len(chosen) * (1 + DEFECTS)
    with Sweep(method, images, count, preparation, detector.extraction_engine(), detector.device, progress) as sweep:
        tuning = search(method, sweep, points, seed, progress)
    other = detector.with_settings(calibrate=False, **{name: tuning.chosen[name] for name in method.live})
    other.latents_ = detector.latents_.only(set(calibrating))
    other.training_ = {**detector.training_, "tuned": {**tuning.chosen, "images": tuning.images, "seed": seed}}
    return other.calibrate(), tuning


def search(method: Method, sweep: Sweep, points: Sequence[Point], seed: int = 0, progress: Progress = quiet) -> Tuning:
    """The point at which synthetic defects stand out most.

    The criterion is, over defects, the mean of two numbers: the share of good images with a lower score (together the
    image AUROC), and the mean over the defect's pixels of 1 - f / 0.3, at least 0, where f is the share of good images'
    pixels with at least that value (together much like AUPRO up to a false-positive rate of 0.3).

    Args:
        method: one with `live` settings.
        sweep: of `synthetic_images`.
        points: what to try; the method's own setting is tried as well.
        seed: of the bootstrap.
        progress: is told how it goes.
    """
    before = {name: float(getattr(method.config, name)) for name in method.live}
    points = [{**before, **point} for point in points]
    points += [] if before in points else [before]
    owner = np.cumsum(~np.array(sweep.labels)) - 1  # the good image that each defect is made from
    values = []
    for done, point in enumerate(points, start=1):
        moved = method.with_settings(configure(type(method), {**method.config.model_dump(), **point}))
        values.append(_criterion(moved, sweep))
        progress("settings", done, len(points))
    defective = np.array(sweep.labels)
    each = np.array(values)[:, defective]  # (P, D)
    of = owner[defective]
    totals = np.stack([np.bincount(of, weights=row, minlength=owner.max() + 1) for row in each])  # (P, I)
    counts = np.bincount(of, minlength=owner.max() + 1)
    best = int(each.mean(1).argmax())
    rng = np.random.default_rng(seed)
    chosen = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=_RESAMPLES)  # (R, I)
    means = chosen @ totals.T / np.maximum(chosen @ counts, 1)[:, None]  # (R, P)
    lead = means[:, best] - means[:, points.index(before)]
    low, high = np.quantile(lead, (0.025, 0.975))
    confidence = float((means.argmax(1) == best).mean())
    return Tuning(points, each.mean(1), (float(low), float(high)), confidence, len(counts), len(of), before)


def _criterion(method: Method, sweep: Sweep) -> NDArray[np.float64]:
    """(N,) of each image of a sweep; only that of defects means something."""
    scores = np.full(len(sweep.labels), -np.inf, np.float32)
    good: list[NDArray[np.float32]] = []
    defects: list[tuple[int, NDArray[np.float32]]] = []
    for batch in sweep.scored(method):
        np.maximum.at(scores, batch.images, batch.scores)
        for i, image in enumerate(batch.images):
            mask = batch.masks[i]
            scored = batch.maps[i] if batch.inside is None else batch.maps[i][batch.inside[i]]
            if not sweep.labels[image]:
                good.append(scored.reshape(-1)[::_STRIDE])
            elif mask is not None:
                defects.append((image, batch.maps[i][mask]))
    pixels, ranked = np.sort(np.concatenate(good)), np.sort(scores[~np.array(sweep.labels)])
    lower = (np.searchsorted(ranked, scores, "left") + np.searchsorted(ranked, scores, "right")) / (2 * len(ranked))
    shown, seen = np.zeros(len(scores)), np.zeros(len(scores))
    for image, values in defects:
        below = np.searchsorted(pixels, values, "left") + np.searchsorted(pixels, values, "right")
        rate = 1 - below / (2 * len(pixels))
        shown[image] += np.maximum(0, 1 - rate / _LIMIT).sum()
        seen[image] += len(values)
    found: NDArray[np.float64] = (lower + shown / np.maximum(seen, 1)) / 2
    return found


def _named(point: Point) -> str:
    return ", ".join(f"{name}={value:g}" for name, value in point.items())
