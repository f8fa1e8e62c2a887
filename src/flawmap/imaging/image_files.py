"""Image files as such, none of them decoded: found below a folder, opened, told apart by their bytes."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from flawmap import files
from flawmap.errors import FlawmapError, ImageError
from flawmap.imaging.formats import HEAD, format_of
from flawmap.imaging.own_files import is_own

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".tif", ".tiff", ".webp"),
    *(".heic", ".heif", ".hif", ".avif", ".jp2", ".j2k", ".jpx", ".gif", ".pgm", ".ppm", ".pbm", ".pnm"),
)

_OF_FILE_SERVERS = (
    *("@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "__macosx", "lost+found", "thumbs.db"),
    *("desktop.ini", "system volume information"),
)


@dataclass(frozen=True)
class Found:
    """What lies below a folder.

    Attributes:
        images: the image files, sorted by their path relative to the folder.
        passed_over: how many other files there are, by suffix in lower case; "" counts those without.
        own: how many pictures flawmap itself wrote, which are no parts.
    """

    images: list[Path]
    passed_over: dict[str, int]
    own: int = 0

    def note(self) -> str | None:
        """A line that says what was passed over; None where nothing was."""
        notes = []
        if count := sum(self.passed_over.values()):
            kinds = ", ".join(f"{suffix or 'no suffix'} {n}" for suffix, n in sorted(self.passed_over.items()))
            notes.append(f"{_files(count)} passed over, being no image by name: {kinds}")
        if self.own:
            notes.append(f"{_files(self.own)} passed over, being written by flawmap itself")
        return "; ".join(notes) or None


def _files(count: int) -> str:
    return "1 file is" if count == 1 else f"{count} files are"


def hidden(name: str) -> bool:
    """Whether a file or folder of this name is none of the user's: hidden, or a file server's own."""
    return name.startswith(".") or name.lower() in _OF_FILE_SERVERS


def search_folder(folder: Path, without: Collection[Path] = ()) -> Found:
    """The image files below a folder, by suffix, or by content where they have none; and what else there is.

    Links to folders are followed, each real folder once. Hidden files and folders, and those of file servers, are left
    out and not counted. Heatmaps and maps that flawmap wrote are left out and counted.

    Args:
        folder: the folder.
        without: folders that are not looked into, wherever links lead to them.

    Raises:
        FlawmapError: a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise FlawmapError(
            f"{error.filename}: the folder cannot be listed ({error.strerror}); check the path and its permissions"
        ) from error

    found: list[Path] = []
    passed_over: Counter[str] = Counter()
    own = 0
    seen = {os.path.realpath(path) for path in without}
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not hidden(name))
        for path in (Path(parent, name) for name in names if not hidden(name)):
            if is_own(path):
                own += 1
            elif is_image(path):
                found.append(path)
            else:
                passed_over[path.suffix.lower()] += 1
    return Found(sorted(found, key=lambda path: path.relative_to(folder).as_posix()), dict(passed_over), own)


def find_images(folder: Path) -> list[Path]:
    """The image files below a folder, see `search_folder`.

    Raises:
        FlawmapError: a folder cannot be listed.
    """
    return search_folder(folder).images


def is_image(path: Path) -> bool:
    """Whether a file is taken for an image: by its suffix, or by its content where it has none."""
    if path.suffix:
        return path.suffix.lower() in IMAGE_SUFFIXES
    try:
        with open_regular(path) as file:
            return format_of(file.read(HEAD)) is not None
    except ImageError:
        return False


def open_regular(path: Path) -> BinaryIO:
    """`flawmap.files.open_regular` of an image or a list of images.

    Raises:
        ImageError: it is missing, may not be read, or is a folder, a pipe, a socket or a device.
    """
    try:
        return files.open_regular(path)
    except FlawmapError as error:
        raise ImageError(str(error)) from error


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        ImageError: the file cannot be read.
    """
    state = hashlib.sha256()
    try:
        with open_regular(path) as file:
            left = os.fstat(file.fileno()).st_size
            while left > 0 and (block := file.read(min(left, 1 << 20))):
                state.update(block)
                left -= len(block)
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    return state.hexdigest()
