"""The folder in which one training keeps what a later process may go on with."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flawmap.errors import FlawmapError
from flawmap.files import replacing


def identity(**parts: Any) -> str:
    """One digest of everything that decides a result, to tell whether an earlier run may be gone on with."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


@contextmanager
def work_in(folder: Path | None, run: dict[str, Any], resume: bool) -> Iterator[None]:
    """A folder that goes when the block ends, in success or failure, and stays when it is interrupted or killed."""
    if folder is None:
        yield
        return
    _claim(folder, run, resume)
    try:
        yield
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def refuse_interrupted(folder: Path) -> None:
    """Raises FlawmapError where a workspace holds a training that was interrupted."""
    if (folder / "run").exists():
        raise FlawmapError(f"{folder} holds an interrupted training: go on with --resume, or delete the folder")


def _claim(folder: Path, run: dict[str, Any], resume: bool) -> None:
    """Makes a workspace for this run, or goes on with the one that is there.

    Raises:
        FlawmapError: there is one, and it is not asked for or is another run's.
    """
    known = folder / "run"
    mark = "\n".join(f"{key} {identity(value=value)}" for key, value in sorted(run.items()))
    if known.exists():
        before = known.read_text(encoding="utf-8")
        if not resume:
            refuse_interrupted(folder)
        if before != mark:
            changed = [line.split()[0] for line in mark.splitlines() if line not in before.splitlines()]
            raise FlawmapError(
                f"--resume: {' and '.join(changed) or 'the run'} changed since the training in {folder} was "
                "interrupted; train as then, or delete the folder"
            )
        return
    try:
        if folder.exists() and any(folder.iterdir()):  # it will be deleted
            raise FlawmapError(f"{folder} is not empty and was not made by a training: give another workspace")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FlawmapError(f"{folder}: cannot be made ({error.strerror}); choose another place") from error
    try:
        with replacing(known) as file:
            file.write(mark.encode())
    except FlawmapError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
