"""Writing files so that a half-written one never appears under its final name."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from flawmap.errors import FlawmapError

if TYPE_CHECKING:
    from PIL.Image import Image


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


def claim_folder(folder: Path) -> None:
    """Makes a folder for a data set to be written to.

    Raises:
        FlawmapError: it is a file, or not empty.
        OSError: it cannot be made.
    """
    if folder.exists() and not folder.is_dir():
        raise FlawmapError(f"{folder}: is a file; give a new or an empty folder")
    if folder.is_dir() and (present := sorted(entry.name for entry in folder.iterdir())):
        more = f" and {len(present) - 1} more" if len(present) > 1 else ""
        raise FlawmapError(f"{folder}: is not empty ({present[0]}{more}); give a new or an empty folder")
    folder.mkdir(parents=True, exist_ok=True)


def write_png(path: Path, image: Image) -> None:
    """One picture of many, its folder made if need be: unlike `replacing` it does not wait for the disk.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")  # a killed run leaves no half image under a final name
    image.save(partial, format="PNG", compress_level=1)
    partial.replace(path)


def unwritable(path: Path, error: OSError) -> FlawmapError:
    """The one line a user needs when `path` could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FlawmapError(
            f"{path}: the disk is full; nothing was written under this name, free some space and try again"
        )
    if isinstance(error, FileNotFoundError):
        return FlawmapError(f"{path}: the folder {path.parent} does not exist; create it first")
    return FlawmapError(f"{path}: cannot be written ({error.strerror or error}); choose another place with -o")
