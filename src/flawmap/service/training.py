"""Trainings started from the page: images collected, a process each, which outlives the service and is gone on with."""

from __future__ import annotations

import csv
import json
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO, StringIO
from pathlib import Path, PurePosixPath
from typing import IO, Any

from flawmap.datasets import find_dataset
from flawmap.errors import FlawmapError, ImageError
from flawmap.files import replacing
from flawmap.imaging.decoding import decode_image, read_image
from flawmap.imaging.image_files import IMAGE_SUFFIXES, hidden
from flawmap.report.drawings import make_folder
from flawmap.service.hosting import Host, model_name
from flawmap.service.pictures import jpeg_of
from flawmap.service.service import Service
from flawmap.service.tables import JobRow
from flawmap.text import counted, printable

_LOG = logging.getLogger("flawmap.service")
_LOOK = 0.5  # seconds between looks at a process
_AGAIN = 3  # times that a training which was killed is gone on with
_PATIENCE = 5.0  # seconds between asking a process to end and ending it
_SHOWN = 12  # unusual images
_EXPORTING = 1800  # seconds
_IMAGES, _UNPACKED = 20_000, 20_000_000_000  # of a collection
_BLOCK = 1 << 20
_MODEL, _REPORT, _FOUND, _PROGRESS, _LOGGED = "model.safetensors", "report.html", "found.json", "progress.json", "log"


@dataclass(frozen=True)
class Progress:
    """How far a training is.

    Attributes:
        step: what it does.
        share: of the step that is done, 0 to 1.
        left: seconds to the end of the step; None while that cannot be said.
    """

    step: str
    share: float
    left: float | None


@dataclass(frozen=True)
class Unusual:
    """A good image unlike the others."""

    path: str
    score: float
    p_value: float


class Collections:
    """Images that were sent to be trained on. Each is named by a number: what the sender calls it names no file.

    Attributes:
        max_bytes: of one file that is sent, an archive or an image.
    """

    def __init__(self, folder: Path, max_image: int, max_bytes: int = 4_000_000_000) -> None:
        """`max_image` bytes are the most that an image may have."""
        make_folder(folder)
        self.folder = folder
        self.max_bytes = max_bytes
        self._max_image = max_image
        self._adding = threading.Lock()

    def new(self) -> str:
        """The name of an empty one."""
        name = secrets.token_hex(8)
        make_folder(self.folder / name)
        return name

    def images(self, collection: str) -> Path:
        """Its folder.

        Raises:
            FlawmapError: there is none of this name.
        """
        found = self.folder / collection
        if not (len(collection) == 16 and set(collection) <= set("0123456789abcdef") and found.is_dir()):
            raise FlawmapError("these images are gone: send them again")
        return found

    def part(self, collection: str) -> Path:
        """Where a file is written while it comes in.

        Raises:
            FlawmapError: as `images`.
        """
        self.images(collection)
        return self.folder / f"{collection}-{secrets.token_hex(4)}.part"

    def count(self, collection: str) -> int:
        """How many images it has."""
        return sum(1 for _ in self.images(collection).iterdir())

    def add(self, collection: str, part: Path, name: str) -> tuple[int, list[str]]:
        """Takes in an image, or those in a ZIP archive.

        Args:
            collection: see `new`.
            part: the file that came in.
            name: what the sender calls it.

        Returns:
            How many images were added, and why others were not, a line each.

        Raises:
            FlawmapError: the archive is damaged, or holds too much.
        """
        folder = self.images(collection)
        with self._adding:
            if not zipfile.is_zipfile(part):
                if part.stat().st_size > self._max_image:
                    return 0, [f"{printable(name)}: more than {self._max_image / 1e6:.0f} MB"]
                refused = self._keep(folder, self.count(collection), part.read_bytes(), name)
                return (0, [refused]) if refused else (1, [])
            return self._unpack(folder, self.count(collection), part)

    def _unpack(self, folder: Path, there: int, archive: Path) -> tuple[int, list[str]]:
        added, refused, taken = 0, [], 0
        try:
            with zipfile.ZipFile(archive) as packed:
                members = [one for one in packed.infolist() if _is_image_member(one)]
                if len(members) > _IMAGES:
                    raise FlawmapError(f"the archive holds more than {_IMAGES} images: send fewer")
                for member in members:
                    with packed.open(member) as file:
                        # What an archive says of its sizes need not be true: what comes out is counted.
                        content = _bounded(file, self._max_image)
                    if content is None:
                        refused.append(f"{printable(member.filename)}: more than {self._max_image / 1e6:.0f} MB")
                        continue
                    taken += len(content)
                    if taken > _UNPACKED:
                        raise FlawmapError(f"the archive unpacks to more than {_UNPACKED / 1e9:.0f} GB: send less")
                    told = self._keep(folder, there + added, content, member.filename)
                    if told:
                        refused.append(told)
                    else:
                        added += 1
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, ValueError) as error:
            raise FlawmapError("the archive is damaged, encrypted or of an unknown kind: pack it again") from error
        return added, refused

    def _keep(self, folder: Path, count: int, content: bytes, name: str) -> str | None:
        """Why it is not kept beside so many."""
        try:
            decode_image(content, printable(name) or "image")
        except ImageError as error:
            return str(error)
        if count >= _IMAGES:
            raise FlawmapError(f"{_IMAGES} images are enough: train with them")
        suffix = PurePosixPath(name).suffix.lower()
        path = folder / f"{count + 1:05d}{suffix if suffix in IMAGE_SUFFIXES else '.png'}"
        with replacing(path) as file:
            file.write(content)
        return None


class Trainings:
    """Runs one at a time, below the records' folder."""

    def __init__(self, service: Service) -> None:
        """Goes on with a training that runs still, or was killed with the service, and serves the models made here.

        Raises:
            FlawmapError: a folder cannot be made.
        """
        store = service.options.store.absolute()
        assert service.options.data is not None
        self.data = service.options.data.resolve()
        self.collections = Collections(store / "collections", service.options.max_bytes)
        self._service, self._records = service, service.records
        self._folder, self._models = store / "trainings", store / "models"
        self._starting = threading.Lock()
        self._closed = threading.Event()
        for folder in (self._folder, self._models):
            make_folder(folder)
        for path in sorted(self._models.glob("*.onnx")):
            try:
                service.hosts.add(path)
            except FlawmapError as error:
                _LOG.warning("a model that was trained here is not served: %s", error)
        for row in self._records.jobs(1):
            if row.state == "running" and Path(row.folder).parent == self._folder:
                self._look_after(row.id, None)

    # What can be trained on

    def folders(self) -> list[str]:
        """Folders below the one that may be trained from, by their names below it; two floors of them."""
        found = [path for path in sorted(self.data.glob("*")) + sorted(self.data.glob("*/*")) if path.is_dir()]
        names = [path.relative_to(self.data).as_posix() for path in found[:500] if not hidden(path.name)]
        return [".", *names]

    def folder(self, name: str) -> Path:
        """A folder below the one that may be trained from.

        Raises:
            FlawmapError: it is not there, or elsewhere.
        """
        found = (self.data / name).resolve()
        if not found.is_relative_to(self.data) or not found.is_dir():
            raise FlawmapError("there is no such folder below the one that may be trained from")
        return found

    def found(self, folder: Path) -> list[str]:
        """What there is to learn from, in a few lines.

        Raises:
            FlawmapError: nothing.
        """
        try:
            dataset = find_dataset(folder)
        except FlawmapError as error:
            raise FlawmapError(self._unplaced(str(error))) from error
        lines = [f"{counted(len(dataset.train), 'good image')} to learn from"]
        if dataset.test:
            lines.append(f"{counted(len(dataset.test), 'image')} to test on, which are not learnt from")
        return lines + [line for line in dataset.describe().splitlines() if line.startswith(("image size", "note"))]

    # Running

    def start(self, data: Path, options: Sequence[str], by: str) -> JobRow:
        """Starts a training.

        Args:
            data: a folder of `folder` or `Collections.images`, or a table of `without`.
            options: of `flawmap train`, besides data and outputs.
            by: who asks.

        Raises:
            FlawmapError: another one runs, or the process cannot be started.
        """
        with self._starting:
            if any(row.state == "running" for row in self._records.jobs(20)):
                raise FlawmapError("a training runs already: wait for it, or cancel it")
            folder = self._folder / secrets.token_hex(6)
            make_folder(folder)
            outputs = {"-o": _MODEL, "--html": _REPORT, "--json": _FOUND, "--progress-file": _PROGRESS}
            command = ["train", os.fspath(data), *options]
            for option, name in outputs.items():
                command += [option, os.fspath(folder / name)]
            row = self._records.add_job(os.fspath(data), os.fspath(folder), command, by)
            try:
                process = self._spawn(row, again=False)
            except FlawmapError as error:
                self._records.change_job(row.id, state="failed", message=str(error))
                raise
            self._look_after(row.id, process)
            return row

    def jobs(self) -> list[JobRow]:
        """The last ones, newest first."""
        return self._records.jobs(20)

    def cancel(self, number: int) -> None:
        """Ends a training, and deletes what it left."""
        row = self._records.change_job(number, state="cancelled", message=None)
        if row is None:
            return
        _end(row)
        shutil.rmtree(Path(row.folder) / f"{_MODEL}.training", ignore_errors=True)

    def close(self) -> None:
        """Looks after none any more. A process goes on, and is found again at the next start."""
        self._closed.set()

    # What comes of one

    def progress(self, row: JobRow) -> Progress | None:
        """How far it is; None before it says."""
        told = _json(Path(row.folder) / _PROGRESS)
        try:
            share = min(1.0, told["done"] / max(1, told["total"]))
            passed = time.time() - told["since"]
            left = None if share <= 0 or passed < 1 else max(0.0, (told["at"] - told["since"]) / share - passed)
            return Progress(str(told["step"]), share, left)
        except (KeyError, TypeError):
            return None

    def unusual(self, number: int) -> list[Unusual]:
        """The good images that were most unlike the others."""
        row = self._records.job(number)
        told = {} if row is None else _json(Path(row.folder) / _FOUND)
        return [Unusual(one["path"], one["score"], one["p_value"]) for one in told.get("unusual", [])[:_SHOWN]]

    def promised(self, number: int) -> str:
        """What its threshold promises."""
        row = self._records.job(number)
        return "" if row is None else str(_json(Path(row.folder) / _FOUND).get("told", ""))

    def report(self, number: int) -> Path | None:
        """The report; None where there is none."""
        row = self._records.job(number)
        path = None if row is None else Path(row.folder) / _REPORT
        return path if path is not None and path.is_file() else None

    def without(self, number: int, dropped: Sequence[int]) -> Path:
        """A table of a training's good images but for some of the unusual ones, to train on.

        Raises:
            FlawmapError: its images are gone.
        """
        row = self._records.job(number)
        if row is None:
            raise FlawmapError("there is no such training")
        unusual = self.unusual(number)
        leave = {os.path.realpath(unusual[place].path) for place in dropped if 0 <= place < len(unusual)}
        kept = [one.path for one in find_dataset(Path(row.data)).train if os.path.realpath(one.path) not in leave]
        path = Path(row.folder) / f"kept-{secrets.token_hex(4)}.csv"
        text = StringIO(newline="")
        csv.writer(text).writerows([("path", "label"), *((os.fspath(one.absolute()), "good") for one in kept)])
        with replacing(path) as file:
            file.write(text.getvalue().encode("utf-8", "surrogateescape"))
        return path

    def use(self, number: int, name: str) -> Host:
        """Exports a training's model, and serves it under a name from now on.

        Raises:
            FlawmapError: the name is no name or is taken, or it cannot be exported.
        """
        row = self._records.job(number)
        if row is None or row.state != "done":
            raise FlawmapError("this training has no model")
        path = self._models / f"{name}.onnx"
        if PurePosixPath(name).name != name or model_name(path) != name or path.parent != self._models:
            raise FlawmapError("a model is called by letters, digits, points and dashes")
        host = self._service.hosts.by_name.get(name)
        if host is not None and host.path != path:
            raise FlawmapError(f"another model is called {name}: choose another name")
        made = Path(row.folder) / "model.onnx"
        command = [sys.executable, "-m", "flawmap", "export", str(Path(row.folder) / _MODEL), "-o", str(made)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_EXPORTING, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise FlawmapError("the model cannot be exported: see the service's log") from error
        if done.returncode != 0:
            _LOG.warning("a model cannot be exported: %s", done.stderr)
            raise FlawmapError(self._unplaced(_last_line(done.stderr)) or "the model cannot be exported")
        with replacing(path) as file:
            file.write(made.read_bytes())
        made.unlink(missing_ok=True)
        if host is not None:
            host.refresh()
            return host
        return self._service.hosts.add(path)

    # The process

    def _spawn(self, row: JobRow, *, again: bool) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "flawmap", *row.command, *(["--resume"] if again else [])]
        if nice := shutil.which("nice"):  # the line goes before
            command = [nice, "-n", "10", *command]
        try:
            with (Path(row.folder) / _LOGGED).open("ab") as log:
                # In a session of its own: what ends the service does not end it.
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
        except OSError as error:
            raise FlawmapError("the training cannot be started: check the disk of the records") from error
        self._records.change_job(row.id, process=process.pid)
        return process

    def _look_after(self, number: int, process: subprocess.Popen[bytes] | None) -> None:
        threading.Thread(target=self._run, args=(number, process), name="training", daemon=True).start()

    def _run(self, number: int, process: subprocess.Popen[bytes] | None) -> None:
        again = 0
        while not self._closed.wait(_LOOK):
            try:
                row = self._records.job(number)
                if row is None or row.state != "running":
                    if process is not None:
                        process.wait()
                    return
                if process.poll() is None if process is not None else _runs(row):
                    continue
                if (Path(row.folder) / _FOUND).is_file():
                    self._records.change_job(number, state="done", process=None)
                    return
                failed = process is not None and process.returncode > 0
                if failed or again == _AGAIN:
                    told = self._unplaced(_last_line(_tail(Path(row.folder) / _LOGGED)))
                    told = (told if failed else "") or "it was ended from outside, again and again: is there memory?"
                    self._records.change_job(number, state="failed", message=told, process=None)
                    return
                again += 1
                process = self._spawn(row, again=True)
            except FlawmapError as error:  # the database may be back at the next look
                _LOG.warning("a training cannot be looked after: %s", error)

    def _unplaced(self, told: str) -> str:
        """A message without the server's folders."""
        for folder in (self._folder, self._models, self.collections.folder, self.data):
            told = told.replace(f"{folder}{os.sep}", "").replace(os.fspath(folder), "the folder")
        return told


def thumbnail(path: Path, side: int) -> bytes | None:
    """A small picture of an image file: JPEG. None where it cannot be read."""
    try:
        return jpeg_of(read_image(path), quality=85, side=side)
    except ImageError:
        return None


def _is_image_member(member: zipfile.ZipInfo) -> bool:
    name = PurePosixPath(member.filename.replace("\\", "/"))
    unseen = any(hidden(part) for part in name.parts if part != "..")
    return not member.is_dir() and name.suffix.lower() in IMAGE_SUFFIXES and not unseen


def _bounded(file: IO[bytes], limit: int) -> bytes | None:
    """What is in a file; None where it is more than the limit."""
    content = BytesIO()
    while block := file.read(_BLOCK):
        if content.tell() + len(block) > limit:
            return None
        content.write(block)
    return content.getvalue()


def _runs(row: JobRow) -> bool:
    """Whether the process of a training that this service did not start itself still runs, and is the same one."""
    if row.process is None:
        return False
    told = Path(f"/proc/{row.process}/cmdline")
    try:
        if told.parent.parent.joinpath("self").exists():
            return row.folder.encode() in told.read_bytes()  # empty once it has ended
        seen = subprocess.run(
            ["ps", "-p", str(row.process), "-o", "args="], capture_output=True, text=True, check=False
        )
        return row.folder in seen.stdout
    except OSError:
        return False


def _end(row: JobRow) -> None:
    if row.process is None or not _runs(row):
        return
    kill: Callable[[int, int], None] = getattr(os, "killpg", os.kill)
    with suppress(OSError):
        kill(row.process, signal.SIGTERM)
        ends = time.monotonic() + _PATIENCE
        while _runs(row):
            if time.monotonic() > ends:
                kill(row.process, getattr(signal, "SIGKILL", signal.SIGTERM))
                return
            time.sleep(0.05)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 10_000))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def _last_line(told: str) -> str:
    lines = [line for line in told.splitlines() if line.strip()]
    return printable(lines[-1])[:500] if lines else ""
