"""Writing files so that a half-written one never appears under its final name."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from flawmap.errors import FlawmapError


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the name `path` when the block ends well, and vanishes when it does not.

    Raises:
        FlawmapError: the folder is missing or cannot be written, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def unwritable(path: Path, error: OSError) -> FlawmapError:
    """The one line a user needs when `path` could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FlawmapError(
            f"{path}: the disk is full; nothing was written under this name, free some space and try again"
        )
    if isinstance(error, FileNotFoundError):
        return FlawmapError(f"{path}: the folder {path.parent} does not exist; create it first")
    return FlawmapError(f"{path}: cannot be written ({error.strerror or error}); choose another place with -o")
