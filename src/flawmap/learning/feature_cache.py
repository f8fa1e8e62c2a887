"""Feature maps on disk: computed once for each image, memory-mapped after, and still there after a killed training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flawmap.errors import FlawmapError
from flawmap.files import replacing

_HALF_BELOW = 2048.0  # float16 ends at 65,504; maps that stay below this at first keep a wide margin


class FeatureCache:
    """The maps of images in a folder: one file a level, whose rows are model inputs, and an index of images.

    An image counts once `commit` has named it; what was written after the last commit is dropped when the folder is
    opened again, so a killed process leaves whole images only.

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
        self._checked = False  # whether there is room for the rows to come
        self._levels: list[tuple[tuple[int, ...], np.dtype[Any]]] = []  # of one row
        folder.mkdir(parents=True, exist_ok=True)
        known = folder / "identity"
        if known.exists() and known.read_text(encoding="utf-8") == identity:
            self._reopen()
        else:
            known.unlink(missing_ok=True)  # first: a kill must not leave it beside files that are half gone
            for path in (folder / "index", folder / "layout", *folder.glob("level*")):
                path.unlink(missing_ok=True)
            with replacing(known) as file:
                file.write(identity.encode())

    def _reopen(self) -> None:
        if not (self.folder / "layout").exists():
            return
        layout = json.loads((self.folder / "layout").read_text(encoding="utf-8"))
        self._levels = [(tuple(shape), np.dtype(kind)) for shape, kind in layout]
        index = self.folder / "index"
        lines = index.read_bytes().splitlines(keepends=True) if index.exists() else []
        whole = 0
        for line in lines:
            if not line.endswith(b"\n"):  # cut off when the process was killed
                break
            digest, rows, record = json.loads(line)
            if any(self._file(i).stat().st_size < (self._rows + rows) * self._bytes(i) for i in range(self.levels)):
                break
            self._register(digest, rows, record)
            whole += len(line)
        for path, size in [(index, whole), *((self._file(i), self._rows * self._bytes(i)) for i in range(self.levels))]:
            with path.open("ab") as file:
                file.truncate(size)

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
                file.write(json.dumps([(shape, kind.name) for shape, kind in self._levels]).encode())
        for i, (level, (_, kind)) in enumerate(zip(maps, self._levels, strict=True)):
            with np.errstate(over="ignore"):
                kept = level.astype(kind, copy=False)
            if kind == np.float16 and not np.isfinite(kept).all():
                raise FlawmapError(
                    f"a feature of {abs(level).max():.3g} is far beyond those of the first images: one is damaged, "
                    "or the backbone's weights are"
                )
            # Written, not mapped: on a full disk a write fails, a mapped page kills the process.
            with self._file(i).open("ab") as file:
                file.write(np.ascontiguousarray(kept).data)

    def commit(self, digest: str, rows: int, record: Any) -> None:
        """The next `rows` rows written are those of the image `digest`; `record` is kept with it as JSON."""
        self.commit_all([(digest, rows, record)])

    def commit_all(self, images: Sequence[tuple[str, int, Any]]) -> None:
        """`commit` of several images, of which a kill leaves all or none."""
        lines = [json.dumps(image).encode() + b"\n" for image in images]
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
