"""What stands before every route: who may ask from where, and the headers of every answer."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = ("localhost", "127.0.0.1", "::1")

_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "SAMEORIGIN",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(self), microphone=(), geolocation=()",
}
_PAGE = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; frame-src 'self'; "
    "frame-ancestors 'self'; base-uri 'self'; form-action 'self'; object-src 'none'"
)
_DATA = "default-src 'none'; frame-ancestors 'none'"


class Guard:
    """Refuses what another site's page asks in the operator's name, and, without keys, other names than this machine's.

    A page of another site can send requests to a service on this machine, and by a name that it resolves to this
    machine can even read the answers; a browser tells of both in `Origin` and `Host`.
    """

    def __init__(self, app: ASGIApp, *, local: bool) -> None:
        """`local`: whether only this machine's own names are answered to."""
        self._app = app
        self._local = local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refused = self._refused(scope, headers)
        if refused is not None:
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                await JSONResponse({"detail": refused}, 403)(scope, receive, send)
            return

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                _add_headers(scope, message)
            await send(message)

        await self._app(scope, receive, sending)

    def _refused(self, scope: Scope, headers: Headers) -> str | None:
        host = headers.get("host", "")
        if self._local and _name(f"//{host}") not in LOOPBACK:
            return "this service has no keys, and answers to localhost alone"
        origin = headers.get("origin")
        changes = scope["type"] == "websocket" or scope["method"] not in ("GET", "HEAD", "OPTIONS")
        if changes and origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return "asked by a page of another site"
        return None


def _name(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


def _add_headers(scope: Scope, message: Any) -> None:
    headers = MutableHeaders(scope=message)
    for name, value in _HEADERS.items():
        headers.setdefault(name, value)
    is_data = scope["path"].startswith("/v1/") or not headers.get("content-type", "").startswith("text/html")
    headers.setdefault("content-security-policy", _DATA if is_data else _PAGE)
    if scope["path"].startswith("/v1/"):
        headers.setdefault("cache-control", "no-store")
