"""What the light falls on: a height field with the properties of its material, and the shapes it is built from."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from flawmap.datasets.drawn.noise import Plane

Window = tuple[slice, slice]


@dataclass
class Surface:
    """A scene seen from straight above, at the drawing resolution. x runs right, y down, z towards the camera.

    `height` (H, W) float32 is in pixels and gives the slopes. `layer` (H, W) int8 numbers the things that lie on one
    another: a step between two layers is an edge, never a slope. `lift` (H, W) float32 is the height that only throws
    shadows, such as the gap under a round part. `albedo` (3, H, W) float32 is linear reflectance in 0..1. `metal`
    (H, W) float32 in 0..1 is how far the surface mirrors its surroundings instead of scattering light, `gloss` (H, W)
    float32 in 0..1 the strength of the coat's highlight.
    """

    height: Plane
    layer: NDArray[np.int8]
    lift: Plane
    albedo: Plane
    metal: Plane
    gloss: Plane

    @classmethod
    def flat(cls, size: int, albedo: tuple[float, float, float]) -> Surface:
        """A matte plane of `size` x `size` pixels in one colour."""
        colour = np.empty((3, size, size), dtype=np.float32)
        colour[:] = np.array(albedo, dtype=np.float32)[:, None, None]
        planes = np.zeros((4, size, size), dtype=np.float32)
        return cls(planes[0], np.zeros((size, size), dtype=np.int8), planes[1], colour, planes[2], planes[3])

    def copy(self) -> Surface:
        """The same surface, to be changed by itself."""
        return Surface(**{field.name: getattr(self, field.name).copy() for field in fields(self)})

    def paint(
        self,
        window: Window,
        coverage: Plane,
        *,
        height: Plane | float | None = None,
        layer: int | None = None,
        albedo: Plane | tuple[float, float, float] | None = None,
        metal: float | None = None,
        gloss: float | None = None,
    ) -> None:
        """Lay a material over a window. `coverage` (h, w) in 0..1 is its opacity; what is None stays as it was."""
        if height is not None:
            self.height[window] += coverage * (height - self.height[window])
        if layer is not None:
            self.layer[window][coverage > 0.5] = layer
        if albedo is not None:
            colour = np.asarray(albedo, dtype=np.float32)
            below = self.albedo[:, window[0], window[1]]
            below += coverage * ((colour[:, None, None] if colour.ndim == 1 else colour) - below)
        for plane, value in ((self.metal, metal), (self.gloss, gloss)):
            if value is not None:
                plane[window] += coverage * (np.float32(value) - plane[window])


def local_window(
    size: int, centre: tuple[float, float], angle: float, reach: float | tuple[float, float]
) -> tuple[Window, Plane, Plane]:
    """The part of a `size` x `size` canvas around a turned box, and its pixels' coordinates in the box's own frame.

    `centre` is (x, y) in pixels, `angle` turns the box's x axis clockwise in radians, `reach` is the half extent
    (along, across). Returns the window and the planes (h, w) along and across; the window may be empty.
    """
    along, across = reach if isinstance(reach, tuple) else (reach, reach)
    cos, sin = np.cos(angle), np.sin(angle)
    half_width, half_height = abs(along * cos) + abs(across * sin), abs(along * sin) + abs(across * cos)
    left, right = (int(np.clip(v, 0, size)) for v in (centre[0] - half_width, centre[0] + half_width + 2))
    top, bottom = (int(np.clip(v, 0, size)) for v in (centre[1] - half_height, centre[1] + half_height + 2))
    x = np.arange(left, right, dtype=np.float32)[None, :] - np.float32(centre[0])
    y = np.arange(top, bottom, dtype=np.float32)[:, None] - np.float32(centre[1])
    window = (slice(top, bottom), slice(left, right))
    return window, x * np.float32(cos) + y * np.float32(sin), y * np.float32(cos) - x * np.float32(sin)


def smoothstep(low: float, high: float, value: Plane) -> Plane:
    """0 below `low`, 1 above `high`, a smooth cubic between; `low > high` turns it round."""
    t = np.clip((value - np.float32(low)) * np.float32(1 / (high - low)), 0, 1)
    smooth: Plane = t * t * (3 - 2 * t)
    return smooth


def rounded_box(x: Plane, y: Plane, half_x: float, half_y: float, radius: float) -> Plane:
    """Signed distance in pixels to a box with rounded corners around the origin, negative inside."""
    dx, dy = np.abs(x) - np.float32(half_x - radius), np.abs(y) - np.float32(half_y - radius)
    outside = np.sqrt(np.maximum(dx, 0) ** 2 + np.maximum(dy, 0) ** 2)
    distance: Plane = outside + np.minimum(np.maximum(dx, dy), 0) - np.float32(radius)
    return distance


def blob(rng: np.random.Generator, x: Plane, y: Plane, radius: float, roughness: float) -> Plane:
    """Distance from the origin over an uneven outline's radius there: below 1 inside, 1 on the outline."""
    bearing = np.arctan2(y, x)
    outline = np.ones_like(bearing)
    for lobes in range(2, 8):
        outline += np.float32(roughness * rng.normal() / lobes) * np.cos(
            lobes * bearing + np.float32(rng.uniform(0, 7))
        )
    distance: Plane = np.hypot(x, y) / (np.float32(radius) * np.maximum(outline, 0.3))
    return distance
