"""Images of several requests judged together: accepted up to a bound, run in batches, committed, then answered."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from numpy.typing import NDArray

from flawmap.errors import FlawmapError, shortage
from flawmap.imaging.reading import BATCH
from flawmap.judging.inspection import Inspection
from flawmap.service.hosting import Host, Serving
from flawmap.service.recording import Judged, Recorder
from flawmap.service.records import Asked, RepeatedError
from flawmap.service.tables import InspectionRow

_LOG = logging.getLogger("flawmap.service")


class QueueFullError(FlawmapError):
    """So many images wait already that another one would wait too long."""


class ClosingError(FlawmapError):
    """The service ends, and takes nothing more."""


@dataclass(frozen=True)
class Upload:
    """One image as it was sent, and its pixels.

    Attributes:
        content: the bytes of the file.
        digest: their SHA-256, in hexadecimal.
        name: what the sender calls it.
        pixels: (H, W) or (H, W, 3), uint8 or uint16.
    """

    content: bytes = field(repr=False)
    digest: str
    name: str
    pixels: NDArray[Any] = field(repr=False)


@dataclass(frozen=True)
class Request:
    """Images to be judged by one model and kept in one transaction.

    Attributes:
        host: the model.
        uploads: at least one.
        source, owner: see `Judged`.
        asked: what makes it safe to be made again, if anything.
    """

    host: Host
    uploads: Sequence[Upload]
    source: str = "api"
    owner: str = ""
    asked: Asked | None = None


@dataclass(frozen=True)
class Answer:
    """What came of a request: the inspections as they were kept.

    `repeated` where it was answered before, and nothing was judged now.
    """

    rows: list[InspectionRow]
    repeated: bool = False


@dataclass(frozen=True)
class _Waiting:
    request: Request
    answer: Future[Answer]


class Batcher:
    """Takes requests from any thread. One thread runs the models, another one commits.

    Attributes:
        waiting: images that were accepted and are not answered yet.
    """

    def __init__(
        self,
        recorder: Recorder,
        *,
        capacity: int = 64,
        wait: float = 0.005,
        seen: Callable[[InspectionRow, Inspection, float], None] = lambda row, inspection, seconds: None,
    ) -> None:
        """
        Args:
            recorder: keeps what is judged.
            capacity: images that may wait; a request of more is taken where none waits.
            wait: seconds that a batch which is not full waits for more.
            seen: called with each inspection that was committed, and how long its batch took.
        """
        self.waiting = 0
        self._recorder, self._capacity, self._wait, self._seen = recorder, capacity, wait, seen
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._counting = threading.Lock()
        self._closed = False
        self._committing = ThreadPoolExecutor(1, thread_name_prefix="records")
        self._thread = threading.Thread(target=self._run, name="judging", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Future[Answer]:
        """Accepts a request, whose answer comes when it is committed.

        Raises:
            QueueFullError: too many images wait.
            ClosingError: the service ends.
        """
        count = len(request.uploads)
        with self._counting:
            if self._closed:
                raise ClosingError("the service ends: ask again in a while")
            if self.waiting and self.waiting + count > self._capacity:
                raise QueueFullError(f"{self.waiting} images wait already: ask again in a while")
            self.waiting += count
            answer: Future[Answer] = Future()
            self._queue.put(_Waiting(request, answer))
        return answer

    def close(self) -> None:
        """Takes nothing more, and returns when all that was accepted is answered."""
        with self._counting:
            if self._closed:
                return
            self._closed = True
            self._queue.put(None)
        self._thread.join()
        self._committing.shutdown(wait=True)

    def _run(self) -> None:
        ended = False
        while not ended:
            first = self._queue.get()
            if first is None:
                return
            taken, ended = self._together(first)
            hosts = {id(one.request.host): one.request.host for one in taken}
            for host in hosts.values():
                self._judge(host.serving, [one for one in taken if one.request.host is host])

    def _together(self, first: _Waiting) -> tuple[list[_Waiting], bool]:
        """What is judged at once: up to `BATCH` images, or what came within the wait; and whether it is the last."""
        taken, count = [first], len(first.request.uploads)
        deadline = time.monotonic() + self._wait
        while count < BATCH:
            try:
                # What is there already costs no wait; nor does a single client, when nobody else was accepted.
                alone = self.waiting <= count
                left = 0.0 if alone else max(0.0, deadline - time.monotonic())
                more = self._queue.get(timeout=left) if left else self._queue.get_nowait()
            except queue.Empty:
                return taken, False
            if more is None:
                return taken, True
            taken.append(more)
            count += len(more.request.uploads)
        return taken, False

    def _judge(self, serving: Serving, taken: list[_Waiting]) -> None:
        uploads = [upload for one in taken for upload in one.request.uploads]
        start = time.perf_counter()
        try:
            found = serving.inspector.predict([upload.pixels for upload in uploads])
        except Exception as error:
            _LOG.exception("images could not be judged")
            told = shortage(error) or FlawmapError("the images could not be judged: see the service's log")
            for one in taken:
                self._finish(one, told)
            return
        seconds = time.perf_counter() - start
        inspections = iter(found)
        for one in taken:
            own = [_named(next(inspections), upload) for upload in one.request.uploads]
            self._committing.submit(self._commit, serving, one, own, seconds)

    def _commit(self, serving: Serving, one: _Waiting, inspections: list[Inspection], seconds: float) -> None:
        request = one.request
        judged = [
            Judged(inspection, upload.content, upload.name, request.source, request.owner)
            for inspection, upload in zip(inspections, request.uploads, strict=True)
        ]
        try:
            rows = self._recorder.record(
                request.host.name, serving.inspector, serving.version, judged, asked=request.asked
            )
        except RepeatedError:  # the same request came twice at the same time
            assert request.asked is not None
            try:
                before = self._recorder.records.answered(request.asked.owner, request.asked.key)
            except FlawmapError as error:
                self._finish(one, error)
                return
            self._finish(one, Answer([] if before is None else before[1], repeated=True))
        except FlawmapError as error:
            self._finish(one, error)
        except Exception as error:
            _LOG.exception("inspections could not be kept")
            self._finish(one, shortage(error) or FlawmapError("the inspections could not be kept: see the log"))
        else:
            for row, inspection in zip(rows, inspections, strict=True):
                try:
                    self._seen(row, inspection, seconds)
                except Exception:  # whoever looks on does not take an answer away
                    _LOG.exception("an inspection could not be told of")
            self._finish(one, Answer(rows))

    def _finish(self, one: _Waiting, outcome: Answer | FlawmapError) -> None:
        with self._counting:
            self.waiting -= len(one.request.uploads)
        if isinstance(outcome, Answer):
            one.answer.set_result(outcome)
        else:
            one.answer.set_exception(outcome)


def _named(inspection: Inspection, upload: Upload) -> Inspection:
    """With the digest of the bytes, and an error that calls the image by its name."""
    error = inspection.error
    if error is not None and error.startswith("the array: "):
        error = f"{upload.name}: {error.removeprefix('the array: ')}"
    return replace(inspection, digest=upload.digest, error=error)
