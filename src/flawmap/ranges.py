"""Numbers that users give, held against their range."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from flawmap.errors import FlawmapError

SEEDS = (0, 2**32 - 1)
SIDES = (32, 8192)
"""Pixels of a model input's side."""

MOST_PIXELS = 2**31 - 1
"""Of an image, however large ones are allowed to be: what Pillow counts to."""

SCORES = (-3.4e38, 3.4e38)
"""Thresholds: what a float32 holds."""

LOWEST_RATE = 1e-9
"""Of false rejects; a smaller one would need more good images than there are."""


def finite(name: str, value: Any, limits: tuple[float, float]) -> float:
    """A number within limits.

    Raises:
        FlawmapError: it is none, not finite, or beyond them.
    """
    low, high = limits
    number = _number(value)
    if number is None or not low <= number <= high:
        raise FlawmapError(f"{name} must be a number between {low:g} and {high:g}, got {_shown(value)}")
    return number


def rate(name: str, value: Any) -> float:
    """A false-reject rate.

    Raises:
        FlawmapError: it is no number between 0 and 1, or below `LOWEST_RATE`.
    """
    number = _number(value)
    if number is None or not LOWEST_RATE <= number < 1:
        raise FlawmapError(f"{name} must be a number between 0 and 1, at least {LOWEST_RATE:g}, got {_shown(value)}")
    return number


def whole(name: str, value: Any, limits: tuple[int, int]) -> int:
    """A whole number within limits.

    Raises:
        FlawmapError: it is none, or beyond them.
    """
    low, high = limits
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise FlawmapError(f"{name} must be a whole number, got {_shown(value)}")
    number = int(value)
    if not low <= number <= high:
        size = "small" if number < low else "large"
        raise FlawmapError(f"{name} {_shown(number)} is too {size}: give {low} to {high}")
    return number


def _number(value: Any) -> float | None:
    """A finite number; None for anything else."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, float) else str(float(value))
    return text if len(text) <= 40 else f"{text[:37]}..."
