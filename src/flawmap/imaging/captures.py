"""Captures that cannot be judged: black, over-exposed, blurred, empty, or of another part. Needs numpy and Pillow only.

A method that has learnt good parts scores a failed capture as it may; it has to be told apart before. Two things tell
it, both learnt from good images alone: `capture_statistics` of the pixels, each with a limit that no defect reaches
(a stain is dark, but it does not blacken half the picture), and, for another part, an embedding of the whole image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flawmap.errors import FlawmapError
from flawmap.imaging.arrays import as_pixels

SIDE = 128
"""Longer side in pixels of the reduced image that sharpness and detail are measured on."""

_BLACK, _WHITE = 0.02, 0.995  # of white: pixels at or below and at or above are clipped
_TAIL = 1e-4  # share of good images beyond a limit, if their tails fall as an exponential's
# Distances from the mean direction of good images: 1 is a right angle to it, about where unrelated pictures lie.
_FAR, _FARTHER = 0.75, 1.35


@dataclass(frozen=True)
class _Statistic:
    """One number of a capture: its limits lie `least` or more from the median of good images, a factor if `ratio`.

    The least distances are such that a defect of any colour over 30 % of the image stays within them. `low` and `high`
    say what lies beyond, and what to do; a side without words is not looked at.
    """

    name: str
    least: float
    low: tuple[str, str] | None = None
    high: tuple[str, str] | None = None
    ratio: bool = False


_LIGHT = "check the light and the exposure"
_COLOUR = ("the colour is off", "check the light, the white balance and the part")
_STATISTICS = (
    _Statistic("black share", 0.5, high=("black", "check the light and the lens cap")),
    _Statistic("white share", 0.4, high=("over-exposed", _LIGHT)),
    _Statistic("brightness", 0.3, low=("too dark", _LIGHT), high=("too bright", _LIGHT)),
    _Statistic("sharpness", 1.6, low=("blurred", "check the focus"), ratio=True),
    _Statistic("detail", 3.0, low=("nothing to be seen", "check that the part is in view"), ratio=True),
    _Statistic("red-green", 0.4, low=_COLOUR, high=_COLOUR),
    _Statistic("yellow-blue", 0.4, low=_COLOUR, high=_COLOUR),
)
STATISTICS = tuple(statistic.name for statistic in _STATISTICS)
"""Names of the values of `capture_statistics`, in order."""


def capture_statistics(pixels: ArrayLike, white: int = 65535) -> NDArray[np.float64]:
    """What tells a failed capture, whatever the part.

    - black share, white share: of pixels whose brightest colour is clipped, counted on the image as it is, on a grid of
      at most `SIDE`.
    - brightness: mean, 0 to 1.
    - sharpness: energy of the gradient at `SIDE` pixels over that at half of them. A step has 0.5 to 1, white
      noise 4 and a smooth shade 0.25, whatever their contrast. It is measured after the reduction because resizing
      for the model hides slighter blur from the model too, and because the grain of a large image, which stays sharp
      when the lens does not, is averaged out. Blur by 1 % of the side and more lowers it.
    - detail: root mean square of the gradient, in units of white per reduced pixel.
    - red-green, yellow-blue: mean of R - G and of (R + G) / 2 - B, -1 to 1.

    Args:
        pixels: an image as `flawmap.imaging.arrays.as_pixels` takes it.
        white: the value that counts as white in 16-bit images.

    Returns:
        float64 (K,), named by `STATISTICS`.

    Raises:
        ImageError: as `as_pixels`.
    """
    array = as_pixels(pixels)
    top = 255 if array.dtype == np.uint8 else white if array.dtype == np.uint16 else 1
    if array.dtype == np.uint16:
        array = np.minimum(array, np.uint16(top))
    height, width = array.shape[:2]
    grid = array[:: -(-height // SIDE), :: -(-width // SIDE)]
    # Plane by plane: over a last axis of three, NumPy's maximum and sums take ten times as long.
    brightest = grid if grid.ndim == 2 else np.maximum(np.maximum(grid[..., 0], grid[..., 1]), grid[..., 2])
    black, clipped = _BLACK * top, _WHITE * top
    if top > 1:  # a limit that is no integer would turn every pixel into a float
        black, clipped = math.floor(black), math.ceil(clipped)
    factor = min(1.0, SIDE / max(height, width))
    down, across = (_Runs.of(side, max(4, round(side * factor))) for side in (height, width))
    lines = down.sums(array.reshape(height, -1), 0).reshape(-1, *array.shape[1:])  # (rows, W[, 3])
    means = lines.sum(0, dtype=np.float32).reshape(width, -1).mean(0) / (down.weights.sum() * top)  # (1,) or (3,)
    red, green, blue = np.broadcast_to(means, 3).tolist()
    total = lines if lines.ndim == 2 else lines[..., 0] + lines[..., 1] + lines[..., 2]  # (rows, W)
    grey = across.sums(total, 1).astype(np.float32)  # (rows, columns)
    grey /= down.weights[:, None] * np.float32(len(means) * top)
    grey /= across.weights
    fine = _gradient_energy(grey)
    even = grey[: len(grey) // 2 * 2, : grey.shape[1] // 2 * 2]
    half = even[::2] + even[1::2]
    half = (half[:, ::2] + half[:, 1::2]) / 4
    return np.array(
        [
            np.count_nonzero(brightest <= black) / brightest.size,
            np.count_nonzero(brightest >= clipped) / brightest.size,
            (red + green + blue) / 3,
            (fine + 1e-6) / (_gradient_energy(half) + 1e-6),
            math.sqrt(fine),
            red - green,
            (red + green) / 2 - blue,
        ]
    )


@dataclass(frozen=True)
class _Runs:
    """A side cut into runs of whole pixels, as even as can be, each of which becomes one pixel.

    Pillow's box filter has the same runs, but takes several times as long and rounds to integers on the way.

    Attributes:
        pixels: of each run one (count,), then of each run another, and so on.
        last: the last of each run, where some are longer; None where all are of one length.
        more: 1 for the longer ones, else 0 (count,).
        weights: how many of its pixels count in each run (count,).
    """

    pixels: tuple[NDArray[np.int64], ...]
    last: NDArray[np.int64] | None
    more: NDArray[np.uint8]
    weights: NDArray[np.float32]

    @classmethod
    @lru_cache(64)
    def of(cls, there: int, count: int) -> _Runs:
        """For a side of `there` pixels that shall have `count`; the same ones again where that is more."""
        every, none = np.arange(count), np.zeros(count, np.uint8)
        if there <= count:
            return cls(((2 * every + 1) * there // (2 * count),), None, none, np.ones(count, np.float32))
        first = (2 * every * there + count) // (2 * count)
        after = np.append(first[1:], there)
        if there < 2 * count:  # one pixel or two: one counts twice
            return cls((first, after - 1), None, none, np.full(count, 2, np.float32))
        least = there // count  # and no run is longer by more than one
        more = (after - first > least).astype(np.uint8)
        last = after - 1 if more.any() else None
        return cls(tuple(first + i for i in range(least)), last, more, (after - first).astype(np.float32))

    def sums(self, array: NDArray[Any], axis: int) -> NDArray[Any]:
        """(there, M) -> (count, M) over axis 0, or (M, there) -> (M, count) over axis 1."""
        # Up to 85 pixels of three colours fit 16 bits, with which NumPy adds twice as fast.
        small = array.dtype == np.uint8 and len(self.pixels) < 85
        total: NDArray[Any] = array.take(self.pixels[0], axis).astype(np.uint16 if small else np.float32)
        for pixels in self.pixels[1:]:
            total += array.take(pixels, axis)
        if self.last is not None:
            total += array.take(self.last, axis) * (self.more[:, None] if axis == 0 else self.more)
        return total


def _gradient_energy(grey: NDArray[np.floating[Any]]) -> float:
    down, across = grey[1:] - grey[:-1], grey[:, 1:] - grey[:, :-1]
    # Not by a dot product, which would wake NumPy's threads.
    return float(np.einsum("hw,hw", down, down) / down.size + np.einsum("hw,hw", across, across) / across.size)


@dataclass(frozen=True)
class CaptureLimits:
    """Within which statistics a capture can be judged. Made by `learn`.

    Attributes:
        low, high: limits of each statistic, (K,); some are looked at on one side only.
        good_low, good_high: the range of the good images, (K,), for the reason.
        centre: mean of the good images' embeddings at unit length, (M,); empty where there are none.
        distance: largest distance of an embedding at unit length from it.
        good_distance: that of the good images, each from the mean of the others.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    good_low: tuple[float, ...]
    good_high: tuple[float, ...]
    centre: tuple[float, ...] = ()
    distance: float = 0.0
    good_distance: float = 0.0

    @classmethod
    def learn(cls, statistics: ArrayLike, embeddings: ArrayLike | None = None) -> CaptureLimits:
        """The limits from good images alone.

        On either side of its median a statistic may go as far as the most extreme good image, times what an
        exponential tail adds from there to one image in 10,000; and in any case so far that no defect gets there.
        From 100 images on the second most extreme counts instead, and one further for each further hundred, so that
        one bad image in a hundred is borne. An embedding may be 0.75 from the mean of the good ones, or 1.35 times as
        far as they are.

        Args:
            statistics: (N, K), from `capture_statistics`, N at least 1.
            embeddings: (N, M), of any scale: features of a frozen backbone, averaged over each image. Levels of
                medium depth, side by side, serve best: a defect moves them little and another part far. Where features
                are never negative, all pictures point one way, and another part is rarely told by them.

        Raises:
            FlawmapError: a value is not finite.
        """
        values = np.asarray(statistics, dtype=np.float64)
        if values.ndim != 2 or values.shape[1] != len(STATISTICS) or len(values) == 0:
            raise ValueError(f"statistics must have shape (N, {len(STATISTICS)}), N at least 1, got {values.shape}")
        if not np.isfinite(values).all():
            raise FlawmapError("capture statistics of good images are not finite; look for damaged images among them")
        count = len(values)
        skipped = count // 100
        stretch = math.log(_TAIL) / math.log((1 + skipped) / count) if count > 1 else 1.0
        low, high = np.empty(len(STATISTICS)), np.empty(len(STATISTICS))
        for i, statistic in enumerate(_STATISTICS):
            ordered = np.sort(_scale(values[:, i], statistic))
            median = float(np.median(ordered))
            least = math.log(statistic.least) if statistic.ratio else statistic.least
            below = max(least, stretch * (median - ordered[skipped]))
            above = max(least, stretch * (ordered[-1 - skipped] - median))
            low[i], high[i] = median - below, median + above
            if statistic.ratio:
                low[i], high[i] = math.exp(low[i]), math.exp(high[i])
        limits = cls(_tuple(low), _tuple(high), _tuple(values.min(0)), _tuple(values.max(0)))
        if embeddings is None:
            return limits
        unit = _unit(np.asarray(embeddings, dtype=np.float64))
        if unit.ndim != 2 or len(unit) != count:
            raise ValueError(f"embeddings must have shape ({count}, M), got {unit.shape}")
        if not np.isfinite(unit).all():
            raise FlawmapError("embeddings of good images are not finite; look for damaged images among them")
        centre = unit.mean(0)
        left_out = count / max(count - 1, 1)  # the distance from the mean of the others is so many times longer
        apart = np.sort(np.linalg.norm(unit - centre, axis=1)) * left_out
        distance = max(_FAR, _FARTHER * float(apart[-1 - skipped]))
        return replace(limits, centre=_tuple(centre), distance=distance, good_distance=float(apart[-1]))

    def joined(self, other: CaptureLimits) -> CaptureLimits:
        """Limits that let pass what either does: of the same part, learnt from further good images."""
        apart = float(np.linalg.norm(np.array(self.centre) - np.array(other.centre))) if self.centre else 0.0
        return CaptureLimits(
            tuple(map(min, self.low, other.low)),
            tuple(map(max, self.high, other.high)),
            tuple(map(min, self.good_low, other.good_low)),
            tuple(map(max, self.good_high, other.good_high)),
            self.centre,
            max(self.distance, apart + other.distance),
            max(self.good_distance, apart + other.good_distance),
        )

    def reason(self, statistics: ArrayLike, embedding: ArrayLike | None = None) -> str | None:
        """Why a capture cannot be judged, in one line; None where it can.

        Args:
            statistics: (K,), from `capture_statistics`.
            embedding: (M,), looked at where embeddings were learnt.
        """
        values = np.asarray(statistics, dtype=np.float64)
        for i, statistic in enumerate(_STATISTICS):
            value = float(values[i])
            # Written so that NaN fails.
            words = (None if value >= self.low[i] else statistic.low) or (
                None if value <= self.high[i] else statistic.high
            )
            if words:
                good = f"{self.good_low[i]:.3g} to {self.good_high[i]:.3g}"
                return f"{words[0]}: {statistic.name} {value:.3g}, good images {good}; {words[1]}"
        if self.centre and embedding is not None:
            away = float(np.linalg.norm(_unit(np.asarray(embedding, dtype=np.float64)) - np.array(self.centre)))
            if not away <= self.distance:
                return (
                    f"another part: distance {away:.3g}, good images up to {self.good_distance:.3g}; "
                    "check the part, its position and the camera"
                )
        return None

    def to_json(self) -> dict[str, Any]:
        """The limits as plain JSON types."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, settings: Any) -> CaptureLimits:
        """Undoes `to_json`.

        Raises:
            FlawmapError: a value is missing, unknown, of another kind, or not finite.
        """
        lists = ("low", "high", "good_low", "good_high", "centre")
        numbers = ("distance", "good_distance")
        if not isinstance(settings, dict) or set(settings) != {*lists, *numbers}:
            raise FlawmapError("capture limits: expected " + ", ".join([*lists, *numbers]) + "; train the model anew")
        for name in lists:
            value = settings[name]
            fits = isinstance(value, list) and (name == "centre" or len(value) == len(STATISTICS))
            if not fits or not all(_is_finite(entry) for entry in value):
                raise FlawmapError(
                    f"capture limits: {name} is not a list of {len(STATISTICS) if name != 'centre' else 'M'} numbers; "
                    "train the model anew"
                )
        for name in numbers:
            if not _is_finite(settings[name]):
                raise FlawmapError(f"capture limits: {name} is not a number; train the model anew")
        values = {name: tuple(map(float, settings[name])) for name in lists}
        return cls(**values, **{name: float(settings[name]) for name in numbers})  # type: ignore[arg-type]


def _scale(values: NDArray[np.float64], statistic: _Statistic) -> NDArray[np.float64]:
    return np.log(np.maximum(values, 1e-6)) if statistic.ratio else values


def _tuple(values: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(values.tolist())


def _unit(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(lengths == 0, 1, lengths)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
