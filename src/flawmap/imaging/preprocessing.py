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

    Resize to `size` without regard to the aspect ratio, by Pillow's bilinear filter (which averages over the
    covered pixels when shrinking), scale to [0, 1], subtract `mean` and divide by `std`.

    Attributes:
        size: (height, width) of the model input, in pixels.
        mean: per channel R, G, B, of values in [0, 1].
        std: per channel, positive.
        white: the value that counts as white (1.0) in 16-bit images; larger ones are clipped. Cameras of 10, 12
            and 14 bits store at most 1023, 4095 and 16383 in 16-bit files: see `decoding.infer_white`.

    Raises:
        FlawmapError: a value out of its range.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    white: int = 65535

    def __post_init__(self) -> None:
        if not (len(self.size) == 2 and all(isinstance(side, int) and side > 0 for side in self.size)):
            raise FlawmapError(f"preprocessing: size is {self.size}; it must be (height, width), both at least 1")
        if not (len(self.mean) == 3 and all(math.isfinite(value) for value in self.mean)):
            raise FlawmapError(f"preprocessing: mean is {self.mean}; it must be three finite numbers")
        if not (len(self.std) == 3 and all(math.isfinite(value) and value > 0 for value in self.std)):
            raise FlawmapError(f"preprocessing: std is {self.std}; it must be three positive numbers")
        if not (isinstance(self.white, int) and 1 <= self.white <= 65535):
            raise FlawmapError(f"preprocessing: white is {self.white}; it must be a whole number from 1 to 65535")

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
                f"preprocessing: settings cannot be used ({error}); expected size, mean, std, white"
            ) from error

    def __call__(self, pixels: ArrayLike, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """The model's input for one image.

        Args:
            pixels: an image as `as_pixels` takes it.
            out: float32 (3, height, width), filled and returned where given, so that a batch is filled in place.

        Returns:
            float32 (3, height, width), C-contiguous.

        Raises:
            ImageError: as `as_pixels`.
        """
        pixels = as_pixels(pixels)
        height, width = self.size
        if out is None:
            out = np.empty((3, height, width), np.float32)
        if pixels.dtype == np.uint8:
            resized = _resize(pixels, self.size)
            planes = [resized] * 3 if resized.ndim == 2 else [resized[:, :, channel] for channel in range(3)]
        else:
            white = self.white if pixels.dtype == np.uint16 else 1
            scaled = np.minimum(pixels * np.float32(255 / white), np.float32(255))
            # Pillow has no floating-point mode of several channels.
            if scaled.ndim == 2:
                planes = [_resize(scaled, self.size)] * 3
            else:
                planes = [_resize(scaled[:, :, channel], self.size) for channel in range(3)]
        for plane, mean, std, target in zip(planes, self.mean, self.std, out, strict=True):
            np.multiply(plane, np.float32(1 / (255 * std)), out=target)
            target -= np.float32(mean / std)
        return out


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
