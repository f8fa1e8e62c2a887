"""Figures of each method's defaults on every set.

    python benchmarks/quality.py [--shared ../shared/data] [--methods padim,patchcore,cfa] [--sets mtd200] [--seeds 0]
                                 [--size N] [--set key=value]

mtd200: every third of the sorted magnetic tiles, 200 of them, at 224 px (the development set). The others at 256 px:
mtd, all tiles, and cookie from the shared folder, and the three drawn sets. Prints one Markdown row for each: with
several seeds, the means and how far the seeds lie apart. For image_auroc_unseen the good images are not those of the
test set but those of the calibration, which the method that scored them had not learnt: nearly all good tiles of mtd's
test set show what a training image shows at another exposure.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

import numpy as np

from flawmap import Detector, find_dataset
from flawmap.datasets import Dataset
from flawmap.datasets.drawn import draw_dataset
from flawmap.metrics import auroc

FIGURES = (
    "image_auroc",
    "image_auroc_unseen",
    "pixel_auroc",
    "pixel_ap",
    "aupro",
    "escape_rate",
    "escape_rate_oracle",
    "overkill_rate",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--methods", default="padim,patchcore,cfa")
    parser.add_argument("--sets", default="mtd200,cookie,boards,fabric,screws")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--size", type=int, help="of all sets, instead of each one's")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(f"| set | method | {' | '.join(FIGURES)} |\n|---|---|{'---|' * len(FIGURES)}")
        for name, dataset, size in data_sets(options.sets.split(","), options.shared, Path(folder)):
            for method in options.methods.split(","):
                reports = []
                for seed in map(int, options.seeds.split(",")):
                    settings = dict(pair.split("=", 1) for pair in options.settings)
                    detector = Detector(method, image_size=options.size or size, seed=seed, **settings)
                    reports.append(_figures(detector.fit(dataset), dataset))
                found = [[report[figure] for report in reports] for figure in FIGURES]
                values = " | ".join(_cell(row) for row in found)
                print(f"| {name} | {method} | {values} |", flush=True)


def data_sets(names: Sequence[str], shared: Path, folder: Path) -> Iterator[tuple[str, Dataset, int]]:
    """Name, data and input size of each set of `names` that can be had; drawn ones are drawn in `folder`."""
    for name in names:
        if name in ("boards", "fabric", "screws"):
            draw_dataset(folder / name, name, 0)
            yield name, find_dataset(folder / name), 256
        elif not shared.is_dir():
            print(f"{name} is left out: {shared} is missing")
        elif name == "mtd200":
            dataset = find_dataset(shared / "mtd")
            train = sorted(dataset.train, key=lambda sample: sample.path)[::3][:200]
            yield name, replace(dataset, samples=(*train, *dataset.test)), 224
        else:
            yield name, find_dataset(shared / name), 256


def _figures(detector: Detector, dataset: Dataset) -> dict[str, float | None]:
    report = detector.evaluate(dataset)
    assert detector.calibration_ is not None
    good = list(detector.calibration_.scores)
    bad = [judged.score for judged in report.results if judged.defective and judged.score is not None]
    scores, labels = np.array([*good, *bad], np.float32), [False] * len(good) + [True] * len(bad)
    return {**report.figures, "image_auroc_unseen": auroc(scores, labels)}


def _cell(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "-"
    apart = f" ({min(known):.3f} to {max(known):.3f})" if len(known) > 1 else ""
    return f"{mean(known):.3f}{apart}"


if __name__ == "__main__":
    main()
