"""How well synthetic defects stand out among good images: what settings are compared by where no label is known."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from flawmap.datasets import Dataset, Sample
from flawmap.errors import FlawmapError
from flawmap.imaging.preparation import Preparation
from flawmap.imaging.reading import BATCH
from flawmap.learning.data import Progress, on_device, quiet
from flawmap.line.engines import Engine
from flawmap.line.evaluating import labelled_samples
from flawmap.methods import Method, configure
from flawmap.synthesis import DEFAULTS, GoodImages, find_foreground, generator, looked_at, synthesize
from flawmap.tuning.oracle import OracleGrid
from flawmap.tuning.sweep import FIGURES, Batch, Labelled, Sweep, figures_of, labelled

DEFECTS = 4
"""Synthetic defects made from each good image."""
FEWEST = 4
"""Good images to tune on."""
_LIMIT = 0.3  # of the false-positive rate, as AUPRO's
_STRIDE = 4  # every so many good pixels give their distribution
_RESAMPLES = 1000
_SHOWN = 12  # points in the table

Point = dict[str, Any]
"""A value of each setting that is searched."""


@dataclass(frozen=True)
class Tuning:
    """What tuning found.

    Attributes:
        points: what was tried.
        values: (P,) the criterion at each, in 0..1: see `Criterion`.
        interval: 95 % bootstrap interval, over good images, of the chosen point's lead over the point before tuning.
        confidence: share of the resamples in which the chosen point is the best.
        images, defects: how many good images it was chosen on, and the defects made from them.
        before: the point that was set before.
        oracle: what each point reaches on labelled test images, where that was asked for. It served no choice.
    """

    points: list[Point]
    values: NDArray[np.float64]
    interval: tuple[float, float]
    confidence: float
    images: int
    defects: int
    before: Point
    oracle: OracleGrid | None = None

    @property
    def chosen(self) -> Point:
        return self.points[int(self.values.argmax())]

    def kept(self, figure: str) -> float | None:
        """The share of what an oracle would gain over the point before tuning that the choice gains, at most 1.

        Negative where the choice is worse than what was set before. None without an oracle, where the figure does not
        exist, or where the oracle gains nothing.

        Args:
            figure: one of `flawmap.tuning.sweep.FIGURES`.
        """
        if self.oracle is None:
            return None
        reached, before = (self._reached(figure, point) for point in (self.chosen, self.before))
        gain = self.oracle.best(figure)[1] - before
        return (reached - before) / gain if gain > 0 else None

    def _reached(self, figure: str, point: Point) -> float:
        assert self.oracle is not None
        return self.oracle.figures[self.points.index(point)][figure]

    def describe(self) -> str:
        """Some lines for the terminal."""
        best, before = int(self.values.argmax()), self.points.index(self.before)
        lead = self.values[best] - self.values[before]
        lines = [
            f"chosen {in_words(self.chosen)} on {self.defects} synthetic defects in {self.images} good images, best in "
            f"{self.confidence:.0%} of bootstrap resamples",
            f"criterion {self.values[best]:.3f}, before ({in_words(self.before)}) {self.values[before]:.3f}: "
            f"{lead:+.3f} [{self.interval[0]:+.3f}, {self.interval[1]:+.3f}]",
        ]
        lines += self._table()
        if self.oracle is not None:
            lines.append("oracle, what the settings tried reach on the test labels, which served no choice:")
            lines += [line for figure in FIGURES if (line := self._oracle_line(figure, self.oracle))]
        return "\n".join(lines)

    def _oracle_line(self, figure: str, oracle: OracleGrid) -> str:
        point, value = oracle.best(figure)
        if np.isnan(value):
            return ""
        kept = self.kept(figure)
        share = "nothing to gain" if kept is None else f"{kept:.0%} of the gain kept"
        return (
            f"  {figure.replace('_', ' '):<12} chosen {self._reached(figure, self.chosen):.3f}   "
            f"before {self._reached(figure, self.before):.3f}   best {value:.3f} at {in_words(point)}   {share}"
        )

    def _table(self) -> list[str]:
        """The best points and the one before, with the criterion and, where there is one, the oracle's figures."""
        names = [] if self.oracle is None else [of for of in FIGURES if not np.isnan(self.oracle.best(of)[1])]
        order = np.argsort(-self.values, kind="stable")
        shown = [i for rank, i in enumerate(order) if rank < _SHOWN or self.points[i] == self.before]
        width = max(len(in_words(self.points[i])) for i in shown)
        lines = [f"{'settings':<{width}}  criterion" + "".join(f"  {name.replace('_', ' '):>11}" for name in names)]
        for i in shown:
            figures = [] if self.oracle is None else [f"  {self.oracle.figures[i][name]:>11.3f}" for name in names]
            lines.append(f"{in_words(self.points[i]):<{width}}  {self.values[i]:>9.3f}{''.join(figures)}")
        hidden = len(order) - len(shown)
        return [*lines, f"and {hidden} more, below {self.values[order[_SHOWN - 1]]:.3f}"] if hidden else lines


def in_words(point: Mapping[str, Any]) -> str:
    """A point as it is written on the command line."""
    return ", ".join(f"{name}={_in_words(name, value)}" for name, value in point.items())


def _in_words(name: str, value: Any) -> str:
    if value is None:
        return "auto"
    if name == "image_size":
        return str(value[0]) if value[0] == value[1] else f"{value[0]}x{value[1]}"
    if isinstance(value, tuple):
        return "+".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def synthetic_images(
    paths: Sequence[Path], preparation: Preparation, seed: int, trained_on: frozenset[str] = frozenset()
) -> Iterator[Labelled]:
    """Each good image, followed by up to `DEFECTS` copies with a synthetic defect each, on the part and where it is
    scored.

    Defects are made on the original pixels, so they are the same for whatever size `preparation` resizes to. None is of
    a kind in `trained_on`, `Method.trained_on`: a method tells such ones more surely than real defects.
    """
    kinds = {kind: share for kind, share in DEFAULTS.kinds.items() if kind not in trained_on}
    settings = replace(DEFAULTS, kinds=kinds)
    others = GoodImages(paths)
    foreground = find_foreground(others[i] for i in looked_at(len(paths)))
    white = preparation.preprocessing.white
    for number in range(len(paths)):
        pixels = others[number]
        yield Labelled(pixels, False)
        region = foreground.mask(pixels) & _scored(pixels, preparation)
        for copy in range(DEFECTS):
            rng = generator(seed, number * DEFECTS + copy)
            defect = synthesize(pixels, rng, others, region=region, settings=settings, white=white)
            if defect.mask.any():
                yield Labelled(defect.image, True, defect.mask)


def _scored(pixels: NDArray[Any], preparation: Preparation) -> NDArray[np.bool_]:
    """(H, W), the region of interest on an image's own pixels, and what its alignment shows."""
    placement = preparation.place(pixels)
    if placement.region is None:
        return np.ones(placement.size, np.bool_)
    if placement.alignment is None:
        return placement.region
    laid = placement.alignment.unwarp(placement.region.astype(np.float32))
    return np.nan_to_num(laid) > 0.5


class Criterion:
    """How well defects stand out, one number for each, in 0..1.

    It is the mean of two: the share of good images with a lower score (together the image AUROC), and the mean over the
    defect's pixels of 1 - f / 0.3, at least 0, where f is the share of good images' pixels with at least that value
    (together much like AUPRO up to a false-positive rate of 0.3). Both are shares, so inputs of different sizes and
    scores of different scales can be compared. Of methods without a map it is the first alone.
    """

    def __init__(self, localises: bool = True) -> None:
        self._localises = localises
        self._good: list[NDArray[np.float32]] = []
        self._defects: list[tuple[int, NDArray[np.float32]]] = []
        self._scores: dict[int, float] = {}

    def update(self, batch: Batch, labels: Sequence[bool]) -> None:
        """Some windows; `labels` tells of every image up to theirs whether it has a defect."""
        for i, image in enumerate(batch.images):
            self._scores[image] = max(float(batch.scores[i]), self._scores.get(image, -np.inf))
            inside, mask = None if batch.inside is None else batch.inside[i], batch.masks[i]
            if not labels[image]:
                scored = batch.maps[i] if inside is None else batch.maps[i][inside]
                self._good.append(scored.reshape(-1)[::_STRIDE] if self._localises else scored[:0])
            elif mask is not None:
                self._defects.append((image, batch.maps[i][mask if inside is None else mask & inside]))

    def values(self, labels: Sequence[bool]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """(N,) of each image, of which only that of defects means something; and (N,) whether any pixel shows it.

        The pixels' half is 0 of a defect that no pixel shows.
        """
        scores = np.array([self._scores[image] for image in range(len(labels))])
        ranked = np.sort(scores[~np.array(labels)])
        lower = (np.searchsorted(ranked, scores, "left") + np.searchsorted(ranked, scores, "right")) / (2 * len(ranked))
        seen = np.bincount([i for i, _ in self._defects], [len(v) for _, v in self._defects], len(labels))
        if not self._localises:
            return lower, seen > 0
        pixels, shown = np.sort(np.concatenate(self._good)), np.zeros(len(labels))
        for image, values in self._defects:
            below = np.searchsorted(pixels, values, "left") + np.searchsorted(pixels, values, "right")
            rate = 1 - below / (2 * len(pixels))
            shown[image] += np.maximum(0, 1 - rate / _LIMIT).sum()
        found: NDArray[np.float64] = (lower + shown / np.maximum(seen, 1)) / 2
        return found, seen > 0


@dataclass(frozen=True)
class Compared:
    """The criterion at some points over the same images.

    Attributes:
        points: what was tried.
        values, seen: (P, N), see `Criterion.values`.
        labels: (N,) True for defects, each of which comes after the good image that it is made from.
    """

    points: list[Point]
    values: NDArray[np.float64]
    seen: NDArray[np.bool_]
    labels: list[bool]

    def tuning(self, before: Point, seed: int, oracle: OracleGrid | None = None) -> Tuning:
        """The point at which defects stand out most, and how sure that is.

        Args:
            before: the point that was set before, one of `points`.
            seed: of the bootstrap.
            oracle: the points' figures on labelled test images.

        Raises:
            FlawmapError: no point shows any defect.
        """
        defective = np.array(self.labels) & self.seen.any(0)  # what no setting shows tells none from another
        if not defective.any():
            raise FlawmapError("no synthetic defect can be seen where images are scored: draw a larger region")
        owner = np.cumsum(~np.array(self.labels)) - 1  # the good image that each defect is made from
        each, of = self.values[:, defective], owner[defective]  # (P, D), (D,)
        images = int(owner.max()) + 1
        totals = np.stack([np.bincount(of, weights=row, minlength=images) for row in each])  # (P, I)
        counts = np.bincount(of, minlength=images)
        best = int(each.mean(1).argmax())
        rng = np.random.default_rng(seed)
        drawn = rng.multinomial(images, np.full(images, 1 / images), size=_RESAMPLES)  # (R, I)
        means = drawn @ totals.T / np.maximum(drawn @ counts, 1)[:, None]  # (R, P)
        lead = means[:, best] - means[:, self.points.index(before)]
        low, high = np.quantile(lead, (0.025, 0.975))
        sure = float((means.argmax(1) == best).mean())
        return Tuning(
            self.points, each.mean(1), (float(low), float(high)), sure, images, int(defective.sum()), before, oracle
        )


def live_points(method: type[Method], config: Any, grid: Mapping[str, Sequence[float]]) -> list[Point]:
    """The points of a grid of `live` settings, those that it leaves out as `config` sets them; that of `config` first.

    Args:
        method: their class.
        config: what is set now.
        grid: values of some of them; empty for every other one that the method's paper tries.

    Raises:
        FlawmapError: a value is not valid.
    """
    before = {name: float(getattr(config, name)) for name in method.live}
    tried = grid or {name: values[::2] for name, values in method.searched.items()}
    points = [before]
    for values in product(*tried.values()):
        moved = configure(method, {**config.model_dump(), **dict(zip(tried, values, strict=True))})
        point = {name: float(getattr(moved, name)) for name in method.live}
        points += [] if point in points else [point]
    return points


def compare_live(
    method: Method, sweep: Sweep, points: Sequence[Point], progress: Progress = quiet
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """(P, N), twice: `Criterion.values` at each point of `live` settings.

    Args:
        method: one with `live` settings.
        sweep: of `synthetic_images`.
        points: what to try.
        progress: is told how it goes.
    """
    values, seen = [], []
    for done, point in enumerate(points, start=1):
        criterion = Criterion(method.localises)
        for batch in sweep.scored(_moved(method, point)):
            criterion.update(batch, sweep.labels)
        found = criterion.values(sweep.labels)
        values.append(found[0])
        seen.append(found[1])
        progress("settings", done, len(points))
    return np.array(values), np.array(seen)


def live_figures(
    method: Method, sweep: Sweep, points: Sequence[Point], progress: Progress = quiet
) -> list[dict[str, float]]:
    """The figures of `flawmap.tuning.sweep` at each point of `live` settings, of a sweep over test images."""
    figures = []
    for done, point in enumerate(points, start=1):
        figures.append(sweep.figures(_moved(method, point)))
        progress("oracle", done, len(points))
    return figures


def _moved(method: Method, point: Point) -> Method:
    return method.with_settings(configure(type(method), {**method.config.model_dump(), **point}))


class Scorer:
    """Scores labelled images, keeping neither them nor their features.

    Attributes:
        labels: of the images scored so far, True for those with a defect.
    """

    def __init__(self, method: Method, preparation: Preparation, engine: Engine, device: str) -> None:
        self.method, self.preparation, self.engine, self.device = method, preparation, engine, device
        self.labels: list[bool] = []

    def scored(self, images: Iterable[Labelled]) -> Iterator[Batch]:
        """The windows of all images, in order, as `Sweep.scored` gives them."""
        waiting: list[_Window] = []
        for image in images:
            self.labels.append(image.defective)
            waiting += self._windows(image)
            while len(waiting) >= BATCH:
                yield self._run(waiting[:BATCH])
                waiting = waiting[BATCH:]
        if waiting:
            yield self._run(waiting)

    def _windows(self, image: Labelled) -> Iterator[_Window]:
        placement = self.preparation.place(image.pixels)
        inputs, shown = self.preparation.inputs(image.pixels, placement), placement.inside()
        none = None if image.defective else np.zeros(self.preparation.size, np.bool_)
        masks = [none] * len(shown) if image.mask is None else placement.project(image.mask)
        for pixels, inside, mask in zip(inputs, shown, masks, strict=True):
            yield _Window(len(self.labels) - 1, pixels, inside, mask)

    @torch.inference_mode()
    def _run(self, windows: Sequence[_Window]) -> Batch:
        inputs, shown = np.stack([w.pixels for w in windows]), np.stack([w.inside for w in windows])
        inside = torch.from_numpy(shown[:, None]).float() if self.preparation.masked else None
        normalised = self.preparation.preprocessing.normalised(inputs)
        maps = self.engine(normalised, None if inside is None else inside.numpy())
        features, inside = on_device(([torch.from_numpy(level) for level in maps], inside), self.device)
        anomaly_map, scores = self.method.score(features, inside)
        return Batch(
            [w.image for w in windows],
            self.method.enlarge(anomaly_map, inside)[:, 0].cpu().numpy(),
            scores.cpu().numpy(),
            [w.mask for w in windows],
            None if inside is None else shown,
        )

    def figures(self, samples: Sequence[Sample], progress: Progress = quiet) -> dict[str, float]:
        """Each of `flawmap.tuning.sweep.FIGURES` of labelled test images, in 0..1; nan where it does not exist."""

        def told() -> Iterator[Batch]:
            for batch in self.scored(labelled(sample) for sample in samples):
                progress("oracle", len(self.labels), len(samples))
                yield batch

        return figures_of(told(), self.labels, self.method.localises)


class _Window(NamedTuple):
    """One model input of the image of a number, where it is scored, and the defect on it."""

    image: int
    pixels: NDArray[Any]  # (3, h, w)
    inside: NDArray[np.bool_]  # (h, w)
    mask: NDArray[np.bool_] | None  # (h, w)


def test_samples(source: str | Path | Dataset | Sequence[str | Path], category: str | None) -> list[Sample]:
    """The labelled test images that an oracle is measured on.

    Raises:
        FlawmapError: there are none.
    """
    if not isinstance(source, (str, Path, Dataset)):
        raise FlawmapError("an oracle needs labelled test images: give a data set, not a list of good images")
    return labelled_samples(source, category)[1]
