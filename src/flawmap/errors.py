"""The failures a user can mend. Each message is one line that names the thing and the remedy."""

from __future__ import annotations


class FlawmapError(Exception):
    """Usage or input that cannot be worked with. The command line prints the message and exits with 2."""

    def __init__(self, message: str) -> None:
        super().__init__(message.replace("\n", "\\n"))  # a file's name may hold one


class InputError(FlawmapError):
    """What was given cannot be used: to try again, or to go on from what was done, would fail likewise."""


class ImageError(InputError):
    """One image (or mask) that cannot be judged. A run over many images goes on without it."""


def lab_is_missing(what: str, error: ModuleNotFoundError) -> FlawmapError:
    """For what needs the lab where it is not installed."""
    return FlawmapError(f"{what} needs the lab, and {error.name} is not installed: pip install 'flawmap[train]'")
