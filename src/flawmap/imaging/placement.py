"""The windows on one image: model inputs out of its pixels, and maps back onto them. Needs numpy and Pillow only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flawmap.imaging.windows import Window, clipped, content_slices, cut_window, resize_window


class Rigid(Protocol):
    """What a `Placement` asks of a registration; `flawmap.imaging.rigid.Alignment` gives it."""

    @property
    def template_size(self) -> tuple[int, int]:
        """(height, width) of the template's frame."""

    @property
    def valid(self) -> NDArray[np.bool_]:
        """(Ht, Wt), True where the frame shows the image."""

    @property
    def quality(self) -> float:
        """In [-1, 1], how well the two agree."""

    def warp(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """(H, W) or (H, W, 3) -> (Ht, Wt) or (Ht, Wt, 3) in the template's frame."""

    def unwarp(self, anomaly_map: NDArray[np.float32]) -> NDArray[np.float32]:
        """(Ht, Wt) -> (H, W) on the original pixels, NaN where the frame does not reach."""


@dataclass(frozen=True, eq=False)
class Placement:
    """The windows on one image; made by `Geometry.place`. T is the number of windows, (h, w) the input size.

    Attributes:
        size: (H, W) of the image.
        frame: (height, width) of the picture on which the windows lie: the image, or the aligned image.
        windows: row by row.
        input_size: (h, w).
        region: bool, of the frame's size, True where pixels are scored; None where all are.
        alignment: of the image to the template; None without registration.
    """

    size: tuple[int, int]
    frame: tuple[int, int]
    windows: tuple[Window, ...]
    input_size: tuple[int, int]
    region: NDArray[np.bool_] | None = field(default=None, repr=False)
    alignment: Rigid | None = field(default=None, repr=False)

    def inputs(self, pixels: NDArray[Any]) -> Iterator[NDArray[Any]]:
        """The resized pixels of each window, padded with the image's edge.

        Args:
            pixels: uint8 (H, W) or (H, W, 3), or one float32 plane (H, W).

        Yields:
            (h, w) or (h, w, 3) of the same type, T of them.
        """
        if self.alignment is not None:
            pixels = self.alignment.warp(pixels)
        for window in self.windows:
            yield resize_window(pixels, window, self.input_size)

    def inside(self) -> NDArray[np.bool_]:
        """(T, h, w), True where the centre of a model pixel lies on the image and in the region of interest."""
        return np.stack(list(self.each_inside()))

    def each_inside(self) -> Iterator[NDArray[np.bool_]]:
        """`inside`, window by window."""
        return (self._sampled(self.region, window) for window in self.windows)

    def project(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """A bool (H, W) mask in the model inputs, by nearest neighbour: (T, h, w), False in the padding."""
        mask = mask if self.alignment is None else self.alignment.warp(mask)
        return np.stack([self._sampled(mask, window) for window in self.windows])

    def _sampled(self, mask: NDArray[np.bool_] | None, window: Window) -> NDArray[np.bool_]:
        """A mask of the frame in a model input (h, w), by nearest neighbour; None is True everywhere."""
        sampled = np.zeros(self.input_size, np.bool_)
        content = content_slices(window, self.frame, self.input_size)
        if mask is None:
            sampled[content] = True
        else:
            cut = cut_window(mask.view(np.uint8), window, self.input_size, Image.Resampling.NEAREST)
            sampled[content] = cut[content]
        return sampled

    def lay_back(self, maps: Iterable[NDArray[np.floating[Any]]]) -> NDArray[np.float32]:
        """Maps of the model inputs on the original pixels: undoes `inputs`.

        Bilinear with half-pixel centres, as `preprocessing.lay_back`. Where windows overlap, each counts the less the
        nearer its border is, along a linear ramp over the overlap; the weights sum to one. Map pixels that are not
        `inside` are not read.

        Args:
            maps: T of (h, w). Taken one at a time, so an iterator need not hold them all.

        Returns:
            float32 (H, W), NaN where nothing was scored.
        """
        bands = list(self.lay_back_rows(maps))
        return bands[0] if len(bands) == 1 else np.concatenate(bands)

    def lay_back_rows(self, maps: Iterable[NDArray[np.floating[Any]]]) -> Iterator[NDArray[np.float32]]:
        """`lay_back` in bands of rows (r, W), from the top, of which a large image need not hold all.

        They end where the next row of windows begins; with an alignment there is one only.
        """
        if self.alignment is None:
            yield from self._in_frame(maps)
            return
        yield self.alignment.unwarp(np.concatenate(list(self._in_frame(maps))))

    def _in_frame(self, maps: Iterable[NDArray[np.floating[Any]]]) -> Iterator[NDArray[np.float32]]:
        """The maps on the frame, in bands of rows."""
        rows = _ramps({(w.top, w.bottom) for w in self.windows}, self.frame[0])
        columns = _ramps({(w.left, w.right) for w in self.windows}, self.frame[1])
        insides = repeat(None) if self.region is None else self.each_inside()
        done = 0  # rows
        laid = np.empty((0, self.frame[1]), np.float32)  # the rows from there on that have begun

        def until(end: int) -> NDArray[np.float32]:
            band = laid[: end - done]
            if len(band) < end - done:
                band = np.concatenate([band, _nowhere(end - done - len(band), self.frame[1])])
            if self.region is not None:
                band[~self.region[done:end]] = np.nan
            return band

        for (window, values), inside in zip(zip(self.windows, maps, strict=True), insides, strict=False):
            down, across = rows[window.top, window.bottom], columns[window.left, window.right]
            if down.pixels.start > done:
                yield until(down.pixels.start)
                laid = laid[down.pixels.start - done :].copy()
                done = down.pixels.start
            if down.pixels.stop > done + len(laid):
                laid = np.concatenate([laid, _nowhere(down.pixels.stop - done - len(laid), self.frame[1])])
            tile = self._enlarge(
                np.asarray(values, np.float32),
                window,
                (down.pixels, across.pixels),
                inside,
            )
            target = laid[down.pixels.start - done : down.pixels.stop - done, across.pixels]
            fresh = np.isnan(target)
            if fresh.all():
                target[:] = tile
                continue
            # The share of this window among those laid so far, itself included. Weighing in by differences keeps
            # constant maps exactly constant, and needs no picture of the weights' sums.
            share = down.weight[:, None] * across.weight
            share /= down.before[:, None] + down.weight[:, None] * (across.before + across.weight)
            blended = target + share * (tile - target)
            target[:] = np.where(fresh, tile, np.where(np.isnan(tile), target, blended))
        if done < self.frame[0]:
            yield until(self.frame[0])

    def _enlarge(
        self,
        values: NDArray[np.float32],
        window: Window,
        pixels: tuple[slice, slice],
        inside: NDArray[np.bool_] | None,
    ) -> NDArray[np.float32]:
        """One map (h, w) at the frame's pixels (rows, columns); NaN where no pixel `inside` is near."""
        content = content_slices(window, self.frame, self.input_size)
        values = values[content]
        left, top, right, bottom = clipped(window, self.frame)
        heights = (pixels[0].start - top, pixels[0].stop - top, bottom - top)
        widths = (pixels[1].start - left, pixels[1].stop - left, right - left)
        seen = None if inside is None else inside[content]
        if seen is None or seen.all():
            return _resample(values, heights, widths)
        weights = _resample(seen.astype(np.float32), heights, widths)
        total = _resample(np.where(seen, values, np.float32(0)), heights, widths)
        return np.divide(total, weights, out=np.full_like(total, np.nan), where=weights > 1e-6)


def _nowhere(height: int, width: int) -> NDArray[np.float32]:
    return np.full((height, width), np.nan, np.float32)


class _Ramp(NamedTuple):
    """The weights of one row (or column) of windows over the pixels that it covers."""

    pixels: slice
    weight: NDArray[np.float32]  # (n,), positive; over all windows they sum to one at each pixel
    before: NDArray[np.float32]  # (n,), the sum of the weights of the windows before


def _ramps(spans: set[tuple[float, float]], length: int) -> dict[tuple[float, float], _Ramp]:
    """The weights of windows that span (start, end) of one side of the frame, `length` pixels long."""
    ordered = sorted(spans)
    raw: list[tuple[slice, NDArray[np.float64]]] = []
    total = np.zeros(length)
    for i, (start, stop) in enumerate(ordered):
        # Of the pixels whose centre the window covers, none lies on its border, so no weight is zero.
        pixels = slice(math.ceil(max(start, 0) - 0.5), math.ceil(min(stop, length) - 0.5))
        centres = np.arange(pixels.start, pixels.stop) + 0.5
        weight = np.ones(len(centres))
        if i > 0 and ordered[i - 1][1] > start:
            weight = np.minimum(weight, (centres - start) / (ordered[i - 1][1] - start))
        if i + 1 < len(ordered) and ordered[i + 1][0] < stop:
            weight = np.minimum(weight, (stop - centres) / (stop - ordered[i + 1][0]))
        total[pixels] += weight
        raw.append((pixels, weight))
    ramps: dict[tuple[float, float], _Ramp] = {}
    done = np.zeros(length)
    for span, (pixels, weight) in zip(ordered, raw, strict=True):
        weight = weight / total[pixels]
        ramps[span] = _Ramp(pixels, weight.astype(np.float32), done[pixels].astype(np.float32))
        done[pixels] += weight
    return ramps


def _resample(
    values: NDArray[np.float32], heights: tuple[float, float, float], widths: tuple[float, float, float]
) -> NDArray[np.float32]:
    """Part of a map (h, w) at whole pixels: for each axis, the part's start and end and the whole map's extent."""
    (top, bottom, height), (left, right, width) = heights, widths
    shape = round(bottom - top), round(right - left)
    if 0 in shape:
        return np.empty(shape, np.float32)
    # Multiplied before divided, so that whole maps give whole numbers.
    box = (
        left * values.shape[1] / width,
        top * values.shape[0] / height,
        right * values.shape[1] / width,
        bottom * values.shape[0] / height,
    )
    # A pixel whose centre alone lies in the window asks for values beyond the map's edge.
    before = math.ceil(max(-box[1], 0)), math.ceil(max(-box[0], 0))
    after = math.ceil(max(box[3] - values.shape[0], 0)), math.ceil(max(box[2] - values.shape[1], 0))
    if any(before) or any(after):
        values = np.pad(values, tuple(zip(before, after, strict=True)), mode="edge")
        box = (box[0] + before[1], box[1] + before[0], box[2] + before[1], box[3] + before[0])
    return np.asarray(Image.fromarray(values).resize((shape[1], shape[0]), Image.Resampling.BILINEAR, box))
