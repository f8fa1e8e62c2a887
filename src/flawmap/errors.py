"""The failures a user can mend. Each message is one line that names the thing and the remedy."""

from __future__ import annotations

import errno

from flawmap.text import printable

_MEMORY = (
    "out of memory",
    "not enough memory",
    "cannot allocate memory",
    "can't allocate memory",
    "could not create a primitive",
    "could not create a memory",
    "bad_alloc",
    "failed to allocate",
    "unable to allocate",
    "std::length_error",
)
_THREADS = ("can't start new thread", "resource temporarily unavailable", "pthread_create")


class FlawmapError(Exception):
    """Usage or input that cannot be worked with. The command line prints the message and exits with 2."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))  # it may hold a file's name


class InputError(FlawmapError):
    """What was given cannot be used: to try again, or to go on from what was done, would fail likewise."""


class ImageError(InputError):
    """One image (or mask) that cannot be judged. A run over many images goes on without it."""


class TooManyPixelsError(ImageError):
    """A picture that is refused before it is decoded, for its size."""


def lab_is_missing(what: str, error: ModuleNotFoundError) -> FlawmapError:
    """For what needs the lab where it is not installed."""
    return FlawmapError(f"{what} needs the lab, and {error.name} is not installed: pip install 'flawmap[train]'")


def service_is_missing(what: str, error: ModuleNotFoundError) -> FlawmapError:
    """For what needs the extra `serve` where it is not installed."""
    if (error.name or "").partition(".")[0] == "flawmap":
        raise error
    return FlawmapError(f"{what} needs {error.name}, which is not installed: pip install 'flawmap[serve]'")


def shortage(error: BaseException) -> FlawmapError | None:
    """The one line about memory, threads, open files or disk that have run out, if that is what an error tells.

    Libraries tell of it by errors of many types.
    """
    seen: BaseException | None = error
    while seen is not None:
        number, text = getattr(seen, "errno", None), str(seen).lower()
        if isinstance(seen, MemoryError) or number == errno.ENOMEM or any(part in text for part in _MEMORY):
            return FlawmapError(
                "the memory is used up: close other programs, or take fewer or smaller images (--image-size)"
            )
        if number == errno.EAGAIN or any(part in text for part in _THREADS):
            return FlawmapError(
                "no more threads or processes can be started: close other programs, or raise the limit (ulimit -u)"
            )
        if number in (errno.EMFILE, errno.ENFILE):
            return FlawmapError("too many files are open: close other programs, or raise the limit (ulimit -n)")
        if number in (errno.ENOSPC, errno.EDQUOT):
            filename = getattr(seen, "filename", None)
            named = f"{filename}: " if filename else ""
            return FlawmapError(f"{named}the disk is full: free some space and try again")
        seen = seen.__cause__
    return None
