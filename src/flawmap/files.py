"""Reading files that are files, and writing them so that a half-written one never appears under its final name."""

from __future__ import annotations

import errno
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from flawmap.errors import FlawmapError

if TYPE_CHECKING:
    from PIL.Image import Image

TEMPORARY = ".tmp"
"""The suffix of files that are being written; their names begin with a dot."""

UNFINISHED = ".flawmap-unfinished"
"""The file that marks a data set which is being written."""

_DATA_SET = ("train", "test", "ground_truth", "contact_sheet.png")
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}
# A folder cannot be synced on some file systems, and nowhere on Windows.
_UNSYNCABLE = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM, errno.EBADF, errno.EISDIR)


def open_regular(path: Path) -> BinaryIO:
    """A file opened for reading, to which a link may lead. Pipes, sockets and devices, which may never end, are not.

    Raises:
        FlawmapError: it is missing, may not be read, or is no file.
    """
    try:
        # Asked before, because opening a device can set something off; and of the open file, as it may be another then.
        _refuse_special(path, path.stat().st_mode)
        flags = [getattr(os, name, 0) for name in ("O_NONBLOCK", "O_CLOEXEC", "O_NOCTTY", "O_BINARY")]
        descriptor = os.open(path, os.O_RDONLY | sum(flags))
        try:
            _refuse_special(path, os.fstat(descriptor).st_mode)
            return os.fdopen(descriptor, "rb")
        except BaseException:
            os.close(descriptor)
            raise
    except FileNotFoundError as error:
        raise FlawmapError(f"{path}: does not exist; check the path") from error
    except PermissionError as error:
        raise FlawmapError(f"{path}: may not be read (permission denied); change its permissions") from error
    except OSError as error:
        raise FlawmapError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    except ValueError as error:  # a NUL in the name
        raise FlawmapError(f"{path!r}: is no path ({error}); check it") from error


def _refuse_special(path: Path, mode: int) -> None:
    kind = other_kind(mode)
    if kind is not None:
        raise FlawmapError(f"{path}: is {kind}, not a file; give a file")


def other_kind(mode: int) -> str | None:
    """What the thing of a `st_mode` is, in words, if it is no file."""
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "something else")


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A binary file that takes the name `path` when the block ends well, and vanishes when it does not.

    It is on the disk then, and so is its name, unless it need not be `durable`: one picture of many. Where `path` is a
    link, what it leads to is replaced, and the link stays. A pipe or a character device is written to, as nothing else
    can be done with it.

    Raises:
        FlawmapError: the folder is missing or cannot be written, the disk is full, `path` is a folder, a socket or a
            disk, or a pipe that nobody reads.
    """
    temporary: Path | None = None
    try:
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:
            mode = None
        if mode is not None and not stat.S_ISREG(mode):
            with _through(path, mode) as file:
                yield file
            return
        target = Path(os.path.realpath(path))
        # Not by tempfile, whose files only their owner may read. The name is new in every thread and container.
        temporary = target.with_name(f".{target.name[:40]}.{secrets.token_hex(8)}{TEMPORARY}")
        with temporary.open("xb") as file:
            if mode is not None:
                with suppress(OSError):
                    temporary.chmod(stat.S_IMODE(mode))
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.replace(target)
        if durable:
            _sync_folder(target.parent)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextmanager
def _through(path: Path, mode: int) -> Iterator[BinaryIO]:
    """A pipe or a character device, opened to write to it."""
    if not (stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):
        raise FlawmapError(f"{path}: is {other_kind(mode)}; give the name of a file")
    try:
        # A pipe without a reader would be waited for.
        descriptor = os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise FlawmapError(f"{path}: nobody reads this pipe; start its reader first, or give a file") from error
        raise
    with os.fdopen(descriptor, "wb") as file:
        if sys.platform != "win32":
            os.set_blocking(descriptor, True)
        yield file


def _sync_folder(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # one may be allowed to write to a folder and not to read it
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSYNCABLE:
            raise
    finally:
        os.close(descriptor)


def claim_folder(folder: Path) -> None:
    """Makes a folder for a data set to be written to; what `filling` was interrupted in there is deleted.

    Raises:
        FlawmapError: it is a file, or not empty.
        OSError: it cannot be made.
    """
    if folder.exists() and not folder.is_dir():
        raise FlawmapError(f"{folder}: is a file; give a new or an empty folder")
    if (folder / UNFINISHED).is_file():
        for name in _DATA_SET:
            _delete(folder / name)
    if folder.is_dir() and (present := sorted(entry.name for entry in folder.iterdir() if entry.name != UNFINISHED)):
        more = f" and {len(present) - 1} more" if len(present) > 1 else ""
        raise FlawmapError(f"{folder}: is not empty ({present[0]}{more}); give a new or an empty folder")
    folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def filling(folder: Path) -> Iterator[None]:
    """`claim_folder`; the folder is marked as unfinished until the block ends well, and empty when it does not.

    Also a run that was killed is so begun again without anything to be cleared up by hand.

    Raises:
        FlawmapError, OSError: as `claim_folder`.
    """
    claim_folder(folder)
    mark = folder / UNFINISHED
    mark.touch()
    try:
        yield
    except BaseException:
        with suppress(OSError, FlawmapError):
            claim_folder(folder)
            mark.unlink()
        raise
    mark.unlink()


def _delete(path: Path) -> None:
    import shutil

    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_png(path: Path, image: Image) -> None:
    """One picture of many, its folder made if need be: unlike `replacing` it does not wait for the disk.

    Raises:
        OSError: the folder cannot be made.
        FlawmapError: as `replacing`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, durable=False) as file:
        image.save(file, format="PNG", compress_level=1)


def unwritable(path: Path, error: OSError) -> FlawmapError:
    """The one line a user needs when `path` could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FlawmapError(
            f"{path}: the disk is full; nothing was written under this name, free some space and try again"
        )
    if isinstance(error, FileNotFoundError):
        return FlawmapError(f"{path}: the folder {path.parent} does not exist; create it first")
    return FlawmapError(f"{path}: cannot be written ({error.strerror or error}); choose another place with -o")
