"""From the scores of good images to p-values, thresholds and what they promise.

Split conformal prediction (Vovk, Gammerman & Shafer 2005; Bates et al. 2023 for outlier detection) and the exact
binomial interval (Clopper & Pearson 1934). Both hold for parts like the calibration parts, and for nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from flawmap.judging.tail import Tail, fit_tail
from flawmap.text import counted

PROMISES = ("marginal", "confidence")
GUARANTEES = (*PROMISES, "tail")
MODES = ("holdout", "loo", "crossfit", "folder")
_PROMISING = ("holdout", "folder")


@dataclass(frozen=True)
class Threshold:
    """A score at and above which a part is called a defect, and what is known of its false rejects.

    Attributes:
        value: the threshold, a float32 value.
        rate: the false-reject rate stated for it, in 0..1.
        requested: the rate that was asked for; None where the user gave the threshold itself.
        guarantee: "marginal" (on average over calibration sets), "confidence" (with 95 % confidence), "estimate"
            (cross-fitted scores, which promise nothing), "tail" (estimated from the upper tail of the scores, which
            promises nothing either) or "none".
        images: how many calibration scores there are; 0 where the user gave the threshold and there are none.
        upper: the Clopper-Pearson upper bound on the rate with 95 % confidence; after cross-fitting an estimate too.
        missing: how many more good images the requested rate needs; 0 where it is kept.
        interval: of the rate, with 95 % confidence; of "tail" only.
    """

    value: float
    rate: float
    requested: float | None
    guarantee: str
    upper: float
    images: int
    missing: int
    interval: tuple[float, float] | None = None

    @property
    def highest(self) -> float:
        """The rate that a measured one must clearly exceed to contradict this one."""
        return self.rate if self.interval is None else self.interval[1]

    def describe(self) -> str:
        """One or two sentences for the user."""
        return self._described(", which promises nothing")

    def describe_again(self) -> str:
        """The same beside another threshold that has said what an estimate does not promise."""
        return self._described("")

    @property
    def promises(self) -> bool:
        """Whether its rate is promised, and not estimated or counted."""
        return self.guarantee in PROMISES

    def _described(self, caveat: str) -> str:
        good, bound = counted(self.images, "good image"), f"95 % upper bound {self.upper:.2%}"
        if not self.images:
            return f"threshold {self.value:.6g}, given by the user: no good images tell how many of them reach it"
        if self.guarantee == "none":
            reach = "reaches" if self.images == 1 else "reach"
            return f"threshold {self.value:.6g}, given by the user: {self.rate:.2%} of {good} {reach} it ({bound})"
        if self.interval is not None:
            low, high = self.interval
            return (
                f"threshold {self.value:.6g} from {good}: about {self.rate:.2%} of good parts are rejected "
                f"[{low:.2%}, {high:.2%}]: an estimate from the upper tail of the scores (generalised Pareto "
                f"distribution, 95 % interval){caveat}"
            )
        kept = {
            "marginal": f"at most {self.rate:.2%} of good parts are rejected on average (conformal; {bound})",
            "confidence": f"with 95 % confidence at most {self.rate:.2%} of good parts are rejected (Clopper-Pearson)",
            "estimate": f"about {self.rate:.2%} of good parts are rejected ({bound}): an estimate{caveat}",
        }[self.guarantee]
        text = f"threshold {self.value:.6g} from {good}: {kept}"
        if self.missing:
            more = counted(self.missing, "more good image is", "more good images are")
            text += f". {self.requested:.2%} was asked for: {more} needed for it"
        return text


@dataclass(frozen=True)
class Decisive:
    """The calibration image that sets a threshold: the highest score that stays below it.

    Attributes:
        image: its index.
        score: its score.
        without: where the threshold would lie without this image.
    """

    image: int
    score: float
    without: float


@dataclass(frozen=True)
class Calibration:
    """Scores of good images the model was not fitted on.

    Attributes:
        scores: (n,) float32, of the images.
        peaks: (n,) float32, the largest value of each image's anomaly map; empty for methods without a map.
        mode: "holdout" or "folder": the images were not learnt from. "loo" or "crossfit": each was scored by a method
            without it, or without some of them, which is not the method that judges, so nothing is promised.
    """

    scores: NDArray[np.float32]
    peaks: NDArray[np.float32]
    mode: str

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {self.mode!r}")
        if self.scores.ndim != 1 or len(self.scores) == 0 or not np.isfinite(self.scores).all():
            raise ValueError("calibration needs a one-dimensional array of at least one finite score")
        if self.peaks.ndim != 1 or len(self.peaks) not in (0, len(self.scores)) or not np.isfinite(self.peaks).all():
            raise ValueError("calibration needs as many finite peaks as scores, or none")

    def p_value(self, score: float) -> float:
        """(1 + #{calibration scores >= score}) / (n + 1), in (0, 1]; small for abnormal images."""
        return p_value(self.scores, score)

    def threshold(self, rate: float = 0.01, guarantee: str = "marginal") -> Threshold:
        """The lowest threshold that keeps the rate, or the strictest one there is: see `threshold_for`.

        With "tail", where the fitted tail of the scores has that rate: see `flawmap.judging.tail`.

        Raises:
            ValueError: as `threshold_for`.
            FlawmapError: with "tail", it cannot be fitted, or the rate is too high for it.
        """
        if guarantee == "tail":
            return self._tail_threshold(rate)
        return threshold_for(self.scores, rate, guarantee, promised=self.mode in _PROMISING)

    @cached_property
    def tail(self) -> Tail:
        """The upper tail of the scores, fitted when it is first asked for.

        Raises:
            FlawmapError: it cannot be fitted.
        """
        return fit_tail(self.scores)

    def _tail_threshold(self, rate: float) -> Threshold:
        found = self.tail.threshold(rate)
        n, reached = len(self.scores), int((self.scores >= np.float32(found.value)).sum())
        return Threshold(found.value, rate, rate, "tail", upper_bound(reached, n), n, 0, found.rates)

    def decisive(self, rate: float = 0.01, guarantee: str = "marginal") -> Decisive | None:
        """The image that sets the threshold of `threshold_for`; None where there is but one."""
        if len(self.scores) == 1:
            return None
        below = self.scores < np.float32(threshold_for(self.scores, rate, guarantee).value)
        image = int(np.argmax(np.where(below, self.scores, -np.inf)))
        without = threshold_for(np.delete(self.scores, image), rate, guarantee)
        return Decisive(image, float(self.scores[image]), without.value)

    def threshold_at(self, value: float) -> Threshold:
        """A threshold the user names, with the share of calibration images that reach it."""
        rejected = int((self.scores >= np.float32(value)).sum())
        n = len(self.scores)
        return Threshold(float(np.float32(value)), rejected / n, None, "none", upper_bound(rejected, n), n, 0)

    def pixel_threshold(self, rate: float = 0.01) -> Threshold:
        """Where regions are cut: the conformal quantile of the maps' maxima, so a good image rarely shows a region."""
        return threshold_for(self.peaks, rate, "marginal", promised=self.mode in _PROMISING)


def uncalibrated(value: float) -> Threshold:
    """A threshold the user names where no scores of good images say what it rejects: any rate is possible."""
    return Threshold(float(np.float32(value)), 1.0, None, "none", 1.0, 0, 0)


def p_value(scores: NDArray[np.float32], score: float) -> float:
    """The conformal p-value of `score` among the `scores` (n,) of good images."""
    return (1 + int((scores >= np.float32(score)).sum())) / (len(scores) + 1)


def threshold_for(
    scores: NDArray[np.float32], rate: float, guarantee: str = "marginal", *, promised: bool = True
) -> Threshold:
    """The lowest threshold that lets at most `rate` of good parts be rejected.

    marginal: `score >= threshold` exactly where the conformal p-value is at most `rate`; needs n >= 1/rate - 1.
    confidence: the most calibration scores may reach it whose Clopper-Pearson bound stays within `rate`; 299 images for
    1 %. Where `rate` cannot be kept the threshold lies just above the largest score and states its own rate.

    Raises:
        ValueError: `rate` outside (0, 1) or an unknown guarantee.
    """
    if not 0 < rate < 1:
        raise ValueError(f"a false-reject rate lies between 0 and 1, got {rate}")
    if guarantee not in PROMISES:
        raise ValueError(f"guarantee must be one of {PROMISES}, got {guarantee!r}")
    n = len(scores)
    if guarantee == "marginal":
        # A hair of slack, so that 0.01 with 99 images counts as 1/100 in spite of binary fractions.
        allowed = math.floor(rate * (n + 1) * (1 + 1e-12)) - 1
        needed = math.ceil((1 - 1e-12) / rate - 1)
    else:
        allowed = _largest(lambda k: upper_bound(k, n) <= rate, n)
        needed = math.ceil(math.log(0.05) / math.log1p(-rate))
    over = max(allowed, 0)
    value = float(np.nextafter(np.sort(scores)[::-1][over], np.float32(np.inf), dtype=np.float32))
    reached = int((scores >= np.float32(value)).sum())
    upper = upper_bound(reached, n)
    stated = upper if guarantee == "confidence" else (over + 1) / (n + 1)
    kept = guarantee if promised else "estimate"
    return Threshold(value, stated, rate, kept, upper, n, max(0, needed - n))


def _largest(holds: Callable[[int], bool], n: int) -> int:
    """The largest k in 0..n-1 for which the monotone `holds(k)` is true; -1 if none."""
    low, high = -1, n - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def upper_bound(events: int, n: int, confidence: float = 0.95) -> float:
    """One-sided Clopper-Pearson: at this rate, `events` or fewer in `n` are seen in 1 - confidence of all cases."""
    return 1.0 if events >= n else _solve(lambda p: binomial_cdf(events, n, p), 1 - confidence)


def binomial_interval(events: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The two-sided Clopper-Pearson interval of a rate seen `events` times in `n`; (0, 1) where n is 0."""
    if not 0 <= events <= n:
        raise ValueError(f"events must lie in 0..{n}, got {events}")
    tail = (1 - confidence) / 2
    low = 0.0 if events == 0 else _solve(lambda p: binomial_cdf(events - 1, n, p), 1 - tail)
    high = 1.0 if events == n else _solve(lambda p: binomial_cdf(events, n, p), tail)
    return low, high


def binomial_cdf(k: int, n: int, p: float) -> float:
    """P(X <= k) for X ~ Binomial(n, p), summed in logarithms."""
    if p <= 0:
        return 1.0
    if p >= 1:
        return 1.0 if k >= n else 0.0
    i = np.arange(k + 1)
    log_factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    terms = log_factorials[n] - log_factorials[i] - log_factorials[n - i] + i * math.log(p) + (n - i) * math.log1p(-p)
    return float(min(1.0, np.exp(terms).sum()))


def _solve(falling: Callable[[float], float], target: float) -> float:
    """The p in 0..1 at which a function that falls from 1 to 0 reaches `target`."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > target else (low, middle)
    return high
