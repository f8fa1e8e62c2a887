"""Settings of an exported file that are moved: its graph computes what goes with them, and scores good images anew."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flawmap.errors import FlawmapError
from flawmap.imaging.reading import BATCH
from flawmap.judging.calibration import Calibration
from flawmap.line.engines import GraphEngine
from flawmap.line.inspector import Inspector
from flawmap.line.model_card import ModelCard


@dataclass(frozen=True)
class Mover:
    """Gives the inspector of other values of the live settings: see `Inspector.with_settings`.

    Attributes:
        card: of the model as trained.
        engine: runs its graph.
        live: `settings`, by name the graph's input, the value as trained and its bounds; `buffers`, inputs that take
            long to make of them, and whose values the graph gives as outputs named `moved_...`; and `images`, of each
            kept row of good images' latents which image it belongs to, or None where none were kept.
        digest: of the model file.
    """

    card: ModelCard
    engine: GraphEngine
    live: Mapping[str, Any]
    digest: str | None

    def __call__(self, settings: Mapping[str, Any], calibrate: bool) -> Inspector:
        values = {**{name: self.card.config[name] for name in self.live["settings"]}, **self._checked(settings)}
        before = self.card.calibration
        if self.live["images"] is None and before is not None:
            raise FlawmapError(
                f"{' and '.join(self.live['settings'])} can be moved only where good images were held out: train with "
                "--calibration holdout or a folder, and export again"
            )
        inputs: dict[str, NDArray[Any]] = {
            self.live["settings"][name]["input"]: np.array(value, np.float32) for name, value in values.items()
        }
        buffers: list[str] = self.live["buffers"]
        if buffers:
            found = self.engine.run(inputs, [f"moved_{name}" for name in buffers])
            inputs |= dict(zip(buffers, found, strict=True))
        config = {**self.card.config, **values}
        calibration = self._calibration(inputs, before.mode) if calibrate and before is not None else None
        card = replace(self.card, config=config, calibration=calibration)
        mover = replace(self, card=replace(self.card, config=config))
        movable = tuple(self.live["settings"])
        return Inspector(card, self.engine.moved(inputs), card.judge(), self.digest, mover, movable)

    def _checked(self, settings: Mapping[str, Any]) -> dict[str, float]:
        """The settings as numbers, which may come as text from the command line."""
        known, values = self.live["settings"], {}
        if fixed := [name for name in settings if name not in known]:
            raise FlawmapError(
                f"{', '.join(fixed)} of {self.card.method} is fixed by training (only {' and '.join(known)} can be "
                "moved): train again"
            )
        for name, given in settings.items():
            try:
                value = float(given)
            except (TypeError, ValueError):
                value = math.nan
            low, high = known[name]["low"], known[name]["high"]
            if not (math.isfinite(value) and (low is None or value >= low) and (high is None or value <= high)):
                bounds = f"from {low:g}" if high is None else f"from {low:g} to {high:g}"
                raise FlawmapError(f"setting {name}={given} is not valid: give a number {bounds}")
            values[name] = value
        return values

    def _calibration(self, inputs: Mapping[str, NDArray[Any]], mode: str) -> Calibration:
        """Score and map maximum of each image whose latents were kept, the largest of its windows'."""
        images: list[int] = self.live["images"]
        best = np.full((max(images) + 1, 2), -np.inf, np.float32)
        for start in range(0, len(images), BATCH):
            rows = np.arange(start, start + BATCH).clip(max=len(images) - 1)
            found = self.engine.run({**inputs, "rows": rows}, ["good_scores", "good_peaks"])
            np.maximum.at(best, np.array(images)[rows], np.stack(found, 1))
        peaks = best[:, 1].copy() if self.card.localises else np.empty(0, np.float32)
        return Calibration(best[:, 0].copy(), peaks, mode)
