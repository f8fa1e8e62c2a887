"""Image files as such, none of them decoded: found below a folder, told apart by their bytes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from flawmap.errors import FlawmapError, ImageError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def find_images(folder: Path) -> list[Path]:
    """The image files below a folder, by suffix, sorted by their path relative to it.

    Links to folders are followed, each real folder once. Hidden files and folders are left out.

    Raises:
        FlawmapError: a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise FlawmapError(
            f"{error.filename}: the folder cannot be listed ({error.strerror}); check the path and its permissions"
        ) from error

    found: list[Path] = []
    seen: set[str] = set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += (
            Path(parent, name)
            for name in files
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES
        )
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        ImageError: the file cannot be read.
    """
    state = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                state.update(block)
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    return state.hexdigest()
