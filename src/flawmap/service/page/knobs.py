"""Knobs: settings that move after training, and the heatmap that follows them."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Sequence
from typing import Any

from nicegui import ui
from numpy.typing import NDArray

from flawmap.errors import FlawmapError
from flawmap.line.inspector import Inspector
from flawmap.report.overlays import heat_layer
from flawmap.service.page.components import SIGNS, WORDS, Film, Viewer, picture_address
from flawmap.service.page.threshold import choose_model
from flawmap.service.pictures import png_of
from flawmap.service.records import Filter
from flawmap.service.service import Service
from flawmap.service.tables import InspectionRow

_SYMBOLS = {
    "alpha": ("\N{GREEK SMALL LETTER ALPHA}: what is there", 2.0),
    "beta": ("\N{GREEK SMALL LETTER BETA}: where it is", 2.0),
    "weight": ("w: of the classifier's map", 3.0),
}
_KEPT = 40  # pictures to choose from


def build(service: Service, model: str | None) -> None:
    """The section for a model with settings that move."""
    hosts = service.hosts.by_name.values()
    movable = {host.name: live for host in hosts if (live := host.serving.inspector.live)}
    if not movable:
        with ui.element("section").classes("panel"):
            ui.label("None of the models that are served has settings that move after training: f2r and cls_cnf have.")
        return
    name = model if model in movable else next(iter(movable))
    rows = [row for row in service.records.latest(Filter(model=name), 10 * _KEPT) if row.picture][:_KEPT]
    _Knobs(service, name, movable[name], rows).build(len(movable) > 1)


class _Knobs:
    """One browser's settings. While a heatmap is computed the newest settings wait, and those between are left out."""

    def __init__(self, service: Service, model: str, live: Sequence[str], rows: list[InspectionRow]) -> None:
        self.service, self.model, self.live, self.rows = service, model, live, rows
        config = service.host(model).serving.inspector.card.config
        self.trained = {setting: float(config[setting]) for setting in live}
        self.values = dict(self.trained)
        self.row: InspectionRow | None = rows[0] if rows else None
        self.pixels: NDArray[Any] | None = None
        self.asked = asyncio.Event()
        self.busy = False

    def build(self, several: bool) -> None:
        with ui.element("div").classes("knobs"):
            with ui.element("section").classes("panel").props('aria-label="Picture"'):
                self.viewer = Viewer()
            with ui.element("section").classes("panel").props('aria-label="Settings"'):
                if several:
                    choose_model(self.service, self.model, "/knobs?model=")
                self.verdict = ui.label().classes("told-verdict").props('aria-live="polite"')
                self.taken = ui.label().classes("quiet")
                self.sliders = {}
                for setting in self.live:
                    with ui.element("div").classes("knob"):
                        label, most = _SYMBOLS.get(setting, (setting, 2.0))
                        with ui.element("div").classes("row"):
                            ui.label(label)
                            ui.label().bind_text_from(self.values, setting, lambda value: f"{value:.2f}")
                        self.sliders[setting] = (
                            ui.slider(min=0, max=max(most, 2 * self.trained[setting]), step=0.01)
                            .bind_value(self.values, setting)
                            .on_value_change(self.move)
                            .props(f'aria-label="{label}"')
                        )
                ui.button("As trained", on_click=self.back, color=None).props("outline no-caps").classes("plain")
                ui.label(
                    "The threshold follows from the good images that the model keeps. Nothing is changed for the line: "
                    "to keep a setting, train with it, for instance --set "
                    f"{self.live[0]}={self.trained[self.live[0]]:g}."
                ).classes("quiet")
                if not self.rows:
                    ui.label("No picture of this model is kept: inspect one first.")
                self.film = Film("Pictures that are kept", self.choose)
        if self.row is not None:
            self.choose(self.row.id)

    def choose(self, number: int) -> None:
        """Another picture."""
        self.row = next((row for row in self.rows if row.id == number), None)
        self.pixels = None
        self.film.show(self.rows, number)
        if self.row is not None:
            self.viewer.show(picture_address(self.row, "picture"), "", "", self.row.name, "This picture is gone.")
        ui.timer(0, self.move, once=True)

    def back(self) -> None:
        """The settings of training."""
        self.values.update(self.trained)

    async def move(self) -> None:
        """Computes the heat of the newest settings."""
        self.asked.set()
        if self.busy:
            return
        self.busy = True
        try:
            while self.asked.is_set():
                self.asked.clear()
                if self.row is None:
                    return
                try:
                    told = await asyncio.to_thread(self._computed, self.row, dict(self.values))
                except FlawmapError as error:
                    self.taken.text = str(error)
                    continue
                heat, outlines, self.verdict.text, self.taken.text = told
                self.viewer.lay(heat, outlines)
        finally:
            self.busy = False

    def _computed(self, row: InspectionRow, values: dict[str, Any]) -> tuple[str, str, str, str]:
        if self.pixels is None:
            self.pixels = self.service.pixels(row)
            if self.pixels is None:
                raise FlawmapError("this picture is not kept any more")
        start = time.perf_counter()
        moved: Inspector = self.service.host(self.model).serving.inspector.with_settings(**values)
        found, scale = moved.predict(self.pixels), moved.heat_scale()
        if found.anomaly_map is None or scale is None or found.verdict is None:
            raise FlawmapError(found.error or "this method has no map")
        quiet = found.verdict == "good"
        layers = [
            _address(heat_layer(found.anomaly_map, scale, heat=heat, outlines=not heat, quiet=quiet))
            for heat in (True, False)
        ]
        taken = 1000 * (time.perf_counter() - start)
        told = f"{SIGNS[found.verdict]} {WORDS[found.verdict]}"
        return (
            layers[0],
            layers[1],
            told,
            f"score {found.score:.4g}, threshold {found.threshold:.4g}, p {found.p_value:.3g}; {taken:.0f} ms",
        )


def _address(layer: NDArray[Any]) -> str:
    return "data:image/png;base64," + base64.b64encode(png_of(layer)).decode()
