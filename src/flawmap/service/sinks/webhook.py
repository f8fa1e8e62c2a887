"""Webhooks: each inspection is posted as JSON, signed, until the receiver takes it.

Which are still to be posted is in the database, committed with the inspections (`flawmap.service.deliveries`), so that
each arrives at least once whatever happens in between. A receiver drops repeats by the inspection's `id`.

Every request bears two headers: `X-Flawmap-Timestamp`, seconds since 1970, and `X-Flawmap-Signature`, "sha256=" and the
hexadecimal HMAC-SHA256, under the secret, of the timestamp, a full stop and the body. A receiver computes it anew from
the bytes it got, compares in constant time, and refuses timestamps that are too old.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from flawmap.errors import FlawmapError
from flawmap.files import open_regular
from flawmap.service.database import now
from flawmap.service.deliveries import Claimed, Deliveries
from flawmap.service.sinks import told

_LOG = logging.getLogger("flawmap.service")

SECRET = "FLAWMAP_WEBHOOK_SECRET"
"""The environment variable that holds the secret, where no file does."""
TRIES = 16
"""How often a delivery is tried before it is given up: for about five hours."""

_TIMEOUT = 10.0
_WAITS = (1000, 3_600_000)  # milliseconds to wait after a try: after the first, at most
_LOOK = 5.0  # seconds between looks at the database, where nobody tells
_CLOSING = 10.0  # seconds to go on in `close`


class _NoRedirect(HTTPRedirectHandler):
    """A redirect would lead elsewhere, and lose the body: it counts as a failure."""

    def redirect_request(self, *arguments: Any, **more: Any) -> None:
        return None


class Webhook:
    """A `Sink` that posts to one URL, from a thread of its own."""

    def __init__(
        self,
        url: str,
        secret: bytes,
        deliveries: Deliveries,
        *,
        tries: int = TRIES,
        first_wait: int = _WAITS[0],
        timeout: float = _TIMEOUT,
    ) -> None:
        """
        Args:
            url: http or https.
            secret: what requests are signed with.
            deliveries: what is to be posted.
            tries: how often each is tried.
            first_wait: milliseconds until the second try; doubled after each.
            timeout: seconds that the receiver may take.

        Raises:
            FlawmapError: it is no such URL, or the secret is empty.
        """
        check_url(url)
        if not secret:
            raise FlawmapError(f"--webhook needs a secret to sign with: give --webhook-secret FILE, or set {SECRET}")
        self.url = url
        self._secret, self._deliveries, self._tries = secret, deliveries, tries
        self._first_wait, self._timeout = first_wait, timeout
        self._opener = build_opener(_NoRedirect)
        self._woken = threading.Event()
        self._closing = False
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="webhook", daemon=True)
        self._thread.start()

    def tell(self, inspection: Mapping[str, Any]) -> None:
        """As `Sink.tell`: what is to be posted is in the database already."""
        self._woken.set()

    def close(self) -> None:
        """As `Sink.close`. What could not be posted is when a watch with this URL runs again."""
        self._closing = True
        self._woken.set()
        self._thread.join(_CLOSING)

    def _run(self) -> None:
        while True:
            closing = self._closing
            self._woken.clear()
            try:
                while (claimed := self._deliveries.claim([self.url], int(1000 * self._timeout) + 60_000)) is not None:
                    self._deliver(claimed)
                due = self._deliveries.due_next([self.url])
            except FlawmapError:  # the watch itself says so, and waits
                due = None
            except Exception:
                _LOG.exception("webhooks: the next look may go well")
                due = None
            if closing:
                return
            pause = _LOOK if due is None else min(_LOOK, max(0.0, (due - now()) / 1000))
            self._woken.wait(pause)

    def _deliver(self, claimed: Claimed) -> None:
        error = self._post(claimed)
        if error is None:
            self._deliveries.done(claimed.id)
            if self._failing:
                _LOG.warning("the webhook takes deliveries again")
            self._failing = False
            return
        wait = min(self._first_wait * 2 ** (claimed.tries - 1), _WAITS[1])
        dead = claimed.tries >= self._tries
        self._deliveries.failed(claimed.id, error, None if dead else now() + wait)
        if dead:
            _LOG.warning("a delivery to the webhook is given up (%s): try again with --retry-dead", error)
        elif not self._failing:
            _LOG.warning("the webhook does not take a delivery (%s); it is tried again", error)
        self._failing = True

    def _post(self, claimed: Claimed) -> str | None:
        """Why it did not arrive; None where it did."""
        body = json.dumps(told(claimed.inspection), allow_nan=False).encode()
        timestamp = str(int(time.time()))
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "flawmap",
            "X-Flawmap-Timestamp": timestamp,
            "X-Flawmap-Signature": signature(self._secret, timestamp, body),
        }
        try:
            with self._opener.open(Request(self.url, body, headers, method="POST"), timeout=self._timeout) as answer:
                return None if 200 <= answer.status < 300 else f"status {answer.status}"
        except HTTPError as error:
            error.close()
            return f"status {error.code}"
        except URLError as error:
            return str(error.reason)[:200]
        except (OSError, http.client.HTTPException, ValueError) as error:
            return (str(error) or type(error).__name__)[:200]


def signature(secret: bytes, timestamp: str, body: bytes) -> str:
    """What the header `X-Flawmap-Signature` says."""
    return "sha256=" + hmac.new(secret, timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()


def check_url(url: str) -> None:
    """Raises FlawmapError where a webhook cannot be at a URL."""
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        fits = False
    if not fits or not url.isascii() or not url.isprintable() or " " in url or len(url) > 1000:
        raise FlawmapError("--webhook is no address to post to: give http://HOST/PATH or https://HOST/PATH")
    if parts.username is not None or parts.password is not None:
        raise FlawmapError(
            "--webhook holds a password, which would be kept in the records: requests are signed instead"
        )


def read_secret(path: Path | None) -> bytes:
    """The secret of a file, without the end of its line, or of the environment variable `SECRET`; empty for neither.

    Raises:
        FlawmapError: the file cannot be read, or is empty.
    """
    if path is None:
        return os.environ.get(SECRET, "").encode()
    with open_regular(path) as file:
        secret = file.read(10_000).strip()
    if not secret:
        raise FlawmapError(f"{path}: is empty; write the secret into it")
    return secret
