"""From a surface to the light it sends to the camera: lamp, surroundings, shadow, highlights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from flawmap.datasets.drawn.noise import Plane
from flawmap.datasets.drawn.surface import Surface, smoothstep

SHADOW_STEPS = 40
STEEPEST = 5.0  # slopes beyond this look the same and only make the edges flicker


@dataclass(frozen=True)
class Light:
    """A lamp box above the part and the light that the room returns.

    `direction` is the unit vector (x, y, z) towards the lamp, `key` its strength, `ambient` that of the room,
    `falloff` the relative change of the key light over half the picture along x and y.
    """

    direction: tuple[float, float, float]
    key: float
    ambient: float
    falloff: tuple[float, float]


def sample_light(rng: np.random.Generator, swing: float = 0.6) -> Light:
    """A lamp at the upper left, its bearing within `swing` radians, as a fixture that is now and then knocked."""
    bearing = -2.3 + rng.uniform(-swing, swing)
    elevation = rng.uniform(0.75, 1.1)
    flat = math.cos(elevation)
    direction = (math.cos(bearing) * flat, math.sin(bearing) * flat, math.sin(elevation))
    slope = rng.uniform(0.04, 0.2)
    falloff = (slope * math.cos(bearing), slope * math.sin(bearing))
    return Light(direction, rng.uniform(0.85, 1.1), rng.uniform(0.28, 0.42), falloff)


def shade(surface: Surface, light: Light) -> Plane:
    """Light sent to the camera, (3, H, W) float32, linear, 1 for a white matte plane in full light.

    Matte parts follow Lambert's law, coats add a Blinn-Phong highlight, metal mirrors a lamp box, a dimmer strip
    opposite and the brightness of the ceiling, tinted by its albedo.
    """
    lx, ly, lz = light.direction
    slope_x, slope_y = _slopes(surface)
    nz: Plane = np.float32(1) / np.sqrt(1 + slope_x * slope_x + slope_y * slope_y)
    facing = (lz - slope_x * lx - slope_y * ly) * nz  # (H, W), cosine between normal and lamp
    lit, open_sky = _shadow_and_occlusion(surface, light)
    key = light.key * lit * _falloff(surface.height.shape, light)
    ambient = light.ambient * open_sky

    radiance: Plane = surface.albedo * ((np.maximum(facing, 0) * key + ambient) * (1 - surface.metal))

    if surface.gloss.any():
        half_z = math.sqrt((1 + lz) / 2)  # the half vector lies between the lamp and the camera at (0, 0, 1)
        half_x, half_y = lx / (2 * half_z), ly / (2 * half_z)
        highlight = np.maximum((half_z - slope_x * half_x - slope_y * half_y) * nz, 0)
        for _ in range(5):  # to the power of 32
            highlight *= highlight
        radiance += surface.gloss * highlight * key

    if surface.metal.any():
        twice = 2 * nz * nz
        up: Plane = twice - 1  # z of the mirrored view ray
        to_lamp: Plane = 2 * nz * facing - lz
        to_strip: Plane = twice * (lx * slope_x + ly * slope_y) + 0.3 * up
        seen = open_sky * (0.10 + 0.38 * smoothstep(-0.5, 1.0, up) + 0.35 * smoothstep(0.45, 0.85, to_strip))
        seen += (0.35 * smoothstep(0.2, 0.95, to_lamp) + 1.1 * smoothstep(0.86, 0.985, to_lamp)) * key
        radiance += surface.albedo * (surface.metal * seen)
    return radiance


def _slopes(surface: Surface) -> tuple[Plane, Plane]:
    """dz/dx and dz/dy, (H, W) each, without the steps between layers."""
    slopes = []
    for axis in (1, 0):
        step = np.diff(surface.height, axis=axis)
        step[np.diff(surface.layer, axis=axis) != 0] = 0
        slope = np.zeros_like(surface.height)
        before, after = (slice(1, None), slice(None, -1)) if axis == 0 else (np.s_[:, 1:], np.s_[:, :-1])
        slope[before] += step
        slope[after] += step
        slopes.append(np.clip(slope * np.float32(0.5), -STEEPEST, STEEPEST))
    return slopes[0], slopes[1]


def _falloff(shape: tuple[int, ...], light: Light) -> Plane:
    y = np.linspace(-1, 1, shape[0], dtype=np.float32)[:, None] * np.float32(light.falloff[1])
    x = np.linspace(-1, 1, shape[1], dtype=np.float32)[None, :] * np.float32(light.falloff[0])
    strength: Plane = 1 + x + y
    return strength


def _shadow_and_occlusion(surface: Surface, light: Light) -> tuple[Plane, Plane]:
    """How much of the lamp and of the room each pixel sees, (H, W) in 0..1 each; worked out at half resolution."""
    from scipy.ndimage import uniform_filter

    rows, columns = surface.height.shape
    height = (surface.height + surface.lift)[::2, ::2] * np.float32(0.5)
    lx, ly, lz = light.direction
    flat = math.hypot(lx, ly)
    rise = lz / flat  # pixels up for each pixel towards the lamp
    reach = min(float(height.max() - height.min()) / rise, min(height.shape) / 3)
    blocked = np.zeros_like(height)
    pad = int(reach) + 2
    padded = np.pad(height, pad, mode="edge")
    steps = min(int(reach) + 1, SHADOW_STEPS)
    spacing = max(reach, 1) / steps
    for step in range(1, steps + 1):
        distance = step * spacing
        x, y = pad + round(distance * lx / flat), pad + round(distance * ly / flat)
        above = padded[y : y + height.shape[0], x : x + height.shape[1]] - height - np.float32(distance * rise)
        np.maximum(blocked, np.clip(above * np.float32(1 / (0.6 + spacing * rise + 0.1 * distance)), 0, 1), out=blocked)
    lit = 1 - uniform_filter(blocked, 3)

    wide = max(3, rows // 64) | 1
    around = uniform_filter(uniform_filter(height, wide), wide)
    open_sky = 1 / (1 + np.float32(3.5 / wide) * np.maximum(around - height, 0))
    lit, open_sky = (
        np.asarray(Image.fromarray(plane).resize((columns, rows), Image.Resampling.BILINEAR), dtype=np.float32)
        for plane in (lit, open_sky)
    )
    return lit, open_sky
