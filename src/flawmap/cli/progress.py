"""Progress on stderr: one line per step with the time left, or plain lines where stderr is no terminal."""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import click

from flawmap.errors import FlawmapError
from flawmap.files import replacing
from flawmap.text import printable

_OFTEN = 0.5  # seconds between what is written of one step


class ProgressLines:
    """Callable as `flawmap.learning.loop.Progress`."""

    def __init__(self, file: Path | None = None) -> None:
        """With a file, it tells whoever started this process how far it is."""
        self._bar: Any = None
        self._what = ""
        self._file = file
        self._since = self._written = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._file is not None:
            self._write(what, done, total)
        if what != self._what:
            self._close()
            self._what = what
            if sys.stderr.isatty():
                from tqdm import tqdm

                self._bar = tqdm(total=total, desc=what, leave=False, dynamic_ncols=True, mininterval=0.2)
            elif ":" not in what:
                click.echo(f"{what} ...", err=True)
        if self._bar is not None:
            self._bar.n = done
            self._bar.refresh() if done == total else self._bar.update(0)

    def _write(self, what: str, done: int, total: int) -> None:
        assert self._file is not None
        now = time.time()
        if what != self._what:
            self._since = now
        elif now - self._written < _OFTEN and done < total:
            return
        self._written = now
        told = {"step": what, "done": done, "total": total, "since": self._since, "at": now}
        with suppress(OSError, FlawmapError), replacing(self._file) as file:
            file.write(json.dumps(told).encode())

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> ProgressLines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def quiet_libraries() -> None:
    """Leaves stderr to what the user can act on: warnings of flawmap's own."""
    # Pillow warns of damaged TIFF tags; what cannot be read is reported by name anyway.
    warnings.filterwarnings("ignore", module="PIL")
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine("flawmap: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("huggingface_hub", "timm", "httpx", "httpcore", "torch"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
