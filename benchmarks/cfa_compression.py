"""Table 6 of the CFA paper on the magnetic tiles: figures and images a second at each compression.

    python benchmarks/cfa_compression.py [--data FOLDER] [--limit N] [--size 256] [--seed 0] [--set key=value]...

gamma_d and gamma_c are 1, 1/2, 1/4 and 1/8 together, as in the paper, all other settings the method's defaults unless
set; the last row is the default itself. Images a second count the whole way from model input to map and score, in the
engine that inspection uses, one image at a time, median of the rounds; the paper's are a GPU's. `--limit` takes so many
of the training images, evenly spread. Prints one Markdown row for each.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

from flawmap import Detector, find_dataset  # before NumPy and PyTorch, which read how to wait when they load

# isort: split
import numpy as np

from flawmap.backbones import create_engine

FIGURES = ("pixel_auroc", "image_auroc", "aupro")
ROUNDS, WARM_UP = 60, 10


def images_per_second(detector: Detector, size: int) -> float:
    engine = create_engine(detector.method_, (size, size))
    image = np.random.default_rng(0).standard_normal((1, 3, size, size), dtype=np.float32)
    times = []
    for _ in range(WARM_UP + ROUNDS):
        start = time.perf_counter()
        engine(image)
        times.append(time.perf_counter() - start)
    return 1 / median(times[WARM_UP:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data" / "mtd")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    paths = sorted(sample.path for sample in find_dataset(options.data).train)
    if options.limit:
        paths = paths[:: max(1, len(paths) // options.limit)][: options.limit]
    chosen: dict[str, Any] = dict(setting.split("=", 1) for setting in options.set)
    print(f"{len(paths)} training images at {options.size} px, seed {options.seed}\n")
    print("| gamma_d | gamma_c | bank | " + " | ".join(FIGURES) + " | images/s | fit, s |")
    print("|---|---|---|" + "---|" * len(FIGURES) + "---|---|")
    for share in (1, 1 / 2, 1 / 4, 1 / 8, None):
        compression: dict[str, Any] = {} if share is None else {"gamma_d": share, "gamma_c": share}
        detector = Detector("cfa", image_size=options.size, seed=options.seed, **compression, **chosen)
        start = time.perf_counter()
        detector.fit(paths)
        fit = time.perf_counter() - start
        report = detector.evaluate(options.data)
        config, bank = detector.method_.config, detector.method_.get_buffer("index")
        figures = " | ".join(f"{report.figures[figure]:.3f}" for figure in FIGURES)
        speed = images_per_second(detector, options.size)
        shares = f"{config.gamma_d:g} | {config.gamma_c:g} | {len(bank)} x {bank.shape[1] - 1}"
        print(f"| {shares} | {figures} | {speed:.1f} | {fit:.0f} |", flush=True)


if __name__ == "__main__":
    main()
