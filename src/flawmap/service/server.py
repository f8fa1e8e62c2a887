"""The service's process: where it listens, and how it ends."""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn

from flawmap.errors import FlawmapError
from flawmap.service.api import create_app
from flawmap.service.page import mount_page
from flawmap.service.service import Options, open_service

_GRACE = 30  # seconds that accepted requests have when the service ends


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own, which no other reaches."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def serve(
    models: list[Path], options: Options, host: str, port: int, *, started: Callable[[str], None] = lambda url: None
) -> None:
    """Serves until it is told to end; what was accepted is finished then.

    Args:
        models: their files.
        options: how.
        host, port: to listen at; port 0 is a free one.
        started: called with the address when it listens.

    Raises:
        FlawmapError: a model, the database, a folder or the address cannot be used, or other machines would be
            answered to without keys.
    """
    local = options.keys is None
    if local and not is_loopback(host):
        raise FlawmapError(
            f"without keys only this machine is served, not {host}: make keys with `flawmap key`, and give --keys FILE"
        )
    listening = _listen(host, port)
    try:
        service = open_service(models, options)
    except BaseException:
        listening.close()
        raise
    logging.getLogger("flawmap.service").setLevel(logging.INFO)
    app = create_app(service, local=local)
    mount_page(app, service)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_GRACE,
        timeout_keep_alive=30,
        forwarded_allow_ips="",
        proxy_headers=False,
    )
    server = _Server(config, lambda: started(_address(listening, host)))
    server.run(sockets=[listening])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, listens: Callable[[], None]) -> None:
        super().__init__(config)
        self._listens = listens

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._listens()


def _listen(host: str, port: int) -> socket.socket:
    try:
        kind, _, _, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(kind, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise FlawmapError(f"{host}:{port} cannot be listened at ({error.strerror}): give another --port") from error
    return listening


def _address(listening: socket.socket, host: str) -> str:
    shown = f"[{host}]" if ":" in host and not host.startswith("[") else host
    return f"http://{shown}:{listening.getsockname()[1]}"
