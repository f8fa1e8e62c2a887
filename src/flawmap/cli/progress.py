"""Progress on stderr: one line per step with the time left, or plain lines where stderr is no terminal."""

from __future__ import annotations

import logging
import sys
import warnings
from types import TracebackType
from typing import Any

import click

from flawmap.text import printable


class ProgressLines:
    """Callable as `flawmap.learning.loop.Progress`."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._what = ""

    def __call__(self, what: str, done: int, total: int) -> None:
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
