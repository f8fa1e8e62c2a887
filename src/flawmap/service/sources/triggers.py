"""What asks cameras for a picture: the key Enter, or an HTTP request of this machine."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from flawmap.errors import FlawmapError


def on_enter(descriptor: int, trigger: Callable[[], None]) -> None:
    """Triggers at each line that comes from a file descriptor, in a thread of its own, until it ends.

    Not from a stream, whose lock a thread that waits in it would hold when Python ends.
    """

    def read() -> None:
        with suppress(OSError):
            while data := os.read(descriptor, 1024):
                for _ in range(data.count(b"\n")):
                    trigger()

    threading.Thread(target=read, name="enter", daemon=True).start()


def on_http(port: int, trigger: Callable[[], None]) -> ThreadingHTTPServer:
    """Triggers at each POST to a port of the loopback interface; it is answered with 202 at once.

    Returns:
        The server, to be closed by its `shutdown` and `server_close`.

    Raises:
        FlawmapError: the port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def do_POST(self) -> None:
            if self.headers.get("Origin") is not None:  # a page in a browser is no controller
                self.send_error(403)
                return
            trigger()
            self.send_response(202)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            """Nothing is printed."""

    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise FlawmapError(f"--trigger-port {port} cannot be used ({error.strerror}): choose another port") from error
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, name="trigger", daemon=True).start()
    return server
