"""The models that a service judges with: loaded, replaced when their file is, and their thresholds moved."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from flawmap.errors import FlawmapError
from flawmap.judging.calibration import Threshold
from flawmap.line.inspector import Inspector
from flawmap.service.database import DatabaseGoneError
from flawmap.service.records import Records
from flawmap.service.tables import ThresholdRow

_LOG = logging.getLogger("flawmap.service")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
LOOK = 1.0
"""Seconds between looks at files and thresholds."""

Load = Callable[[Path], Inspector]


@dataclass(frozen=True)
class Serving:
    """What an image is judged with: it does not change while it is judged.

    Attributes:
        inspector: with its threshold.
        version: of the threshold; 0 is that of training.
        rate: false-reject rate that the threshold is to keep; None where its value was given.
    """

    inspector: Inspector
    version: int = 0
    rate: float | None = None


class Host:
    """One model under its name.

    Attributes:
        name: that it is asked for by.
        path: its file.
        trouble: why the newest file, or the newest threshold, is not in use; None where it is.
    """

    def __init__(self, name: str, path: Path, records: Records, load: Load) -> None:
        """Raises FlawmapError where the file is no calibrated model."""
        self.name = name
        self.path = path
        self.trouble: str | None = None
        self._records = records
        self._load = load
        self._changing = threading.Lock()
        self._seen = self._stamp()
        self._trained = self._loaded()
        self.serving = self._with(self._trained, self._newest())

    @property
    def trained_threshold(self) -> Threshold:
        """That of training, which version 0 is."""
        threshold = self._trained.judge.threshold
        assert threshold is not None
        return threshold

    def set_threshold(self, *, rate: float | None, value: float | None, by: str) -> Serving:
        """Keeps a new version of the threshold, under which is judged from now on.

        Raises:
            FlawmapError: both or neither are given, or it is no threshold.
            DatabaseGoneError: it cannot be kept.
        """
        with self._changing:
            moved = self._trained.with_threshold(max_false_reject=rate, threshold=value)
            threshold, digest = moved.judge.threshold, self._trained.digest
            assert threshold is not None
            row = self._records.set_threshold(self.name, digest or "", threshold.value, rate, by)
            self.serving = Serving(moved, row.version, rate)
            return self.serving

    def keep_threshold(self, *, rate: float | None, value: float | None, by: str) -> Serving:
        """`set_threshold`, unless that is the one in use.

        Raises:
            FlawmapError, DatabaseGoneError: as `set_threshold`.
        """
        used = self.serving.inspector.judge.threshold
        wanted = self._trained.with_threshold(max_false_reject=rate, threshold=value).judge.threshold
        assert used is not None
        assert wanted is not None
        if self.serving.version and (self.serving.rate, used.value) == (rate, wanted.value):
            return self.serving
        return self.set_threshold(rate=rate, value=value, by=by)

    def refresh(self) -> bool:
        """Looks at the file and at the thresholds, which another process may have set; whether anything was new.

        A file that cannot be read, or is not whole yet, changes nothing: the model goes on as it was.
        """
        stamp = self._stamp()
        with self._changing:
            replaced = stamp is not None and stamp != self._seen
            try:
                if replaced:
                    self._trained = self._loaded()
                    self._seen = stamp
                newest = self._newest()
                changed = replaced or (newest.version if newest else 0) != self.serving.version
                if changed:
                    self.serving = self._with(self._trained, newest)
                self.trouble = None
                return changed
            except DatabaseGoneError as error:
                self.trouble = str(error)
            except FlawmapError as error:
                if self.trouble is None:
                    _LOG.warning("model %s is not replaced: %s", self.name, error)
                self.trouble = f"the new model file is not in use: {error}"
            return False

    def _loaded(self) -> Inspector:
        inspector = self._load(self.path)
        if inspector.judge.threshold is None:
            raise FlawmapError(f"{self.path} has no threshold: calibrate it first")
        inspector.warm_up()
        return inspector

    def _newest(self) -> ThresholdRow | None:
        rows = self._records.thresholds(self.name)
        return rows[-1] if rows else None

    def _with(self, trained: Inspector, row: ThresholdRow | None) -> Serving:
        """A rate holds for whatever model has the name; a value for the one that it was given for."""
        if row is None:
            return Serving(trained, 0, trained.judge.max_false_reject)
        if row.rate is not None:
            return Serving(trained.with_threshold(max_false_reject=row.rate), row.version, row.rate)
        if row.model_digest == (trained.digest or ""):
            return Serving(trained.with_threshold(threshold=row.value), row.version, None)
        # The model is another one, in whose units the value says nothing.
        kept = self._records.set_threshold(
            self.name, trained.digest or "", _value(trained), trained.judge.max_false_reject, "flawmap"
        )
        return Serving(trained, kept.version, trained.judge.max_false_reject)

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns


class Hosts:
    """All models of a service, by name; looked after in a thread of its own."""

    def __init__(self, paths: Iterable[Path], records: Records, load: Load = Inspector.load) -> None:
        """Raises FlawmapError where a file is no model, or two have one name."""
        self.by_name: dict[str, Host] = {}
        self._records, self._load = records, load
        for path in paths:
            self.add(path)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look_after, name="models", daemon=True)
        self._thread.start()

    def add(self, path: Path) -> Host:
        """Takes another model in, under the name of its file."""
        name = model_name(path)
        if name in self.by_name:
            raise FlawmapError(f"{path} and {self.by_name[name].path} would both be called {name}: rename one")
        host = Host(name, path, self._records, self._load)
        self.by_name = {**self.by_name, name: host}
        return host

    def close(self) -> None:
        """Ends looking after the files."""
        self._ended.set()
        self._thread.join()

    def _look_after(self) -> None:
        while not self._ended.wait(LOOK):
            for host in self.by_name.values():
                try:
                    if host.refresh():
                        _LOG.info("model %s: now %s", host.name, host.serving.inspector.digest)
                except Exception:  # the next look may go well
                    _LOG.exception("model %s could not be looked at", host.name)


def model_name(path: Path) -> str:
    """What a model file is called in addresses.

    Raises:
        FlawmapError: its name has letters that do not belong there.
    """
    if not _NAME.fullmatch(path.stem):
        raise FlawmapError(
            f"{path}: a model that is served is called by its file, of letters, digits, points and dashes: rename it"
        )
    return path.stem


def _value(inspector: Inspector) -> float:
    assert inspector.judge.threshold is not None
    return inspector.judge.threshold.value
