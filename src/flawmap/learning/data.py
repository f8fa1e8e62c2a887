"""The training images and their features, each computed once and kept on disk."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flawmap.backbones import weights_digest
from flawmap.datasets.duplicates import duplicate_groups, duplicate_pairs
from flawmap.errors import FlawmapError, ImageError
from flawmap.imaging.decoding import read_image
from flawmap.imaging.image_files import digest
from flawmap.imaging.preparation import Preparation
from flawmap.imaging.reading import BATCH, Picture, read_batches
from flawmap.learning.feature_cache import FeatureCache
from flawmap.learning.views import Views
from flawmap.line.engines import Engine
from flawmap.methods import Method
from flawmap.text import counted

COLLECTED = 32
"""Model inputs whose features are collected or scored at once: PaDiM reads all its Gaussians for each batch."""

Progress = Callable[[str, int, int], None]
"""Called as progress(what, done, total)."""

Announce = Callable[[str], None]
"""Called with one line, such as what a stage will hold in memory, before it starts."""


def quiet(what: str, done: int, total: int) -> None:
    """A `Progress` that says nothing."""


def silent(line: str) -> None:
    """An `Announce` that says nothing."""


class TrainingData:
    """The training images and their features, each computed once and kept, memory-mapped, in a folder.

    `medium` are the levels by whose averages whole images are compared, see `Backbone.medium`.
    Without a `folder` of its own it takes a temporary one; use it as a context manager then, so that the folder goes
    when the block ends, also on Ctrl-C. With one, features that an earlier process left there under the same `identity`
    are used again. Of every model input `views` makes rotated ones beside the plain one. `retuned` makes the engine of
    a method that has trained its extractor, see `of`.

    Attributes:
        paths: the images that could be read.
        digests: of their bytes.
        unreadable: what was wrong with the others.
        engine: the name of the engine that made the features.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        prepare: Preparation,
        engine: Engine,
        medium: Sequence[int] = (0,),
        *,
        views: Views | None = None,
        folder: Path | None = None,
        identity: str = "",
        half: bool = False,
        retuned: Callable[[Method], Engine] | None = None,
        progress: Progress = quiet,
        announce: Announce = silent,
    ) -> None:
        self.prepare = prepare
        self.engine = engine.name
        self.views = views or Views()
        self._medium = medium
        self.paths: list[Path] = []
        self.digests: list[str] = []
        self.unreadable: list[ImageError] = []
        self._temporary = None
        if folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="flawmap-", ignore_cleanup_errors=True)
            folder = Path(self._temporary.name)
        try:
            self._cache = FeatureCache(folder, identity, half=half)
            self._retuned = retuned
            self._tuned: dict[str, TrainingData] = {}
            self._rows_of_original: dict[int, int] = {}
            self._told: dict[str, Any] = {"half": half, "progress": progress, "announce": announce}
            self._extract(paths, engine, progress, announce)
        except BaseException as error:
            self.__exit__()
            if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):  # of who is told the progress
                raise FlawmapError(
                    f"the features of {counted(len(paths), 'image')} cannot be kept in {folder.parent} "
                    f"({error.strerror or error}): free some space, or set TMPDIR to a larger disk"
                ) from error
            raise
        self._owners = {row: i for i in range(len(self.paths)) for row in self.rows([i])}

    def _extract(self, paths: Sequence[Path], engine: Engine, progress: Progress, announce: Announce) -> None:
        digests: dict[Path, str] = {}
        errors: dict[Path, ImageError] = {}
        for path in paths:
            try:
                digests[path] = digest(path)
            except ImageError as error:
                errors[path] = error
        first = {kept: path for path, kept in reversed(digests.items())}  # one path for each content
        missing = [path for path, kept in digests.items() if kept not in self._cache.images and first[kept] == path]
        done = len(digests) - len(missing)
        pooled: list[NDArray[np.float32]] = []  # of windows whose image is not complete
        told = False
        whole: list[tuple[str, int, dict[str, Any]]] = []
        for batch in read_batches(missing, self.prepare, fingerprints=True):
            if len(batch.inputs):
                inputs, inside = self.views(self.prepare.preprocessing.normalised(batch.inputs), batch.inside)
                scored = None if inside is None else inside.astype(np.float32)
                parts = [slice(i, i + BATCH) for i in range(0, len(inputs), BATCH)]
                maps = _joined([engine(inputs[i], None if scored is None else scored[i]) for i in parts])
                plain = [maps[i][:: self.views.count] for i in self._medium]
                pooled.extend(np.concatenate([level.mean((2, 3)) for level in plain], axis=1))
                if inside is not None:
                    maps.append(inside)
                windows = max((picture.windows for picture in batch.pictures), default=len(batch.inputs))
                expected = max(windows, 1) * self.views.count * len(missing)
                self._cache.write(maps, expected_rows=expected)
                if not told:
                    what = f"features of {counted(len(missing), 'image')}{self.views.describe()}"
                    announce(f"{what}: {expected * self._cache.row_bytes / 1e6:.0f} MB on disk while training")
                    told = True
            for picture in batch.pictures:
                assert picture.path is not None
                if picture.error is not None:
                    errors[picture.path] = picture.error
                else:
                    whole.append(self._described(digests[picture.path], picture, pooled))
            # Where no image goes on in the next batch: what is resumed is cut into the same batches, on whose size
            # torch's last digits depend.
            if not pooled:
                self._cache.commit_all(whole)
                whole = []
            done += len(batch.pictures)
            progress("features", done, len(digests))
        for path in paths:
            if path in errors:
                self.unreadable.append(errors[path])
            elif digests[path] in self._cache.images:
                self.paths.append(path)
                self.digests.append(digests[path])

    def _described(
        self, digest: str, picture: Picture, pooled: list[NDArray[np.float32]]
    ) -> tuple[str, int, dict[str, Any]]:
        """What is committed of an image whose windows are written."""
        assert picture.placement is not None
        assert picture.statistics is not None
        assert picture.fingerprint is not None
        embedding = np.mean(pooled[: picture.windows], axis=0)
        del pooled[: picture.windows]
        record = {
            "size": list(picture.placement.size),
            "statistics": picture.statistics.tolist(),
            "embedding": embedding.tolist(),
            "fingerprint": base64.b64encode(picture.fingerprint.astype(np.float16).tobytes()).decode(),
            "quality": None if picture.placement.alignment is None else picture.placement.alignment.quality,
        }
        return digest, picture.windows * self.views.count, record

    def record(self, image: int) -> dict[str, Any]:
        """What is known of one image: its size (H, W), the statistics of the capture, its embedding, its alignment."""
        kept: dict[str, Any] = self._cache.records[self.digests[image]]
        return kept

    def near_duplicates(self, images: Sequence[int]) -> list[list[int]]:
        """Groups of images that show the same photograph, or one part photographed again unmoved."""
        kept = [np.frombuffer(base64.b64decode(self.record(i)["fingerprint"]), np.float16) for i in images]
        pairs = duplicate_pairs(np.array(kept, np.float32))
        return [[images[i] for i in group] for group in duplicate_groups(pairs, len(images))]

    def of(self, method: Method) -> TrainingData:
        """These images with the features that `method` reads: others than here once it has trained its extractor.

        Rows keep their numbers. Such features are computed when they are first asked for, in a folder named for the
        weights within this one.
        """
        if not method.tunes:
            return self
        assert self._retuned is not None
        by = weights_digest(method.extracting())
        if by not in self._tuned:
            folder = self._cache.folder / f"tuned-{by[:16]}"
            engine = self._retuned(method)
            tuned = TrainingData(
                self.paths, self.prepare, engine, self._medium, folder=folder, identity=by, **self._told
            )
            for kept in self.digests:
                tuned._rows_of_original |= zip(self._cache.images[kept], tuned._cache.images[kept], strict=True)
            self._tuned[by] = tuned
        return self._tuned[by]

    def __enter__(self) -> TrainingData:
        return self

    def __exit__(self, *reason: object) -> None:
        if self._temporary is not None:
            self._temporary.cleanup()

    def rows(self, images: Sequence[int]) -> list[int]:
        """The model inputs of some images, one after the other; each one's further views lie in the rows behind it."""
        return [row for i in images for row in self._cache.images[self.digests[i]][:: self.views.count]]

    def features(self, rows: Sequence[int]) -> tuple[list[Tensor], Tensor | None]:
        """The maps (B, C, H, W) of some model inputs, and where those are scored, (B, 1, h, w); None is everywhere."""
        own = [self._rows_of_original.get(row, row) for row in rows]
        maps = [torch.from_numpy(level) for level in self._cache.read(own)]
        return (maps[:-1], maps[-1].float()) if self.prepare.masked else (maps, None)

    def images(self, rows: Sequence[int]) -> tuple[list[Tensor], Tensor | None]:
        """[model inputs (B, 3, h, w)], and where they are scored, as `features`."""
        windows = [self.window(row) for row in rows]
        inputs = [torch.from_numpy(np.stack([pixels for pixels, _ in windows]))]
        if not self.prepare.masked:
            return inputs, None
        return inputs, torch.from_numpy(np.stack([scored[None] for _, scored in windows])).float()

    def window(self, row: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """The normalised model input (3, h, w) of a row, read anew, and where it is scored (h, w)."""
        image = self._owners[row]
        number = (row - self._cache.images[self.digests[image]].start) // self.views.count
        pixels = read_image(self.paths[image])
        placement = self.prepare.place(pixels)
        found = next((x for i, x in enumerate(self.prepare.inputs(pixels, placement)) if i == number), None)
        if found is None:
            raise FlawmapError(f"{self.paths[image]}: was changed while it was being learnt from; train again")
        return self.prepare.preprocessing.normalised(found), placement.inside()[number]

    def pixels(self, row: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """The pixels (h, w, 3) in 0..1 of the model input of a row, read anew, and where it is scored (h, w)."""
        preprocessing = self.prepare.preprocessing
        mean, std = np.array(preprocessing.mean, np.float32), np.array(preprocessing.std, np.float32)
        normalised, scored = self.window(row)
        return (normalised.transpose(1, 2, 0) * std + mean).clip(0, 1), scored


def _joined(parts: Sequence[Sequence[NDArray[np.float32]]]) -> list[NDArray[Any]]:
    """The maps of consecutive parts of a batch as those of the whole."""
    return list(parts[0]) if len(parts) == 1 else [np.concatenate(level) for level in zip(*parts, strict=True)]


def on_device(
    loaded: tuple[list[Tensor], Tensor | None], device: torch.device | str
) -> tuple[list[Tensor], Tensor | None]:
    """What `TrainingData.features` or `images` gave, on a device."""
    maps, inside = loaded
    return [level.to(device) for level in maps], None if inside is None else inside.to(device)


def batches(rows: Sequence[int], size: int = BATCH) -> list[Sequence[int]]:
    """Consecutive parts of at most `size`."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]
