"""The one training loop: it runs a method's stages over images whose frozen features are computed once."""

from __future__ import annotations

import base64
import io
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flawmap.backbones import Engine
from flawmap.datasets.duplicates import duplicate_groups, duplicate_pairs
from flawmap.errors import FlawmapError, ImageError
from flawmap.feature_cache import FeatureCache
from flawmap.files import replacing
from flawmap.images import digest, read_image
from flawmap.methods import Collect, Method, Optimise, Stage
from flawmap.preparation import Preparation
from flawmap.reading import BATCH, Picture, read_batches
from flawmap.views import Views

COLLECTED = 32
"""Model inputs whose features are collected or scored at once: PaDiM reads all its Gaussians for each batch."""

Progress = Callable[[str, int, int], None]
"""Called as progress(what, done, total)."""

Announce = Callable[[str], None]
"""Called with one line, such as what a stage will hold in memory, before it starts."""

Load = Callable[[Sequence[int]], tuple[list[Tensor], Tensor | None]]


def quiet(what: str, done: int, total: int) -> None:
    """A `Progress` that says nothing."""


def silent(line: str) -> None:
    """An `Announce` that says nothing."""


class TrainingData:
    """The training images and their features, each computed once and kept, memory-mapped, in a folder.

    `medium` are the levels by whose averages whole images are compared, see `Backbone.medium`.
    Without a `folder` of its own it takes a temporary one; use it as a context manager then, so that the folder goes
    when the block ends, also on Ctrl-C. With one, features that an earlier process left there under the same `identity`
    are used again. Of every model input `views` makes rotated ones beside the plain one.

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
            self._extract(paths, engine, progress, announce)
        except BaseException as error:
            self.__exit__()
            if isinstance(error, OSError):
                raise FlawmapError(
                    f"the features of {len(paths)} images cannot be kept in {folder.parent} "
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
        for batch in read_batches(missing, self.prepare, fingerprints=True):
            if len(batch.inputs):
                inputs, inside = self.views(batch.inputs, batch.inside)
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
                    what = f"features of {len(missing)} images{self.views.describe()}"
                    announce(f"{what}: {expected * self._cache.row_bytes / 1e6:.0f} MB on disk while training")
                    told = True
            whole = []
            for picture in batch.pictures:
                assert picture.path is not None
                if picture.error is not None:
                    errors[picture.path] = picture.error
                else:
                    whole.append(self._described(digests[picture.path], picture, pooled))
            # A batch at once: what is resumed is cut into the same batches, on whose size torch's last digits depend.
            self._cache.commit_all(whole)
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
        maps = [torch.from_numpy(level) for level in self._cache.read(rows)]
        return (maps[:-1], maps[-1].float()) if self.prepare.masked else (maps, None)

    def images(self, rows: Sequence[int]) -> tuple[list[Tensor], Tensor | None]:
        """[model inputs (B, 3, h, w)], and where they are scored, as `features`."""
        inputs, inside = [], []
        for row in rows:
            image = self._owners[row]
            window = (row - self._cache.images[self.digests[image]].start) // self.views.count
            pixels = read_image(self.paths[image])
            placement = self.prepare.place(pixels)
            inputs.append(next(x for i, x in enumerate(self.prepare.inputs(pixels, placement)) if i == window))
            inside.append(placement.inside()[window][None])
        masks = torch.from_numpy(np.stack(inside)).float() if self.prepare.masked else None
        return [torch.from_numpy(np.stack(inputs))], masks


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


def train(
    method: Method,
    data: TrainingData,
    rows: Sequence[int],
    stages: Iterator[Stage] | None = None,
    *,
    seed: int = 0,
    progress: Progress = quiet,
    announce: Announce = silent,
    checkpoint: Path | None = None,
) -> None:
    """Runs stages, those of `method` by default, over the model inputs `rows` of `data`; it is ready to score after.

    The same seed, machine, thread count and library versions give the same tensors. With a `checkpoint`, the state is
    written there after every epoch, and a training that was killed goes on from it to the same tensors.

    Raises:
        FlawmapError: the loss is not finite, memory runs out, or the checkpoint is damaged.
    """
    device = next(chain(method.parameters(), method.buffers())).device
    state = _Checkpoint(checkpoint if method.optimises else None, method)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for number, stage in enumerate(stages or method.stages(len(rows)), start=1):
            if number > state.stages:
                if state.epochs:
                    state.restore()
                with _memory(method, len(rows)):
                    _run(stage, data, rows, device, [seed, number], progress, announce, state)
                state.save(stages=number)
            elif number == state.stages and not state.epochs:
                state.restore()  # before what the method does between its stages
            _reseed(seed, number)  # for what the method draws before its next stage, also where this one was not run
    method.eval().requires_grad_(False)


@contextmanager
def _memory(method: Method, rows: int) -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        raise FlawmapError(
            f"not enough memory for {rows} images at {method.size[1]} x {method.size[0]}: "
            "train on fewer images or at a smaller --image-size"
        ) from error


def _run(
    stage: Stage,
    data: TrainingData,
    rows: Sequence[int],
    device: torch.device,
    seeds: list[int],
    progress: Progress,
    announce: Announce,
    state: _Checkpoint,
) -> None:
    source = data.features if stage.inputs == "features" else data.images

    def load(part: Sequence[int]) -> tuple[list[Tensor], Tensor | None]:
        return on_device(source(part), device)

    if isinstance(stage, Collect):
        announce(f"{stage.name}: about {stage.peak_bytes / 1e6:.0f} MB of memory at its highest")
        _collect(stage, load, rows, progress)
    else:
        views = data.views.count if stage.views else 1
        _optimise(stage, load, rows, views, seeds, progress, announce, state)


def _reseed(*seeds: int) -> None:
    torch.manual_seed(int(np.random.SeedSequence(seeds).generate_state(1)[0]))


def _collect(stage: Collect, load: Load, rows: Sequence[int], progress: Progress) -> None:
    done = 0
    with torch.no_grad():
        for part in batches(rows, COLLECTED):
            stage.update(*load(part))
            done += len(part)
            progress(stage.name, done, len(rows))
        stage.close(lambda done, total: progress(f"{stage.name}, closing", done, total))


def _optimise(
    stage: Optimise,
    load: Load,
    rows: Sequence[int],
    views: int,
    seeds: list[int],
    progress: Progress,
    announce: Announce,
    state: _Checkpoint,
) -> None:
    optimiser = stage.optimiser(stage.parameters)
    steps = stage.epochs * math.ceil(len(rows) / stage.batch_size)
    schedule = stage.schedule(optimiser, steps) if stage.schedule is not None else None
    state.resume(optimiser, schedule)
    step = state.epochs * (steps // stage.epochs)
    for epoch in range(state.epochs, stage.epochs):
        # Everything random in an epoch comes from its own seed: one that is run again after a kill is the same.
        _reseed(*seeds, epoch)
        rng = np.random.default_rng([*seeds, epoch])
        order = rng.permutation(np.asarray(rows))
        values: list[float] = []
        if views > 1:
            order = order + rng.integers(views, size=len(order))
        for part in batches(order.tolist(), stage.batch_size):
            losses = stage.loss(*load(part))
            for loss in [losses] if isinstance(losses, Tensor) else losses:
                values.append(float(loss.detach()))
                if not math.isfinite(values[-1]):
                    raise FlawmapError(
                        f"training diverged: the loss of {stage.name} is {values[-1]} at step {step + 1} of {steps}; "
                        "lower --set learning_rate=..."
                    )
                optimiser.zero_grad(set_to_none=not stage.keep_gradients)
                loss.backward()
                if stage.clip is not None:
                    torch.nn.utils.clip_grad_norm_(stage.parameters, stage.clip)
                optimiser.step()
            if schedule is not None:
                schedule.step()
            step += 1
            progress(stage.name, step, steps)
        more = "" if stage.after_epoch is None else f", {stage.after_epoch()}"
        announce(f"{stage.name}, epoch {epoch + 1} of {stage.epochs}: loss {np.mean(values):.4g}{more}")
        state.save(stages=seeds[1] - 1, epochs=epoch + 1, optimiser=optimiser, schedule=schedule)


class _Checkpoint:
    """Where a training stands: finished stages, finished epochs of the next, and all that these have changed.

    The backbone's weights are left out while nothing trains them.
    """

    def __init__(self, path: Path | None, method: Method) -> None:
        self.path, self.method = path, method
        self.stages = self.epochs = 0
        self._kept: dict[str, Any] = {}
        if path is None or not path.exists():
            return
        try:
            self._kept = torch.load(path, weights_only=True)
            self.stages, self.epochs = self._kept["stages"], self._kept["epochs"]
        except Exception as error:  # torch raises several kinds for files that are damaged
            raise FlawmapError(f"the checkpoint {path} is damaged: train again without --resume") from error

    def restore(self) -> None:
        """Puts the kept state into the method, once."""
        if "method" in self._kept:
            self.method.load_state({**self.method.state_dict(), **self._kept.pop("method")})

    def resume(self, optimiser: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler | None) -> None:
        """Puts the kept state into the optimiser and the schedule of the stage that goes on."""
        if self.epochs:
            optimiser.load_state_dict(self._kept.pop("optimiser"))
            if schedule is not None:
                schedule.load_state_dict(self._kept.pop("schedule"))

    def save(
        self,
        stages: int,
        epochs: int = 0,
        optimiser: torch.optim.Optimizer | None = None,
        schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    ) -> None:
        self.stages, self.epochs = stages, epochs
        if self.path is None:
            return
        frozen = not any(parameter.requires_grad for parameter in self.method.backbone.parameters())
        state = {
            key: value
            for key, value in self.method.state_dict().items()
            if not (frozen and key.startswith("backbone."))
        }
        kept: dict[str, Any] = {"stages": stages, "epochs": epochs, "method": state}
        if optimiser is not None:
            kept["optimiser"] = optimiser.state_dict()
        if schedule is not None:
            kept["schedule"] = schedule.state_dict()
        file = io.BytesIO()
        torch.save(kept, file)
        with replacing(self.path) as target:
            target.write(file.getbuffer())


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
