"""Feature maps on disk: computed once for each image, memory-mapped after, and still there after a killed training."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from flawmap.errors import FlawmapError
from flawmap.files import replacing

log = logging.getLogger(__name__)

_HALF_BELOW = 2048.0  # float16 ends at 65,504; maps that stay below this at first keep a wide margin


class FeatureCache:
    """The maps of images in a folder: one file a level, whose rows are model inputs, and an index of images.

    An image counts once `commit` has named it; what was written after the last commit is dropped when the folder is
    opened again, so a killed process leaves whole images only. Each has a checksum, over its maps and what the index
    says of it: from the first one on that has changed, images are dropped as well, and a warning says so.

    Args:
        folder: made if it is missing.
        identity: what made the maps: weights, preparation, engine. Maps of another identity are deleted.
        half: keep maps in float16, unless their values are too large for it.

    Attributes:
        images: for the digest of each image: its rows.
        records: for the digest of each image: what was kept beside its maps.
    """

    def __init__(self, folder: Path, identity: str, *, half: bool = False) -> None:
        self.folder = folder
        self.half = half
        self.images: dict[str, range] = {}
        self.records: dict[str, Any] = {}
        self._rows = 0
        self._sums: list[bytes] = []  # of rows that are written and not committed
        self._checked = False  # whether there is room for the rows to come
        self._levels: list[tuple[tuple[int, ...], np.dtype[Any]]] = []  # of one row
        folder.mkdir(parents=True, exist_ok=True)
        known = folder / "identity"
        if known.exists() and known.read_text(encoding="utf-8") == identity:
            self._reopen()
        else:
            known.unlink(missing_ok=True)  # first: a kill must not leave it beside files that are half gone
            self._empty()
            with replacing(known) as file:
                file.write(identity.encode())

    def _reopen(self) -> None:
        index = self.folder / "index"
        try:
            self._levels = _layout(self.folder / "layout")
            lines = index.read_bytes().splitlines(keepends=True) if index.exists() else []
        except FileNotFoundError:
            lines = []
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            log.warning("%s: the layout of the features is damaged; they are computed anew", self.folder)
            lines = []
        if not self._levels:
            self._empty()
            return
        whole = 0
        batch: list[tuple[str, int, Any]] = []
        length = 0
        with ExitStack() as stack:
            files = [stack.enter_context(self._file(i).open("ab+")) for i in range(self.levels)]
            for file in files:
                file.seek(0)
            for line in lines:
                if not line.endswith(b"\n"):  # cut off when the process was killed
                    break
                image = self._verified(line, files)
                if image is None:
                    log.warning(
                        "%s: the features from image %d on are damaged; they are computed anew",
                        self.folder, len(self.images) + len(batch) + 1,
                    )  # fmt: skip
                    break
                *named, left = image
                batch.append((named[0], named[1], named[2]))
                length += len(line)
                if left == 0:
                    for one in batch:
                        self._register(*one)
                    whole += length
                    batch, length = [], 0
            for i, file in enumerate(files):
                file.truncate(self._rows * self._bytes(i))
        with index.open("ab") as kept:
            kept.truncate(whole)

    def _verified(self, line: bytes, files: Sequence[BinaryIO]) -> tuple[str, int, Any, int] | None:
        """What a line of the index says, if its checksum is that of itself and the rows that are read on for it."""
        try:
            digest, rows, record, left, expected = json.loads(line)
            if not (isinstance(digest, str) and isinstance(rows, int) and isinstance(left, int) and rows >= 0):
                return None
        except (ValueError, TypeError, RecursionError):
            return None
        sums = []
        for _ in range(rows):
            row = [file.read(self._bytes(i)) for i, file in enumerate(files)]
            if any(len(part) != self._bytes(i) for i, part in enumerate(row)):
                return None
            sums.append(_sum(row))
        found = _line_sum([digest, rows, record, left], sums)
        return (digest, rows, record, left) if found == expected else None

    def _empty(self) -> None:
        """Deletes all that is kept."""
        self._levels = []
        for path in (self.folder / "index", self.folder / "layout", *self.folder.glob("level*")):
            path.unlink(missing_ok=True)

    @property
    def levels(self) -> int:
        """Maps of one row."""
        return len(self._levels)

    @property
    def row_bytes(self) -> int:
        """What one row takes on disk; 0 before the first `write`."""
        return sum(self._bytes(i) for i in range(self.levels))

    def write(self, maps: Sequence[NDArray[Any]], *, expected_rows: int) -> None:
        """Appends rows: maps (B, ...) of each level, float32, or bool, which stays as it is.

        Raises:
            FlawmapError: `expected_rows` rows in all do not fit on the disk, or a value is too large to be kept.
            OSError: the disk is full.
        """
        started = bool(self._levels)
        if not started:
            self._levels = [(level.shape[1:], self._kind(level)) for level in maps]
        if not self._checked:
            self._checked = True
            needed, free = expected_rows * self.row_bytes, shutil.disk_usage(self.folder).free
            if needed > free:
                raise FlawmapError(
                    f"the features take {needed / 1e6:.0f} MB but {self.folder} has {free / 1e6:.0f} MB left: "
                    "free some space, or train on fewer images or at a smaller --image-size"
                )
        if not started:
            with replacing(self.folder / "layout") as file:
                levels = [[list(shape), kind.name] for shape, kind in self._levels]
                file.write(json.dumps({"levels": levels, "sum": _line_sum(levels, [])}).encode())
        written: list[NDArray[Any]] = []
        for i, (level, (_, kind)) in enumerate(zip(maps, self._levels, strict=True)):
            with np.errstate(over="ignore"):
                kept = level.astype(kind, copy=False)
            if kind == np.float16 and not np.isfinite(kept).all():
                raise FlawmapError(
                    f"a feature of {abs(level).max():.3g} is far beyond those of the first images: one is damaged, "
                    "or the backbone's weights are"
                )
            # Written, not mapped: on a full disk a write fails, a mapped page kills the process.
            written.append(np.ascontiguousarray(kept))
            with self._file(i).open("ab") as file:
                file.write(written[i].data)
        self._sums += [_sum([level[row].data for level in written]) for row in range(len(written[0]))]

    def commit(self, digest: str, rows: int, record: Any) -> None:
        """The next `rows` rows written are those of the image `digest`; `record` is kept with it as JSON."""
        self.commit_all([(digest, rows, record)])

    def commit_all(self, images: Sequence[tuple[str, int, Any]]) -> None:
        """`commit` of several images, of which a kill leaves all or none."""
        lines = []
        for left, (digest, rows, record) in zip(reversed(range(len(images))), images, strict=True):
            content = [digest, rows, record, left]
            sums, self._sums = self._sums[:rows], self._sums[rows:]
            lines.append(json.dumps([*content, _line_sum(content, sums)]).encode() + b"\n")
        with (self.folder / "index").open("ab", buffering=0) as file:
            file.write(b"".join(lines))
        for image in images:
            self._register(*image)

    def read(self, rows: Sequence[int]) -> list[NDArray[Any]]:
        """The maps (B, ...) of some rows, float32 or bool."""
        read = []
        for i, (shape, kind) in enumerate(self._levels):
            # Mapped anew each time, so that the pages of earlier batches do not stay in memory.
            level = np.memmap(self._file(i), kind, "r", shape=(self._rows, *shape))
            read.append(np.array(level[list(rows)], dtype=np.float32 if kind.kind == "f" else kind))
        return read

    def _register(self, digest: str, rows: int, record: Any) -> None:
        self.images[digest] = range(self._rows, self._rows + rows)
        self.records[digest] = record
        self._rows += rows

    def _kind(self, level: NDArray[Any]) -> np.dtype[Any]:
        if level.dtype == np.bool_:
            return np.dtype(np.bool_)
        return np.dtype(np.float16 if self.half and float(abs(level).max()) < _HALF_BELOW else np.float32)

    def _bytes(self, i: int) -> int:
        shape, kind = self._levels[i]
        return int(np.prod(shape)) * kind.itemsize

    def _file(self, i: int) -> Path:
        return self.folder / f"level{i}"


def _layout(path: Path) -> list[tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and type of a row of each level.

    Raises:
        FileNotFoundError: nothing was written yet.
        ValueError, TypeError, KeyError, OverflowError, RecursionError: it says something else.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["sum"] != _line_sum(content["levels"], []):
        raise ValueError("its checksum differs")
    return [(tuple(shape), np.dtype(kind)) for shape, kind in content["levels"]]


def _sum(row: Sequence[bytes | memoryview]) -> bytes:
    """The checksum of a row's maps."""
    value = 0
    for part in row:
        value = zlib.crc32(part, value)
    return value.to_bytes(4, "big")


def _line_sum(content: Sequence[Any], sums: Sequence[bytes]) -> str:
    """The checksum of what the index says of an image, and of its rows."""
    return hashlib.sha256(json.dumps(content).encode() + b"".join(sums)).hexdigest()[:16]
