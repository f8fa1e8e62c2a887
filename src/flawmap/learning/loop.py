"""The one training loop: it runs a method's stages over images whose features are computed once."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flawmap.errors import FlawmapError
from flawmap.files import open_regular, replacing
from flawmap.learning.data import COLLECTED, Announce, Progress, TrainingData, batches, on_device, quiet, silent
from flawmap.learning.defective import DefectiveBatches
from flawmap.methods import Collect, Method, Optimise, Stage, SyntheticDefects
from flawmap.text import counted

_SIGNED = 32  # bytes at the end of a checkpoint

Load = Callable[[Sequence[int], Sequence[np.random.Generator]], tuple[list[Tensor], Tensor | None]]
"""(some rows, a generator for each) -> what a stage's function takes."""


def train(
    method: Method,
    data: TrainingData,
    rows: Sequence[int],
    stages: Iterator[Stage] | None = None,
    *,
    groups: Sequence[int] | None = None,
    seed: int = 0,
    progress: Progress = quiet,
    announce: Announce = silent,
    checkpoint: Path | None = None,
    run: str = "",
) -> None:
    """Runs stages, those of `method` by default, over the model inputs `rows` of `data`; it is ready to score after.

    `groups` are those of the rows, by which inputs are left out later, see `Method.groups`.
    The same seed, machine, thread count and library versions give the same tensors. With a `checkpoint`, the state is
    written there after every epoch, and a training that was killed goes on from it to the same tensors. `run` is what
    decides the result beside the method and the rows: a checkpoint of another is not gone on from.

    Raises:
        FlawmapError: the loss is not finite, memory runs out, or the checkpoint is damaged or of another run.
    """
    device = next(chain(method.parameters(), method.buffers())).device
    method.groups = None if groups is None else torch.tensor(groups)
    state = _Checkpoint(checkpoint if method.optimises else None, method, f"{run} {seed} {list(rows)}")
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
            f"not enough memory for {counted(rows, 'image')} at {method.size[1]} x {method.size[0]}: "
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
    load = _loader(stage, state.method, data, rows, device, announce)
    if isinstance(stage, Collect):
        announce(f"{stage.name}: about {stage.peak_bytes / 1e6:.0f} MB of memory at its highest")
        _collect(stage, load, rows, progress)
    else:
        views = data.views.count if stage.views else 1
        _optimise(stage, load, rows, views, seeds, progress, announce, state)


def _loader(
    stage: Stage,
    method: Method,
    data: TrainingData,
    rows: Sequence[int],
    device: torch.device,
    announce: Announce,
) -> Load:
    if isinstance(stage.inputs, SyntheticDefects):
        defective = DefectiveBatches(data, rows, stage.inputs)
        if defective.foreground is not None:
            announce(f"{stage.name}, {defective.foreground.describe()}")
        return lambda part, rngs: on_device(defective(part, rngs), device)
    if stage.inputs == "images":
        return lambda part, rngs: on_device(data.images(part), device)
    tuned = data.of(method)
    return lambda part, rngs: on_device(tuned.features(part), device)


def _reseed(*seeds: int) -> None:
    torch.manual_seed(int(np.random.SeedSequence(seeds).generate_state(1)[0]))


def _collect(stage: Collect, load: Load, rows: Sequence[int], progress: Progress) -> None:
    done = 0
    with torch.no_grad():
        for part in batches(rows, COLLECTED):
            stage.update(*load(part, ()))
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
        if stage.before_epoch is not None:
            stage.before_epoch(epoch)
        for loaded in _ahead(load, batches(order.tolist(), stage.batch_size), [*seeds, epoch]):
            losses = stage.loss(*loaded)
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


def _ahead(
    load: Load, parts: Sequence[Sequence[int]], seeds: list[int]
) -> Iterator[tuple[list[Tensor], Tensor | None]]:
    """Loads each part while the one before is learnt from."""
    starts = [0, *accumulate(len(part) for part in parts)]

    def loaded(number: int) -> tuple[list[Tensor], Tensor | None]:
        places = range(starts[number], starts[number + 1])
        rngs = [np.random.default_rng(np.random.SeedSequence(seeds, spawn_key=(place,))) for place in places]
        return load(parts[number], rngs)

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(loaded, 0)
        for number in range(1, len(parts) + 1):
            found = waiting.result()
            if number < len(parts):
                waiting = pool.submit(loaded, number)
            yield found


class _Checkpoint:
    """Where a training stands: finished stages, finished epochs of the next, and all that these have changed.

    The backbone's weights are left out where the method does not tune them.
    """

    def __init__(self, path: Path | None, method: Method, run: str) -> None:
        self.path, self.method, self.run = path, method, run
        self.stages = self.epochs = 0
        self._kept: dict[str, Any] = {}
        if path is None or not path.exists():
            return
        with open_regular(path) as file:
            content = file.read()
        content, signed = content[:-_SIGNED], content[-_SIGNED:]
        with self._telling():
            if signed != self._signature(content):
                raise ValueError("another checksum")
            self._kept = torch.load(io.BytesIO(content), weights_only=True)
            self.stages, self.epochs = self._kept["stages"], self._kept["epochs"]

    def _signature(self, content: bytes | memoryview) -> bytes:
        """Of a checkpoint's content and of its run."""
        sha = hashlib.sha256(self.run.encode())
        sha.update(content)
        return sha.digest()

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # torch raises several kinds for what is damaged or does not fit
            raise FlawmapError(
                f"{self.path}: the checkpoint is damaged, or of another training; start anew with --discard"
            ) from error

    def restore(self) -> None:
        """Puts the kept state into the method, once."""
        if "method" in self._kept:
            with self._telling():
                self.method.load_state({**self.method.state_dict(), **self._kept.pop("method")})

    def resume(self, optimiser: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler | None) -> None:
        """Puts the kept state into the optimiser and the schedule of the stage that goes on."""
        if self.epochs:
            with self._telling():
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
        state = {
            key: value
            for key, value in self.method.state_dict().items()
            if self.method.tunes or not key.startswith("backbone.")
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
            target.write(self._signature(file.getbuffer()))
