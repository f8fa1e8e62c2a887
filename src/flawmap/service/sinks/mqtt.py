"""MQTT: the last verdict of a model as a retained message, and whether its watch is running."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

from flawmap.errors import FlawmapError

_LOG = logging.getLogger("flawmap.service")

_CLOSING = 5.0  # seconds to go on in `close`
_WAITING = 10_000  # messages that are held while the broker is away


class Mqtt:
    """A `Sink` that publishes to `BASE/verdict` and `BASE/state`, with quality of service 1.

    BASE is the URL's path, or `flawmap/MODEL` where it has none. The state is "online", and "offline" when the watch
    ends or the broker has lost it. While the broker is away messages are held, and lost when the watch ends.
    """

    def __init__(self, url: str, model: str) -> None:
        """
        Args:
            url: mqtt://USER:PASSWORD@HOST:PORT/BASE, or mqtts for TLS; all but the host may be left out.
            model: its name.

        Raises:
            FlawmapError: it is no such URL, or paho-mqtt is not installed.
        """
        try:
            from paho.mqtt.client import Client
            from paho.mqtt.enums import CallbackAPIVersion
        except ModuleNotFoundError as error:
            raise FlawmapError(
                "--mqtt needs paho-mqtt, which is not installed: pip install 'flawmap[serve]'"
            ) from error
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if host is None or parts.scheme not in ("mqtt", "mqtts"):
            raise FlawmapError("--mqtt is no address of a broker: give mqtt://HOST:PORT or mqtts://HOST:PORT")
        base = unquote(parts.path).strip("/") or f"flawmap/{model}"
        if any(sign in base for sign in "+#\0"):
            raise FlawmapError(f"--mqtt: {base} is no topic, for + and # are not allowed in one: choose another path")
        secure = parts.scheme == "mqtts"
        self._verdict, self._state = f"{base}/verdict", f"{base}/state"
        self._where = f"{host}:{port or (8883 if secure else 1883)}"
        self._lost: str | None = None  # why, as it was said
        self._client = Client(CallbackAPIVersion.VERSION2)
        self._client.enable_logger(logging.getLogger("flawmap.mqtt"))
        logging.getLogger("flawmap.mqtt").setLevel(logging.CRITICAL)
        if parts.username is not None:
            password = None if parts.password is None else unquote(parts.password)
            self._client.username_pw_set(unquote(parts.username), password)
        if secure:
            self._client.tls_set()
        self._client.will_set(self._state, "offline", qos=1, retain=True)
        self._client.max_queued_messages_set(_WAITING)
        self._client.reconnect_delay_set(1, 30)
        self._client.on_connect = self._connected
        self._client.on_connect_fail = self._failed
        self._client.on_disconnect = self._disconnected
        self._client.connect_async(host, port or (8883 if secure else 1883), keepalive=20)
        self._client.loop_start()

    def tell(self, inspection: Mapping[str, Any]) -> None:
        """As `Sink.tell`."""
        self._client.publish(self._verdict, json.dumps(inspection, allow_nan=False), qos=1, retain=True)

    def close(self) -> None:
        """As `Sink.close`."""
        if self._client.is_connected():
            last = self._client.publish(self._state, "offline", qos=1, retain=True)
            last.wait_for_publish(_CLOSING)
        self._client.disconnect()
        self._client.loop_stop()

    # Called from the client's own thread

    def _connected(self, client: Any, data: Any, flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            if str(reason) != self._lost:
                self._say(str(reason))
            return
        client.publish(self._state, "online", qos=1, retain=True)
        if self._lost is not None:
            _LOG.warning("the MQTT broker at %s is there again", self._where)
        self._lost = None

    def _failed(self, client: Any, data: Any) -> None:
        if self._lost is None:
            self._say("it does not answer")

    def _disconnected(self, client: Any, data: Any, flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure and self._lost is None:
            self._say("it is gone")

    def _say(self, reason: str) -> None:
        _LOG.warning("the MQTT broker at %s cannot be used (%s); it is tried again", self._where, reason)
        self._lost = reason
