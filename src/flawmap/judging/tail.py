"""The upper tail of the scores of good images as a smooth curve: what a threshold rejects beyond the scores seen.

Peaks over threshold (Pickands 1975): the exceedances of a high quantile of almost any distribution come close to a
generalised Pareto distribution. It is fitted by probability-weighted moments (Hosking & Wallis 1987, Technometrics 29).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from flawmap.errors import FlawmapError
from flawmap.text import counted

FEWEST = 10
"""Images whose scores a tail can be fitted to."""

SURE = 0.01
"""A fit whose test gives a smaller probability is rejected."""

_SHAPES = (-1.0, 0.5)
_LARGEST = float(np.finfo(np.float32).max)
_REPEATS = 1000
_CONFIDENCE = 0.95

Values = NDArray[np.float64]


@dataclass(frozen=True)
class TailThreshold:
    """A threshold that the tail gives for a rate.

    Attributes:
        value: the threshold, a float32 value.
        values: (low, high), where the threshold for that rate may lie, with 95 % confidence.
        rates: (low, high), the rate that the threshold may have, with 95 % confidence.
    """

    value: float
    values: tuple[float, float]
    rates: tuple[float, float]


@dataclass(frozen=True)
class Tail:
    """A generalised Pareto distribution over the `exceedances` largest of `images` scores. Made by `fit_tail`.

    Attributes:
        start: the score that the tail begins above, the largest but `exceedances`.
        shape: xi; the tail ends where it is negative, is exponential at 0, and heavier than that where it is positive.
        scale: in units of the score.
        probability: of a worse fit, if the tail is what it is taken for: the test of Kolmogorov and Smirnov.
    """

    images: int
    exceedances: int
    start: float
    shape: float
    scale: float
    probability: float
    _begins: Values = field(repr=False, compare=False)  # (R,) the share of good parts above `start`, as it may be
    _shapes: Values = field(repr=False, compare=False)  # (R,) of refits
    _scales: Values = field(repr=False, compare=False)

    @property
    def share(self) -> float:
        """The share of good parts that score above `start`: what rates must stay below."""
        return (self.exceedances + 1) / (self.images + 1)

    def threshold(self, rate: float) -> TailThreshold:
        """The score that a share `rate` of good parts reaches.

        Given `start`, an order statistic, the exceedances are independent draws from the tail, and the share of all
        parts above it is Beta(k + 1, n - k) distributed. The intervals are percentiles over such shares and refits of
        simulated exceedances. In simulations of normal, Gumbel, exponential and uniform scores with 10 to 300 images
        and 1 % asked for, the interval of the rate held the true one in 90 cases of 100 or more, that of the threshold
        in 80 to 95. The median rate was 2 % at most; on average 4 % at most were rejected with 10 images, 3 % with 30,
        1.6 % with 100 and 1.2 % with 300, since a tail judged too short costs more than one judged too long gains.

        Raises:
            FlawmapError: the rate is not within the tail, or the threshold is no finite float32.
        """
        if not 0 < rate < self.share:
            raise FlawmapError(
                f"a false-reject rate of {rate:.3g} does not lie in the tail of {self.images} scores: ask for less "
                f"than {self.share:.3g}, or keep the conformal threshold"
            )
        above = float(_quantile(np.float64(rate / self.share), np.float64(self.shape), np.float64(self.scale)))
        if abs(self.start + above) > _LARGEST:
            raise FlawmapError("the scores are too large for their tail to be estimated: keep the conformal threshold")
        rates = self._begins * _survival(np.float64(above), self._shapes, self._scales)
        values = self.start + _quantile(np.minimum(rate / self._begins, 1.0), self._shapes, self._scales)
        return TailThreshold(float(np.float32(self.start + above)), _interval(values), _interval(rates))


def fit_tail(scores: NDArray[np.float32]) -> Tail:
    """The upper tail of the scores (n,) of good images.

    The tail is the upper half of the scores, and of more than 64 images the largest 4 sqrt(n): few enough to be a tail,
    enough to be fitted. Probability-weighted moments rather than maximum likelihood, because of the 5 to 70 exceedances
    that 10 to 300 images leave: their errors are smaller below some 500 (Hosking & Wallis 1987), they always exist, and
    they need no search that could fail. The shape is kept within -1 (uniform) and 0.5 (beyond which they lose their
    variance). Equal scores give an equal tail; shifted and scaled scores a shifted and scaled one.

    Raises:
        FlawmapError: there are fewer than `FEWEST` scores, they are all alike, or the fit is rejected: the distance of
            Kolmogorov and Smirnov is larger than in all but `SURE` of as many exceedances drawn from the fit and
            fitted again (Lilliefors' correction by parametric bootstrap).
    """
    n = len(scores)
    if n < FEWEST:
        raise FlawmapError(
            f"the tail of {counted(n, 'calibration score')} cannot be estimated: calibrate on at least "
            f"{FEWEST} good images, or keep the conformal threshold"
        )
    k = min(n // 2, round(4 * math.sqrt(n)))
    ordered = np.sort(scores.astype(np.float64))
    start = float(ordered[n - k - 1])
    over = ordered[n - k :] - start  # (k,) ascending
    unit = float(over.mean())
    if over[0] == over[-1]:
        raise FlawmapError(
            f"the {k} largest of {n} calibration scores are all alike, so their tail cannot be estimated: calibrate on "
            "other good images, or keep the conformal threshold"
        )
    over = over / unit
    shape, scale = _fitted(over[None])
    rng = np.random.default_rng(0)
    drawn = np.sort(_quantile(1 - rng.random((_REPEATS, k)), shape[0], scale[0]), axis=1)
    shapes, scales = _fitted(drawn)
    distances = _distance(drawn, shapes, scales)
    worse = int((distances >= _distance(over[None], shape, scale)).sum())
    probability = (1 + worse) / (1 + _REPEATS)
    if probability < SURE:
        raise FlawmapError(
            f"the {k} largest of {n} calibration scores do not follow a generalised Pareto tail (Kolmogorov-Smirnov, "
            f"p = {probability:.2g}): look at the most unusual good images, or keep the conformal threshold"
        )
    begins = rng.beta(k + 1, n - k, _REPEATS)
    return Tail(n, k, start, float(shape[0]), float(scale[0]) * unit, probability, begins, shapes, scales * unit)


def _fitted(ascending: Values) -> tuple[Values, Values]:
    """Shape and scale (R,) of exceedances (R, k), by their first two probability-weighted moments."""
    k = ascending.shape[1]
    mean = ascending.mean(axis=1)
    spread = 2 * (ascending * (np.arange(k) / (k - 1))).mean(axis=1) - mean  # the second L-moment
    with np.errstate(divide="ignore"):
        shape = np.clip(2 - mean / spread, *_SHAPES)
    return shape, (1 - shape) * mean


def _distance(ascending: Values, shape: Values, scale: Values) -> Values:
    """How far the empirical distribution of exceedances (R, k) lies from that of the fits, at most: (R,)."""
    k = ascending.shape[1]
    below = 1 - _survival(ascending, shape[:, None], scale[:, None])
    steps = np.arange(k + 1) / k
    return np.asarray(np.maximum((steps[1:] - below).max(axis=1), (below - steps[:-1]).max(axis=1)))


def _survival(above: Values | np.float64, shape: Values | np.float64, scale: Values | np.float64) -> Values:
    """The share of exceedances that reach so far above the start."""
    safe = _not_zero(shape)
    base = np.maximum(1 + safe * above / scale, 0.0)
    with np.errstate(divide="ignore"):
        return np.asarray(np.exp(-np.log(base) / safe))


def _quantile(share: Values | np.float64, shape: Values | np.float64, scale: Values | np.float64) -> Values:
    """How far above the start a share of exceedances reaches."""
    safe = _not_zero(shape)
    return np.asarray(scale * np.expm1(-safe * np.log(share)) / safe)


def _not_zero(shape: Values | np.float64) -> Values:
    """An exponential tail as one that is almost so, so that one formula holds for all shapes."""
    return np.where(np.abs(shape) < 1e-9, 1e-9, shape)


def _interval(values: Values) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return float(low), float(high)
