"""How much of what an oracle would gain over the defaults is kept by choosing settings on synthetic defects.

    python benchmarks/tuning.py [--shared ../shared/data] [--methods f2r,patchcore,cfa] [--sets mtd,cookie,boards,...]
                                [--size 192] [--seed 0] [--set key=value]

Each method is tuned on each set as `flawmap train --tune --oracle` does it, without test labels: levels and resolution
by the default grid, but F2R's alpha and beta, and CLS-CNFs' weight. The oracle picks, for each figure, the best of the
same points on the test labels. Prints one Markdown row for each set, method and figure, then the share kept over all
sets: the choice's gains over the oracle's, added up.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median

from flawmap import FlawmapError
from flawmap.tuning.outcome import in_words
from flawmap.tuning.refitting import tune_fit
from flawmap.tuning.sweep import FIGURES
from quality import data_sets

LIVE: dict[str, dict[str, list[float]]] = {
    "f2r": {"alpha": [0, 0.25, 0.5, 0.75, 1], "beta": [0, 0.25, 0.5, 0.75, 1]},
    "cls_cnf": {"weight": [0, 0.1, 0.3, 1, 3]},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--methods", default="f2r,patchcore,cfa")
    parser.add_argument("--sets", default="mtd,cookie,boards,fabric,screws")
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    settings = dict(pair.split("=", 1) for pair in options.settings)
    gains: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)  # of the choice, of the oracle
    with tempfile.TemporaryDirectory() as folder:
        print("| set | method | figure | before | chosen | oracle | kept |\n|---|---|---|---|---|---|---|")
        for name, dataset, _ in data_sets(options.sets.split(","), options.shared, Path(folder)):
            for method in options.methods.split(","):
                common = {"method": method, "image_size": options.size, "seed": options.seed}
                try:
                    tuning = tune_fit(dataset, LIVE.get(method), oracle=True, **common, **settings)[1]
                except FlawmapError as error:
                    print(f"| {name} | {method} | {error} |", flush=True)
                    continue
                assert tuning.oracle is not None
                for figure in FIGURES:
                    reached, before = (
                        tuning.oracle.figures[tuning.points.index(point)][figure]
                        for point in (tuning.chosen, tuning.before)
                    )
                    best, kept = tuning.oracle.best(figure)[1], tuning.kept(figure)
                    gains[method, figure].append((reached - before, best - before))
                    share = "-" if kept is None else f"{kept:.0%}"
                    print(f"| {name} | {method} | {figure} | {before:.3f} | {reached:.3f} | {best:.3f} | {share} |")
                sure = f"in {tuning.confidence:.0%} of resamples"
                print(f"{name}, {method}: {in_words(tuning.chosen)}, {sure}, of {len(tuning.points)}", flush=True)
    for (method, figure), pairs in gains.items():
        chosen, oracle = (sum(pair[i] for pair in pairs) for i in (0, 1))
        share = f"{chosen / oracle:.0%}" if oracle > 0 else "nothing to gain"
        moved = median(pair[0] for pair in pairs)
        print(f"{method}, {figure}, {len(pairs)} sets: kept {share}, median gain {moved:+.3f} by the choice")


if __name__ == "__main__":
    main()
