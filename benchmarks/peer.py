"""Fit, evaluate, inspect one image: seconds, memory and figures on mtd200, beside anomalib's with the same weights.

    python benchmarks/peer.py --peer PYTHON [--method patchcore] [--rounds 2] [--data FOLDER]
    python benchmarks/peer.py --skip-peer [...]

mtd200 is every third of the sorted training images of `--data`, the first 200 of those, and its whole test set, at
224 px. PYTHON is an interpreter that has anomalib 2.7.0 (see anomalib_peer.py). Each run is a fresh process; ours and
the peer's take turns. Fit is ours with its calibration, the peer's with its validation pass. Evaluate is all metrics
on the test images; ours adds F1-max, escape and overkill rates, and all intervals. Peak memory is the whole
process's, up to there. The peer runs PatchCore on blocks.2 and blocks.4 with a 1 % bank, or PaDiM with 100 features on
blocks.1, blocks.2 and blocks.4; ours runs what `flawmap train` does by default.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from metrics import peak_megabytes

DATA = Path(__file__).parents[2] / "shared" / "data" / "mtd"
SIZE, IMAGES = 224, 200
ROUNDS, WARM_UP = 100, 10
ROWS = {  # of the table: ours, the peer's
    "fit, s": ("fit_seconds", "fit_seconds"),
    "evaluate, s": ("evaluate_seconds", "evaluate_seconds"),
    "one array to verdict and map, ms": ("milliseconds", "milliseconds"),
    "peak memory, MB": ("peak_megabytes", "peak_megabytes"),
    "image AUROC": ("image_auroc", "image_AUROC"),
    "pixel AUROC": ("pixel_auroc", "pixel_AUROC"),
    "pixel AP": ("pixel_ap", "pixel_AUPR"),
    "AUPRO": ("aupro", "pixel_AUPRO"),
}
COSTS = tuple(ROWS)[:4]


def copy_mtd200(source: Path, target: Path) -> None:
    (target / "train" / "good").mkdir(parents=True)
    for image in sorted((source / "train" / "good").iterdir())[::3][:IMAGES]:
        shutil.copyfile(image, target / "train" / "good" / image.name)
    for part in ("test", "ground_truth"):
        shutil.copytree(source / part, target / part, copy_function=shutil.copyfile)


def ours(method: str, data: Path) -> dict[str, Any]:
    from flawmap import Detector  # before NumPy and PyTorch, which read how to wait when they load

    # isort: split
    import numpy as np
    import onnx  # noqa: F401  # imports are counted on neither side; flawmap's are late
    import timm  # noqa: F401

    importlib.import_module("openvino" if importlib.util.find_spec("openvino") else "onnxruntime")
    start = time.perf_counter()
    detector = Detector(method, image_size=SIZE).fit(data)
    fit = time.perf_counter() - start
    start = time.perf_counter()
    report = detector.evaluate(data)
    evaluate = time.perf_counter() - start
    peak = peak_megabytes()
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    times = []
    for _ in range(WARM_UP + ROUNDS):
        start = time.perf_counter()
        inspection = detector.predict(pixels)
        _ = inspection.verdict, inspection.anomaly_map
        times.append(1000 * (time.perf_counter() - start))
    return {
        "fit_seconds": fit,
        "evaluate_seconds": evaluate,
        "milliseconds": median(times[WARM_UP:]),
        "peak_megabytes": peak,
        "settings": f"{report.settings['engine']}, {detector.method_.config!r}",
        "training_images": detector.training_["images"],
        "images": report.images,
        **report.figures,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=["patchcore", "padim"], default="patchcore")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--peer", metavar="PYTHON")
    parser.add_argument("--skip-peer", action="store_true")
    parser.add_argument("--stage", choices=["ours"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        print(json.dumps(ours(options.method, options.data)))
        return
    if not (options.data / "train" / "good").is_dir():
        parser.error(f"{options.data} has no train/good: give a folder in the MVTec AD layout with --data")
    if not (options.peer or options.skip_peer):
        parser.error("give the interpreter that has anomalib with --peer, or --skip-peer")
    compare(options)


def compare(options: argparse.Namespace) -> None:
    # This process stays small, and without flawmap: on Linux a child's peak starts from its parent's, and the peer must
    # not inherit the environment variables that flawmap sets.
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "mtd200")
        copy_mtd200(options.data, data)
        commands = {"ours": [sys.executable, __file__, "--stage", "ours", "--method", options.method]}
        if not options.skip_peer:
            peer = str(Path(__file__).with_name("anomalib_peer.py"))
            commands["peer"] = [options.peer, peer, options.method, "--size", str(SIZE), "--latency"]
        results: dict[str, list[dict[str, Any]]] = {side: [] for side in commands}
        for _ in range(options.rounds):
            for side, command in commands.items():
                run = subprocess.run([*command, "--data", str(data)], capture_output=True, text=True)
                if run.returncode != 0:
                    sys.exit(f"{run.stderr}\n{side} failed, see above")
                results[side].append(json.loads(run.stdout.splitlines()[-1]))

    first = results["ours"][0]
    images = f"{first['training_images']} training and {first['images']} test images"
    print(f"{options.method}, {SIZE} px, {images}; medians of {options.rounds} rounds")
    print(f"ours: {first['settings']}")
    print(f"{'':34}" + "".join(f"{side:>10}" for side in results) + ("     ratio" if "peer" in results else ""))
    for row, keys in ROWS.items():
        cells = {}
        for side, key in zip(results, keys, strict=False):
            values = [run[key] for run in results[side]]
            cells[side] = None if None in values else median(values)
        digits = (0 if row.endswith("MB") else 1) if row in COSTS else 3
        line = f"{row:34}" + "".join("         ?" if v is None else f"{v:10.{digits}f}" for v in cells.values())
        if "peer" in cells and row in COSTS and None not in cells.values():
            line += f"{cells['peer'] / cells['ours']:9.1f}x"
        elif "peer" in cells and row not in COSTS:
            line += f"{cells['ours'] - cells['peer']:+10.3f}"
        print(line)
    if "peer" in results:
        print("ratio: the peer's over ours; of the figures, ours less the peer's")


if __name__ == "__main__":
    main()
