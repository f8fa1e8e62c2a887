"""The papers' ablation tables, on any data set: each row trains and evaluates one choice of settings.

    python benchmarks/ablations.py TABLE DATA [--size 256] [--limit N] [--seeds 0,1,2] [--set key=value]...

TABLE is one of those below. Prints one Markdown row for each, mean and spread (largest minus smallest) over the seeds.
--limit trains on every third of the sorted training images, N of them. Figures are of the last epoch.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean
from typing import Any

from flawmap import Detector, find_dataset

Row = tuple[str, dict[str, Any]]
TABLES: dict[str, tuple[str, list[Row]]] = {
    "cainnflow-2": ("cainnflow", [(name, {"subnet": name}) for name in ("CAC", "CA", "AC", "CC")]),
    "cainnflow-3": ("cainnflow", [(f"step {steps}", {"steps": steps}) for steps in range(1, 6)]),
    "f2r-4": ("f2r", [("regression", {"semantics": "reg"}), ("classification", {"semantics": "cls"})]),
    "f2r-factors": (
        "f2r",
        [
            ("default alpha and beta", {}),
            ("alpha = beta = 1", {"alpha": 1.0, "beta": 1.0}),
            ("local: beta = 0.1", {"alpha": 1.0, "beta": 0.1}),
            ("global: alpha = 0.1", {"alpha": 0.1, "beta": 1.0}),
            ("without covariance", {"covariance": False}),
            ("without semantics", {"semantics": "none"}),
            ("without position", {"position": False}),
        ],
    ),
    "cflow": (
        "cflow",
        [("default", {}), ("fibres of 256, one shared Adam", {"fibres": 256, "shared_adam": True})],
    ),
}
FIGURES = ("image_auroc", "pixel_auroc", "pixel_ap", "aupro")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("data", type=Path)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    method, rows = TABLES[options.table]
    common = dict(pair.split("=", 1) for pair in options.settings)
    dataset = find_dataset(options.data)
    paths = sorted(sample.path for sample in dataset.train)
    if options.limit:
        paths = paths[::3][: options.limit]
    print(f"| {options.table} | {' | '.join(FIGURES)} |\n|---|{'---|' * len(FIGURES)}")
    for name, settings in rows:
        reports = []
        for seed in map(int, options.seeds.split(",")):
            detector = Detector(
                method, backbone=options.backbone, image_size=options.size, seed=seed, **{**common, **settings}
            )
            reports.append(detector.fit(paths).evaluate(dataset))
        found = [[value for report in reports if (value := report.figures[figure]) is not None] for figure in FIGURES]
        cells = [f"{mean(values):.3f} ({max(values) - min(values):.3f})" if values else "-" for values in found]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
