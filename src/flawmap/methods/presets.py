"""Presets as data: what a paper prints, and what its authors' program does where the two part, each with its source.

A method's tables are `tables/METHOD.csv`: names of presets, a setting, its value as `--set` takes it, and where that is
printed. A setting is the method's own, or one of `DETECTOR`.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

DETECTOR = ("backbone", "image_size", "crop", "calibration")
"""Settings of a detector, not of its method."""

_TOGETHER = {"backbone": ("levels", "deep_levels"), "image_size": ("crop",)}  # what means nothing beside another value


@dataclass(frozen=True)
class Choice:
    """One setting: its value as text, and the section or equation that prints it."""

    setting: str
    value: str
    source: str


@dataclass(frozen=True)
class Preset:
    """Settings under one name."""

    choices: tuple[Choice, ...] = ()

    def __getitem__(self, setting: str) -> str:
        """Raises KeyError where it says nothing of the setting."""
        return self.values[setting]

    @property
    def values(self) -> dict[str, str]:
        """Value of each setting."""
        return {choice.setting: choice.value for choice in self.choices}

    @property
    def settings(self) -> dict[str, str]:
        """Those of the method."""
        return {name: value for name, value in self.values.items() if name not in DETECTOR}

    @property
    def detector(self) -> dict[str, str]:
        """Those of the detector."""
        return {name: value for name, value in self.values.items() if name in DETECTOR}

    def beside(self, given: Mapping[str, Any]) -> tuple[Preset, list[str]]:
        """What is left of it beside what the user gives, and the names of the settings that are not.

        With another backbone its levels go, and with another size the crop that belongs to it.
        """
        other = [c.setting for c in self.choices if c.setting in given and not _same(given[c.setting], c.value)]
        gone = {*other, *(of for name in other for of in _TOGETHER.get(name, ()))}
        kept = tuple(choice for choice in self.choices if choice.setting not in gone)
        return Preset(kept), [choice.setting for choice in self.choices if choice.setting in gone]


def in_words(name: str, other: Sequence[str]) -> str:
    """A preset and which of its settings are others, such as "paper, except backbone, image-size"."""
    named = [one.replace("_", "-") if one in DETECTOR else one for one in other]
    return f"{name}, except {', '.join(named)}" if named else name


def read_presets(method: str) -> dict[str, Preset]:
    """The presets of a method's table, in its order."""
    found: dict[str, list[Choice]] = {}
    text = (files("flawmap.methods") / "tables" / f"{method}.csv").read_text("utf-8")
    for row in csv.DictReader(text.splitlines()):
        for preset in row["preset"].split():
            found.setdefault(preset, []).append(Choice(row["setting"], row["value"], row["source"]))
    return {name: Preset(tuple(choices)) for name, choices in found.items()}


def _same(given: Any, value: str) -> bool:
    text = ",".join(map(str, given)) if isinstance(given, (tuple, list)) else str(given)
    try:
        return float(text) == float(value)
    except ValueError:
        return text.replace(" ", "").lower() == value.lower()
