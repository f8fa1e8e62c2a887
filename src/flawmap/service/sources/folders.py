"""A folder that is watched by looking: on every system and on network drives alike.

A file is judged when it is whole: when it can be decoded, and its size and time of change have stayed the same over two
looks or are old. Which files were judged is in the records, committed with their inspections.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from flawmap.errors import FlawmapError, ImageError
from flawmap.imaging.decoding import IN_MEMORY, decode_image
from flawmap.imaging.image_files import open_regular, search_folder
from flawmap.service.records import Records, Seen
from flawmap.service.sources import Shot
from flawmap.service.sources.moving import move_beside
from flawmap.text import printable

_LOG = logging.getLogger("flawmap.service")

_LOOK = 0.5  # seconds between looks
_SHARE = 5  # of the time is spent looking at most one part in so many
_OLD = 2.0  # seconds after which a file that nobody changed is taken for whole at once
_NAME = 500  # letters of a name in the table of what was seen


Stamp = tuple[int, int]
"""Size, and time of change in nanoseconds."""


@dataclass
class _Waiting:
    stamp: Stamp
    since: float


class WatchedFolder:
    """A `Source`. A folder that is gone for a while is waited for."""

    def __init__(
        self,
        folder: Path,
        model: str,
        records: Records,
        *,
        move: Path | None = None,
        without: Sequence[Path] = (),
        patience: float = 10.0,
        once: bool = False,
    ) -> None:
        """
        Args:
            folder: the folder; sub-folders are watched too.
            model: the name of the model: what another one has judged is judged again.
            records: say what was judged before.
            move: the folder that judged files are moved to, below the name of their verdict; None leaves them.
            without: folders below that are no source.
            patience: seconds that a file which cannot be decoded is waited for.
            once: whether it is finished when all that is there is judged.

        Raises:
            FlawmapError: it is no folder, or files would be moved to where they are found.
        """
        if not folder.is_dir():
            raise FlawmapError(f"{folder} does not exist: check the path")
        self._folder, self._real = folder, Path(os.path.realpath(folder))
        self._place = f"{model}:{self._real}"
        if move is not None and self._real.is_relative_to(os.path.realpath(move)):
            raise FlawmapError(f"{folder} lies in {move}, where judged files go: choose another folder with --move")
        self._records, self._move, self._patience, self._once = records, move, patience, once
        self._without: Collection[Path] = [*without, *([] if move is None else [move])]
        self._judged: dict[Path, Stamp] = {}
        self._waiting: dict[Path, _Waiting] = {}
        self._ready: deque[Path] = deque()
        self._unmoved: dict[Path, tuple[Stamp, str]] = {}
        self._next_look = 0.0
        self._gone = self._looked = False
        self._said: str | None = None

    @property
    def unmoved(self) -> int:
        """How many judged files could not be moved."""
        return len(self._unmoved)

    def take(self) -> Shot | None:
        """As `Source.take`."""
        if not self._ready and time.monotonic() >= self._next_look:
            self._look()
        while self._ready:
            path = self._ready.popleft()
            if (shot := self._read(path)) is not None:
                return shot
        return None

    def judged(self, shot: Shot, verdict: str | None) -> None:
        """As `Source.judged`."""
        assert shot.seen is not None
        stamp = (shot.seen.size, shot.seen.changed)
        self._waiting.pop(shot.shown, None)
        self._judged[shot.shown] = stamp
        if verdict is not None:
            self._put_away(shot.shown, stamp, verdict)

    def finished(self) -> bool:
        """As `Source.finished`."""
        return self._once and self._looked and not self._ready and not self._waiting

    def close(self) -> None:
        """As `Source.close`."""

    # Looking

    def _look(self) -> None:
        start = time.monotonic()
        try:
            if not self._folder.is_dir():  # `search_folder` tells of what is below it
                raise FlawmapError(f"{self._folder}: the folder is gone")
            stamps = self._stamps()
        except FlawmapError as error:
            self._next_look = start + _LOOK
            if self._once:
                raise
            if not self._gone:
                _LOG.warning("%s; it is waited for", error)
            self._gone = True
            return
        if self._gone:
            _LOG.warning("%s: is there again", self._folder)
            self._gone = False
        fresh = [path for path, stamp in stamps.items() if self._is_new(path, stamp)]
        known = self._records.was_seen([self._seen(path, stamps[path]) for path in fresh])
        before = [path for path, seen in zip(fresh, known, strict=True) if seen]
        if self._move is not None:
            for path in before:  # a run that was killed has judged it and not moved it
                verdict = self._records.verdict_of(self._seen(path, stamps[path]))
                if verdict is not None:
                    self._put_away(path, stamps[path], verdict)
            for path, (stamp, verdict) in list(self._unmoved.items()):
                self._put_away(path, stamp, verdict)
        self._judged = {path: stamp for path, stamp in self._judged.items() if path in stamps}
        self._judged |= {path: stamps[path] for path in before}
        self._ready.extend(self._whole(stamps))
        self._looked = True
        ended = time.monotonic()
        self._next_look = ended + max(_LOOK, (_SHARE - 1) * (ended - start))

    def _stamps(self) -> dict[Path, Stamp]:
        found = {}
        for path in search_folder(self._folder, self._without).images:
            try:
                status = path.stat()
            except OSError:  # gone since
                continue
            found[path] = (status.st_size, status.st_mtime_ns)
        return found

    def _is_new(self, path: Path, stamp: Stamp) -> bool:
        waiting = self._waiting.get(path)
        return self._judged.get(path) != stamp and (waiting is None or waiting.stamp != stamp)

    def _whole(self, stamps: dict[Path, Stamp]) -> list[Path]:
        """The files to try to judge, in the order of their times; the others wait on."""
        at, clock = time.monotonic(), time.time()
        whole, waiting = [], {}
        for path, stamp in stamps.items():
            if self._judged.get(path) == stamp:
                continue
            before = self._waiting.get(path)
            same = before is not None and before.stamp == stamp
            waiting[path] = before if before is not None and same else _Waiting(stamp, at)
            # A time that lies ahead is another computer's clock, and says nothing.
            if same or clock - stamp[1] / 1e9 >= _OLD:
                whole.append(path)
        self._waiting = waiting
        return sorted(whole, key=lambda path: (stamps[path][1], path))

    def _read(self, path: Path) -> Shot | None:
        """What is to be judged of a file; None where it is not whole yet, or no more there."""
        waiting = self._waiting[path]
        name = _fitting(path.relative_to(self._folder).as_posix())
        content, pixels, error = b"", None, None
        try:
            with open_regular(path) as file:
                if os.fstat(file.fileno()).st_size > IN_MEMORY:
                    raise ImageError(f"{path}: has over {IN_MEMORY} bytes; cut it into parts or shrink it")
                content = file.read()
                status = os.fstat(file.fileno())
            if (status.st_size, status.st_mtime_ns) != waiting.stamp or len(content) != status.st_size:
                return None
            pixels = decode_image(content, str(path))
        except (ImageError, OSError) as failure:
            if time.monotonic() - waiting.since < self._patience:
                return None
            if not path.exists():
                del self._waiting[path]
                return None
            error = str(failure) if isinstance(failure, ImageError) else f"{path}: cannot be read ({failure.strerror})"
        source = f"watch:{printable(self._real.name)}"[:200]
        return Shot(source, name, path, content, pixels, error, self._seen(path, waiting.stamp))

    def _seen(self, path: Path, stamp: Stamp) -> Seen:
        return Seen(_fitting(self._place), _fitting(path.relative_to(self._folder).as_posix()), *stamp)

    # Moving

    def _put_away(self, path: Path, stamp: Stamp, verdict: str) -> None:
        """Moves a judged file, if that is wanted; one that cannot be moved is tried again at the next look."""
        if self._move is None:
            return
        self._unmoved.pop(path, None)
        try:
            status = path.stat()
            if (status.st_size, status.st_mtime_ns) != stamp:  # another one by now, not yet judged
                return
            move_beside(path, self._move / verdict / path.relative_to(self._folder))
        except FileNotFoundError:
            return
        except OSError as error:
            self._unmoved[path] = (stamp, verdict)
            told = (
                f"judged files cannot be moved to {self._move} ({error.strerror}): check its permissions and its disk"
            )
            if told != self._said:
                _LOG.warning("%s", told)
            self._said = told


def _fitting(name: str) -> str:
    """A name as a database takes it: of letters alone, and not too long."""
    name = printable(name)
    if len(name) <= _NAME:
        return name
    return f"{name[: _NAME - 65]}-{hashlib.sha256(name.encode()).hexdigest()}"
