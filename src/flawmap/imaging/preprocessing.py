"""What is done to pixels before the backbone, and to maps to undo it. Needs numpy and Pillow only."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from flawmap.errors import FlawmapError
from flawmap.imaging.arrays import as_pixels


@dataclass(frozen=True)
class Preprocessing:
    """What is done to every image before the backbone, in training and ever after.

    Resize to `size` without regard to the aspect ratio, by Pillow's bilinear filter, which averages over the covered
    pixels when shrinking: that is a model input. What is left, scaling to [0, 1], subtracting `mean` and dividing by
    `std`, the graph of an inspection does itself, and `normalised` for all else.

    Attributes:
        size: (height, width) of the model input, in pixels.
        mean: per channel R, G, B, of values in [0, 1].
        std: per channel, positive.
        white: the value that counts as white (1.0) in 16-bit images; larger ones are clipped. Cameras of 10, 12
            and 14 bits store at most 1023, 4095 and 16383 in 16-bit files: see `decoding.infer_white`.
        deep: model inputs are float32 from 0 to 1, as 16-bit images need, and not uint8, which they are rounded to
            otherwise.

    Raises:
        FlawmapError: a value out of its range.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    white: int = 65535
    deep: bool = False

    def __post_init__(self) -> None:
        if not (len(self.size) == 2 and all(isinstance(side, int) and side > 0 for side in self.size)):
            raise FlawmapError(f"preprocessing: size is {self.size}; it must be (height, width), both at least 1")
        if not (len(self.mean) == 3 and all(math.isfinite(value) for value in self.mean)):
            raise FlawmapError(f"preprocessing: mean is {self.mean}; it must be three finite numbers")
        if not (len(self.std) == 3 and all(math.isfinite(value) and value > 0 for value in self.std)):
            raise FlawmapError(f"preprocessing: std is {self.std}; it must be three positive numbers")
        if not (isinstance(self.white, int) and 1 <= self.white <= 65535):
            raise FlawmapError(f"preprocessing: white is {self.white}; it must be a whole number from 1 to 65535")
        if not isinstance(self.deep, bool):
            raise FlawmapError(f"preprocessing: deep is {self.deep}; it must be true or false")

    def to_json(self) -> dict[str, Any]:
        """The settings as plain JSON types."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, settings: dict[str, Any]) -> Preprocessing:
        """Undoes `to_json`.

        Raises:
            FlawmapError: a setting is missing, unknown or out of its range.
        """
        try:
            values: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()
            }
            return cls(**values)
        except (TypeError, AttributeError) as error:
            raise FlawmapError(
                f"preprocessing: settings cannot be used ({error}); expected size, mean, std, white, deep"
            ) from error

    @property
    def dtype(self) -> type[np.generic]:
        """Of model inputs."""
        return np.float32 if self.deep else np.uint8

    def __call__(self, pixels: ArrayLike) -> NDArray[Any]:
        """The model's input for one image.

        Args:
            pixels: an image as `as_pixels` takes it.

        Returns:
            (3, height, width) of `dtype`, a grey image three times.

        Raises:
            ImageError: as `as_pixels`.
        """
        pixels = as_pixels(pixels)
        top = 255 if pixels.dtype == np.uint8 else self.white if pixels.dtype == np.uint16 else 1
        if pixels.dtype == np.uint8 and not self.deep:
            planes = [_resize(pixels, self.size)]
        else:
            # Pillow has no floating-point mode of several channels.
            scaled = np.minimum(pixels * np.float32(1 / top), np.float32(1))
            channels = [scaled] if scaled.ndim == 2 else [scaled[:, :, channel] for channel in range(3)]
            planes = [_resize(plane, self.size) for plane in channels]
            planes = planes if self.deep else [np.rint(plane * np.float32(255)).astype(np.uint8) for plane in planes]
        made = np.empty((3, *self.size), self.dtype)
        if len(planes) == 1 and planes[0].ndim == 3:
            made[:] = planes[0].transpose(2, 0, 1)
        else:
            made[:] = planes
        return made

    def normalised(self, inputs: NDArray[Any]) -> NDArray[np.float32]:
        """Model inputs (..., 3, h, w) -> what the backbone's weights expect, float32 of the same shape."""
        top = 1 if self.deep else 255
        gain = np.array([1 / (top * std) for std in self.std], np.float32)[:, None, None]
        offset = np.array([mean / std for mean, std in zip(self.mean, self.std, strict=True)], np.float32)
        scaled: NDArray[np.float32] = inputs * gain
        scaled -= offset[:, None, None]
        return scaled


def lay_back(anomaly_map: NDArray[np.floating[Any]], size: tuple[int, int]) -> NDArray[np.float32]:
    """An anomaly map (h, w) at the size (height, width) of the image it was made from: undoes `Preprocessing`'s resize.

    Bilinear with half-pixel centres: map pixel i covers the image from i/h to (i + 1)/h of its height, as it did on
    the way in. Where the image is smaller than the map, the covered map pixels are averaged.

    Returns:
        float32 (H, W), on the map's own scale.
    """
    return np.array(_resize(np.asarray(anomaly_map, dtype=np.float32), size))


def _resize(pixels: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """uint8 (H, W) or (H, W, 3), or float32 (H, W), at (height, width); read-only."""
    height, width = size
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
