"""All that a running service has, for REST and for the page alike."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flawmap.errors import FlawmapError
from flawmap.imaging.decoding import decode_image
from flawmap.line.inspector import Inspector
from flawmap.report.overlays import as_rgb, heat_layer
from flawmap.service.batching import Answer, Batcher, Request, Upload
from flawmap.service.counters import Counters
from flawmap.service.database import open_database
from flawmap.service.hosting import Host, Hosts
from flawmap.service.journal import Journal
from flawmap.service.keys import FailedKeys, Keys
from flawmap.service.pictures import Pictures, jpeg_of, map_of, png_of
from flawmap.service.recording import Keep, Recorder
from flawmap.service.records import Asked, Records
from flawmap.service.tables import InspectionRow
from flawmap.text import printable

_LOG = logging.getLogger("flawmap.service")


class RepeatedDifferentlyError(FlawmapError):
    """An Idempotency-Key came again with something else."""


class UnknownModelError(FlawmapError):
    """No model of this name is served."""


@dataclass(frozen=True)
class Options:
    """How a service is run.

    Attributes:
        store: the folder of the records: pictures, log, trainings, and the database if none is named.
        database: its URL; None for SQLite in `store`.
        keep: of which inspections pictures are kept.
        keep_bytes: what they may take.
        judge_when_full: whether judging goes on without pictures when their disk is full.
        keys: the keys that are asked for; None for none.
        queue: images that may wait.
        max_bytes: of one request.
        data: folder that may be trained from; None where nothing is to be trained.
        engine, threads: see `Inspector.load`.
    """

    store: Path
    database: str | None = None
    keep: Keep = "defects"
    keep_bytes: int = 10_000_000_000
    judge_when_full: bool = False
    keys: Keys | None = None
    queue: int = 64
    max_bytes: int = 64_000_000
    data: Path | None = None
    engine: str = "auto"
    threads: int | None = None


@dataclass
class Service:
    """Models, records, and what judges with the ones and keeps the others. Made by `open_service`.

    Attributes:
        listeners: called with each inspection that was committed, in the thread that commits: they must be quick.
    """

    options: Options
    records: Records
    pictures: Pictures
    hosts: Hosts
    batcher: Batcher
    counters: Counters
    failed_keys: FailedKeys = field(default_factory=FailedKeys)
    listeners: list[Callable[[InspectionRow], None]] = field(default_factory=list)

    def host(self, name: str) -> Host:
        """Raises UnknownModelError."""
        host = self.hosts.by_name.get(name)
        if host is None:
            raise UnknownModelError(f"no model is called {name!r}: there are {', '.join(self.hosts.by_name)}")
        return host

    def upload(self, content: bytes, name: str) -> Upload:
        """One image as it was sent, decoded.

        Raises:
            TooManyPixelsError: before it is decoded.
            ImageError: it is no image.
        """
        name = printable(name)[:300] or "image"
        return Upload(content, hashlib.sha256(content).hexdigest(), name, decode_image(content, name))

    def submit(
        self, host: Host, uploads: Sequence[Upload], *, owner: str, source: str, key: str | None = None
    ) -> Future[Answer]:
        """Has images judged and kept. The same key and images again get the same answer, and are kept once.

        Raises:
            RepeatedDifferentlyError: the key was used for something else.
            QueueFullError, ClosingError: see `Batcher.submit`.
            DatabaseGoneError: it cannot be asked whether the key was used.
        """
        asked = None
        if key is not None:
            asked = Asked(owner, key, _digest(host.name, uploads))
            if (before := self.answered(asked)) is not None:
                done: Future[Answer] = Future()
                done.set_result(Answer(before, repeated=True))
                return done
        return self.batcher.submit(Request(host, uploads, source, owner, asked))

    def answered(self, asked: Asked) -> list[InspectionRow] | None:
        """The inspections of a request that was answered before; None where it was not.

        Raises:
            RepeatedDifferentlyError: the key was used for something else.
            DatabaseGoneError: it cannot be asked.
        """
        found = self.records.answered(asked.owner, asked.key)
        if found is None:
            return None
        digest, rows = found
        if digest != asked.digest:
            raise RepeatedDifferentlyError("this Idempotency-Key was used for other images: take a new one")
        return rows

    def close(self) -> None:
        """Finishes what was accepted, and lets go of everything."""
        self.batcher.close()
        self.hosts.close()
        self.records.engine.dispose()

    # What is shown of an inspection

    def picture(self, row: InspectionRow) -> bytes | None:
        """The picture as a browser shows it: JPEG. None where it is not kept."""
        pixels = self.pixels(row)
        return None if pixels is None else jpeg_of(pixels, quality=90)

    def pixels(self, row: InspectionRow) -> NDArray[Any] | None:
        """Those that were judged, see `Upload.pixels`. None where the picture is not kept."""
        content = None if row.picture is None else self.pictures.read(row.picture)
        return None if content is None else decode_image(content, row.name)

    def map(self, row: InspectionRow) -> bytes | None:
        """The map as a 16-bit PNG, see `flawmap.report.overlays.map_levels`. None where it is not kept."""
        return None if row.map is None else self.pictures.read(row.map)

    def layer(self, row: InspectionRow, *, heat: bool, outlines: bool) -> bytes | None:
        """Heat and outlines of the regions to be laid over the picture: PNG with transparency. None without a map."""
        layer = self._layer(row, heat=heat, outlines=outlines)
        return None if layer is None else png_of(layer)

    def overlay(self, row: InspectionRow) -> bytes | None:
        """Picture, heat and outlines in one PNG. None where they are not kept."""
        pixels = self.pixels(row)
        layer = None if pixels is None else self._layer(row)
        if pixels is None or layer is None:
            return None
        picture = Image.fromarray(as_rgb(pixels)).convert("RGBA")
        return png_of(np.asarray(Image.alpha_composite(picture, Image.fromarray(layer)).convert("RGB")))

    def _layer(self, row: InspectionRow, *, heat: bool = True, outlines: bool = True) -> NDArray[np.uint8] | None:
        drawn = self.map(row)
        if drawn is None:
            return None
        values, scale = map_of(drawn)
        return heat_layer(values, scale, heat=heat, outlines=outlines, quiet=row.verdict == "good")


def open_service(models: Sequence[Path], options: Options) -> Service:
    """Loads the models and opens the records.

    Raises:
        FlawmapError: a model, the database or a folder cannot be used.
    """
    from flawmap.report.drawings import make_folder

    make_folder(options.store)
    url = options.database or f"sqlite:///{(options.store / 'records.db').as_posix()}"
    records = Records(open_database(url))
    pictures = Pictures(options.store / "pictures", records, options.keep_bytes)
    hosts = Hosts(models, records, lambda path: Inspector.load(path, engine=options.engine, threads=options.threads))
    counters = Counters()
    journal = Journal(options.store / "inspections.log")
    recorder = Recorder(records, pictures, options.keep, options.judge_when_full)
    listeners: list[Callable[[InspectionRow], None]] = [journal.write]

    def seen(row: InspectionRow, inspection: object, seconds: float) -> None:
        counters.inspected(row.model, row.verdict, seconds)
        for listener in list(listeners):
            listener(row)

    batcher = Batcher(recorder, capacity=options.queue, seen=seen)
    counters.watch_queue(lambda: batcher.waiting)
    return Service(options, records, pictures, hosts, batcher, counters, listeners=listeners)


def _digest(model: str, uploads: Sequence[Upload]) -> str:
    state = hashlib.sha256(model.encode())
    for upload in uploads:
        state.update(f"\0{upload.name}\0{upload.digest}".encode("utf-8", "surrogateescape"))
    return state.hexdigest()
