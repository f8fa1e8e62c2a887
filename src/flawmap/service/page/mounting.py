"""The page brought into a service's application."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import RedirectResponse
from nicegui import app as pages
from nicegui import ui
from starlette.responses import Response

from flawmap.files import replacing
from flawmap.service.page import knobs, live, login, quality, threshold, train
from flawmap.service.page.access import caller
from flawmap.service.page.feed import Feed
from flawmap.service.page.frame import frame
from flawmap.service.page.routes import add_routes
from flawmap.service.service import Service
from flawmap.service.training import Trainings

_SECRET = "page-secret"
_SIGNED_IN = 30 * 24 * 3600  # seconds that a browser stays signed in
_ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" rx="7" fill="#0b5e66"/>'
    '<circle cx="14" cy="14" r="7" fill="none" stroke="#fff" stroke-width="3"/>'
    '<path d="M19 19l7 7" stroke="#fff" stroke-width="3.5" stroke-linecap="round"/>'
    '<circle cx="15" cy="13" r="2.5" fill="#fdae3c"/></svg>'
)


def mount_page(app: FastAPI, service: Service) -> None:
    """Serves the page at / of an application, below its own routes. Once a process: NiceGUI has one page tree.

    Raises:
        FlawmapError: the secret that signs the browsers' cookies cannot be written.
    """
    feed = Feed(service.records)
    service.listeners.append(feed.add)
    trainings = Trainings(service) if service.options.data is not None and find_spec("torch") is not None else None
    if trainings is not None:
        pages.on_shutdown(trainings.close)
    pages.storage.path = service.options.store / "page"
    add_routes(service, trainings)

    def shown(path: str, build: Callable[[], None]) -> Response | None:
        """A section in its frame, for whoever is signed in."""
        who = caller(service)
        if who is None:
            return RedirectResponse("/login")
        with frame(service, who, path, trainings is not None):
            build()
        return None

    @ui.page("/login", title="Sign in \N{MIDDLE DOT} flawmap")
    def login_page(request: Request) -> Response | None:
        if caller(service) is not None:
            return RedirectResponse("/")
        login.build(service, request.client.host if request.client else "")
        return None

    @ui.page("/", title="Live \N{MIDDLE DOT} flawmap")
    def live_page(inspection: int | None = None) -> Response | None:
        return shown("/", lambda: live.build(service, feed, inspection))

    @ui.page("/threshold", title="Threshold \N{MIDDLE DOT} flawmap")
    def threshold_page(model: str | None = None, last: int = 200) -> Response | None:
        return shown("/threshold", lambda: threshold.build(service, model, last))

    @ui.page("/knobs", title="Knobs \N{MIDDLE DOT} flawmap")
    def knobs_page(model: str | None = None) -> Response | None:
        return shown("/knobs", lambda: knobs.build(service, model))

    @ui.page("/quality", title="Quality \N{MIDDLE DOT} flawmap")
    def quality_page(model: str | None = None, days: int = 30) -> Response | None:
        return shown("/quality", lambda: quality.build(service, model, days))

    @ui.page("/train", title="Train \N{MIDDLE DOT} flawmap")
    def train_page() -> Response | None:
        return shown("/train", lambda: train.build(service, trainings))

    ui.run_with(
        app,
        mount_path="/",
        title="flawmap",
        favicon=_ICON,
        dark=None,
        language="en-US",
        tailwind=False,
        show_welcome_message=False,
        storage_secret=_secret(service.options.store / _SECRET),
        session_middleware_kwargs={"same_site": "strict", "max_age": _SIGNED_IN, "session_cookie": "flawmap"},
    )


def _secret(path: Path) -> str:
    """What the browsers' cookies are signed with: the same after a restart, so that nobody has to sign in again."""
    if path.is_file() and (found := path.read_text("ascii", "replace").strip()):
        return found
    made = secrets.token_urlsafe(32)
    with replacing(path) as file:
        file.write(made.encode())
    path.chmod(0o600)
    return made
