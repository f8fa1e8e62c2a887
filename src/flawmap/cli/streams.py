"""Standard output and error that outlive their readers, and the signal that asks a process to end."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Ended(BaseException):
    """The process was asked to end by SIGTERM. Not an Exception, so that everything is cleared up and nothing else."""


def lasting_streams() -> None:
    """Lets the work go on where nobody reads what it says any more, as after `| head -1`.

    Closed ones (`2>&-`) are opened anew, onto nothing: the next file opened would take their number, and receive what
    libraries write to it. Names that a terminal cannot show are written with escapes.
    """
    for number, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        try:
            os.fstat(number)
        except OSError:
            onto_nothing(number)
        if getattr(sys, name) is None:
            stream: Any = open(number, "r" if number == 0 else "w", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):
            continue
        stream.reconfigure(errors="backslashreplace")
        if stream is getattr(sys, f"__{name}__") and not stream.isatty():
            stream.flush()
            lasting = io.BufferedWriter(_Lasting(stream.fileno(), "wb", closefd=False))
            line = name == "stderr" or stream.line_buffering
            setattr(sys, name, io.TextIOWrapper(lasting, stream.encoding, "backslashreplace", line_buffering=line))


def nobody_reads() -> bool:
    """Whether the reader of standard output has gone."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return isinstance(raw, _Lasting) and raw.gone


class _Lasting(io.FileIO):
    """A pipe, from which all goes nowhere once its reader has gone."""

    gone = False

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            self.gone = True
            onto_nothing(self.fileno())
            return len(data)


def onto_nothing(number: int) -> None:
    """Lets all that is written to a file descriptor go nowhere."""
    nothing = os.open(os.devnull, os.O_RDWR)
    if nothing != number:
        os.dup2(nothing, number)
        os.close(nothing)


@contextmanager
def ended_by_signal() -> Iterator[None]:
    """Raises `Ended` in the main thread on SIGTERM, so that other processes of this one are ended and files cleared."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # whoever asks twice is not made to wait
        raise Ended

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
