"""Rigid registration: how a part lies in an image, compared with a template. Needs numpy and Pillow only.

Both pictures are reduced and turned into maps of edge strength, which keep their shape when the light changes. On the
smallest maps, all rotations of the template are tried by cross-correlation in Fourier space; the best poses are refined
by Gauss-Newton steps, from there to the largest maps.

Positions are continuous, (x, y) from the picture's upper left corner, with pixel i from i to i + 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from flawmap.errors import FlawmapError, ImageError
from flawmap.imaging.arrays import as_pixels, size_text

LONGEST = 256
"""Pixels; the longest side of the reduced template."""

_COARSEST = 96  # pixels; the search starts on maps whose longest side is no larger
_STEP = 3.0  # degrees between the rotations tried; under 3 pixels at the rim of those maps
_ANGLES = np.arange(-180, 180, _STEP)
_TRIED = 8  # rotations refined on the coarsest maps
_KEPT = 3  # poses refined on the next
_STEPS = 10  # of Gauss-Newton on one level
_LONGEST_STEP = 3.0  # pixels; beyond, the linear model holds no more
_SETTLED = 0.01  # pixels
_LARGEST_RATIO = 2.0
_LUMA = np.array((0.299, 0.587, 0.114), np.float32)

Affine = tuple[float, float, float, float, float, float]
"""(a, b, c, d, e, f) maps (x, y) to (a x + b y + c, d x + e y + f)."""


@dataclass(frozen=True)
class _Pose:
    """How the template lies in an image: turned about its centre, which is then moved from the image's centre."""

    angle: float  # radians, clockwise as seen
    x: float  # pixels of the level, to the right
    y: float  # downwards

    def scaled(self, factor: float) -> _Pose:
        return _Pose(self.angle, self.x * factor, self.y * factor)

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
        return _transformed(ones, self.template_size, self._to_image()).astype(np.bool_)

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
            return _transformed(mask, self.template_size, data, Image.Resampling.NEAREST).astype(np.bool_)
        if pixels.dtype == np.uint8:
            warped = _transformed(Image.fromarray(pixels), self.template_size, data)
        elif pixels.ndim == 3:  # Pillow has no floating-point mode of several channels
            return np.stack([self.warp(pixels[:, :, channel]) for channel in range(3)], axis=2)
        else:
            warped = _transformed(Image.fromarray(pixels.astype(np.float32, copy=False)), self.template_size, data)
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
            _transformed(Image.fromarray(plane), self.size, (a, b, x, c, d, y))
            for plane in (known.astype(np.float32), np.where(known, anomaly_map, np.float32(0)))
        )
        unwarped = np.full(self.size, np.nan, np.float32)
        np.divide(total, weights, out=unwarped, where=weights >= 0.5)
        return unwarped

    def _to_image(self) -> Affine:
        (a, b, x), (c, d, y) = self.matrix.tolist()
        # The inverse of a rotation is its transpose.
        return a, c, -(a * x + c * y), b, d, -(b * x + d * y)


class Template:
    """What a part looks like in the pose that regions of interest are drawn in.

    Attributes:
        grey: float32 (h, w), the reduced picture, 0..255; the longest side is at most `LONGEST`.
        size: (Ht, Wt) of the picture that it was made from.

    Raises:
        FlawmapError: the picture is all alike.
    """

    def __init__(self, grey: NDArray[np.float32], size: tuple[int, int]) -> None:
        self.grey = grey
        self.size = size
        self._levels = [_Level(plane) for plane in _pyramid(grey)]
        self._spectra: dict[int, NDArray[np.complex64]] = {}
        if self._levels[0].edges.std() < 1e-3:
            raise FlawmapError(
                "the template for registration shows nothing but one flat tone; give a picture of a part"
            )

    @classmethod
    def from_image(cls, pixels: ArrayLike) -> Template:
        """From a picture as `arrays.as_pixels` takes it.

        Raises:
            ImageError: it is not an image.
            FlawmapError: it is all alike.
        """
        pixels = as_pixels(pixels)
        size = (pixels.shape[0], pixels.shape[1])
        return cls(_grey(pixels, _factor(size)), size)

    def align(self, pixels: ArrayLike, max_angle: float = 180) -> Alignment:
        """Finds the template in an image taken at the same scale, turned and moved.

        Args:
            pixels: a picture as `arrays.as_pixels` takes it. Values may differ from the template's by gain and offset.
            max_angle: degrees, how far the part may be turned either way.

        Raises:
            FlawmapError: `max_angle` is not in 0..180.
            ImageError: it is not an image, or its size is more than twice or less than half of the template's.
        """
        if not 0 <= max_angle <= 180:
            raise FlawmapError(f"registration: the largest angle is {max_angle}; it must lie from 0 to 180 degrees")
        pixels = as_pixels(pixels)
        size = (pixels.shape[0], pixels.shape[1])
        ratio = max(size) / max(self.size)
        if not 1 / _LARGEST_RATIO <= ratio <= _LARGEST_RATIO:
            raise ImageError(
                f"the image is {size_text(size)} but the template for registration {size_text(self.size)}; "
                "take both at the same scale, or train with a template of this size"
            )
        factor = _factor(self.size)
        planes = _pyramid(_grey(pixels, factor), len(self._levels))
        limit = math.radians(max_angle)

        found: list[tuple[float, _Pose]] = [(0.0, pose) for pose in self._search(planes[-1], limit)]
        for depth in reversed(range(len(self._levels))):
            level, scale = self._levels[depth], factor / 2**depth
            centres = _centre(self.size, scale), _centre(size, scale)
            refined = [level.refine(planes[depth], pose, *centres, limit) for _, pose in found]
            kept: list[tuple[float, _Pose]] = []
            for quality, pose in sorted(refined, key=lambda one: -one[0]):
                if len(kept) < _KEPT and not any(_alike(pose, other) for _, other in kept):
                    kept.append((quality, pose))
            found = kept if depth == 0 else [(quality, pose.scaled(2)) for quality, pose in kept]

        quality, pose = found[0]
        pose = pose.scaled(1 / factor)
        a, b, x, c, d, y = pose.to_image(_centre(self.size), _centre(size))
        matrix = np.array([[a, c, -(a * x + c * y)], [b, d, -(b * x + d * y)]])
        angle = math.degrees(math.remainder(pose.angle, 2 * math.pi))
        return Alignment(size, self.size, matrix, angle, (pose.x, pose.y), quality)

    def _search(self, edges: NDArray[np.float32], limit: float) -> list[_Pose]:
        """Poses that correlate best, each at another rotation, best first."""
        template = self._levels[-1].edges
        canvas = math.ceil(math.hypot(*template.shape))
        side = _fast_length(max(edges.shape) + canvas // 2)  # wrapping around reaches only poses with little overlap
        if side not in self._spectra:
            self._spectra[side] = _rotated_spectra(template, canvas, side)
        angles = np.radians(_ANGLES)
        tried = np.flatnonzero(np.abs(angles) <= limit + 1e-9)
        spectrum = np.fft.rfft2(edges - edges.mean(), (side, side))
        correlation = np.fft.irfft2(spectrum * self._spectra[side][tried], (side, side)).reshape(len(tried), -1)
        places, peaks = correlation.argmax(axis=1), correlation.max(axis=1)

        poses: list[_Pose] = []
        for one in np.argsort(-peaks):
            y, x = divmod(int(places[one]), side)
            # The upper left corner of the canvas lies up to half a canvas above or left of the image.
            y, x = (at - side if at >= edges.shape[axis] else at for axis, at in ((0, y), (1, x)))
            pose = _Pose(
                float(angles[tried[one]]),
                x + canvas / 2 - edges.shape[1] / 2,
                y + canvas / 2 - edges.shape[0] / 2,
            )
            if all(_degrees_between(pose, other) > 1.5 * _STEP for other in poses):
                poses.append(pose)
            if len(poses) == _TRIED:
                break
        return poses


class _Level:
    """The template at one resolution, with what each Gauss-Newton step needs of it."""

    def __init__(self, edges: NDArray[np.float32]) -> None:
        self.edges = edges
        self._slopes = np.gradient(edges) if min(edges.shape) > 1 else [np.zeros_like(edges)] * 2

    def refine(
        self,
        image: NDArray[np.float32],
        pose: _Pose,
        template_centre: tuple[float, float],
        image_centre: tuple[float, float],
        limit: float,
    ) -> tuple[float, _Pose]:
        """The pose nearby at which gain * template + offset is closest to the image, and its quality.

        Inverse compositional Gauss-Newton (Baker & Matthews, "Lucas-Kanade 20 years on", 2004, section 3.2), with gain
        and offset solved for in each step.
        """
        height, width = self.edges.shape
        down, across = self._slopes
        y = (np.arange(height, dtype=np.float32) + np.float32(0.5 - template_centre[1]))[:, None]
        x = np.arange(width, dtype=np.float32) + np.float32(0.5 - template_centre[0])
        radius = max(height, width) / 2  # turns the unknown angle into pixels at the rim
        turning = (x * down - y * across) / np.float32(radius)
        columns = np.stack([turning, across, down, self.edges, np.ones_like(self.edges)]).reshape(5, -1)
        ones = np.ones_like(image)

        def warp(plane: NDArray[np.float32]) -> NDArray[np.float32]:
            data = pose.to_image(template_centre, image_centre)
            return _transformed(Image.fromarray(plane), (height, width), data)

        for _ in range(_STEPS):
            weighted = columns * warp(ones).ravel()
            normal, right = weighted @ columns.T, weighted @ warp(image).ravel()
            solved = np.linalg.lstsq(normal.astype(np.float64), right.astype(np.float64), rcond=1e-7)[0]
            gain = float(solved[3])
            if gain <= 0:
                break
            turn, dx, dy = np.clip(solved[:3] / gain, -_LONGEST_STEP, _LONGEST_STEP).tolist()
            angle = pose.angle - turn / radius
            if limit < math.pi:
                angle = min(max(angle, -limit), limit)
            cos, sin = math.cos(angle), math.sin(angle)
            pose = _Pose(angle, pose.x - cos * dx + sin * dy, pose.y - sin * dx - cos * dy)
            if max(abs(turn), abs(dx), abs(dy)) < _SETTLED:
                break
        return _correlation(self.edges, warp(image), warp(ones)), pose


def _correlation(template: NDArray[np.float32], image: NDArray[np.float32], covered: NDArray[np.float32]) -> float:
    """The normalised cross-correlation where `covered` is 1, times the share of the template's norm that lies there.

    Else a good match of the template's empty half would count as much as one of the part.
    """
    inside = covered > 0.5
    if not inside.any():
        return 0.0
    a, b = template[inside] - template[inside].mean(), image[inside] - image[inside].mean()
    norm = math.sqrt(float(np.sum((template - template.mean()) ** 2)) * float(b @ b))
    return float(a @ b) / norm if norm > 0 else 0.0


def _rotated_spectra(template: NDArray[np.float32], canvas: int, side: int) -> NDArray[np.complex64]:
    """Conjugate spectra (K, side, side // 2 + 1) of the template turned by `_ANGLES` on a square canvas."""
    picture = Image.fromarray(template - template.mean())
    rotated = np.zeros((len(_ANGLES), side, side), np.float32)
    for angle, plane in zip(np.radians(-_ANGLES).tolist(), rotated, strict=True):
        data = _Pose(angle, 0, 0).to_image((canvas / 2, canvas / 2), _centre(template.shape))
        plane[:canvas, :canvas] = _transformed(picture, (canvas, canvas), data)
    return np.conj(np.fft.rfft2(rotated)).astype(np.complex64, copy=False)


def _pyramid(grey: NDArray[np.float32], count: int | None = None) -> list[NDArray[np.float32]]:
    """Maps of edge strength, each half as large as the one before; `count`, or down to `_COARSEST`."""
    planes = [_edges(grey)]
    while (max(planes[-1].shape) > _COARSEST) if count is None else (len(planes) < count):
        planes.append(_reduced(planes[-1], 0.5))
    return planes


def _edges(grey: NDArray[np.float32]) -> NDArray[np.float32]:
    """The length of the gradient, smoothed before against noise and after for a wider reach."""
    if min(grey.shape) < 2:
        return np.zeros_like(grey)
    down, across = np.gradient(_smoothed(_smoothed(grey)))
    return _smoothed(_smoothed(np.hypot(down, across)))


def _smoothed(plane: NDArray[np.float32]) -> NDArray[np.float32]:
    """1 2 1 on both axes."""
    padded = np.pad(plane, 1, mode="edge")
    rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    smoothed: NDArray[np.float32] = (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) * np.float32(1 / 16)
    return smoothed


def _grey(pixels: NDArray[Any], factor: float) -> NDArray[np.float32]:
    """Any image, reduced, on the scale 0..255."""
    white = {"uint8": 255, "uint16": 65535}.get(pixels.dtype.name, 1)
    if pixels.dtype != np.uint8:
        # Pillow has no floating-point mode of several channels.
        pixels = pixels @ _LUMA if pixels.ndim == 3 else pixels.astype(np.float32)
    reduced: NDArray[np.float32] = _reduced(pixels, factor).astype(np.float32) * np.float32(255 / white)
    return reduced if reduced.ndim == 2 else np.asarray(reduced @ _LUMA)


def _reduced(pixels: NDArray[Any], factor: float) -> NDArray[Any]:
    """At exactly `factor`, whose rest at the right and lower edge is left out."""
    height, width = (max(1, math.floor(side * factor + 1e-9)) for side in pixels.shape[:2])
    box = (0, 0, min(width / factor, pixels.shape[1]), min(height / factor, pixels.shape[0]))
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR, box))


def _factor(size: tuple[int, int]) -> float:
    return min(1.0, LONGEST / max(size))


def _centre(size: tuple[int, ...], factor: float = 1.0) -> tuple[float, float]:
    return size[1] * factor / 2, size[0] * factor / 2


def _transformed(
    image: Image.Image,
    size: tuple[int, int],
    data: Affine,
    resampling: Image.Resampling = Image.Resampling.BILINEAR,
) -> NDArray[Any]:
    """A picture of `size` (height, width), made from the positions that `data` gives; 0 where they lie outside."""
    return np.array(image.transform((size[1], size[0]), Image.Transform.AFFINE, data, resampling))


def _degrees_between(one: _Pose, other: _Pose) -> float:
    return abs(math.degrees(math.remainder(one.angle - other.angle, 2 * math.pi)))


def _alike(one: _Pose, other: _Pose) -> bool:
    """Whether two refinements ended in the same pose."""
    return _degrees_between(one, other) < _STEP / 2 and math.hypot(one.x - other.x, one.y - other.y) < 2


def _fast_length(length: int) -> int:
    """The next length of which Fourier transforms are fast, from few, so that spectra can be kept."""
    side = 32
    while side < length:
        side = side * 3 // 2 if side & (side - 1) == 0 else side * 4 // 3
    return side
