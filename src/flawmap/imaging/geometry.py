"""Which parts of an image become model inputs. Needs numpy and Pillow only.

Every geometry is a list of windows: axis-aligned boxes in original pixels, each of which one model input covers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from flawmap.errors import FlawmapError, ImageError
from flawmap.imaging.arrays import size_text
from flawmap.imaging.masks import resize_mask
from flawmap.imaging.placement import Placement, Rigid
from flawmap.imaging.windows import Window

Kind = Literal["stretch", "keep_aspect", "crop", "tile"]

SMALLEST = 8
"""Pixels; a crop or a tile of less shows nothing."""
MOST_TILES = 10_000
"""An image that would be cut into more is refused before memory runs out."""


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


def _padded(length: int, model: int, scale: float) -> tuple[float, float]:
    """Start and end of a window whose `model` pixels hold `length` image pixels at `scale`, centred."""
    content = min(model, max(1, round(length * scale)))
    before = (model - content) // 2
    return -before * length / content, (model - before) * length / content


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
