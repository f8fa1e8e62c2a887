"""Drawn textures, so that no collection of photographs has to be downloaded to make defects look foreign."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from flawmap.datasets.drawn.noise import Plane, fractal_noise, smooth_noise

Recipe = Callable[[np.random.Generator, tuple[int, int]], Plane]


def draw_texture(rng: np.random.Generator, size: tuple[int, int]) -> NDArray[np.uint8]:
    """A texture in random colours: one of `RECIPES`, or one where a second is not, with or without fine noise.

    Args:
        size: (H, W), in pixels.

    Returns:
        uint8 (H, W, 3).
    """
    recipes = list(RECIPES.values())
    field = recipes[rng.integers(len(recipes))](rng, size)
    if rng.random() < 0.25:
        other = recipes[rng.integers(len(recipes))](rng, size)
        where = np.clip(2 * smooth_noise(rng, size, _period(rng, size, 4, 1)) + 0.5, 0, 1)
        field = field + where * (other - field)
    if rng.random() < 0.5:
        field = field + np.float32(rng.uniform(0.02, 0.15)) * rng.standard_normal(size, dtype=np.float32)
    index = (np.clip(field, 0, 1) * 255).astype(np.uint8)
    picture = Image.fromarray(index)
    picture.putpalette(_palette(rng).tobytes())
    return np.asarray(picture.convert("RGB"))


def brick(rng: np.random.Generator, size: tuple[int, int]) -> Plane:
    """Courses of bricks of their own shades with mortar between them."""
    u, v = _turned(rng, size)
    long = _period(rng, size, 16, 2)
    high = long * rng.uniform(0.25, 0.8)
    course = np.floor(v / high)
    along = u / long + course * np.float32(rng.choice([0.0, 0.5, rng.random()]))
    column = np.floor(along)
    gap = np.minimum(_to_edge(along - column) * long, _to_edge(v / high - course) * high)
    shade = _cell_noise(rng, column, course)
    mortar = np.clip(gap - rng.uniform(0.5, 0.12 * high + 0.6), 0, 1)
    level = np.float32(rng.choice([0.0, 1.0]))
    return _field(level + mortar * (0.2 + 0.6 * shade - level))


def weave(rng: np.random.Generator, size: tuple[int, int]) -> Plane:
    """Warp and weft passing over and under one another."""
    u, v = _turned(rng, size)
    period = _period(rng, size, 40, 8)
    a, b = u / period, v / (period * rng.uniform(0.6, 1.6))
    over = _wrapped(np.floor(a) + np.floor(b) * int(rng.choice([1, 1, 3])), int(rng.choice([2, 2, 3, 4]))) < 1
    warp, weft = np.abs(np.sin(np.pi * a)), np.abs(np.sin(np.pi * b))
    tone = np.float32(rng.uniform(0.4, 1))
    return _field(np.where(over, warp * (0.6 + 0.4 * weft), weft * (0.6 + 0.4 * warp) * tone))


def grain(rng: np.random.Generator, size: tuple[int, int]) -> Plane:
    """The rings and pores of sawn wood, brushed metal, straw."""
    u, v = _turned(rng, size)
    period = _period(rng, size, 30, 4)
    bend = smooth_noise(rng, size, _period(rng, size, 3, 1)) * np.float32(rng.uniform(0, 1.5))
    rings = _wrapped(v / period + bend + u / period * 0.02)
    pores = smooth_noise(rng, size, _streaks(rng, size))
    return _field(0.15 + 0.5 * rings + np.float32(rng.uniform(0.05, 0.25)) * pores)


def noise(rng: np.random.Generator, size: tuple[int, int]) -> Plane:
    """Clouds, stone, sand; or streaks."""
    if rng.random() < 0.3:
        return _field(0.5 + 0.25 * smooth_noise(rng, size, _streaks(rng, size)))
    field = fractal_noise(rng, size, _period(rng, size, 60, 2), int(rng.integers(1, 5)))
    if rng.random() < 0.3:  # ridges, as in crumpled sheets
        return _field(1 - 0.6 * np.abs(field))
    return _field(0.5 + 0.25 * field)


def gradient(rng: np.random.Generator, size: tuple[int, int]) -> Plane:
    """Light that falls off, straight or round, once or in bands."""
    height, width = size
    u, v = _turned(rng, size)
    side = max(size)
    if rng.random() < 0.5:
        ramp = u / side
    else:
        ramp = np.hypot(u - rng.uniform(-0.5, 0.5) * width, v - rng.uniform(-0.5, 0.5) * height) / side
    times = math.exp(rng.uniform(math.log(0.7), math.log(12)))
    wave = _wrapped(_field(ramp * times + rng.random()), 2)
    folded = 1 - np.abs(wave - 1)
    return _field(folded if rng.random() < 0.6 else np.floor(folded * 4) / 3)


def scratches(rng: np.random.Generator, size: tuple[int, int]) -> Plane:
    """Many straight or bent lines, in one direction or in all."""
    height, width = size
    side = max(size)
    picture = Image.new("L", (width, height), int(rng.integers(60, 200)))
    draw = ImageDraw.Draw(picture)
    angle, spread = rng.uniform(0, math.pi), float(rng.choice([0.05, 0.4, math.pi]))
    for _ in range(int(rng.integers(10, 80))):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        turn, length = angle + rng.uniform(-spread, spread), rng.uniform(0.05, 0.6) * side
        points = [(x, y)]
        for _ in range(3):
            turn += rng.normal(0, 0.15)
            x, y = x + math.cos(turn) * length / 3, y + math.sin(turn) * length / 3
            points.append((x, y))
        draw.line(points, fill=int(rng.integers(256)), width=max(1, round(side / 256 * rng.uniform(0.6, 4))))
    return _field(np.asarray(picture) / 255 + 0.06 * smooth_noise(rng, size, _period(rng, size, 30, 2)))


def blobs(rng: np.random.Generator, size: tuple[int, int]) -> Plane:
    """Stains and spots: noise cut off softly, or discs."""
    height, width = size
    if rng.random() < 0.5:
        field = fractal_noise(rng, size, _period(rng, size, 30, 3), 2)
        return _field(np.clip((field - rng.uniform(-0.7, 1)) * rng.uniform(1.5, 8) + 0.5, 0, 1))
    picture = Image.new("L", (width, height), int(rng.integers(256)))
    draw = ImageDraw.Draw(picture)
    radius = _period(rng, size, 60, 8)
    for _ in range(int(np.clip(rng.uniform(0.1, 0.6) * height * width / radius**2, 1, 150))):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        a, b = radius * rng.uniform(0.3, 1.2, 2)
        draw.ellipse((x - a, y - b, x + a, y + b), fill=int(rng.integers(256)))
    return _field(np.asarray(picture) / 255)


def cells(rng: np.random.Generator, size: tuple[int, int]) -> Plane:
    """Pebbles, scales, dried mud: Worley's cellular noise (SIGGRAPH 1996), drawn at half the size."""
    shape = (max(1, size[0] // 2), max(1, size[1] // 2))
    count = int(rng.integers(5, 40))
    y = np.arange(shape[0], dtype=np.float32)[:, None]
    x = np.arange(shape[1], dtype=np.float32)[None]
    first = np.full(shape, np.inf, np.float32)
    second = first.copy()
    for py, px in rng.uniform(-0.1, 1.1, (count, 2)).astype(np.float32) * np.array(shape, np.float32):
        distance = (y - py) ** 2 + (x - px) ** 2
        second = np.minimum(second, np.maximum(first, distance))
        first = np.minimum(first, distance)
    scale = math.sqrt(shape[0] * shape[1] / count)
    nearest, next_nearest = _field(np.sqrt(first) / scale), _field(np.sqrt(second) / scale)
    field = nearest if rng.random() < 0.4 else np.clip((next_nearest - nearest) * np.float32(rng.uniform(1, 8)), 0, 1)
    return np.asarray(Image.fromarray(_field(field)).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def stripes(rng: np.random.Generator, size: tuple[int, int]) -> Plane:
    """Stripes, checks, ribs and meshes of holes, sharp or soft."""
    u, v = _turned(rng, size)
    period = _period(rng, size, 40, 2)
    across = np.sin(2 * np.pi / period * u)
    if rng.random() < 0.6:
        along = np.sin(2 * np.pi / (period * rng.uniform(0.5, 2)) * v)
        across = across * along if rng.random() < 0.5 else np.maximum(across, along)
    return _field(0.5 + 0.5 * np.clip(across * math.exp(rng.uniform(0, 2)), -1, 1))


def marble(rng: np.random.Generator, size: tuple[int, int]) -> Plane:
    """Veins: waves bent far by noise."""
    u, _ = _turned(rng, size)
    period = _period(rng, size, 12, 1)
    bend = fractal_noise(rng, size, _period(rng, size, 12, 2), 3)
    wave = np.sin(2 * np.pi / period * u + np.float32(rng.uniform(1, 4)) * bend)
    return _field(0.5 + 0.5 * wave if rng.random() < 0.5 else 1 - np.abs(wave))


RECIPES: dict[str, Recipe] = {
    "brick": brick,
    "weave": weave,
    "grain": grain,
    "noise": noise,
    "gradient": gradient,
    "scratches": scratches,
    "blobs": blobs,
    "cells": cells,
    "stripes": stripes,
    "marble": marble,
}
"""Fields of float32 (H, W), mostly within 0..1, by what they look like."""


def _field(values: NDArray[np.floating[Any]]) -> Plane:
    return values.astype(np.float32, copy=False)


def _turned(rng: np.random.Generator, size: tuple[int, int]) -> tuple[Plane, Plane]:
    """Coordinates in pixels about the middle, turned and (half of the time) warped, each (H, W)."""
    y = np.arange(size[0], dtype=np.float32)[:, None] - size[0] / 2
    x = np.arange(size[1], dtype=np.float32)[None] - size[1] / 2
    angle = rng.uniform(0, math.pi)
    u, v = math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x
    if rng.random() < 0.5:
        warp = smooth_noise(rng, size, _period(rng, size, 6, 1))
        strength = np.float32(rng.uniform(0, 0.03) * max(size))
        u, v = u + strength * warp, v - strength * warp
    return _field(u), _field(v)


def _period(rng: np.random.Generator, size: tuple[int, int], most: float, least: float) -> float:
    """A length of 2 pixels or more, `least` to `most` of which make the longer side, uniform in its logarithm."""
    return max(2.0, max(size) / math.exp(rng.uniform(math.log(least), math.log(most))))


def _streaks(rng: np.random.Generator, size: tuple[int, int]) -> tuple[float, float]:
    pair = (_period(rng, size, 120, 30), _period(rng, size, 8, 1))
    return pair if rng.random() < 0.5 else (pair[1], pair[0])


def _wrapped(values: Plane, period: int = 1) -> Plane:
    """What is left of the values beyond a multiple of the period; the `%` of NumPy is far slower."""
    return _field(values - period * np.floor(values / period))


def _to_edge(share: Plane) -> Plane:
    return _field(np.minimum(share, 1 - share))


def _cell_noise(rng: np.random.Generator, column: Plane, row: Plane) -> Plane:
    """A shade in 0..1 for each pair of whole numbers, (H, W)."""
    shades = rng.random((64, 64), dtype=np.float32)
    return shades.ravel()[(row.astype(np.int32) & 63) * 64 + (column.astype(np.int32) & 63)]


def _palette(rng: np.random.Generator) -> NDArray[np.uint8]:
    """256 colours along a line through two to four random ones, mostly muted as real things are, (256, 3)."""
    stops = int(rng.integers(2, 5))
    colours = rng.uniform(0, 255, (stops, 3))
    grey = rng.uniform(0, 255, (stops, 1))
    colours = grey + rng.random() ** 2 * (colours - grey)
    tint = 1 - rng.random() ** 2 * rng.uniform(0, 0.5, 3)
    places = np.linspace(0, 255, stops)
    lines = [np.interp(np.arange(256), places, colours[:, channel] * tint[channel]) for channel in range(3)]
    palette: NDArray[np.uint8] = np.stack(lines, axis=1).round().astype(np.uint8)
    return palette
