"""The layout of the drawn board: what lies where, and the artwork of its copper, tin, print and holes.

Positions are in units of 1/256 of the picture, x to the right and y down.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

Point = tuple[float, float]

OUTLINE_HALF = 119.0
LEG_PITCH = 7.0
PIN_PITCH = 14.0


class Part(NamedTuple):
    """A place in the layout. `turn` is in quarter turns; `legs` are those on each long side of a chip."""

    name: str
    family: str
    x: float
    y: float
    turn: int
    half: Point
    print: str = ""
    legs: int = 0


RESISTOR, CAPACITOR = (8.5, 4.6), (7.5, 4.4)
LAYOUT = (
    Part("U1", "chip", 92, 100, 0, (31, 17), "FM2601A\n84-0417", 8),
    Part("U2", "chip", 190, 152, 0, (16, 12), "L78\nA05", 4),
    Part("C9", "can", 205, 58, 0, (19, 19), "47\n16V"),
    Part("Y1", "crystal", 50, 163, 0, (19, 8), "12.000"),
    Part("Q1", "transistor", 138, 194, 0, (8, 4.8), "1A"),
    Part("R1", "resistor", 44, 42, 0, RESISTOR, "103"),
    Part("R2", "resistor", 72, 42, 0, RESISTOR, "472"),
    Part("R3", "resistor", 100, 42, 0, RESISTOR, "103"),
    Part("R4", "resistor", 128, 42, 0, RESISTOR, "220"),
    Part("R5", "resistor", 88, 190, 0, RESISTOR, "331"),
    Part("R6", "resistor", 226, 178, 1, RESISTOR, "103"),
    Part("R7", "resistor", 226, 148, 1, RESISTOR, "104"),
    Part("C1", "capacitor", 144, 92, 1, CAPACITOR),
    Part("C2", "capacitor", 166, 92, 1, CAPACITOR),
    Part("C3", "capacitor", 34, 112, 1, CAPACITOR),
    Part("C4", "capacitor", 90, 152, 0, CAPACITOR),
    Part("C5", "capacitor", 120, 152, 0, CAPACITOR),
    Part("C6", "capacitor", 204, 106, 0, CAPACITOR),
)
SMALL = tuple(part for part in LAYOUT if part.family in ("resistor", "capacitor", "transistor", "crystal"))
PINS = tuple((54 + PIN_PITCH * k, 228.0) for k in range(9))
VIAS: tuple[Point, ...] = (
    (24, 74), (22, 140), (136.5, 24), (58, 24), (86, 24), (188, 84.5), (232, 92), (150, 152), (164, 172), (60, 196),
    (120, 174), (160, 216), (176, 30), (150, 60), (232, 206), (206, 216), (214, 130), (28, 204),
)  # fmt: skip
TEST_PADS: tuple[Point, ...] = ((24, 182), (160, 36), (178, 196), (196, 200))
MOUNTING_HOLES: tuple[Point, ...] = ((22, 22), (234, 22), (22, 234), (234, 234))
TRACES: tuple[tuple[Point, ...], ...] = (
    ((67.5, 78), (67.5, 60), (52.5, 45), (52.5, 42)),
    ((74.5, 78), (74.5, 60), (63.5, 49), (63.5, 42)),
    ((81.5, 78), (81.5, 42)),
    ((88.5, 78), (88.5, 48), (91.5, 45), (91.5, 42)),
    ((95.5, 78), (95.5, 66), (108.5, 53), (108.5, 42)),
    ((102.5, 78), (102.5, 70), (119.5, 53), (119.5, 42)),
    ((109.5, 78), (109.5, 74), (136.5, 47), (136.5, 24)),
    ((116.5, 78), (123, 84.5), (144, 84.5)),
    ((35.5, 42), (24, 53.5), (24, 74)),
    ((63.5, 42), (58, 36.5), (58, 24)),
    ((91.5, 42), (86, 36.5), (86, 24)),
    ((67.5, 122), (67.5, 140), (60, 147.5), (60, 163)),
    ((74.5, 122), (74.5, 144), (82.5, 152)),
    ((81.5, 122), (81.5, 136), (97.5, 152)),
    ((88.5, 122), (88.5, 128), (112.5, 152)),
    ((95.5, 122), (95.5, 126), (107, 137.5), (113, 137.5), (127.5, 152)),
    ((102.5, 122), (112.5, 132), (168, 132), (170, 134), (179.5, 134)),
    ((109.5, 122), (115, 127.5), (178, 127.5), (186.5, 136)),
    ((116.5, 122), (117.5, 123), (180, 123), (193.5, 136.5)),
    ((144, 84.5), (166, 84.5), (188, 84.5)),
    ((144, 99.5), (166, 99.5), (190, 99.5), (196.5, 106)),
    ((211, 106), (218, 106), (232, 92)),
    ((200.5, 136), (206, 130.5), (214, 130)),
    ((200.5, 168), (207, 174.5), (213, 174.5), (226, 170)),
    ((193.5, 168), (193.5, 178), (204, 188.5), (219, 188.5), (226, 186)),
    ((186.5, 168), (186.5, 180), (166, 200.5), (166, 214), (166, 228)),
    ((179.5, 168), (164, 172)),
    ((226, 156), (226, 170)),
    ((34, 104.5), (34, 97), (48, 83), (60, 83), (65, 78), (67.5, 78)),
    ((34, 119.5), (34, 128), (22, 140)),
    ((40, 163), (28, 175), (28, 204)),
    ((127.5, 152), (150, 152)),
    ((54, 228), (54, 206), (60, 196)),
    ((68, 228), (68, 203), (79.5, 191.5)),
    ((96.5, 190), (82, 213), (82, 228)),
    ((96, 228), (96, 214), (108, 202), (108, 188), (120, 174)),
    ((110, 228), (110, 214), (132, 200)),
    ((124, 228), (124, 219), (144, 200)),
    ((138, 228), (138, 222), (155, 205), (155, 186), (138, 186)),
    ((152, 228), (152, 224), (160, 216)),
    ((193, 58), (176, 41), (176, 30)),
    ((217, 58), (232, 73), (232, 92)),
    ((150, 60), (160, 50), (160, 36)),
    ((226, 186), (232, 192), (232, 206)),
)


def pads(part: Part) -> list[tuple[float, float, Point]]:
    """Centre (x, y) in the layout and half extents, along the part and across it, of each pad."""
    along, across = part.half
    if part.family == "chip":
        legs = [
            ((leg - (part.legs - 1) / 2) * LEG_PITCH, side * (across + 5.2))
            for side in (-1, 1)
            for leg in range(part.legs)
        ]
        local, half = legs, (2.0, 4.2)
    elif part.family == "transistor":
        local, half = [(-6, across + 3), (6, across + 3), (0, -across - 3)], (2.3, 2.8)
    elif part.family == "crystal":
        local, half = [(-along - 1.5, 0), (along + 1.5, 0)], (3.2, 4.5)
    elif part.family == "can":
        local, half = [(-along - 0.5, 0), (along + 0.5, 0)], (4.0, 4.0)
    else:
        local, half = [(-along, 0), (along, 0)], (4.2, across + 0.8)
    turned = [(x, y) if part.turn == 0 else (-y, x) for x, y in local]
    return [(part.x + x, part.y + y, half) for x, y in turned]


@lru_cache(maxsize=4)
def artwork(canvas: int) -> Image.Image:
    """The layout as the four 8-bit bands of one picture of `canvas` pixels: copper, bare tin, silk print, holes."""
    big = 2 * canvas
    scale = big / 256
    layers = {name: Image.new("L", (big, big)) for name in ("copper", "tin", "silk", "hole")}
    pen = {name: ImageDraw.Draw(layer) for name, layer in layers.items()}

    def box(name: str, x: float, y: float, half: Point, fill: int, radius: float = 0.8) -> None:
        corners = [v * scale for v in (x - half[0], y - half[1], x + half[0], y + half[1])]
        pen[name].rounded_rectangle(corners, radius * scale, fill=fill)

    def disc(name: str, x: float, y: float, radius: float, fill: int) -> None:
        pen[name].ellipse([v * scale for v in (x - radius, y - radius, x + radius, y + radius)], fill=fill)

    def line(name: str, points: tuple[Point, ...], width: float, fill: int) -> None:
        pen[name].line([(x * scale, y * scale) for x, y in points], fill, round(width * scale), joint="curve")
        for x, y in points:
            disc(name, x, y, width / 2, fill)

    box("copper", 128, 128, (OUTLINE_HALF - 3, OUTLINE_HALF - 3), 255, 4)
    places = [(x, y, half if part.turn == 0 else half[::-1]) for part in LAYOUT for x, y, half in pads(part)]
    for fill, spare in ((0, 1.7), (255, 0.0)):  # the pour keeps clear of every trace
        for trace in TRACES:
            line("copper", trace, 2.0 + 2 * spare, fill)
        for x, y, half in places:
            box("copper", x, y, (half[0] + spare, half[1] + spare), fill)
        for points, radius in ((VIAS, 3.0), (PINS, 5.2), (TEST_PADS, 4.0)):
            for x, y in points:
                disc("copper", x, y, radius + spare, fill)
    for x, y, half in places:
        box("tin", x, y, half, 255)
    for points, radius in ((VIAS, 2.4), (PINS, 5.0), (TEST_PADS, 3.6), (MOUNTING_HOLES, 8.5)):
        for x, y in points:
            disc("tin", x, y, radius, 255)
    for points, radius in ((VIAS, 1.1), (MOUNTING_HOLES, 5.0)):
        for x, y in points:
            disc("hole", x, y, radius, 255)

    font = ImageFont.load_default(7.5 * scale)
    for part in LAYOUT:
        half = part.half if part.turn == 0 else part.half[::-1]
        half = (half[0] + 6.0, half[1] + 2.6) if part.turn == 0 else (half[0] + 2.6, half[1] + 6.0)
        if part.family == "chip":
            half = (part.half[0] + 2, part.half[1] - 1)
        corners = [v * scale for v in (part.x - half[0], part.y - half[1], part.x + half[0], part.y + half[1])]
        pen["silk"].rounded_rectangle(corners, scale, outline=255, width=round(0.8 * scale))
        where = (part.x - half[0], part.y - half[1] - 9) if part.turn == 0 else (part.x + half[0] + 1, part.y - 5)
        if part.family == "chip":
            where = (part.x - half[0] - 14, part.y - 4)
        pen["silk"].text((where[0] * scale, where[1] * scale), part.name, fill=255, font=font)
    pen["silk"].text((184 * scale, 226 * scale), "FM-26 B", fill=255, font=ImageFont.load_default(9 * scale))
    for pad in ("tin", "hole"):  # nothing is printed on metal
        layers["silk"].paste(0, mask=layers[pad])
    bands = (layer.resize((canvas, canvas), Image.Resampling.BOX) for layer in layers.values())
    return Image.merge("CMYK", tuple(bands))  # the mode only says how many bands there are
