"""Rigid registration: how a part lies in an image, compared with a template. Needs numpy and Pillow only.

Both pictures are reduced and turned into maps of edge strength, which keep their shape when the light changes. On the
smallest maps, all rotations of the template are tried by cross-correlation in Fourier space; the best poses are refined
by Gauss-Newton steps, from there to the largest maps.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from flawmap.errors import FlawmapError, ImageError
from flawmap.imaging.arrays import as_pixels, size_text
from flawmap.imaging.edges import edge_pyramid, to_grey
from flawmap.imaging.refinement import Level
from flawmap.imaging.rigid import Alignment, Pose, transformed

LONGEST = 256
"""Pixels; the longest side of the reduced template."""

_STEP = 3.0  # degrees between the rotations tried; under 3 pixels at the rim of the smallest maps
_ANGLES = np.arange(-180, 180, _STEP)
_TRIED = 8  # rotations refined on the coarsest maps
_KEPT = 3  # poses refined on the next
_LARGEST_RATIO = 2.0


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
        self._levels = [Level(plane) for plane in edge_pyramid(grey)]
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
        return cls(to_grey(pixels, _factor(size)), size)

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
        planes = edge_pyramid(to_grey(pixels, factor), len(self._levels))
        limit = math.radians(max_angle)

        found: list[tuple[float, Pose]] = [(0.0, pose) for pose in self._search(planes[-1], limit)]
        for depth in reversed(range(len(self._levels))):
            level, scale = self._levels[depth], factor / 2**depth
            centres = _centre(self.size, scale), _centre(size, scale)
            refined = [level.refine(planes[depth], pose, *centres, limit) for _, pose in found]
            kept: list[tuple[float, Pose]] = []
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

    def _search(self, edges: NDArray[np.float32], limit: float) -> list[Pose]:
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

        poses: list[Pose] = []
        for one in np.argsort(-peaks):
            y, x = divmod(int(places[one]), side)
            # The upper left corner of the canvas lies up to half a canvas above or left of the image.
            y, x = (at - side if at >= edges.shape[axis] else at for axis, at in ((0, y), (1, x)))
            pose = Pose(
                float(angles[tried[one]]),
                x + canvas / 2 - edges.shape[1] / 2,
                y + canvas / 2 - edges.shape[0] / 2,
            )
            if all(_degrees_between(pose, other) > 1.5 * _STEP for other in poses):
                poses.append(pose)
            if len(poses) == _TRIED:
                break
        return poses


def _rotated_spectra(template: NDArray[np.float32], canvas: int, side: int) -> NDArray[np.complex64]:
    """Conjugate spectra (K, side, side // 2 + 1) of the template turned by `_ANGLES` on a square canvas."""
    picture = Image.fromarray(template - template.mean())
    rotated = np.zeros((len(_ANGLES), side, side), np.float32)
    for angle, plane in zip(np.radians(-_ANGLES).tolist(), rotated, strict=True):
        data = Pose(angle, 0, 0).to_image((canvas / 2, canvas / 2), _centre(template.shape))
        plane[:canvas, :canvas] = transformed(picture, (canvas, canvas), data)
    return np.conj(np.fft.rfft2(rotated)).astype(np.complex64, copy=False)


def _factor(size: tuple[int, int]) -> float:
    return min(1.0, LONGEST / max(size))


def _centre(size: tuple[int, ...], factor: float = 1.0) -> tuple[float, float]:
    return size[1] * factor / 2, size[0] * factor / 2


def _degrees_between(one: Pose, other: Pose) -> float:
    return abs(math.degrees(math.remainder(one.angle - other.angle, 2 * math.pi)))


def _alike(one: Pose, other: Pose) -> bool:
    """Whether two refinements ended in the same pose."""
    return _degrees_between(one, other) < _STEP / 2 and math.hypot(one.x - other.x, one.y - other.y) < 2


def _fast_length(length: int) -> int:
    """The next length of which Fourier transforms are fast, from few, so that spectra can be kept."""
    side = 32
    while side < length:
        side = side * 3 // 2 if side & (side - 1) == 0 else side * 4 // 3
    return side
