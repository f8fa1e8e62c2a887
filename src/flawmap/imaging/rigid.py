"""Rigid transforms: the pose of a template in an image, and pixels and maps carried by it. Needs numpy and Pillow only.

Positions are continuous, (x, y) from the picture's upper left corner, with pixel i from i to i + 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Affine = tuple[float, float, float, float, float, float]
"""(a, b, c, d, e, f) maps (x, y) to (a x + b y + c, d x + e y + f)."""


@dataclass(frozen=True)
class Pose:
    """How the template lies in an image: turned about its centre, which is then moved from the image's centre."""

    angle: float  # radians, clockwise as seen
    x: float  # pixels of the level, to the right
    y: float  # downwards

    def scaled(self, factor: float) -> Pose:
        return Pose(self.angle, self.x * factor, self.y * factor)

    def to_image(self, template_centre: tuple[float, float], image_centre: tuple[float, float]) -> Affine:
        """From positions on the template to positions on the image."""
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        x, y = template_centre
        return (
            *(cos, -sin, image_centre[0] + self.x - cos * x + sin * y),
            *(sin, cos, image_centre[1] + self.y - sin * x - cos * y),
        )


@dataclass(frozen=True, eq=False)
class Alignment:
    """The rigid transform between an image and the template's frame.

    Attributes:
        size: (H, W) of the image.
        template_size: (Ht, Wt).
        matrix: float64 (2, 3), from positions (x, y, 1) on the image to positions on the template.
        angle: degrees that the image is turned, counter-clockwise as seen, to lie as the template; within 180.
        shift: (x, y), pixels from the image's centre to where the template's centre lies in it.
        quality: in [-1, 1], the normalised cross-correlation of the template's edge strength and the aligned image's,
            with nothing found where the frame does not show the image. 1 for the template itself.
    """

    size: tuple[int, int]
    template_size: tuple[int, int]
    matrix: NDArray[np.float64] = field(repr=False)
    angle: float
    shift: tuple[float, float]
    quality: float

    @cached_property
    def valid(self) -> NDArray[np.bool_]:
        """(Ht, Wt), True where the frame shows the image."""
        ones = Image.new("L", (self.size[1], self.size[0]), 1)
        return transformed(ones, self.template_size, self._to_image()).astype(np.bool_)

    def warp(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """An image in the template's frame: bilinear, masks nearest. What it does not cover repeats its edge.

        Args:
            pixels: bool, uint8, uint16 or float32, (H, W) or (H, W, 3). A bool mask is False where not covered.

        Returns:
            The same type, (Ht, Wt) or (Ht, Wt, 3).
        """
        data = self._to_image()
        if pixels.dtype == np.bool_:
            mask = Image.fromarray(pixels.view(np.uint8))
            return transformed(mask, self.template_size, data, Image.Resampling.NEAREST).astype(np.bool_)
        if pixels.dtype == np.uint8:
            warped = transformed(Image.fromarray(pixels), self.template_size, data)
        elif pixels.ndim == 3:  # Pillow has no floating-point mode of several channels
            return np.stack([self.warp(pixels[:, :, channel]) for channel in range(3)], axis=2)
        else:
            warped = transformed(Image.fromarray(pixels.astype(np.float32, copy=False)), self.template_size, data)
            if pixels.dtype == np.uint16:
                warped = np.rint(warped).astype(np.uint16)
        rows, columns = np.nonzero(~self.valid)
        x, y = np.array(data).reshape(2, 3) @ np.stack([columns + 0.5, rows + 0.5, np.ones(len(rows))])
        warped[rows, columns] = pixels[
            np.clip(np.floor(y), 0, self.size[0] - 1).astype(np.intp),
            np.clip(np.floor(x), 0, self.size[1] - 1).astype(np.intp),
        ]
        return warped

    def unwarp(self, anomaly_map: NDArray[np.float32]) -> NDArray[np.float32]:
        """A map of the template's frame on the image's pixels, bilinear.

        Args:
            anomaly_map: float32 (Ht, Wt), NaN where nothing was scored.

        Returns:
            float32 (H, W), NaN outside the frame and where most of what a pixel would be made from is NaN.
        """
        known = ~np.isnan(anomaly_map)
        a, b, x, c, d, y = self.matrix.ravel().tolist()
        weights, total = (
            transformed(Image.fromarray(plane), self.size, (a, b, x, c, d, y))
            for plane in (known.astype(np.float32), np.where(known, anomaly_map, np.float32(0)))
        )
        unwarped = np.full(self.size, np.nan, np.float32)
        np.divide(total, weights, out=unwarped, where=weights >= 0.5)
        return unwarped

    def _to_image(self) -> Affine:
        (a, b, x), (c, d, y) = self.matrix.tolist()
        # The inverse of a rotation is its transpose.
        return a, c, -(a * x + c * y), b, d, -(b * x + d * y)


def transformed(
    image: Image.Image,
    size: tuple[int, int],
    data: Affine,
    resampling: Image.Resampling = Image.Resampling.BILINEAR,
) -> NDArray[Any]:
    """A picture of `size` (height, width), made from the positions that `data` gives; 0 where they lie outside."""
    return np.array(image.transform((size[1], size[0]), Image.Transform.AFFINE, data, resampling))
