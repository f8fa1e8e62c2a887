"""Sign in with a key."""

from __future__ import annotations

from nicegui import ui

from flawmap.service.page.access import sign_in
from flawmap.service.page.frame import style
from flawmap.service.service import Service


def build(service: Service, address: str) -> None:
    """The form, for a browser at an address: whoever gives too many wrong keys waits."""
    style()

    def enter() -> None:
        if wait := service.failed_keys.wait(address):
            told.text = f"Too many wrong keys: try again in {wait} s."
        elif sign_in(service, (key.value or "").strip()):
            ui.navigate.to("/")
        else:
            service.failed_keys.failed(address)
            told.text = "This key is not known. Ask whoever runs the service for one."
        key.value = ""

    with ui.element("main").classes("login"), ui.element("div").classes("panel"):
        with ui.element("h1"):
            ui.label("flawmap").classes("brand")
        key = ui.input("Key", password=True).props('outlined autocomplete="current-password" autofocus')
        key.on("keydown.enter", enter)
        ui.button("Sign in", on_click=enter).props("unelevated color=primary no-caps")
        told = ui.label().classes("told").props('role="alert"')
