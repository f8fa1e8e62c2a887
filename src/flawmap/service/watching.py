"""Watching: pictures from sources are judged, committed, and told to sinks, one after the other, until it is ended."""

from __future__ import annotations

import hashlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from textwrap import shorten
from typing import TypeVar

from flawmap.errors import FlawmapError
from flawmap.judging.inspection import Inspection
from flawmap.line.inspector import Inspector
from flawmap.service.database import DatabaseGoneError
from flawmap.service.hosting import LOOK, Host
from flawmap.service.recording import Judged, Recorder
from flawmap.service.records import Asked, RepeatedError
from flawmap.service.sinks import Sink, told
from flawmap.service.sources import Shot, Source
from flawmap.service.tables import InspectionRow

_LOG = logging.getLogger("flawmap.service")
T = TypeVar("T")

_REST = 0.1  # seconds between questions to sources that have nothing
_WAITS = (1.0, 30.0)  # seconds to wait for what cannot be committed: at first, at most


class Watch:
    """Judges what sources give. An inspection is committed before anybody is told of it.

    Attributes:
        counts: how many of each verdict.
    """

    def __init__(
        self,
        host: Host,
        recorder: Recorder,
        sources: Sequence[Source],
        *,
        sinks: Sequence[Sink] = (),
        deliveries: Sequence[str] = (),
        write: Callable[[Inspection], None] = lambda inspection: None,
        once: bool = False,
    ) -> None:
        """
        Args:
            host: judges; its file and its threshold are looked at again while it does.
            recorder: keeps what is judged; while it cannot, it is waited for.
            sources: asked in turn.
            sinks: told of each inspection.
            deliveries: URLs of webhooks, which are committed with each inspection.
            write: called with each inspection.
            once: whether to give up where nothing can be committed.
        """
        self.counts = {"good": 0, "defect": 0, "unsure": 0, "error": 0}
        self._host, self._recorder, self._sources, self._sinks = host, recorder, sources, sinks
        self._deliveries, self._write, self._once = deliveries, write, once
        self._ending = False
        self._looked = time.monotonic()
        self._woken = threading.Event()

    def end(self) -> None:
        """Ends `run` after the picture in hand. A signal handler may call it: it takes no lock."""
        self._ending = True

    def wake(self) -> None:
        """Lets sources be asked at once. Any thread may call it."""
        self._woken.set()

    def run(self) -> None:
        """Judges until it is ended, or all sources are finished.

        Raises:
            FlawmapError: with `once`, something cannot be read or committed.
        """
        while not self._ending:
            taken = False
            if time.monotonic() > self._looked + LOOK:
                self._host.refresh()
                self._looked = time.monotonic()
            for source in self._sources:
                if self._ending:
                    return
                shot = until_it_can(source.take, lambda: self._ending, once=self._once)
                if shot is not None:
                    taken = True
                    self._judge(source, shot)
            if taken:
                continue
            if all(source.finished() for source in self._sources):
                return
            self._woken.wait(_REST)
            self._woken.clear()

    def _judge(self, source: Source, shot: Shot) -> None:
        serving = self._host.serving
        inspection = _inspected(serving.inspector, shot)
        judged = [Judged(inspection, shot.content, shot.name, shot.source)]
        # A connection that breaks in a commit does not tell whether it was done; the key does.
        asked = Asked("watch", secrets.token_hex(16), inspection.digest or "")
        seen = [] if shot.seen is None else [shot.seen]

        def record() -> list[InspectionRow]:
            try:
                return self._recorder.record(
                    self._host.name, serving.inspector, serving.version, judged, asked, seen, self._deliveries
                )
            except RepeatedError:
                before = self._recorder.records.answered(asked.owner, asked.key)
                return [] if before is None else before[1]

        # Also pictures that cannot be written now can be later.
        rows = until_it_can(record, lambda: self._ending, once=self._once, of=FlawmapError)
        if rows is None:
            _LOG.warning("%s: was not kept, and is no more judged: the watch was ended", shot.shown)
            return
        source.judged(shot, rows[0].verdict if rows else None)
        for row in rows:
            self.counts[row.verdict] += 1
            self._write(inspection)
            for sink in self._sinks:
                try:
                    sink.tell(told(row))
                except Exception:  # whoever is told does not take an inspection away
                    _LOG.exception("an inspection could not be told of")


def until_it_can(
    do: Callable[[], T], ended: Callable[[], bool], *, once: bool, of: type[FlawmapError] = DatabaseGoneError
) -> T | None:
    """What `do` gives, tried again and again while it raises errors of a type; None where it is ended meanwhile.

    Raises:
        FlawmapError: other ones; with `once`, any.
    """
    wait, said = _WAITS[0], None
    while True:
        try:
            result = do()
        except of as error:
            if once:
                raise
            if str(error) != said:
                said = str(error)
                _LOG.warning("%s; the watch waits for it", said)
        else:
            if said is not None:
                _LOG.warning("the watch goes on")
            return result
        deadline = time.monotonic() + wait
        while time.monotonic() < deadline:
            if ended():
                return None
            time.sleep(_REST)
        wait = min(2 * wait, _WAITS[1])


def _inspected(inspector: Inspector, shot: Shot) -> Inspection:
    digest = hashlib.sha256(shot.content).hexdigest() if shot.content else None
    if shot.pixels is None:
        return Inspection(shot.shown, "error", error=shot.error, digest=digest)
    try:
        found = inspector.predict(shot.pixels)
    except Exception as error:  # one picture does not end a watch, and is never good
        reason = shorten(f"{type(error).__name__}: {error}", 200)
        return Inspection(shot.shown, "error", error=f"{shot.shown}: could not be judged ({reason})", digest=digest)
    told_of = found.error
    if told_of is not None:
        told_of = f"{shot.shown}: {told_of.removeprefix('the array: ')}"
    return replace(found, path=shot.shown, digest=digest, error=told_of)
