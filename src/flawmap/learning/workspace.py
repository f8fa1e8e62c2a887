"""The folder in which one training keeps what a later process may go on with."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flawmap.errors import FlawmapError, InputError
from flawmap.files import TEMPORARY, replacing, unwritable

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

log = logging.getLogger(__name__)

_RUN = "run"  # marks a workspace, and says whose it is
_LOCK = "lock"
_WORTH = 8  # images
_UNDER_WAY = 1 << 20  # the byte of `lock` that is locked, behind those that say by whom, which others read


def identity(**parts: Any) -> str:
    """One digest of everything that decides a result, to tell whether an earlier run may be gone on with."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True)
class Workspace:
    """A workspace of one run, in which nobody need be working.

    Attributes:
        folder: where it is.
        mark: what its run is known by.
    """

    folder: Path
    mark: str

    def delete(self) -> None:
        """For when the result is safe. Left where another process works in it, or it has become another run's."""
        with suppress(OSError, FlawmapError), _locked(self.folder, make=False):
            if _marked(self.folder) == self.mark:
                _delete(self.folder)


@contextmanager
def work_in(folder: Path | None, run: dict[str, Any], resume: bool) -> Iterator[Workspace | None]:
    """A folder that nobody else works in until the block ends, and which is left as it is then; None for none.

    It goes where the block fails before anything was kept in it that is worth going on from, or by input that cannot be
    used.

    Raises:
        FlawmapError: another process works in it, it holds an interrupted training that is not asked for or another
            run's, or something else, or it cannot be made.
    """
    if folder is None:
        yield None
        return
    mark = "\n".join(f"{key} {identity(value=value)}" for key, value in sorted(run.items()))
    with _locked(folder, make=True):
        try:
            _claim(folder, mark, resume)
            yield Workspace(folder, mark)
        except BaseException as error:
            useless = isinstance(error, InputError) or not _holds_anything(folder)
            with suppress(OSError, FlawmapError):
                if _marked(folder) in (None, mark) and useless:
                    _delete(folder)
            raise


def refuse_interrupted(folder: Path) -> None:
    """Raises FlawmapError where a workspace holds a training that was interrupted, or is under way."""
    if (folder / _RUN).exists():
        with _locked(folder, make=False):
            raise _interrupted(folder)


def discard(folder: Path) -> None:
    """Deletes what an interrupted training left, if it left anything.

    Raises:
        FlawmapError: it is under way, the folder is no workspace, or it cannot be deleted.
    """
    if not folder.exists():
        return
    _refuse_foreign(folder)
    with _locked(folder, make=False):
        try:
            _delete(folder)
        except OSError as error:
            raise unwritable(folder, error) from error


def _claim(folder: Path, mark: str, resume: bool) -> None:
    before = _marked(folder)
    if before is None or not _holds_anything(folder):
        with replacing(folder / _RUN) as file:
            file.write(mark.encode())
    elif not resume:
        raise _interrupted(folder)
    elif before != mark:
        changed = [line.split()[0] for line in mark.splitlines() if line not in before.splitlines()]
        raise FlawmapError(
            f"--resume: {' and '.join(changed) or 'the run'} changed since the training in {folder} was "
            "interrupted; train as then, or start anew with --discard"
        )


def _holds_anything(folder: Path) -> bool:
    """Whether there is anything to go on with: more than the features of a few images, which take no time."""
    if next(folder.glob("checkpoint-*"), None) is not None:
        return True
    try:
        return (folder / "index").read_bytes().count(b"\n") >= _WORTH
    except OSError:
        return False


def _interrupted(folder: Path) -> FlawmapError:
    return FlawmapError(
        f"{folder} holds an interrupted training: start anew with --discard, go on with --resume, or delete the folder"
    )


def _marked(folder: Path) -> str | None:
    """What a workspace's run is known by; None where it has none yet."""
    try:
        return (folder / _RUN).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise FlawmapError(f"{folder / _RUN}: cannot be read ({error.strerror}); check its permissions") from error


def _refuse_foreign(folder: Path) -> None:
    """Raises FlawmapError for a folder that is no workspace: it would be deleted."""
    if folder.exists() and not folder.is_dir():
        raise FlawmapError(f"{folder}: is a file, and a training needs a folder there; move it away")
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    # A process that was killed as it began, or as it ended, may leave these alone.
    begun = {name for name in names if name.startswith(f".{_RUN}.") and name.endswith(TEMPORARY)}
    if _RUN not in names and names - begun - {_LOCK}:
        raise FlawmapError(f"{folder} is not empty and was not made by a training: give another workspace")


def _delete(folder: Path) -> None:
    """The mark goes last: what is left of a workspace by a kill is still known as one."""
    for path in sorted(folder.iterdir()):
        if path.name not in (_RUN, _LOCK):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (folder / _RUN).unlink(missing_ok=True)
    with suppress(OSError):  # Windows deletes no file that is open: `_locked` does
        (folder / _LOCK).unlink(missing_ok=True)
        folder.rmdir()


@contextmanager
def _locked(folder: Path, *, make: bool) -> Iterator[None]:
    """The one lock of a workspace, which ends with its process in whatever way that ends.

    Not by the package filelock: it empties the file that says who holds the lock, and takes one for held whose file
    has been deleted.

    Raises:
        FlawmapError: another process holds it, the folder is no workspace, or it cannot be made.
    """
    while True:
        try:
            _refuse_foreign(folder)
            if make:
                folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        except OSError as error:
            raise FlawmapError(f"{folder}: cannot be made ({error.strerror}); choose another place") from error
        try:
            if not _lock(descriptor):
                holder = os.read(descriptor, 200).decode(errors="replace") or "another process"
                raise FlawmapError(f"{folder}: {holder} is training in it; wait for it, or give another -o")
            if _is_still(descriptor, folder / _LOCK):  # else its last holder has deleted it
                with suppress(OSError):
                    os.truncate(descriptor, 0)
                    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                yield
                break
        finally:
            os.close(descriptor)
    if sys.platform == "win32" and not (folder / _RUN).exists():
        with suppress(OSError):
            (folder / _LOCK).unlink()
            folder.rmdir()


def _is_still(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _lock(descriptor: int) -> bool:
    """Whether it could be had."""
    try:
        if sys.platform == "win32":
            os.lseek(descriptor, _UNDER_WAY, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        log.warning("this file system has no locks (%s): see to it that no other training has this output", error)
    finally:
        os.lseek(descriptor, 0, os.SEEK_SET)
    return True
