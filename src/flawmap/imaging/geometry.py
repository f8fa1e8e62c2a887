"""Which parts of an image become model inputs, and how maps come back onto its pixels. Needs numpy and Pillow only.

Every geometry is a list of windows: axis-aligned boxes in original pixels, each of which one model input covers. Pixel
i spans i to i + 1, so its centre lies at i + 0.5, in images, model inputs and maps alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flawmap.errors import FlawmapError, ImageError
from flawmap.imaging.arrays import size_text
from flawmap.imaging.masks import resize_mask

Kind = Literal["stretch", "keep_aspect", "crop", "tile"]

SMALLEST = 8
"""Pixels; a crop or a tile of less shows nothing."""
MOST_TILES = 10_000
"""An image that would be cut into more is refused before memory runs out."""


class Window(NamedTuple):
    """The box that one model input covers, in pixels of the frame. What exceeds the image is padding.

    The image's edges lie on edges of model pixels, so that no model pixel is image in part: `Geometry` moves a window's
    edges by up to half a model pixel to have it so.
    """

    left: float
    top: float
    right: float
    bottom: float


class Rigid(Protocol):
    """What a `Placement` asks of a registration; `flawmap.imaging.registration.Alignment` gives it."""

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


@dataclass(frozen=True)
class Geometry:
    """How windows are laid over an image.

    Attributes:
        kind: "stretch": one window, the whole image, whatever its aspect ratio.
            "keep_aspect": one window that holds the whole image at its own aspect ratio, to the nearest model pixel;
            the short side is padded on both sides.
            "crop": the image is resized to the image size as by "stretch" and its centre, `side` x `side`, is the
            model input.
            "tile": windows of `side` x `side` original pixels, each resized to the model input, that cover the image.
            The last of a row or column is moved inwards. In a direction in which the image is smaller than a window,
            there is one window, padded.
        side: of a crop, in pixels of the resized image, or of a tile, in original pixels; 0 for the other kinds.
        overlap: of neighbouring tiles, in original pixels; 0 for the other kinds.

    Raises:
        FlawmapError: a value out of its range.
    """

    kind: Kind = "stretch"
    side: int = 0
    overlap: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise FlawmapError(f"geometry: kind is {self.kind!r}; it must be one of {', '.join(get_args(Kind))}")
        if not (isinstance(self.side, int) and isinstance(self.overlap, int)):
            raise FlawmapError(f"geometry: side {self.side!r} and overlap {self.overlap!r} must be whole numbers")
        if self.kind in ("crop", "tile") and self.side < SMALLEST:
            raise FlawmapError(f"--{self.kind} {self.side} is too small: give at least {SMALLEST} pixels")
        if self.kind == "tile" and not 0 <= self.overlap < self.side:
            raise FlawmapError(
                f"--tile {self.side},{self.overlap}: the overlap must lie from 0 to {self.side - 1} pixels; "
                f"leave it out for {self.side // 4}"
            )
        if (self.kind not in ("crop", "tile") and self.side) or (self.kind != "tile" and self.overlap):
            raise FlawmapError(
                f"geometry: {self.kind} takes no side {self.side} with overlap {self.overlap}; leave them 0"
            )

    @classmethod
    def keep_aspect(cls) -> Geometry:
        """The whole image at its own aspect ratio, padded."""
        return cls("keep_aspect")

    @classmethod
    def crop(cls, side: int) -> Geometry:
        """The centre of the resized image."""
        return cls("crop", side)

    @classmethod
    def tile(cls, side: int, overlap: int | None = None) -> Geometry:
        """Windows of `side` original pixels that overlap by `overlap`, a quarter of the side where not given."""
        return cls("tile", side, side // 4 if overlap is None else overlap)

    @classmethod
    def from_options(cls, keep_aspect: bool = False, crop: int | None = None, tile: str | None = None) -> Geometry:
        """From the command line's words, `tile` as "SIZE" or "SIZE,OVERLAP".

        Raises:
            FlawmapError: more than one is given, a number is out of its range, or `tile` is not a number or two.
        """
        if keep_aspect + (crop is not None) + (tile is not None) > 1:
            raise FlawmapError("--keep-aspect, --crop and --tile exclude each other: give one of them")
        if keep_aspect:
            return cls.keep_aspect()
        if crop is not None:
            return cls.crop(crop)
        if tile is not None:
            side, comma, overlap = tile.partition(",")
            try:
                return cls.tile(int(side), int(overlap) if comma else None)
            except ValueError:
                raise FlawmapError(
                    f"--tile {tile}: cannot be read; give SIZE or SIZE,OVERLAP in pixels, such as 512 or 512,64"
                ) from None
        return cls()

    def __str__(self) -> str:
        """In a few words, such as "tile 512,128"."""
        numbers = ",".join(str(number) for number in (self.side, self.overlap) if number)
        return f"{self.kind.replace('_', ' ')} {numbers}".strip()

    def to_json(self) -> dict[str, Any]:
        """The settings as plain JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, settings: dict[str, Any]) -> Geometry:
        """Undoes `to_json`.

        Raises:
            FlawmapError: a setting is unknown or out of its range.
        """
        try:
            return cls(**settings)
        except TypeError as error:
            raise FlawmapError(f"geometry: settings cannot be used ({error}); expected kind, side, overlap") from error

    def input_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the model input where `image_size` is asked for: the crop's own, else `image_size`.

        Raises:
            FlawmapError: the crop is larger than `image_size`.
        """
        if self.kind != "crop":
            return image_size
        if self.side > min(image_size):
            raise FlawmapError(
                f"--crop {self.side} does not fit in an image size of {size_text(image_size)}: "
                f"give at most {min(image_size)}, or a larger --image-size"
            )
        return self.side, self.side

    def windows(self, size: tuple[int, int], image_size: tuple[int, int]) -> tuple[Window, ...]:
        """The windows on an image of `size`, row by row.

        Raises:
            FlawmapError: the crop is larger than `image_size`.
            ImageError: there would be more than `MOST_TILES`.
        """
        (height, width), (model_height, model_width) = size, self.input_size(image_size)
        if self.kind == "stretch":
            return (Window(0, 0, width, height),)
        if self.kind == "crop":
            # The offset as torchvision's CenterCrop rounds it.
            top, left = round((image_size[0] - self.side) / 2), round((image_size[1] - self.side) / 2)
            scaled_y, scaled_x = height / image_size[0], width / image_size[1]
            return (
                Window(left * scaled_x, top * scaled_y, (left + self.side) * scaled_x, (top + self.side) * scaled_y),
            )
        if self.kind == "keep_aspect":
            scale = min(model_height / height, model_width / width)
            rows, columns = [_padded(height, model_height, scale)], [_padded(width, model_width, scale)]
        else:
            rows, columns = self._tiles(height, model_height), self._tiles(width, model_width)
            if len(rows) * len(columns) > MOST_TILES:
                raise ImageError(
                    f"--tile {self.side},{self.overlap} cuts an image of {size_text(size)} into "
                    f"{len(rows) * len(columns)} tiles, over the limit of {MOST_TILES}; "
                    "train with larger tiles or less overlap"
                )
        return tuple(Window(left, top, right, bottom) for top, bottom in rows for left, right in columns)

    def _tiles(self, length: int, model: int) -> list[tuple[float, float]]:
        """Where tiles start and end along one side of the image."""
        if length < self.side:
            return [_padded(length, model, model / self.side)]
        step, last = self.side - self.overlap, length - self.side
        return [(start, start + self.side) for start in (*range(0, last, step), last)]

    def place(
        self,
        size: tuple[int, int],
        image_size: tuple[int, int],
        *,
        roi: NDArray[np.bool_] | None = None,
        alignment: Rigid | None = None,
    ) -> Placement:
        """Lays the windows over one image.

        Args:
            size: (height, width) of the image.
            image_size: (height, width) that the image (or tile) is resized to; the model input's, except for a crop.
            roi: bool (Hr, Wr), True in the region of interest, drawn on the image or, with an alignment, on the
                template. A mask of another size but of the same aspect ratio, to 2 %, is scaled.
            alignment: of this image to the template. The windows then lie in the template's frame.

        Raises:
            FlawmapError: the crop is larger than `image_size`, or the region of interest is empty.
            ImageError: the region's aspect ratio is not the image's; no model pixel lies in the region and shows the
                image; there would be too many tiles.
        """
        frame = size if alignment is None else alignment.template_size
        region = None if roi is None else _scaled(roi, frame)
        if alignment is not None:
            region = alignment.valid if region is None else region & alignment.valid
        placement = Placement(
            size, frame, self.windows(frame, image_size), self.input_size(image_size), region, alignment
        )
        if region is None:
            return placement
        windows = tuple(
            window for window, inside in zip(placement.windows, placement.inside(), strict=True) if inside.any()
        )
        if not windows:
            raise ImageError(
                f"less than one model pixel of an image of {size_text(size)} lies in the region of interest; "
                "draw a larger region, or give a larger --image-size"
            )
        return replace(placement, windows=windows)


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
        return self._sampled(self.region)

    def project(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """A bool (H, W) mask in the model inputs, by nearest neighbour: (T, h, w), False in the padding."""
        return self._sampled(mask if self.alignment is None else self.alignment.warp(mask))

    def _sampled(self, mask: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
        """A mask of the frame in the model inputs, by nearest neighbour; None is True everywhere."""
        sampled = np.zeros((len(self.windows), *self.input_size), np.bool_)
        for window, target in zip(self.windows, sampled, strict=True):
            content = _content(window, self.frame, self.input_size)
            if mask is None:
                target[content] = True
            else:
                cut = _cut(mask.view(np.uint8), window, self.input_size, Image.Resampling.NEAREST)
                target[content] = cut[content]
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
        rows = _ramps({(w.top, w.bottom) for w in self.windows}, self.frame[0])
        columns = _ramps({(w.left, w.right) for w in self.windows}, self.frame[1])
        laid = np.full(self.frame, np.nan, np.float32)
        # Whole, so that the masks are made once; a bool array is a quarter of the maps.
        inside = None if self.region is None else self.inside()
        for i, (window, values) in enumerate(zip(self.windows, maps, strict=True)):
            down, across = rows[window.top, window.bottom], columns[window.left, window.right]
            tile = self._enlarge(
                np.asarray(values, np.float32),
                window,
                (down.pixels, across.pixels),
                None if inside is None else inside[i],
            )
            target = laid[down.pixels, across.pixels]
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
        if self.region is not None:
            laid[~self.region] = np.nan
        return laid if self.alignment is None else self.alignment.unwarp(laid)

    def _enlarge(
        self,
        values: NDArray[np.float32],
        window: Window,
        pixels: tuple[slice, slice],
        inside: NDArray[np.bool_] | None,
    ) -> NDArray[np.float32]:
        """One map (h, w) at the frame's pixels (rows, columns); NaN where no pixel `inside` is near."""
        content = _content(window, self.frame, self.input_size)
        values = values[content]
        left, top, right, bottom = _clipped(window, self.frame)
        heights = (pixels[0].start - top, pixels[0].stop - top, bottom - top)
        widths = (pixels[1].start - left, pixels[1].stop - left, right - left)
        seen = None if inside is None else inside[content]
        if seen is None or seen.all():
            return _resample(values, heights, widths)
        weights = _resample(seen.astype(np.float32), heights, widths)
        total = _resample(np.where(seen, values, np.float32(0)), heights, widths)
        return np.divide(total, weights, out=np.full_like(total, np.nan), where=weights > 1e-6)


def resize_window(pixels: NDArray[Any], window: Window, size: tuple[int, int]) -> NDArray[Any]:
    """The part of an image under a window, at (height, width), by Pillow's bilinear filter; the edge repeated outside.

    Args:
        pixels: uint8 (H, W) or (H, W, 3), or one float32 plane (H, W).

    Returns:
        (height, width) or (height, width, 3) of the same type; may be read-only.
    """
    return _cut(pixels, window, size, Image.Resampling.BILINEAR)


def _cut(pixels: NDArray[Any], window: Window, size: tuple[int, int], resampling: Image.Resampling) -> NDArray[Any]:
    rows, columns = _content(window, pixels.shape[:2], size)
    left, top, right, bottom = _clipped(window, pixels.shape[:2])
    height, width = rows.stop - rows.start, columns.stop - columns.start
    # The filter reaches one model pixel, or one image pixel where that is larger, beyond the window.
    down, across = math.ceil(max((bottom - top) / height, 1)) + 1, math.ceil(max((right - left) / width, 1)) + 1
    y, x = max(math.floor(top) - down, 0), max(math.floor(left) - across, 0)
    part = pixels[y : math.ceil(bottom) + down, x : math.ceil(right) + across]
    box = (left - x, top - y, right - x, bottom - y)
    resized = np.asarray(Image.fromarray(part).resize((width, height), resampling, box))
    if resized.shape[:2] == size:
        return resized
    padding = [(rows.start, size[0] - rows.stop), (columns.start, size[1] - columns.stop), (0, 0)]
    return np.pad(resized, padding[: pixels.ndim], mode="edge")


def _content(window: Window, frame: tuple[int, ...], size: tuple[int, int]) -> tuple[slice, slice]:
    """The rows and columns of the model input that are image."""
    left, top, right, bottom = window
    down, across = size[0] / (bottom - top), size[1] / (right - left)
    return (
        slice(max(0, round(-top * down)), min(size[0], round((frame[0] - top) * down))),
        slice(max(0, round(-left * across)), min(size[1], round((frame[1] - left) * across))),
    )


def _clipped(window: Window, frame: tuple[int, ...]) -> Window:
    """The part of a window that is image."""
    left, top, right, bottom = window
    return Window(max(left, 0), max(top, 0), min(right, frame[1]), min(bottom, frame[0]))


def _padded(length: int, model: int, scale: float) -> tuple[float, float]:
    """Start and end of a window whose `model` pixels hold `length` image pixels at `scale`, centred."""
    content = min(model, max(1, round(length * scale)))
    before = (model - content) // 2
    return -before * length / content, (model - before) * length / content


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


def _scaled(roi: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    """A region of interest at the size of the frame."""
    if not roi.any():
        raise FlawmapError("--roi: the mask marks no pixel; paint what is to be inspected white (255)")
    if roi.shape == size:
        return roi
    (height, width), (own_height, own_width) = size, roi.shape
    if abs(own_height * width / (own_width * height) - 1) > 0.02:
        raise ImageError(
            f"the region of interest is {size_text(roi.shape)} but the image is {size_text(size)}; "
            "its aspect ratio must be the image's: leave the image out, or redraw the region"
        )
    return resize_mask(roi, size)
