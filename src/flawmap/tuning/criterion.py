"""How well synthetic defects stand out among good images: what settings are compared by where no label is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flawmap.errors import FlawmapError
from flawmap.tuning.oracle import OracleGrid
from flawmap.tuning.outcome import Point, Tuning
from flawmap.tuning.sweep import Batch

_LIMIT = 0.3  # of the false-positive rate, as AUPRO's
_STRIDE = 4  # every so many good pixels give their distribution
_RESAMPLES = 1000


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
