"""Printed circuit boards in a fixture: one fixed layout, small tolerances of pose, placement, solder and print."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw

from flawmap.datasets.drawn.board_components import BODIES, Assembly, Colour, Finish, Placed, Pose, tinted
from flawmap.datasets.drawn.board_layout import LAYOUT, LEG_PITCH, OUTLINE_HALF, PIN_PITCH, PINS, TRACES, artwork, pads
from flawmap.datasets.drawn.camera import SUPERSAMPLING
from flawmap.datasets.drawn.noise import Plane, fractal_noise, smooth_noise
from flawmap.datasets.drawn.surface import Surface, Window, blob, rounded_box, smoothstep

DEFECTS = ("missing_component", "scratch", "shifted_component", "solder_bridge")

FIXTURE: Colour = (0.035, 0.035, 0.038)
MASK_OVER_LAMINATE: Colour = (0.010, 0.085, 0.032)
MASK_OVER_COPPER: Colour = (0.022, 0.165, 0.052)
LAMINATE: Colour = (0.30, 0.30, 0.19)
COPPER: Colour = (0.80, 0.50, 0.33)
PIN: Colour = (0.55, 0.53, 0.48)
SILK: Colour = (0.66, 0.67, 0.64)
SMALL = tuple(part for part in LAYOUT if part.family in ("resistor", "capacitor", "transistor", "crystal"))


class Board:
    """One board in the fixture at `SUPERSAMPLING` times `size` pixels."""

    def __init__(self, rng: np.random.Generator, size: int) -> None:
        canvas = size * SUPERSAMPLING
        turn = float(np.radians(rng.uniform(-0.8, 0.8)))
        self.pose = Pose(canvas, turn, (rng.uniform(-2, 2), rng.uniform(-2, 2)))
        self.placed = tuple(
            Placed(
                part,
                float(np.clip(rng.normal(0, 0.45), -1, 1)),
                float(np.clip(rng.normal(0, 0.45), -1, 1)),
                float(np.clip(rng.normal(0, 0.015), -0.04, 0.04)),
                rng.uniform(0.85, 1.15),
                tuple(rng.uniform(0.35, 1.0, max(2 * part.legs, 3))),
            )
            for part in LAYOUT
        )
        self.pin_solder = rng.uniform(0.5, 1.0, len(PINS))
        self.finish = Finish(rng.uniform(0.86, 1.05), smooth_noise(rng, (canvas, canvas), 1.6 * self.pose.unit))
        self.bare = self._bare_board(rng)

    def surface(self, defect: str | None, flaw: np.random.Generator) -> Surface:
        """The populated board; `flaw` draws the defect, and only it."""
        surface = self.bare.copy()
        board = Assembly(surface, self.pose, self.finish)
        placed = self.placed
        if defect == "missing_component":
            gone = SMALL[flaw.integers(len(SMALL))]
            placed = tuple(p for p in placed if p.part is not gone)
            bare = next(p for p in self.placed if p.part is gone)
            self._solder_joints(surface, bare, high=0.6)  # the paste has melted flat on the empty pads
        if defect == "shifted_component":
            moved = SMALL[flaw.integers(len(SMALL))]
            placed = tuple(_knocked(flaw, p) if p.part is moved else p for p in placed)
        if defect == "scratch":
            self._scratch(surface, flaw)
        self._solder_pins(surface)
        for part in placed:
            self._solder_joints(surface, part)
        for part in placed:
            BODIES[part.part.family](board, part)
        if defect == "solder_bridge":
            self._bridge(surface, flaw)
        return surface

    def _bare_board(self, rng: np.random.Generator) -> Surface:
        canvas, unit, roughness = self.pose.canvas, self.pose.unit, self.finish.roughness
        shape = (canvas, canvas)
        layers = artwork(canvas).transform(shape, Image.Transform.AFFINE, self.pose.back(), Image.Resampling.BILINEAR)
        copper, tin, silk, hole = (np.asarray(band, np.float32) * np.float32(1 / 255) for band in layers.split())
        _, x, y = self.pose.window(128, 128, 0.0, (256, 256))
        board = smoothstep(0.25, -0.25, rounded_box(x, y, OUTLINE_HALF, OUTLINE_HALF, 5))
        surface = Surface.flat(canvas, FIXTURE)
        everywhere = (slice(None), slice(None))
        tone = rng.uniform(0.85, 1.15) * (1 + 0.05 * fractal_noise(rng, shape, 60 * unit, 2) + 0.02 * roughness)
        green = tinted(MASK_OVER_LAMINATE, tone * (1 - copper)) + tinted(MASK_OVER_COPPER, tone * copper)
        surface.paint(everywhere, board, albedo=green, gloss=0.22)
        surface.height += board * (0.5 * unit * copper + 0.015 * unit * roughness)
        surface.lift += board * (2 * unit)
        surface.paint(everywhere, silk * np.float32(rng.uniform(0.8, 0.95)), albedo=SILK, gloss=0.05)
        surface.paint(everywhere, tin, albedo=self.finish.tin(), metal=0.9, gloss=0.0)
        surface.height += tin * (0.5 * unit + 0.07 * unit * roughness)
        surface.paint(everywhere, hole, albedo=(0.01, 0.01, 0.01), metal=0.0, gloss=0.0)
        return surface

    def _solder(self, surface: Surface, window: Window, distance: Plane, high: Plane | float) -> None:
        """Solder where `distance` (units, negative inside) says, domed up to `high` units."""
        dome = np.sqrt(np.clip(-distance / 2.2, 0, 1))
        bumps = 0.07 * self.finish.roughness[window]
        coverage = smoothstep(0.4, -0.4, distance)
        height = (0.5 + high * dome + bumps) * np.float32(self.pose.unit)
        surface.paint(window, coverage, height=height, albedo=self.finish.tin(), metal=0.95, gloss=0.0)

    def _solder_pins(self, surface: Surface) -> None:
        """The header's through-hole joints: a cone of solder around the end of each pin."""
        first, last = PINS[0][0], PINS[-1][0]
        reach = ((last - first + PIN_PITCH) / 2, PIN_PITCH / 2)
        window, x, y = self.pose.window((first + last) / 2, PINS[0][1], 0.0, reach)
        along = (x - np.float32(first - (first + last) / 2)) / np.float32(PIN_PITCH) + np.float32(0.5)
        index = np.clip(along.astype(np.int32), 0, len(PINS) - 1)
        amount = self.pin_solder.astype(np.float32).take(index)
        distance = np.hypot((along - np.floor(along) - np.float32(0.5)) * np.float32(PIN_PITCH), y)
        self._solder(surface, window, distance - (3.6 + amount), 1.2 + 1.6 * amount)
        pin = smoothstep(1.9, 1.3, distance)
        surface.paint(window, pin, height=4.5 * self.pose.unit, albedo=PIN, metal=0.8)

    def _solder_joints(self, surface: Surface, placed: Placed, high: float = 2.4) -> None:
        """Solder stays on the pads, which are where the layout has them, not where the part went."""
        part = placed.part
        for number, (px, py, half) in enumerate(pads(part)):
            amount = placed.solder[number % len(placed.solder)]
            turn = part.turn * np.pi / 2
            window, x, y = self.pose.window(px, py, turn, (half[0] + 1, half[1] + 1))
            shrink = 0.5 * (1 - amount)
            distance = rounded_box(x, y, half[0] - shrink, half[1] - shrink, 1.2)
            self._solder(surface, window, distance, high * amount)

    def _bridge(self, surface: Surface, flaw: np.random.Generator) -> None:
        """Solder that runs from one joint to the next: between two legs of a chip, or two pins of the header."""
        if flaw.uniform() < 0.25:
            left = PINS[flaw.integers(len(PINS) - 1)]
            x, y, half, pitch = left[0] + PIN_PITCH / 2, left[1] + flaw.normal(0, 1), PIN_PITCH / 2, PIN_PITCH
        else:
            chip = LAYOUT[0] if flaw.uniform() < 0.65 else LAYOUT[1]
            leg, side = flaw.integers(chip.legs - 1), flaw.choice((-1.0, 1.0))
            x = chip.x + (leg - chip.legs / 2 + 1) * LEG_PITCH
            y = chip.y + side * (chip.half[1] + flaw.uniform(4.5, 6.5))
            half, pitch = LEG_PITCH / 2, LEG_PITCH
        window, along, across = self.pose.window(x, y, flaw.normal(0, 0.12), (pitch, pitch))
        thick = flaw.uniform(2.0, 3.4) + 0.25 * half
        waist = 1 - 0.3 * np.exp(-((along / (0.5 * half)) ** 2))
        distance = np.hypot(np.maximum(np.abs(along) - half, 0), across / waist) - np.float32(thick)
        distance = distance * (0.9 + 0.15 * blob(flaw, along, across, half, 0.3).clip(0, 2))
        self._solder(surface, window, distance, flaw.uniform(1.8, 3.2))

    def _scratch(self, surface: Surface, flaw: np.random.Generator) -> None:
        """A slip of a tool through the green mask, down to the copper or the laminate."""
        from scipy.ndimage import gaussian_filter

        unit = self.pose.unit
        start = TRACES[flaw.integers(len(TRACES))]
        knot = flaw.integers(len(start) - 1)
        share = flaw.uniform(0.3, 0.7)
        middle = np.array(start[knot]) * share + np.array(start[knot + 1]) * (1 - share)
        run = np.subtract(start[knot + 1], start[knot])
        bearing = np.arctan2(run[1], run[0]) + np.pi / 2 + flaw.normal(0, 0.5)
        reach = flaw.uniform(6, 24) * np.array([np.cos(bearing), np.sin(bearing)])
        bow = flaw.normal(0, 2.5, 2)
        sheet = Image.new("L", (self.pose.canvas, self.pose.canvas))
        pen = ImageDraw.Draw(sheet)
        width = flaw.uniform(0.9, 2.4)
        for _ in range(flaw.integers(1, 3)):
            offset = flaw.normal(0, 1.5, 2)
            path = [self.pose.at(*(middle + offset + reach * t + bow * (1 - t * t))) for t in np.linspace(-1, 1, 15)]
            pen.line(path, fill=255, width=max(1, round(width * unit)), joint="curve")
        depth = gaussian_filter(np.asarray(sheet, dtype=np.float32) / 255, 0.3 * unit)
        depth = np.clip(depth * (1 + 0.35 * self.finish.roughness), 0, 1)
        copper = np.clip(self.bare.height / np.float32(0.5 * unit), 0, 1)
        everywhere = (slice(None), slice(None))
        surface.paint(everywhere, depth * (1 - copper), albedo=LAMINATE, gloss=0.0)
        surface.paint(everywhere, depth * copper, albedo=COPPER, metal=0.8, gloss=0.0)
        surface.height -= depth * np.float32(0.5 * unit)


def _knocked(flaw: np.random.Generator, placed: Placed) -> Placed:
    """The same part, pushed off its pads or turned on them."""
    bearing, distance = flaw.uniform(0, 2 * np.pi), flaw.uniform(1.5, 4.5)
    turn = flaw.uniform(0.12, 0.6) * flaw.choice((-1.0, 1.0))
    return replace(
        placed,
        dx=placed.dx + distance * float(np.cos(bearing)),
        dy=placed.dy + distance * float(np.sin(bearing)),
        turn=placed.turn + turn,
    )
