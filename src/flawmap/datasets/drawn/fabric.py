"""A plain-woven cloth over a dark plate, never twice in the same place, seen from above.

Positions on the cloth are counted in yarns: warp yarn `i` lies between `s = i` and `s = i + 1` and runs along `t`, weft
yarn `j` lies between `t = j` and `t = j + 1` and runs along `s`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from flawmap.datasets.drawn.camera import SUPERSAMPLING
from flawmap.datasets.drawn.noise import Plane, smooth_noise
from flawmap.datasets.drawn.surface import Surface, blob, smoothstep

DEFECTS = ("hole", "knot", "missing_yarn", "stain")

WARP_PITCH = 7.4  # 1/256 of the picture
WEFT_PITCH = 8.3
SPARE = 8  # yarns beyond each edge of the picture, so that no pixel falls off the tables
WARP_COLOUR = np.array((0.31, 0.30, 0.285), dtype=np.float32)
WEFT_COLOUR = np.array((0.235, 0.24, 0.25), dtype=np.float32)
SWING = np.float32(0.42)  # how far a yarn rises over the next and dips under it, and its own bulge, in yarns
BULGE = np.float32(0.55)
PLATE_DEPTH = np.float32(-1.2)
DYES = ((0.42, 0.40, 0.38), (0.45, 0.36, 0.26), (0.35, 0.36, 0.38))
PLATE = (0.035, 0.035, 0.037)


class Cloth:
    """One piece of cloth under the camera at `SUPERSAMPLING` times `size` pixels."""

    def __init__(self, rng: np.random.Generator, size: int) -> None:
        canvas = size * SUPERSAMPLING
        unit = canvas / 256
        shape = (canvas, canvas)
        turn = rng.uniform(-0.07, 0.07)
        pitch_s, pitch_t = WARP_PITCH * unit * rng.uniform(0.96, 1.04), WEFT_PITCH * unit * rng.uniform(0.96, 1.04)
        x = np.arange(canvas, dtype=np.float32)[None, :] - np.float32(canvas / 2)
        y = np.arange(canvas, dtype=np.float32)[:, None] - np.float32(canvas / 2)
        cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
        warps, wefts = int(canvas * 1.1 / pitch_s) + 2 * SPARE, int(canvas * 1.1 / pitch_t) + 2 * SPARE
        s = (x * cos + y * sin) / np.float32(pitch_s) + np.float32(warps / 2 + rng.uniform())
        t = (y * cos - x * sin) / np.float32(pitch_t) + np.float32(wefts / 2 + rng.uniform())
        self.canvas, self.unit, self.pitch, self.warps, self.wefts = canvas, unit, pitch_s, warps, wefts
        self.s = s + 0.30 * smooth_noise(rng, shape, 80 * unit) + 0.045 * smooth_noise(rng, shape, 8 * unit)
        self.t = t + 0.30 * smooth_noise(rng, shape, 80 * unit) + 0.045 * smooth_noise(rng, shape, 8 * unit)
        self.thick_warp = 0.47 * _yarn_table(rng, warps, wefts, 0.05, 0.05)
        self.thick_weft = 0.47 * _yarn_table(rng, wefts, warps, 0.05, 0.05)
        self.tone_warp = _yarn_table(rng, warps, wefts, 0.055, 0.05)
        self.tone_weft = _yarn_table(rng, wefts, warps, 0.075, 0.05)
        self.fibres = smooth_noise(rng, shape, 1.1 * unit)
        self.lint = [_hair(rng, rng.uniform(0, canvas, 2), rng.uniform(5, 22) * unit) for _ in range(rng.poisson(3))]

    def surface(self, defect: str | None, flaw: np.random.Generator) -> Surface:
        """The woven cloth; `flaw` draws the defect, and only it."""
        s, t, fibres = self.s, self.t, self.fibres
        lump = np.float32(0)
        middle = flaw.uniform(0.2, 0.8, 2) * self.canvas
        row, column = int(middle[1]), int(middle[0])
        s0, t0 = float(s[row, column]), float(t[row, column])
        if defect == "knot":
            s, t, lump = _knot(flaw, s, t, s0, t0)

        warp_start, weft_start = np.floor(s), np.floor(t)
        a, b = s - warp_start - np.float32(0.5), t - weft_start - np.float32(0.5)
        i, j = warp_start.astype(np.int32), weft_start.astype(np.int32)
        at_warp, at_weft = i * np.int32(self.wefts) + j, j * np.int32(self.warps) + i  # places in the yarn tables
        half_warp, half_weft = self.thick_warp.take(at_warp), self.thick_weft.take(at_weft)
        if defect == "hole":
            radius = flaw.uniform(1.3, 4.2)
            left_warp, left_weft = _hole(flaw, s, t, i, j, s0, t0, radius, self.warps + self.wefts)
            half_warp, half_weft = half_warp * left_warp, half_weft * left_weft
        if defect == "missing_yarn":
            if flaw.uniform() < 0.5:
                half_warp = half_warp * _gap(flaw, i, t, int(s0), t0, self.wefts)
            else:
                half_weft = half_weft * _gap(flaw, j, s, int(t0), s0, self.warps)

        warp_above = 1 - 2 * ((i + j) & 1).astype(np.float32)  # 1 where the warp crosses over the weft, -1 under it
        high_warp = _yarn_height(a, half_warp, SWING * warp_above * np.cos(np.float32(np.pi) * b))
        high_weft = _yarn_height(b, half_weft, -SWING * warp_above * np.cos(np.float32(np.pi) * a))
        warp = (high_warp > high_weft).astype(np.float32)  # 1 where a warp yarn is seen, 0 where a weft yarn is
        height = np.maximum(high_warp, high_weft)
        cloth = (height > PLATE_DEPTH).astype(np.float32)

        run, side = a + warp * (b - a), warp * (a + b) - b
        twist = np.sin(np.float32(2 * np.pi) * (2.0 * run + 1.6 * side) + 1.5 * fibres)
        tone_warp, tone_weft = self.tone_warp.take(at_warp), self.tone_weft.take(at_weft)
        tone = (tone_weft + warp * (tone_warp - tone_weft)) * (1 + 0.10 * twist + 0.07 * fibres)
        tone *= 0.66 + 0.50 * height  # the valleys see less of the room
        if defect == "stain":
            soaked = _stain(flaw, s, t, s0, t0, a, b)
            dye = np.array(flaw.choice(DYES), dtype=np.float32)
            soaked *= np.float32(flaw.uniform(0.35, 1.0))

        surface = Surface.flat(self.canvas, PLATE)
        for channel, plane in enumerate(surface.albedo):
            colour = (WEFT_COLOUR[channel] + (WARP_COLOUR - WEFT_COLOUR)[channel] * warp) * tone
            if defect == "stain":
                colour *= 1 - (1 - dye[channel]) * soaked
            plane += cloth * (colour - plane)
        surface.gloss[:] = 0.05 * cloth
        surface.height[:] = (height + cloth * (lump + 0.03 * twist + 0.02 * fibres)) * np.float32(0.40 * self.pitch)
        if defect == "hole":
            for _ in range(12):
                _draw_hair(surface, _fringe(flaw, middle, radius * self.pitch, self.unit), (0.24, 0.235, 0.23), 0.9)
        if defect == "knot":
            for _ in range(3):
                _draw_hair(surface, _fringe(flaw, middle, 0.8 * self.pitch, self.unit), (0.42, 0.41, 0.40), 0.6)
        for hair in self.lint:
            _draw_hair(surface, hair, (0.42, 0.42, 0.41), 0.35)
        return surface


def _yarn_table(rng: np.random.Generator, yarns: int, length: int, between: float, along: float) -> Plane:
    """(yarns, length) float32 about 1: each yarn has its own value and changes slowly along its run."""
    own = rng.standard_normal((yarns, 1), dtype=np.float32) * np.float32(between)
    table: Plane = 1 + own + np.float32(along) * smooth_noise(rng, (yarns, length), (1, 4))
    return table


def _yarn_height(across: Plane, half: Plane, middle: Plane) -> Plane:
    """Height in yarns of a round yarn at a distance `across` from its middle line, `PLATE_DEPTH` beside it."""
    inside = 1 - (across / np.maximum(half, 0.05)) ** 2
    yarn = ((inside > 0) & (half > 0.1)).astype(np.float32)
    height: Plane = PLATE_DEPTH + yarn * (middle + BULGE * np.sqrt(np.maximum(inside, 0)) - PLATE_DEPTH)
    return height


def _knot(flaw: np.random.Generator, s: Plane, t: Plane, s0: float, t0: float) -> tuple[Plane, Plane, Plane]:
    """Yarns swollen around a knot: the positions (s, t) to draw there and the height of the lump, in yarn heights."""
    radius = flaw.uniform(1.1, 2.2)
    ds, dt = s - np.float32(s0), t - np.float32(t0)
    near = np.exp(-(blob(flaw, ds, dt, radius, 0.25) ** 2))
    squeeze = 1 - np.float32(flaw.uniform(0.35, 0.6)) * near
    turned = np.float32(flaw.uniform(-0.9, 0.9)) * near  # the tangle twists its yarns
    ds, dt = ds + turned * dt, dt - turned * ds
    return s0 + ds * squeeze, t0 + dt * squeeze, np.float32(flaw.uniform(2.2, 4.2)) * near


def _hole(
    flaw: np.random.Generator,
    s: Plane,
    t: Plane,
    i: NDArray[np.int32],
    j: NDArray[np.int32],
    s0: float,
    t0: float,
    radius: float,
    yarns: int,
) -> tuple[Plane, Plane]:
    """0..1, what is left of the warp's and of the weft's thickness: each yarn is torn off at a place of its own."""
    outline = flaw.integers(2**63)
    ragged = flaw.normal(0, 0.45, (2, yarns)).astype(np.float32)
    warp_middle: Plane = np.floor(s) + np.float32(0.5 - s0)
    weft_middle: Plane = np.floor(t) + np.float32(0.5 - t0)
    warp = blob(np.random.default_rng(outline), warp_middle, t - np.float32(t0) + ragged[0].take(i), radius, 0.2)
    weft = blob(np.random.default_rng(outline), s - np.float32(s0) + ragged[1].take(j), weft_middle, radius, 0.2)
    return smoothstep(0.95, 1.2, warp), smoothstep(0.95, 1.2, weft)


def _gap(
    flaw: np.random.Generator, index: NDArray[np.int32], along: Plane, yarn: int, middle: float, length: int
) -> Plane:
    """0..1, what is left of the thickness where one yarn is missing, now and then from edge to edge."""
    half = flaw.uniform(3.5, 0.4 * length)
    left: Plane = 1 - (index == yarn).astype(np.float32) * smoothstep(
        half, half - 0.6, np.abs(along - np.float32(middle))
    )
    return left


def _stain(flaw: np.random.Generator, s: Plane, t: Plane, s0: float, t0: float, a: Plane, b: Plane) -> Plane:
    """0..1, how far a liquid has soaked in; it creeps along the yarns and dries darker at its edge."""
    distance = blob(flaw, s - np.float32(s0), t - np.float32(t0), flaw.uniform(2.2, 6.0), 0.22)
    distance += 0.10 * np.abs(a) + 0.10 * np.abs(b)
    rim = np.exp(-(((distance - 0.97) / 0.07) ** 2))
    soaked: Plane = smoothstep(1.12, 0.9, distance) * (0.78 + 0.22 * rim)
    return soaked


def _fringe(flaw: np.random.Generator, middle: NDArray[np.float64], radius: float, unit: float) -> NDArray[np.float64]:
    """One of the loose fibres around a place, as `_hair`."""
    bearing = flaw.uniform(0, 2 * np.pi)
    root = middle + radius * flaw.uniform(0.8, 1.2) * np.array([np.cos(bearing), np.sin(bearing)])
    return _hair(flaw, root, flaw.uniform(5, 14) * unit)


def _hair(rng: np.random.Generator, middle: NDArray[np.float64], length: float) -> NDArray[np.float64]:
    """A curled fibre as 12 points (x, y) in pixels."""
    bearing, curl = rng.uniform(0, 2 * np.pi), rng.normal(0, 1.3)
    steps = bearing + curl * np.linspace(-1, 1, 12) + 0.15 * rng.standard_normal(12)
    path = np.cumsum(np.stack([np.cos(steps), np.sin(steps)], axis=1), axis=0) * (length / 12)
    return np.asarray(path - path[6] + middle)


def _draw_hair(surface: Surface, path: NDArray[np.float64], colour: tuple[float, float, float], opacity: float) -> None:
    canvas = surface.height.shape[0]
    left, top = (int(v) for v in np.clip(path.min(axis=0) - 1, 0, canvas - 1))
    right, bottom = (int(v) for v in np.clip(path.max(axis=0) + 2, 1, canvas))
    sheet = Image.new("L", (max(right - left, 1), max(bottom - top, 1)))
    ImageDraw.Draw(sheet).line([(float(x), float(y)) for x, y in path - (left, top)], fill=255)
    coverage = np.asarray(sheet, dtype=np.float32) * np.float32(opacity / 255)
    surface.paint((slice(top, top + sheet.height), slice(left, left + sheet.width)), coverage, albedo=colour)
