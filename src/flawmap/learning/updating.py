"""Further good images learnt on top of those that a method knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flawmap.errors import FlawmapError, ImageError
from flawmap.imaging.captures import CaptureLimits
from flawmap.imaging.preparation import Preparation
from flawmap.learning.data import Announce, Progress, TrainingData
from flawmap.learning.fitting import limits, report_unreadable
from flawmap.learning.good_scores import Split, good_scores
from flawmap.learning.loop import train
from flawmap.line.engines import Engine
from flawmap.methods import Method
from flawmap.text import counted


@dataclass(frozen=True)
class Updated:
    """What came of it, beside the method, which has changed.

    Attributes:
        scores, peaks: (n,) of the new images, before they were learnt.
        capture_limits: of the new images alone.
        digests: of the new images, sorted.
        left_out: what was wrong with those that could not be learnt from.
        sizes: (height, width) of the others.
    """

    scores: NDArray[np.float32]
    peaks: NDArray[np.float32]
    capture_limits: CaptureLimits
    digests: list[str]
    left_out: list[ImageError]
    sizes: list[tuple[int, int]]


def update(
    method: Method,
    paths: Sequence[Path],
    preparation: Preparation,
    engine: Engine,
    device: str,
    seed: int,
    source: str,
    *,
    strict: bool,
    progress: Progress,
    announce: Announce,
) -> Updated:
    """Scores the images `paths`, found in `source`, then lets `method` learn them: see `Detector.update`."""
    with TrainingData(paths, preparation, engine, method.backbone.medium, progress=progress, announce=announce) as data:
        report_unreadable(data.unreadable, strict)
        images = list({kept: i for i, kept in reversed(list(enumerate(data.digests)))}.values())[::-1]
        if not images:
            raise FlawmapError(
                f"{source}: none of what is there can be read ({counted(len(paths), 'image')}); give other images"
            )
        good = good_scores(method, data, Split([], images, "holdout"), seed, device, progress, level=False)
        rows = data.rows(images)
        stages = method.further_stages(len(rows))
        train(method, data, rows, stages, seed=seed, progress=progress, announce=announce)
        records = [data.record(i) for i in images]
        return Updated(
            good.scores,
            good.peaks,
            limits(records),
            sorted(data.digests[i] for i in images),
            data.unreadable,
            [(height, width) for height, width in (record["size"] for record in records)],
        )
