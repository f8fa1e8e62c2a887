"""Figures of each method's defaults on every set.

    python benchmarks/quality.py [--shared ../shared/data] [--methods padim,patchcore,cfa] [--sets mtd200] [--seeds 0]
                                 [--size N] [--set key=value]

mtd200: every third of the sorted magnetic tiles, 200 of them, at 224 px (the development set). The others at 256 px:
mtd, all tiles, and cookie from the shared folder, and the three drawn sets. Prints one Markdown row for each: with
several seeds, the means and how far the seeds lie apart.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import mean

from flawmap import Detector, find_dataset
from flawmap.datasets.drawn import draw_dataset

FIGURES = ("image_auroc", "pixel_auroc", "pixel_ap", "aupro", "escape_rate", "overkill_rate")


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
        sets: dict[str, tuple[Path, int]] = {}
        if options.shared.is_dir():
            sets |= {"mtd200": (options.shared / "mtd", 224), "cookie": (options.shared / "cookie", 256)}
            sets["mtd"] = options.shared / "mtd", 256
        else:
            print(f"{options.shared} is missing: the drawn sets only")
        for kind in ("boards", "fabric", "screws"):
            draw_dataset(Path(folder, kind), kind, 0)
            sets[kind] = (Path(folder, kind), 256)
        print(f"| set | method | {' | '.join(FIGURES)} |\n|---|---|{'---|' * len(FIGURES)}")
        for name in options.sets.split(","):
            if name not in sets:
                continue
            root, size = sets[name]
            paths = [sample.path for sample in find_dataset(root).train]
            if name == "mtd200":
                paths = sorted(paths)[::3][:200]
            for method in options.methods.split(","):
                reports = []
                for seed in map(int, options.seeds.split(",")):
                    settings = dict(pair.split("=", 1) for pair in options.settings)
                    detector = Detector(method, image_size=options.size or size, seed=seed, **settings).fit(paths)
                    reports.append(detector.evaluate(root))
                found = [[report.figures[figure] for report in reports] for figure in FIGURES]
                values = " | ".join(_cell(row) for row in found)
                print(f"| {name} | {method} | {values} |", flush=True)


def _cell(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "-"
    apart = f" ({min(known):.3f} to {max(known):.3f})" if len(known) > 1 else ""
    return f"{mean(known):.3f}{apart}"


if __name__ == "__main__":
    main()
