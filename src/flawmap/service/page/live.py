"""Live: what is inspected, newest first, and the operator's word on it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from nicegui import ui
from nicegui.events import KeyEventArguments

from flawmap.errors import FlawmapError
from flawmap.service.page.access import allowed, may
from flawmap.service.page.components import SIGNS, WORDS, Drop, Film, Viewer, picture_address, when
from flawmap.service.page.feed import Feed
from flawmap.service.service import Service
from flawmap.service.tables import InspectionRow
from flawmap.text import counted

_OFTEN = 0.25  # seconds between what a page is told
_WORDS = {"g": "good", "d": "defect", "u": "unsure"}
_NOT_KEPT = "No picture is kept of this one. flawmap serve --keep all keeps those of good parts too."
_NOTHING = "Nothing was inspected yet. Drop an image below, or send one to the service."


def build(service: Service, feed: Feed, inspection: int | None) -> None:
    """The section, with an inspection shown if one is asked for."""
    view = _Live(service, feed)
    view.build()
    if inspection is not None:
        view.choose(inspection)
    view.refresh()
    ui.timer(_OFTEN, view.tick)


class _Live:
    """One browser's view. It stays with the newest inspection until another one is chosen."""

    def __init__(self, service: Service, feed: Feed) -> None:
        self.service, self.feed = service, feed
        self.version = -1
        self.chosen: InspectionRow | None = None
        self.following = True
        self.model = next(iter(service.hosts.by_name), "")

    def build(self) -> None:
        with ui.element("div").classes("live"):
            with ui.element("section").classes("light").props('aria-live="polite" aria-label="Verdict"') as self.light:
                self.sign = ui.label().classes("light-sign").props('aria-hidden="true"')
                self.verdict = ui.label().classes("light-word")
                with ui.element("div").classes("light-more"):
                    self.name = ui.label().classes("light-name")
                    self.told = ui.label()
            with ui.element("section").classes("panel latest").props('aria-label="Latest inspections"'):
                with ui.element("div").classes("row"):
                    with ui.element("h2"):
                        ui.label("Latest")
                    self.follow = ui.button("Follow the newest", on_click=self.newest).props("flat dense no-caps")
                    self.follow.classes("plain")
                self.film = Film("Inspections, newest first", self.choose)
            with ui.element("section").classes("panel shown").props('aria-label="Picture"'):
                self.viewer = Viewer()
            with ui.element("section").classes("panel details").props('aria-label="Details"'):
                self._build_words()
                self.facts = ui.element("dl").classes("facts")
                self.regions = ui.element("div").classes("regions")
                if may(self.service, "operate"):
                    self._build_drop()
        ui.keyboard(self._key, repeating=True, ignore=["input", "select", "textarea"])

    def _build_words(self) -> None:
        with ui.element("h2"):
            ui.label("Your word")
        with ui.element("div").classes("words").props('role="group" aria-label="Your word"'):
            self.buttons = {}
            for key, word in _WORDS.items():
                button = ui.button(on_click=self._saying(word), color=None).props(
                    f'unelevated no-caps aria-keyshortcuts="{key}"'
                )
                with button.classes(f"word is-{word}"):
                    ui.label(f"{SIGNS[word]} {word.capitalize()}")
                    ui.element("kbd").classes("key").props(f'aria-hidden="true" data-key="{key}"')
                self.buttons[word] = button
        self.said = ui.label().classes("quiet said")

    def _build_drop(self) -> None:
        with ui.element("h2"):
            ui.label("Inspect an image")
        if len(self.service.hosts.by_name) > 1:
            ui.select(list(self.service.hosts.by_name), value=self.model, label="Model", on_change=self._judge_with)
        self.drop = Drop(self._address(), "Drop images here, or choose them", self._sent)

    def _address(self) -> str:
        return f"/page-files/inspections?model={quote(self.model)}"

    def _judge_with(self, event: Any) -> None:
        self.model = event.value
        self.drop.send_to(self._address())

    def _sent(self, answer: dict[str, Any]) -> None:
        number = answer.get("id")
        if isinstance(number, int):
            self.newest()
            self.choose(number)

    # What is shown

    async def tick(self) -> None:
        await asyncio.to_thread(self.feed.look)
        if self.version != self.feed.version:
            self.refresh()

    def refresh(self) -> None:
        """Shows what is new."""
        self.version = self.feed.version
        rows = self.feed.rows()
        chosen = self.chosen
        if self.following or chosen is None:
            chosen = rows[0] if rows else None
        else:
            chosen = next((row for row in rows if row.id == chosen.id), chosen)
        self._show(chosen)
        self.film.show(rows, None if chosen is None else chosen.id)
        self.follow.set_visibility(not self.following)

    def choose(self, number: int) -> None:
        """Shows an inspection; the newest one is followed on."""
        rows = self.feed.rows()
        found = next((row for row in rows if row.id == number), None)
        if found is None:
            try:
                found = self.service.records.get(number)
            except FlawmapError as error:
                ui.notify(str(error), type="warning")
        if found is None:
            return
        self.following = bool(rows) and number == rows[0].id
        self.chosen = found
        self.refresh()

    def newest(self) -> None:
        """Goes back to the newest one, and stays with it."""
        self.following, self.chosen = True, None
        self.refresh()

    def step(self, by: int) -> None:
        """The next older one (1), or the next newer (-1)."""
        rows = self.feed.rows()
        if not rows or self.chosen is None:
            return
        here = next((i for i, row in enumerate(rows) if row.id == self.chosen.id), -1)
        self.choose(rows[min(max(here + by, 0), len(rows) - 1)].id)

    def _show(self, row: InspectionRow | None) -> None:
        before, self.chosen = self.chosen, row
        verdict = "none" if row is None else row.verdict
        self.light.classes(replace=f"light is-{verdict}")
        self.sign.text = SIGNS.get(verdict, "")
        self.verdict.text = WORDS.get(verdict, "READY")
        self.name.text = _NOTHING if row is None else row.name
        self.told.text = "" if row is None else _in_short(row)
        for word, button in self.buttons.items():
            button.props(f'aria-pressed="{str(row is not None and row.word == word).lower()}"')
            button.set_enabled(row is not None)
        self.said.text = (
            "" if row is None or row.word is None else f"{row.word_by or 'Said'} at {when(row.word_at)}: {row.word}"
        )
        if row is None:
            self.viewer.show("", "", "", "nothing", "")
        elif before is None or before.id != row.id or before.picture != row.picture or not self.viewer.props["name"]:
            addresses = [picture_address(row, what) for what in ("picture", "heat", "outlines")]
            self.viewer.show(addresses[0], addresses[1], addresses[2], row.name, _NOT_KEPT)
        if row is None or before is None or before.id != row.id or not self.facts.default_slot.children:
            self._show_facts(row)

    def _show_facts(self, row: InspectionRow | None) -> None:
        self.facts.clear()
        self.regions.clear()
        if row is None:
            return
        with self.facts:
            for name, value in _facts(row):
                with ui.element("dt"):
                    ui.label(name)
                with ui.element("dd"):
                    ui.label(value)
        with self.regions:
            with ui.element("h2"):
                ui.label("Regions")
            if not row.regions:
                ui.label("None is above its threshold." if row.map or row.verdict == "good" else "None.").classes(
                    "quiet"
                )
            for number, region in enumerate(row.regions[:20], start=1):
                left, top, right, bottom = region["box"]
                told = f"{number}: {right - left} \N{MULTIPLICATION SIGN} {bottom - top} at {left}, {top}"
                more = f"{counted(region['area'], 'pixel')}, peak {region['peak']:.3g}"
                button = ui.button(on_click=lambda box=region["box"]: self.viewer.look_at(box), color=None)
                with button.props("flat no-caps align=left").classes("region plain"):
                    ui.label(told)
                    ui.label(more).classes("quiet")

    # What is done

    def _saying(self, word: str) -> Callable[[], Any]:
        return lambda: self.say(word)

    async def say(self, word: str) -> None:
        """Keeps the operator's word on what is shown."""
        row = self.chosen
        who = allowed(self.service, "operate")
        if row is None or who is None:
            return
        try:
            kept = await asyncio.to_thread(self.service.records.say, row.id, word, who.name)
        except FlawmapError as error:
            ui.notify(str(error), type="negative")
            return
        if kept is not None:
            self.feed.add(kept)
            if self.chosen is not None and self.chosen.id == kept.id:
                self.chosen = kept
            self.refresh()

    async def _key(self, event: KeyEventArguments) -> None:
        held = event.modifiers
        if not event.action.keydown or held.ctrl or held.meta or held.alt or held.shift:
            return
        name = str(event.key.name)
        if name in ("ArrowRight", "j"):
            self.step(1)
        elif name in ("ArrowLeft", "k"):
            self.step(-1)
        elif name in _WORDS and not event.action.repeat:
            await self.say(_WORDS[name])


def _in_short(row: InspectionRow) -> str:
    if row.error is not None:
        return row.error
    score = f"score {row.score:.4g}" if row.score is not None else "no score"
    return score if row.p_value is None else f"{score}, p {row.p_value:.3g}, {row.model}"


def _facts(row: InspectionRow) -> list[tuple[str, str]]:
    def number(value: float | None) -> str:
        return "\N{EN DASH}" if value is None else f"{value:.5g}"

    version = "of training" if row.threshold_version == 0 else f"version {row.threshold_version}"
    return [
        ("Score", number(row.score)),
        ("Threshold", f"{number(row.threshold)} ({version})"),
        ("p-value", number(row.p_value)),
        ("Model", f"{row.model} ({row.model_digest[:8]})"),
        ("Inspected", f"{when(row.at)}, {row.milliseconds:.0f} ms, from {row.source}"),
        ("Size", "\N{EN DASH}" if row.width is None else f"{row.width} \N{MULTIPLICATION SIGN} {row.height} pixels"),
        ("Number", str(row.id)),
    ]
