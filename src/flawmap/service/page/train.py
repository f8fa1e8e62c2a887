"""Train: good images on the server or sent from here, a training that goes on by itself, its report, its model."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from pathlib import Path
from typing import Any

from nicegui import ui

from flawmap.errors import FlawmapError
from flawmap.service.page.access import allowed, may
from flawmap.service.page.components import Drop, when
from flawmap.service.page.threshold import table
from flawmap.service.service import Service
from flawmap.service.tables import JobRow
from flawmap.service.training import Trainings
from flawmap.text import counted

_OFTEN = 1.0  # seconds between looks at a training
_METHODS = ("auto", "patchcore", "padim", "cfa", "f2r", "cls_cnf", "cainnflow", "cflow", "differnet")


def build(service: Service, trainings: Trainings | None) -> None:
    """The section."""
    if trainings is None or not may(service, "administer"):
        with ui.element("section").classes("panel"):
            ui.label(
                "Training needs a key that may administer, the lab (pip install 'flawmap[train]'), and a folder that "
                "may be trained from (flawmap serve --data FOLDER)."
            )
        return
    _Training(service, trainings).build()


class _Training:
    """One browser's view. What runs is in the records, so that a reload finds it again."""

    def __init__(self, service: Service, trainings: Trainings) -> None:
        self.service, self.trainings = service, trainings
        self.collection: str | None = None
        self.shown: tuple[int, str] | None = None
        self.dropped: set[int] = set()

    def build(self) -> None:
        with ui.element("div").classes("stack"):
            with ui.element("div").classes("columns"):
                with ui.element("section").classes("panel").props('aria-label="Images"'):
                    with ui.element("h2"):
                        ui.label("1. Good images")
                    folders = self.trainings.folders()
                    self.folder = ui.select(
                        folders, value=None, label="A folder on the server", on_change=self._look, clearable=True
                    )
                    self.drop = Drop(
                        self._address(), "Or drop good images, or a ZIP of them", self._sent, accept="image/*,.zip"
                    )
                    self.found = ui.element("div").props('aria-live="polite"').classes("found")
                with ui.element("section").classes("panel").props('aria-label="Settings"'):
                    with ui.element("h2"):
                        ui.label("2. Settings")
                    with ui.element("div").classes("choices"):
                        self.method = ui.select(list(_METHODS), value="auto", label="Method")
                        self.size = ui.number("Image size", value=256, min=32, max=2048, step=32, precision=0)
                        self.rate = ui.number("Good parts rejected, in %", value=1, min=0.001, max=50)
                    self.starter = ui.button("Train", on_click=self.start).props("unelevated no-caps color=primary")
            self.running = ui.element("section").classes("panel").props('aria-label="Training"')
            with ui.element("section").classes("panel").props('aria-label="Trainings"'):
                with ui.element("h2"):
                    ui.label("Earlier trainings")
                self.list = ui.element("div")
        self.tick()
        ui.timer(_OFTEN, self.tick)

    # What is learnt from

    def _address(self) -> str:
        if self.collection is None:
            self.collection = self.trainings.collections.new()
        return f"/page-files/collections/{self.collection}"

    async def _sent(self, answer: dict[str, Any]) -> None:
        for told in answer.get("refused", []):
            ui.notify(str(told), type="warning")
        assert self.collection is not None
        self.folder.value = None
        await self._tell(self.trainings.collections.images(self.collection))

    async def _look(self) -> None:
        self.found.clear()
        if self.folder.value:
            try:
                await self._tell(self.trainings.folder(str(self.folder.value)))
            except FlawmapError as error:
                self._say([str(error)], "told")

    async def _tell(self, folder: Path) -> None:
        try:
            self._say(await asyncio.to_thread(self.trainings.found, folder), "quiet")
        except FlawmapError as error:
            self._say([str(error)], "told")

    def _say(self, lines: list[str], kind: str) -> None:
        self.found.clear()
        with self.found:
            for line in lines:
                ui.label(line).classes(kind)

    # What is done

    async def start(self) -> None:
        """Trains on the folder chosen, else on the images that were sent."""
        try:
            if self.folder.value:
                data = self.trainings.folder(str(self.folder.value))
            else:
                assert self.collection is not None
                data = self.trainings.collections.images(self.collection)
                if self.trainings.collections.count(self.collection) == 0:
                    raise FlawmapError("choose a folder, or send images first")
            await self._start(data, self._options())
        except FlawmapError as error:
            ui.notify(str(error), type="warning")

    def _options(self) -> list[str]:
        if self.size.value is None or self.rate.value is None:
            raise FlawmapError("give an image size and a rate")
        method = self.method.value if self.method.value in _METHODS else "auto"
        return [
            "--method",
            str(method),
            "--image-size",
            str(int(self.size.value)),
            "--max-false-reject",
            f"{float(self.rate.value) / 100:.6g}",
        ]

    async def _start(self, data: Path, options: list[str]) -> None:
        who = allowed(self.service, "administer")
        if who is not None:
            await asyncio.to_thread(self.trainings.start, data, options, who.name)
            self.dropped.clear()
            self.tick()

    async def cancel(self, number: int) -> None:
        """Ends the training that runs."""
        if allowed(self.service, "administer") is not None:
            await asyncio.to_thread(self.trainings.cancel, number)
            self.tick()

    async def again(self, row: JobRow) -> None:
        """Trains anew without the images that were dropped."""
        try:
            data = await asyncio.to_thread(self.trainings.without, row.id, sorted(self.dropped))
            await self._start(data, _settings(row.command))
        except FlawmapError as error:
            ui.notify(str(error), type="warning")

    async def use(self, number: int, name: str) -> None:
        """Serves the model under a name."""
        if allowed(self.service, "administer") is None:
            return
        self.using.set_enabled(False)
        self.using.text = "Exporting \N{HORIZONTAL ELLIPSIS}"
        try:
            host = await asyncio.to_thread(self.trainings.use, number, name.strip())
            ui.notify(f"{host.name} is served from now on", type="positive")
        except FlawmapError as error:
            ui.notify(str(error), type="negative")
        self.using.text = "Use this model"
        self.using.set_enabled(True)

    # What is shown

    def tick(self) -> None:
        """Shows how far it is."""
        try:
            rows = self.trainings.jobs()
        except FlawmapError:  # the database may be back at the next look
            return
        newest = rows[0] if rows else None
        self.running.set_visibility(newest is not None)
        self.starter.set_enabled(newest is None or newest.state != "running")
        if newest is None:
            return
        if self.shown != (newest.id, newest.state):
            self.shown = (newest.id, newest.state)
            self._show(newest)
            self.list.clear()
            with self.list:
                table(
                    ("Number", "Started", "By", "State", "Why"),
                    [
                        (str(row.id), when(row.at), row.by or "\N{EN DASH}", row.state, row.message or "")
                        for row in rows
                    ],
                    "Earlier trainings",
                )
        if newest.state == "running":
            progress = self.trainings.progress(newest)
            self.step.text = "Starting \N{HORIZONTAL ELLIPSIS}" if progress is None else progress.step.capitalize()
            share = 0.0 if progress is None else progress.share
            self.bar.style(f"width: {100 * share:.0f}%")
            self.meter.props(f'aria-valuenow="{100 * share:.0f}"')
            left = None if progress is None else progress.left
            self.left.text = f"{share:.0%}" + ("" if left is None else f", about {_duration(left)} left in this step")

    def _show(self, row: JobRow) -> None:
        self.running.clear()
        with self.running:
            with ui.element("h2"):
                ui.label(f"3. Training {row.id}: {row.state}")
            if row.state == "running":
                self.step = ui.label()
                self.meter = ui.element("div").classes("bar")
                self.meter.props('role="progressbar" aria-label="This step" aria-valuemin="0" aria-valuemax="100"')
                with self.meter:
                    self.bar = ui.element("div")
                self.left = ui.label().classes("quiet")
                ui.label("It goes on when this page is closed.").classes("quiet")
                ui.button("Cancel", on_click=lambda: self.cancel(row.id), color=None).props("outline no-caps").classes(
                    "plain"
                )
            elif row.state == "done":
                self._show_done(row)
            elif row.message:
                ui.label(row.message).classes("told")

    def _show_done(self, row: JobRow) -> None:
        ui.label(self.trainings.promised(row.id))
        ui.link("Open the report", f"/page-files/trainings/{row.id}/report", new_tab=True).classes("link")
        with ui.element("div").classes("choices"):
            name = ui.input("Name of the model", value=f"trained-{row.id}")
            self.using = ui.button("Use this model", on_click=lambda: self.use(row.id, name.value or ""))
            self.using.props("unelevated no-caps color=primary")
        unusual = self.trainings.unusual(row.id)
        if not unusual:
            return
        with ui.element("h2"):
            ui.label("The most unusual good images")
        ui.label("Is one of them not good, or no picture of the part? Drop it, and train again without it.").classes(
            "quiet"
        )
        with ui.element("div").classes("unusual"):
            for place, one in enumerate(unusual):
                with ui.element("div"):
                    ui.element("img").props["src"] = f"/page-files/trainings/{row.id}/unusual/{place}"
                    ui.label(Path(one.path).name).classes("name")
                    ui.label(f"score {one.score:.4g}, p {one.p_value:.2g}").classes("quiet")
                    ui.checkbox("Drop", on_change=lambda event, place=place: self._drop(place, bool(event.value)))
        self.anew = ui.button("Train again", on_click=lambda: self.again(row), color=None)
        self.anew.props("outline no-caps").classes("plain")
        self._drop(-1, False)

    def _drop(self, place: int, dropped: bool) -> None:
        (self.dropped.add if dropped else self.dropped.discard)(place)
        self.anew.set_enabled(bool(self.dropped))
        count = len(self.dropped)
        self.anew.text = f"Train again without {counted(count, 'image')}" if count else "Train again"


def _settings(command: list[str]) -> list[str]:
    """The settings of an earlier training, for another one."""
    kept = []
    for option, value in pairwise(command):
        if option in ("--method", "--image-size", "--max-false-reject"):
            kept += [option, value]
    return kept


def _duration(seconds: float) -> str:
    if seconds < 90:
        return counted(max(1, round(seconds)), "second")
    return counted(round(seconds / 60), "minute")
