"""The parts on the drawn board: chips, resistors, capacitors, a transistor, a crystal and an electrolytic can."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from flawmap.datasets.drawn.board_layout import LEG_PITCH, Part, Point
from flawmap.datasets.drawn.noise import Plane
from flawmap.datasets.drawn.surface import Surface, Window, local_window, rounded_box, smoothstep

Colour = tuple[float, float, float]

TIN: Colour = (0.74, 0.74, 0.72)
BLACK_PLASTIC: Colour = (0.028, 0.028, 0.030)
RESISTOR_BODY: Colour = (0.022, 0.022, 0.024)
CERAMIC: Colour = (0.36, 0.25, 0.15)

LEG, BODY = 1, 2  # layers above the board


@dataclass(frozen=True)
class Pose:
    """Where the fixture holds the board: turned by `turn` radians about its middle, then moved by `shift` units.

    `canvas` is the width of the drawing in pixels, `unit` that of 1/256 of it.
    """

    canvas: int
    turn: float
    shift: Point

    @property
    def unit(self) -> float:
        return self.canvas / 256

    def at(self, x: float, y: float) -> Point:
        """Pixels on the canvas of a point in the layout."""
        cos, sin = math.cos(self.turn), math.sin(self.turn)
        dx, dy = x - 128, y - 128
        return (
            (dx * cos - dy * sin + 128 + self.shift[0]) * self.unit,
            (dx * sin + dy * cos + 128 + self.shift[1]) * self.unit,
        )

    def back(self) -> tuple[float, float, float, float, float, float]:
        """The affine map from a pixel of the canvas to one of the layout, as Pillow wants it."""
        cos, sin = math.cos(self.turn), math.sin(self.turn)
        x, y = 128 + self.shift[0], 128 + self.shift[1]
        right, down = (128 - cos * x - sin * y) * self.unit, (128 + sin * x - cos * y) * self.unit
        return (cos, sin, right, -sin, cos, down)

    def window(self, x: float, y: float, turn: float, reach: Point) -> tuple[Window, Plane, Plane]:
        """`local_window` in units, of a box at (x, y) turned by `turn` in the layout."""
        half = (reach[0] * self.unit, reach[1] * self.unit)
        window, along, across = local_window(self.canvas, self.at(x, y), turn + self.turn, half)
        return window, along / np.float32(self.unit), across / np.float32(self.unit)


@dataclass(frozen=True)
class Finish:
    """How the metal came out: `shine` a factor on its albedo, `roughness` (canvas, canvas) float32 its fine relief."""

    shine: float
    roughness: Plane

    def tin(self, tone: float = 1.0) -> Colour:
        return shaded(TIN, self.shine * tone)


@dataclass(frozen=True)
class Placed:
    """A part as the machine set it: its offset in units, its turn in radians, and how it came out."""

    part: Part
    dx: float
    dy: float
    turn: float
    tone: float
    solder: tuple[float, ...]  # 0..1 for each joint, from starved to full

    def window(self, pose: Pose, reach: Point) -> tuple[Window, Plane, Plane]:
        """The window around the part and its coordinates along and across the part, in units."""
        part = self.part
        return pose.window(part.x + self.dx, part.y + self.dy, part.turn * math.pi / 2 + self.turn, reach)


@dataclass(frozen=True)
class Assembly:
    """A board while it is being populated."""

    surface: Surface
    pose: Pose
    finish: Finish

    def block(
        self,
        window: Window,
        distance: Plane,
        high: float,
        bevel: float,
        colour: Plane | Colour,
        metal: float = 0.0,
        gloss: float = 0.1,
    ) -> None:
        """A block `high` units tall with edges bevelled by `bevel`; `distance` in units, negative inside."""
        relief = np.minimum(np.float32(high), np.float32(high - bevel) - distance * np.float32(1.5))
        coverage = smoothstep(0.25, -0.25, distance)
        height = (np.maximum(relief, 0) + 0.03 * self.finish.roughness[window]) * np.float32(self.pose.unit)
        self.surface.paint(window, coverage, height=height, layer=BODY, albedo=colour, metal=metal, gloss=gloss)


def shaded(colour: Colour, tone: float) -> Colour:
    return (colour[0] * tone, colour[1] * tone, colour[2] * tone)


def tinted(colour: Colour, tone: Plane) -> Plane:
    """(3, h, w), the colour times a plane of tones."""
    return np.multiply.outer(np.array(colour, dtype=np.float32), tone)


@lru_cache(maxsize=32)
def _stencil(text: str, height: int) -> Plane:
    """(h, w) float32 in 0..1, the print on a part; each line is `height` pixels high."""
    font = ImageFont.load_default(height)
    left, top, right, bottom = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox(
        (0, 0), text, font, align="center"
    )
    sheet = Image.new("L", (int(right - left) + 2, int(bottom - top) + 2))
    ImageDraw.Draw(sheet).multiline_text((1 - left, 1 - top), text, 255, font, align="center")
    ink: Plane = np.asarray(sheet, dtype=np.float32) * np.float32(1 / 255)
    return ink


def _printed(text: str, height: float, along: Plane, across: Plane, unit: float) -> Plane:
    """(h, w) in 0..1, `text` printed around the origin of a part's own frame."""
    pixels = 4 * max(1, round(height * unit / 4 * 2))
    stencil = _stencil(text, pixels)
    scale = pixels / height
    row = np.rint(across * np.float32(scale) + np.float32(stencil.shape[0] / 2)).astype(np.int32)
    column = np.rint(along * np.float32(scale) + np.float32(stencil.shape[1] / 2)).astype(np.int32)
    inside = (row >= 0) & (row < stencil.shape[0]) & (column >= 0) & (column < stencil.shape[1])
    flat = np.where(inside, row * stencil.shape[1] + column, 0)
    ink: Plane = stencil.take(flat) * inside.astype(np.float32)
    return ink


def _chip(board: Assembly, placed: Placed) -> None:
    part, unit = placed.part, board.pose.unit
    along, across = part.half
    window, x, y = placed.window(board.pose, (along + 1, across + 11))
    slot = x / np.float32(LEG_PITCH) + np.float32(part.legs / 2)
    beside = np.abs((slot - np.floor(slot) - np.float32(0.5)) * np.float32(LEG_PITCH))
    out = np.abs(y) - np.float32(across)  # units beyond the body's edge
    leg = smoothstep(1.6, 1.2, beside) * smoothstep(8.2, 7.6, out) * smoothstep(-0.5, 0.0, out)
    leg *= (slot > 0) & (slot < part.legs)
    bend = 0.9 + 3.2 * smoothstep(4.2, 1.0, out) - 0.25 * (beside / 1.4) ** 2
    board.surface.paint(
        window, leg, height=bend * np.float32(unit), layer=LEG, albedo=board.finish.tin(0.95), metal=0.92, gloss=0.0
    )
    marks = _printed(part.print, 8.0 if part.legs > 4 else 7.0, x - 2, y, unit)
    dimple = smoothstep(2.2, 1.7, np.hypot(x + along - 5.5, y - across + 5.5))
    tone = np.float32(placed.tone) * (1 - 0.3 * dimple + 0.06 * board.finish.roughness[window])
    colour = tinted(BLACK_PLASTIC, tone + np.float32(4) * marks)
    distance = rounded_box(x, y, along, across, 0.8)
    board.block(window, distance, 6.0, 1.6, colour, gloss=0.10)
    board.surface.height[window] -= dimple * np.float32(0.6 * unit)


def _end_capped(board: Assembly, placed: Placed, colour: Colour, high: float) -> None:
    """A chip resistor or capacitor: a block with a metal cap at either end."""
    along, across = placed.part.half
    window, x, y = placed.window(board.pose, (along + 2, across + 2))
    distance = rounded_box(x, y, along, across, 0.7)
    board.block(window, distance, high, 0.7, board.finish.tin(0.92), metal=0.85)
    board.surface.height[window] += (
        smoothstep(0.2, -0.2, distance) * board.finish.roughness[window] * np.float32(0.08 * board.pose.unit)
    )
    middle = rounded_box(x, y, along - 3.4, across + 1, 0.3)
    coverage = smoothstep(0.25, -0.25, np.maximum(middle, distance))
    albedo = tinted(shaded(colour, placed.tone), 1 + 0.05 * board.finish.roughness[window])
    if placed.part.print:
        albedo = albedo + 0.45 * _printed(placed.part.print, 6.0, x, y, board.pose.unit)
    board.surface.paint(window, coverage, albedo=albedo, metal=0.0, gloss=0.12)


def _resistor(board: Assembly, placed: Placed) -> None:
    _end_capped(board, placed, RESISTOR_BODY, 2.8)


def _capacitor(board: Assembly, placed: Placed) -> None:
    _end_capped(board, placed, CERAMIC, 4.2)


def _transistor(board: Assembly, placed: Placed) -> None:
    along, across = placed.part.half
    window, x, y = placed.window(board.pose, (along + 1, across + 6))
    for leg_x, side in ((-6.0, 1.0), (6.0, 1.0), (0.0, -1.0)):
        distance = rounded_box(x - np.float32(leg_x), y - np.float32(side * (across + 2.2)), 1.4, 2.6, 0.3)
        board.block(window, distance, 1.6, 0.5, board.finish.tin(0.95), metal=0.92, gloss=0.0)
    marks = _printed(placed.part.print, 6.0, x, y, board.pose.unit)
    colour = tinted(BLACK_PLASTIC, np.float32(placed.tone) + np.float32(5) * marks)
    board.block(window, rounded_box(x, y, along, across, 0.6), 4.5, 1.2, colour)


def _crystal(board: Assembly, placed: Placed) -> None:
    """A flat metal can with round ends and a rim."""
    along, across = placed.part.half
    window, x, y = placed.window(board.pose, (along + 2, across + 2))
    rim = rounded_box(x, y, along, across, across)
    board.block(window, rim, 1.2, 0.6, board.finish.tin(0.9), metal=0.9, gloss=0.0)
    marks = _printed(placed.part.print, 6.5, x, y, board.pose.unit)
    colour = tinted(board.finish.tin(0.95 * placed.tone), 1 - 0.7 * marks)
    inner = rounded_box(x, y, along - 1.6, across - 1.6, across - 1.6)
    board.block(window, inner, 6.5, 1.5, colour, metal=0.9, gloss=0.0)


def _can(board: Assembly, placed: Placed) -> None:
    """An electrolytic capacitor from above: a square foot with two cut corners, a round top with a dark sector."""
    along, across = placed.part.half
    window, x, y = placed.window(board.pose, (along + 2, across + 2))
    cut = (np.abs(y) + x - np.float32(1.45 * along)) * np.float32(0.7)
    foot = np.maximum(rounded_box(x, y, along, across, 1.0), cut)
    board.block(window, foot, 3.0, 0.8, shaded(BLACK_PLASTIC, placed.tone))
    radius = 0.93 * along
    distance = np.hypot(x, y) - np.float32(radius)
    sector = smoothstep(-0.35, 0.35, -x - 0.42 * radius)
    marks = _printed(placed.part.print, 8.5, x - np.float32(0.22 * radius), y, board.pose.unit)
    tone = (1 - 0.85 * np.maximum(sector, marks)) * np.float32(min(placed.tone, 1.05))
    colour = tinted(board.finish.tin(0.9), tone)
    board.block(window, distance, 14.0, 2.0, colour, metal=0.75, gloss=0.05)


BODIES: dict[str, Callable[[Assembly, Placed], None]] = {
    "chip": _chip,
    "can": _can,
    "crystal": _crystal,
    "transistor": _transistor,
    "resistor": _resistor,
    "capacitor": _capacitor,
}
