"""Files moved without ever replacing another one, across file systems too."""

from __future__ import annotations

import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from flawmap.files import TEMPORARY


def move_beside(path: Path, target: Path) -> Path:
    """Moves a file to `target`, or to that name with a number where another file has it.

    Where `target` holds the same bytes already, as after a move that was broken off, `path` is deleted.

    Returns:
        Where it is now.

    Raises:
        OSError: it cannot be moved; it is still there.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    number = 0
    while True:
        place = target if number == 0 else target.with_name(f"{target.stem}-{number}{target.suffix}")
        number += 1
        if place.is_file() and _same(path, place):
            path.unlink()
            return place
        try:
            _take_name(path, place)
        except FileExistsError:
            continue
        return place


def _same(path: Path, other: Path) -> bool:
    """Whether two files hold the same bytes; each time read anew, since one of the two is deleted for it."""
    if path.stat().st_size != other.stat().st_size:
        return False
    with path.open("rb") as one, other.open("rb") as two:
        while block := one.read(1 << 20):
            if block != two.read(len(block)):
                return False
    return True


def _take_name(path: Path, place: Path) -> None:
    """Raises FileExistsError where the name is taken."""
    # A link that leads elsewhere by a relative path would lead nowhere from there: what it leads to is copied.
    if not path.is_symlink() and path.stat().st_dev == place.parent.stat().st_dev:
        _rename(path, place)
        return
    if place.exists():
        raise FileExistsError(place)
    copy = place.with_name(f".{secrets.token_hex(8)}{TEMPORARY}")
    try:
        shutil.copy2(path, copy)
        with copy.open("rb+") as file:
            os.fsync(file.fileno())
        _rename(copy, place)
    finally:
        with suppress(OSError):
            copy.unlink(missing_ok=True)
    path.unlink()


def _rename(path: Path, place: Path) -> None:
    try:
        os.link(path, place)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: an empty file keeps the name, and is replaced
        with place.open("xb"):
            pass
        try:
            path.replace(place)
        except OSError:
            place.unlink()
            raise
    else:
        path.unlink()
