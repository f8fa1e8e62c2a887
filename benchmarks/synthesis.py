"""Synthetic defects a second: made by worker processes, none of which repeats another's, and not written to disk.

    python benchmarks/synthesis.py [--workers 2] [--size 256] [--count 600]

Each worker reads 20 drawn good images and makes its share of the defects, once for each way of making them; start-up
is not counted. Prints the rate of all workers together.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from flawmap.datasets import find_dataset
from flawmap.datasets.drawn import draw_dataset
from flawmap.imaging.decoding import read_image
from flawmap.synthesis import CLS_CNF, DEFAULTS, DRAEM, POUTA, find_foreground, generator, synthesize

SETTINGS = {"default": DEFAULTS, "cls_cnf": CLS_CNF, "draem": DRAEM, "pouta": POUTA}


def made(name: str, paths: Sequence[Path], first: int, step: int, count: int) -> tuple[float, float]:
    """When the defects `first`, `first` + `step`, ... below `count` were begun, and when the last was done."""
    images = [read_image(path) for path in paths]
    foreground = find_foreground(images)
    regions = [foreground.mask(image) for image in images]
    synthesize(images[0], generator(1, 0), images, region=regions[0])  # imports
    begun = time.monotonic()
    for number in range(first, count, step):
        i = number % len(images)
        synthesize(images[i], generator(0, number), images, region=regions[i], settings=SETTINGS[name])
    return begun, time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--count", type=int, default=600)
    options = parser.parse_args()
    print("| images | defects | a second |\n|---|---|---|")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool,
    ):
        for kind in ("fabric", "screws"):
            draw_dataset(Path(folder, kind), kind, 0, train=20, good=1, per_defect=1, size=options.size)
            paths = [sample.path for sample in find_dataset(Path(folder, kind)).train]
            for name in SETTINGS:
                jobs = [
                    pool.submit(made, name, paths, first, options.workers, options.count)
                    for first in range(options.workers)
                ]
                spans = [job.result() for job in jobs]
                seconds = max(end for _, end in spans) - min(begun for begun, _ in spans)
                print(f"| {kind} | {name} | {options.count / seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
