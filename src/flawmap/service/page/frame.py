"""What stands around each section: its name, the way to the others, light or dark."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nicegui import app as pages
from nicegui import ui

from flawmap.service.keys import Caller
from flawmap.service.page.access import sign_out
from flawmap.service.service import Service

_STYLE = (Path(__file__).parent / "page.css").read_text("utf-8")
_SECTIONS = (("/", "Live"), ("/threshold", "Threshold"), ("/knobs", "Knobs"), ("/quality", "Quality"))
_LOOKS = {"auto": None, "light": False, "dark": True}


def style() -> ui.dark_mode:
    """Brings the style in; light or dark as the browser's user chose, else as the system is."""
    ui.add_css(_STYLE)
    ui.colors(primary="#0b6e75")
    return ui.dark_mode(_LOOKS.get(str(pages.storage.user.get("look", "auto"))))


@contextmanager
def frame(service: Service, who: Caller, here: str, trains: bool) -> Iterator[None]:
    """A section's place on the page.

    Args:
        service: whose page it is.
        who: looks at it.
        here: the section's address.
        trains: whether there is one to train in.
    """
    dark = style()

    def look(choice: str) -> None:
        pages.storage.user["look"] = choice
        dark.value = _LOOKS[choice]

    def leave() -> None:
        sign_out()
        ui.navigate.to("/login")

    with ui.element("header").classes("top"):
        ui.label("flawmap").classes("brand")
        with ui.element("nav").props('aria-label="Sections"'):
            sections = [*_SECTIONS, ("/train", "Train")] if trains and who.may("administer") else _SECTIONS
            for address, name in sections:
                link = ui.link(name, address)
                if address == here:
                    link.props('aria-current="page"')
        with ui.element("div").classes("who"):
            if service.options.keys is not None:
                ui.label(f"{who.name} ({who.role})").classes("quiet")
                ui.button("Sign out", on_click=leave).props("flat dense no-caps").classes("plain")
            chosen = str(pages.storage.user.get("look", "auto"))
            ui.select(
                {"auto": "As the system", "light": "Light", "dark": "Dark"},
                value=chosen if chosen in _LOOKS else "auto",
                on_change=lambda event: look(event.value),
            ).props('dense borderless options-dense aria-label="Light or dark"').classes("look")
    with ui.element("main").classes("section") as main:
        with ui.element("h1").classes("unseen"):
            ui.label(next(name for address, name in (*_SECTIONS, ("/train", "Train")) if address == here))
        yield
    ui.skip_link(target=main)
