"""A countersunk screw with a cross drive, lying anyhow on a matte tray, seen from an oblique camera.

Lengths are in units of 1/256 of the picture. The axis leans towards the camera, so the head's face shows as an ellipse
and each turn of the thread as an arc. `along` runs on the axis from the face to the tip, `across` at right angles.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from flawmap.datasets.drawn.camera import SUPERSAMPLING
from flawmap.datasets.drawn.noise import Plane, fractal_noise, smooth_noise
from flawmap.datasets.drawn.surface import Surface, blob, local_window, smoothstep

DEFECTS = ("bent", "broken_tip", "scratched_head", "stripped_thread")

LENGTH = 172.0
HEAD_RADIUS = 29.0
RIM = 2.5  # thickness of the head's edge
CONE_END = 27.0
SHANK_RADIUS = 10.8
CORE_RADIUS = 9.2
THREAD_START = 56.0
TIP_START = 144.0
PITCH = 9.8
THREAD_DEPTH = 5.0

TRAY, SCREW, FACE = 0, 1, 2


class Screw:
    """One screw on its tray at `SUPERSAMPLING` times `size` pixels."""

    def __init__(self, rng: np.random.Generator, size: int) -> None:
        canvas = size * SUPERSAMPLING
        unit = canvas / 256
        self.unit = unit
        self.angle, self.lean = rng.uniform(0, 2 * np.pi), np.float32(np.sin(rng.uniform(0.42, 0.58)))
        self.thread_turn, self.drive_turn = rng.uniform(0, 1), rng.uniform(0, np.pi / 2)
        self.thread_depth = THREAD_DEPTH * rng.uniform(0.93, 1.05)
        tone, warmth = rng.uniform(0.62, 0.80), rng.normal(0, 0.012)
        self.steel = np.array((tone * (1 + warmth), tone, tone * (1.015 - warmth)), dtype=np.float32)[:, None, None]
        direction = np.array([np.cos(self.angle), np.sin(self.angle)])
        self.face = (128 + rng.uniform(-12, 12, 2) - 0.46 * LENGTH * direction) * unit
        middle = self.face + 0.5 * LENGTH * unit * direction
        self.window, along, across = local_window(
            canvas, (middle[0], middle[1]), self.angle, (0.62 * LENGTH * unit, 1.1 * HEAD_RADIUS * unit)
        )
        self.along, self.across = along / np.float32(unit) + np.float32(LENGTH / 2), across / np.float32(unit)
        self.finish = smooth_noise(rng, along.shape, 2.5 * unit)
        self.wear = fractal_noise(rng, along.shape, 30 * unit)
        self.lathe = rng.uniform(55, 75), rng.uniform(0, 6)
        self.tray = _tray(rng, canvas, unit)

    def surface(self, defect: str | None, flaw: np.random.Generator) -> Surface:
        """The screw on its tray; `flaw` draws the defect, and only it."""
        surface = self.tray.copy()
        x, across, unit = self.along, self.across, self.unit
        if defect == "bent":
            start = flaw.uniform(45, 100)
            bend = float(np.tan(flaw.uniform(0.15, 0.4))) * flaw.choice((-1.0, 1.0))
            past = np.maximum(x - np.float32(start), 0)
            across = across - np.float32(bend) * past * past / (past + 12)
        end = np.full_like(x, LENGTH)
        if defect == "broken_tip":
            jagged = smooth_noise(flaw, x.shape, 4 * unit)
            end = LENGTH - flaw.uniform(14, 42) + flaw.normal(0, 0.25) * across + 1.6 * jagged

        # Where on the axis a pixel looks depends on how far the surface stands off the axis there.
        along = x
        for _ in range(3):
            radius = _profile(along)
            along = 0.4 * along + 0.6 * (x - self.lean * np.sqrt(np.maximum(radius * radius - across * across, 0)))
        radius = _profile(along)
        bearing = np.arcsin(np.clip(across / (radius + np.float32(self.thread_depth)), -1, 1))
        height = self.thread_depth * _thread_amount(along)
        if defect == "stripped_thread":
            height = height * _stripping(flaw, along, bearing, unit)
        phase = along * np.float32(1 / PITCH) + bearing * np.float32(0.5 / np.pi) + np.float32(self.thread_turn)
        ridge = np.maximum(1 - np.abs(2 * (phase - np.floor(phase)) - 1) * np.float32(1 / 0.62), 0)
        radius = radius + height * ridge * np.float32(1.1) / (1 + np.float32(0.1) * ridge)
        standing = np.sqrt(np.maximum(radius * radius - across * across, 0))

        body = ((np.abs(across) < radius) & (along > 0) & (along < end)).astype(np.float32)
        valley = 1 - 0.45 * (1 - ridge) * np.clip(height / self.thread_depth, 0, 1)
        colour = self.steel * ((1 + 0.05 * self.wear + 0.05 * self.finish) * valley)
        relief = (standing + 0.05 * self.finish) * np.float32(unit)
        surface.paint(self.window, body, height=relief, layer=SCREW, albedo=colour, metal=0.93)
        gap = HEAD_RADIUS * 0.55 * np.clip(1 - x / LENGTH, 0, 1)
        surface.lift[self.window] += body * gap * np.float32(unit)
        self._draw_face(surface, flaw if defect == "scratched_head" else None)
        return surface

    def _draw_face(self, surface: Surface, flaw: np.random.Generator | None) -> None:
        """The head's face with its cross recess, and with scratches where `flaw` is given."""
        unit, lean = self.unit, self.lean
        radius = HEAD_RADIUS * unit
        reach = (radius * lean + 2, radius + 2)
        window, x, y = local_window(surface.height.shape[0], (self.face[0], self.face[1]), self.angle, reach)
        fx, fy = x / (radius * lean), y / np.float32(radius)  # (h, w), the face's own plane, 1 at the rim
        distance = np.hypot(fx, fy)
        cos, sin = np.float32(np.cos(self.drive_turn)), np.float32(np.sin(self.drive_turn))
        px, py = np.abs(fx * cos + fy * sin), np.abs(fy * cos - fx * sin)
        arm, other = np.maximum(px, py), np.minimum(px, py)
        # The arms narrow outwards and meet in a round well.
        cross = np.maximum(
            np.minimum((0.15 - 0.05 * arm - other) / 0.05, (0.62 - arm) / 0.08), (0.27 - distance) / 0.06
        )
        recess = np.clip(cross, 0, 1)
        bottom = recess * (0.30 + 0.25 * np.clip(1 - distance / 0.6, 0, 1))
        lathe = np.sin(distance * np.float32(self.lathe[0]) + np.float32(self.lathe[1]))
        dent = 0.0022 * lathe - 0.03 * smoothstep(0.88, 1.0, distance) - 0.28 * bottom
        tone = (1 - 0.72 * recess) * (1 + 0.04 * lathe)
        if flaw is not None:
            depth = _scratches(flaw, x.shape, unit)
            dent = dent - 0.04 * depth
            tone = tone * (1 - 0.65 * depth * (1 - recess))
        tilt = np.sqrt(1 - lean * lean) / lean
        relief = x * tilt * np.float32(0.45) + dent * np.float32(radius)
        coverage = smoothstep(1.0 + 0.5 / radius, 1.0 - 1.5 / radius, distance)
        surface.paint(window, coverage, height=relief, layer=FACE, albedo=self.steel * tone, metal=0.9)
        surface.lift[window] += coverage * np.float32(HEAD_RADIUS * unit)


def _profile(along: Plane) -> Plane:
    """Radius of the blank without its thread."""
    cone = np.clip((along - RIM) / (CONE_END - RIM), 0, 1)
    radius: Plane = SHANK_RADIUS + (HEAD_RADIUS - SHANK_RADIUS) * (1 - cone) * np.sqrt(1 - cone)
    radius += (CORE_RADIUS - SHANK_RADIUS) * smoothstep(THREAD_START - 4, THREAD_START + 2, along)
    radius *= np.clip((LENGTH - along) / (LENGTH - TIP_START), 0, 1)
    return radius


def _thread_amount(along: Plane) -> Plane:
    """0..1, the share of its full height that the thread has."""
    return smoothstep(THREAD_START - 3, THREAD_START + 8, along) * smoothstep(LENGTH - 1, TIP_START, along)


def _stripping(flaw: np.random.Generator, along: Plane, bearing: Plane, unit: float) -> Plane:
    """0..1, what is left of the thread: a few turns worn down on the side that faces the camera."""
    half = flaw.uniform(7, 22)
    middle = flaw.uniform(THREAD_START + half, TIP_START - half)
    side = flaw.uniform(-0.5, 0.5)
    ragged = 1 + 0.25 * np.clip(smooth_noise(flaw, along.shape, 5 * unit), -1, 1)
    distance = np.hypot((along - middle) / half, (bearing - side) / flaw.uniform(0.9, 1.6)) * ragged
    left: Plane = 1 - np.float32(flaw.uniform(0.75, 1.0)) * smoothstep(1.1, 0.8, distance)
    return left


def _scratches(flaw: np.random.Generator, shape: tuple[int, int], unit: float) -> Plane:
    """0..1, gouges over the face as a slipped bit leaves them."""
    from scipy.ndimage import gaussian_filter

    sheet = Image.new("L", (shape[1], shape[0]))
    pen = ImageDraw.Draw(sheet)
    bearing = flaw.uniform(0, np.pi)
    middle = np.array([shape[1], shape[0]]) / 2 + flaw.uniform(-7, 7, 2) * unit
    for _ in range(flaw.integers(2, 5)):
        turned = bearing + flaw.normal(0, 0.25)
        reach = flaw.uniform(9, 22) * unit * np.array([np.cos(turned), np.sin(turned)])
        sideways = flaw.normal(0, 4, 2) * unit
        bow = flaw.normal(0, 2.0, 2) * unit
        points = [tuple(middle + sideways + reach * t + bow * (1 - t * t)) for t in np.linspace(-1, 1, 9)]
        width = max(1, round(flaw.uniform(1.1, 2.6) * unit))
        pen.line(points, fill=int(flaw.uniform(170, 255)), width=width, joint="curve")
    depth: Plane = gaussian_filter(np.asarray(sheet, dtype=np.float32) / 255, 0.35 * unit)
    return depth


def _tray(rng: np.random.Generator, canvas: int, unit: float) -> Surface:
    """A grey moulded tray with grain, stains of long use and a few specks of dust."""
    shape = (canvas, canvas)
    grey = rng.uniform(0.24, 0.32)
    tint = rng.normal(0, 0.01, 3)
    surface = Surface.flat(canvas, (grey * (1 + tint[0]), grey * (1 + tint[1]), grey * (1 + tint[2])))
    grain = smooth_noise(rng, shape, 0.9 * unit)
    surface.height += 0.10 * unit * grain
    surface.albedo *= 1 + 0.05 * fractal_noise(rng, shape, 70 * unit) + 0.03 * grain
    for _ in range(rng.poisson(5)):
        centre, radius = rng.uniform(0, canvas, 2), rng.uniform(0.5, 1.3) * unit
        window, x, y = local_window(canvas, (centre[0], centre[1]), 0.0, 3 * radius)
        speck = smoothstep(1.2, 0.7, blob(rng, x, y, radius, 0.5)) * np.float32(0.8)
        shade = rng.choice([0.06, 0.6])
        surface.paint(window, speck, albedo=(shade, shade, shade))
    return surface
