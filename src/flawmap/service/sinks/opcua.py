"""OPC UA: a server whose nodes say the last verdict of a model, for controllers that read it and trigger pictures.

Objects / flawmap / MODEL holds Verdict, Score, PValue, Time, Id, Name, the counters Good, Defect, Unsure and Error of
what was judged since the watch began, and the method Trigger. Score and PValue are NaN where there are none. Nobody has
to say who they are and nothing is encrypted: the endpoint is for a network of machines.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

from flawmap.errors import FlawmapError

_LOG = logging.getLogger("flawmap.service")

NAMESPACE = "urn:flawmap"
_STARTING = 120.0  # seconds: the standard's own nodes take some to make
_CLOSING = 5.0
_HELD = 1000  # inspections that may wait to be written
_COUNTERS = {"good": "Good", "defect": "Defect", "unsure": "Unsure", "error": "Error"}


class OpcUa:
    """A `Sink` with a thread and an event loop of its own."""

    def __init__(self, endpoint: str, model: str, trigger: Callable[[], None]) -> None:
        """
        Args:
            endpoint: opc.tcp://HOST:PORT, where it listens.
            model: its name, and that of its node.
            trigger: called when a client calls the method Trigger.

        Raises:
            FlawmapError: it is no such address, nothing can listen there, or asyncua is not installed.
        """
        try:
            import asyncua  # noqa: F401
        except ModuleNotFoundError as error:
            raise FlawmapError("--opcua needs asyncua, which is not installed: pip install 'flawmap[opcua]'") from error
        try:
            parts = urlsplit(endpoint)
            fits = parts.scheme == "opc.tcp" and bool(parts.hostname) and bool(parts.port)
        except ValueError:
            fits = False
        if not fits:
            raise FlawmapError(f"--opcua {endpoint} is no address to listen at: give opc.tcp://HOST:PORT")
        try:  # before what takes seconds
            socket.create_server((str(parts.hostname), int(parts.port or 0))).close()
        except OSError as error:
            raise _taken(endpoint, error.strerror or str(error)) from error
        # asyncua warns of each client that goes, and of endpoints without encryption.
        logging.getLogger("asyncua").setLevel(logging.CRITICAL)
        self._endpoint, self._model, self._trigger = endpoint, model, trigger
        self._counts = dict.fromkeys(_COUNTERS.values(), 0)
        self._started: Future[None] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="opcua", daemon=True)
        self._thread.start()
        try:
            self._started.result(_STARTING)
        except Exception as error:
            raise _taken(endpoint, str(error) or type(error).__name__) from error

    def tell(self, inspection: Mapping[str, Any]) -> None:
        """As `Sink.tell`."""
        self._loop.call_soon_threadsafe(self._put, inspection)

    def close(self) -> None:
        """As `Sink.close`."""
        self._loop.call_soon_threadsafe(self._put, None)
        self._thread.join(_CLOSING)

    # In the loop's thread

    def _put(self, inspection: Mapping[str, Any] | None) -> None:
        if inspection is not None:
            self._counts[_COUNTERS[inspection["verdict"]]] += 1
            if self._queue.qsize() >= _HELD:
                self._queue.get_nowait()  # the last verdict is what is read
        self._queue.put_nowait(inspection)

    async def _serve(self) -> None:
        try:
            self._loop = asyncio.get_running_loop()
            self._queue: asyncio.Queue[Mapping[str, Any] | None] = asyncio.Queue()
            server, nodes = await self._opened()
            await server.start()
        except Exception as error:
            self._started.set_exception(error)
            return
        self._started.set_result(None)
        while (inspection := await self._queue.get()) is not None:
            try:
                await self._write(nodes, inspection)
            except Exception:
                _LOG.exception("OPC UA: an inspection could not be written")
        await server.stop()

    async def _opened(self) -> tuple[Any, dict[str, Any]]:
        from asyncua import ua as types
        from asyncua.server.server import Server

        ua: Any = types
        server = Server()
        await server.init()
        server.set_endpoint(self._endpoint)
        server.set_server_name("flawmap")
        server.set_security_policy([ua.SecurityPolicyType.NoSecurity])
        space = await server.register_namespace(NAMESPACE)
        folder = await server.nodes.objects.add_object(space, "flawmap")
        model = await folder.add_object(ua.NodeId(self._model, space), ua.QualifiedName(self._model, space))
        nodes = {}
        kinds = {"Verdict": "", "Name": "", "Time": datetime.fromtimestamp(0), "Score": float("nan")}
        for name, value in {**kinds, "PValue": float("nan"), "Id": 0, **self._counts}.items():
            node_id = ua.NodeId(f"{self._model}.{name}", space)
            nodes[name] = await model.add_variable(node_id, ua.QualifiedName(name, space), value)

        def trigger(parent: Any) -> list[Any]:
            self._trigger()
            return []

        await model.add_method(
            ua.NodeId(f"{self._model}.Trigger", space), ua.QualifiedName("Trigger", space), trigger, [], []
        )
        return server, nodes

    async def _write(self, nodes: Mapping[str, Any], inspection: Mapping[str, Any]) -> None:
        number = {key: float("nan") if inspection[key] is None else inspection[key] for key in ("score", "p_value")}
        values: dict[str, Any] = {
            "Name": inspection["path"],
            "Score": number["score"],
            "PValue": number["p_value"],
            "Time": datetime.fromisoformat(inspection["at"]),
            "Id": inspection["id"],
            **self._counts,
            # Last: who waits for it to change finds the others in place.
            "Verdict": inspection["verdict"],
        }
        for name, value in values.items():
            await nodes[name].write_value(value)


def _taken(endpoint: str, reason: str) -> FlawmapError:
    return FlawmapError(f"--opcua cannot listen at {endpoint} ({reason}): choose another port")
