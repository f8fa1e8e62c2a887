"""The one training loop: it runs a method's stages over images whose frozen features are computed once."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flawmap.backbones import Engine
from flawmap.errors import FlawmapError, ImageError
from flawmap.images import Preprocessing, read_image
from flawmap.methods import Collect, Method, Optimise, Stage

Progress = Callable[[str, int, int], None]
"""Called as progress(what, done, total)."""

BATCH = 8


Announce = Callable[[str], None]
"""Called with one line, such as what a stage will hold in memory, before it starts."""


def quiet(what: str, done: int, total: int) -> None:
    """A `Progress` that says nothing."""


def silent(line: str) -> None:
    """An `Announce` that says nothing."""


def read_batches(
    paths: Sequence[Path], preprocess: Preprocessing, batch: int = BATCH
) -> Iterator[tuple[NDArray[np.float32], list[tuple[int, int] | ImageError]]]:
    """Reads images ahead of their use.

    Yields for each `batch` paths: the readable images (B, 3, h, w) float32, and for each path its (height, width) or
    what was wrong with it.
    """

    def read(paths: Sequence[Path]) -> tuple[NDArray[np.float32], list[tuple[int, int] | ImageError]]:
        images = np.empty((len(paths), 3, *preprocess.size), np.float32)
        found: list[tuple[int, int] | ImageError] = []
        filled = 0
        for path in paths:
            try:
                pixels = read_image(path)
            except ImageError as error:
                found.append(error)
                continue
            preprocess(pixels, out=images[filled])
            filled += 1
            found.append((pixels.shape[0], pixels.shape[1]))
        return images[:filled], found

    parts = [paths[i : i + batch] for i in range(0, len(paths), batch)]
    with ThreadPoolExecutor(1) as pool:
        ahead = [pool.submit(read, part) for part in parts[:2]]
        try:
            for i in range(len(parts)):
                if i + 2 < len(parts):
                    ahead.append(pool.submit(read, parts[i + 2]))
                yield ahead.pop(0).result()
        finally:
            for future in ahead:
                future.cancel()


class TrainingData:
    """The training images and their features, each computed once and kept, memory-mapped, in a temporary folder.

    Use as a context manager: the folder goes when the block ends, also on Ctrl-C.

    Attributes:
        paths: the images that could be read.
        unreadable: what was wrong with the others.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        preprocess: Preprocessing,
        engine: Engine,
        progress: Progress = quiet,
        announce: Announce = silent,
    ) -> None:
        self.preprocess = preprocess
        self.paths: list[Path] = []
        self.unreadable: list[ImageError] = []
        self._folder = tempfile.TemporaryDirectory(prefix="flawmap-", ignore_cleanup_errors=True)
        self._shapes: list[tuple[int, ...]] = []  # (C, h, w) of each level
        try:
            self._extract(paths, engine, progress, announce)
        except BaseException as error:
            self.__exit__()
            if isinstance(error, OSError):
                raise FlawmapError(
                    f"the features of {len(paths)} images cannot be kept in {tempfile.gettempdir()} "
                    f"({error.strerror or error}): free some space, or set TMPDIR to a larger disk"
                ) from error
            raise

    def _extract(self, paths: Sequence[Path], engine: Engine, progress: Progress, announce: Announce) -> None:
        done = 0
        for images, found in read_batches(paths, self.preprocess):
            for path, size in zip(paths[done : done + len(found)], found, strict=True):
                if isinstance(size, ImageError):
                    self.unreadable.append(size)
                else:
                    self.paths.append(path)
            if len(images):
                maps = engine(images)
                if not self._shapes:
                    held = sum(level[0].nbytes for level in maps) * len(paths)
                    announce(f"features of {len(paths)} images: {held / 1e6:.0f} MB on disk while training")
                    self._shapes = [level.shape[1:] for level in maps]
                for i, level in enumerate(maps):
                    # Written, not mapped: on a full disk a write fails, a mapped page kills the process.
                    with self._file(i).open("ab") as file:
                        file.write(level.astype(np.float32, copy=False).tobytes())
            done += len(found)
            progress("features", done, len(paths))

    def __enter__(self) -> TrainingData:
        return self

    def __exit__(self, *reason: object) -> None:
        self._folder.cleanup()

    def features(self, indices: Sequence[int]) -> list[Tensor]:
        """The maps (B, C, H, W) of some images."""
        maps = []
        for i, shape in enumerate(self._shapes):
            # Mapped anew for each batch, so that the pages of earlier batches do not stay in memory.
            level = np.memmap(self._file(i), np.float32, "r", shape=(len(self.paths), *shape))
            maps.append(torch.from_numpy(np.array(level[list(indices)])))
        return maps

    def _file(self, i: int) -> Path:
        return Path(self._folder.name, f"level{i}")

    def images(self, indices: Sequence[int]) -> list[Tensor]:
        """[images (B, 3, H, W)]."""
        return [torch.from_numpy(np.stack([self.preprocess(read_image(self.paths[i])) for i in indices]))]


def train(
    method: Method,
    data: TrainingData,
    indices: Sequence[int],
    *,
    seed: int = 0,
    progress: Progress = quiet,
    announce: Announce = silent,
) -> None:
    """Runs the stages of `method` over the images `indices` of `data`; the method is ready to score afterwards.

    The same seed, machine, thread count and library versions give the same tensors.

    Raises:
        FlawmapError: the loss is not finite, or memory runs out.
    """
    device = next(chain(method.parameters(), method.buffers())).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for stage in method.stages(len(indices)):
            try:
                if isinstance(stage, Collect):
                    announce(f"{stage.name}: about {stage.peak_bytes / 1e6:.0f} MB of memory at its highest")
                run_stage(stage, data, indices, seed, device, progress)
            except MemoryError as error:
                raise FlawmapError(
                    f"not enough memory for {len(indices)} images at {method.size[1]} x {method.size[0]}: "
                    "train on fewer images or at a smaller --image-size"
                ) from error
    method.eval().requires_grad_(False)


def run_stage(
    stage: Stage, data: TrainingData, indices: Sequence[int], seed: int, device: torch.device, progress: Progress
) -> None:
    """One stage of a method."""
    source = data.features if stage.inputs == "features" else data.images

    def load(part: Sequence[int]) -> list[Tensor]:
        return [tensor.to(device) for tensor in source(part)]

    if isinstance(stage, Collect):
        _collect(stage, load, indices, progress)
    else:
        _optimise(stage, load, indices, seed, progress)


def _collect(
    stage: Collect, load: Callable[[Sequence[int]], list[Tensor]], indices: Sequence[int], progress: Progress
) -> None:
    with torch.no_grad():
        for start in range(0, len(indices), BATCH):
            part = indices[start : start + BATCH]
            stage.update(load(part))
            progress(stage.name, start + len(part), len(indices))
        stage.close(lambda done, total: progress(f"{stage.name}, closing", done, total))


def _optimise(
    stage: Optimise,
    load: Callable[[Sequence[int]], list[Tensor]],
    indices: Sequence[int],
    seed: int,
    progress: Progress,
) -> None:
    optimiser = stage.optimiser(stage.parameters)
    batches = math.ceil(len(indices) / stage.batch_size)
    steps = stage.epochs * batches
    schedule = stage.schedule(optimiser, steps) if stage.schedule is not None else None
    step = 0
    for epoch in range(stage.epochs):
        order = np.random.default_rng([seed, epoch]).permutation(np.asarray(indices))
        for start in range(0, len(order), stage.batch_size):
            loss = stage.loss(load(order[start : start + stage.batch_size].tolist()))
            if not bool(torch.isfinite(loss)):
                raise FlawmapError(
                    f"training diverged: the loss of {stage.name} is {loss.item()} at step {step + 1} of {steps}; "
                    "lower the learning rate"
                )
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            if stage.clip is not None:
                torch.nn.utils.clip_grad_norm_(stage.parameters, stage.clip)
            optimiser.step()
            if schedule is not None:
                schedule.step()
            step += 1
            progress(stage.name, step, steps)


def folds(groups: Sequence[Any], count: int, seed: int) -> list[list[int]]:
    """Splits positions into `count` folds of nearly equal size; positions of one group (equal values) stay together."""
    members: dict[Any, list[int]] = {}
    for position, group in enumerate(groups):
        members.setdefault(group, []).append(position)
    order = np.random.default_rng(seed).permutation(len(members))
    keys = list(members)
    split: list[list[int]] = [[] for _ in range(min(count, len(members)))]
    for turn, key in enumerate(order):
        split[turn % len(split)] += members[keys[key]]
    return [sorted(fold) for fold in split]
