"""The false-reject rate that is stated, beside the true one: drawn sets, thousands of fresh good images.

    python benchmarks/calibration.py [--kinds boards,fabric,screws] [--methods gaussbank,patchcore,padim]
                                     [--images 10,30,100,300] [--seeds 20] [--fresh 2000] [--size 256] [--workers 1]
                                     [--rate 0.01] [--folder FOLDER]

For each seed other good images are drawn and learnt, and the same fresh ones are scored; the true rate is the share of
those at or above the threshold. "Within" counts the seeds whose true rate lies below the upper bound that the threshold
states (Clopper-Pearson, 95 %), "bias" is the share of fresh images that score above a calibration image, less a half:
0 where calibration scores are like those of images not seen, positive where they are too low. With --folder, what is
drawn is kept there.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

from flawmap.datasets.drawn import draw_dataset

FRESH_SEED = 1_000_000


@dataclass(frozen=True)
class Trial:
    """One set of good images, learnt by one method."""

    kind: str
    method: str
    images: int
    seed: int
    size: int
    rate: float
    settings: tuple[tuple[str, str], ...]
    workers: int


@dataclass(frozen=True)
class Found:
    """What came of it: rates in 0..1."""

    stated: float
    upper: float
    true: float
    bias: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", default="boards,fabric,screws")
    parser.add_argument("--methods", default="gaussbank,patchcore,padim")
    parser.add_argument("--images", default="10,30,100,300")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--fresh", type=int, default=2000)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    numbers = [int(n) for n in options.images.split(",")]
    kinds, methods = options.kinds.split(","), options.methods.split(",")
    settings = tuple(tuple(pair.split("=", 1)) for pair in options.settings)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        # Another start method than fork: PyTorch's threads do not survive one.
        with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
            drawn = [(folder, kind, seed, max(numbers)) for kind in kinds for seed in range(options.seeds)]
            drawn += [(folder, kind, FRESH_SEED + part, options.fresh // 20) for kind in kinds for part in range(20)]
            list(pool.map(_draw, drawn, [options.size] * len(drawn)))
            print("| set | method | images | stated | true, mean | largest | within | bias |")
            print("|---|---|---|---|---|---|---|---|", flush=True)
            for kind in kinds:
                for method in methods:
                    for n in numbers:
                        trials = [
                            Trial(kind, method, n, seed, options.size, options.rate, settings, options.workers)
                            for seed in range(options.seeds)
                        ]
                        found = list(pool.map(_tried, [folder] * len(trials), trials))
                        print(_row(trials[0], found), flush=True)


def _row(trial: Trial, found: Sequence[Found]) -> str:
    within = sum(one.true <= one.upper for one in found)
    true = [one.true for one in found]
    return (
        f"| {trial.kind} | {trial.method} | {trial.images} | {mean(one.stated for one in found):.3f} "
        f"| {mean(true):.3f} | {max(true):.3f} | {within} of {len(found)} | {mean(one.bias for one in found):+.3f} |"
    )


def _draw(drawn: tuple[Path, str, int, int], size: int) -> None:
    folder, kind, seed, count = drawn
    target = folder / f"{kind}-{seed}"
    if not target.exists():
        draw_dataset(target, kind, seed, train=count, good=0, per_defect=0, size=size)


_FEATURES: dict[tuple[str, str], list[Any]] = {}


def _tried(folder: Path, trial: Trial) -> Found:
    import numpy as np
    import torch

    from flawmap import Detector

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // trial.workers))
    paths = sorted((folder / f"{trial.kind}-{trial.seed}" / "train" / "good").iterdir())[: trial.images]
    settings = dict(trial.settings)
    detector = Detector(
        trial.method, image_size=trial.size, seed=trial.seed, max_false_reject=trial.rate, **settings
    ).fit(paths)
    key = trial.kind, trial.method
    if key not in _FEATURES:
        _FEATURES.clear()
        fresh = [path for part in range(20) for path in _fresh(folder, trial.kind, part)]
        preparation, engine = detector.preparation_, detector.extraction_engine()
        _FEATURES[key] = []
        from flawmap.imaging.reading import read_batches

        for batch in read_batches(fresh, preparation):
            maps = engine(preparation.preprocessing.normalised(batch.inputs))
            _FEATURES[key].append([torch.from_numpy(np.array(level)).half() for level in maps])
    scores = []
    with torch.inference_mode():
        for batch in _FEATURES[key]:
            features = [level.float().to(detector.device) for level in batch]
            method = detector.method_
            scores.append(method.levelled(*method.score(features))[1].cpu().numpy())
    good = np.concatenate(scores)
    kept = detector.calibration_.scores
    above = (good[:, None] > kept).mean() + float((good[:, None] == kept).mean()) / 2
    threshold = detector.threshold_
    return Found(threshold.rate, threshold.upper, float((good >= threshold.value).mean()), float(above - 0.5))


def _fresh(folder: Path, kind: str, part: int) -> list[Path]:
    return sorted((folder / f"{kind}-{FRESH_SEED + part}" / "train" / "good").iterdir())


if __name__ == "__main__":
    main()
