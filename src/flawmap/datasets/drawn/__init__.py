"""Drawn parts with drawn defects and exact masks: data that may be shipped, tested on and shown."""

from __future__ import annotations

from flawmap.datasets.drawn.dataset import KINDS, Kind, draw_dataset, draw_part

__all__ = ["KINDS", "Kind", "draw_dataset", "draw_part"]
