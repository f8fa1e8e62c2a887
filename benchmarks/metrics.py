"""AUPRO + AUROC + AP of many large maps: seconds, and memory beyond the maps, beside anomalib's.

    python benchmarks/metrics.py [--images 100] [--size 1024] [--repeats 3] [--peer PYTHON]

PYTHON is an interpreter that has anomalib (2.7.0 was the one compared with). Each run is a fresh process that loads the
same maps; ours and the peer's take turns. The maps stay within [0, 1], where anomalib's AUROC leaves scores alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

BATCH = 10


def make(folder: Path, images: int, size: int) -> None:
    """Smooth maps with noise; every other image has one to three round defects, raised a little."""
    import numpy as np
    from scipy import ndimage

    rng = np.random.default_rng(0)
    maps = np.lib.format.open_memmap(folder / "maps.npy", "w+", np.float32, (images, size, size))
    masks = np.lib.format.open_memmap(folder / "masks.npy", "w+", np.bool_, (images, size, size))
    y, x = np.ogrid[:size, :size]
    for i in range(images):
        coarse = rng.random((16, 16), dtype=np.float32)
        scores = 0.6 * ndimage.zoom(coarse, size / 16, order=1) + 0.25 * rng.random((size, size), dtype=np.float32)
        for _ in range(rng.integers(1, 4) if i % 2 else 0):
            row, column, radius = rng.integers(size), rng.integers(size), rng.integers(size // 100, size // 15)
            blob = (y - row) ** 2 + (x - column) ** 2 < radius**2
            masks[i] |= blob
            scores += np.float32(0.15) * blob
        maps[i] = scores.clip(0, 1)


def ours(maps: Any, masks: Any) -> dict[str, float]:
    from flawmap.metrics import PixelCurves

    curves = PixelCurves()
    for start in range(0, len(maps), BATCH):
        curves.update(maps[start : start + BATCH], masks[start : start + BATCH])
    figures = curves.compute()
    return {"aupro": figures.aupro, "auroc": figures.auroc, "ap": figures.average_precision}


def peer(maps: Any, masks: Any) -> dict[str, float]:
    from types import SimpleNamespace

    import torch
    from anomalib.metrics import AUPR, AUPRO, AUROC

    fields = ["anomaly_map", "gt_mask"]
    metrics = {"aupro": AUPRO(fields=fields), "auroc": AUROC(fields=fields), "ap": AUPR(fields=fields)}
    for start in range(0, len(maps), BATCH):
        batch = SimpleNamespace(
            anomaly_map=torch.from_numpy(maps[start : start + BATCH]),
            gt_mask=torch.from_numpy(masks[start : start + BATCH]).int(),
        )
        for metric in metrics.values():
            metric.update(batch)
    return {name: float(metric.compute()) for name, metric in metrics.items()}


def measure(job: Callable[[Any, Any], dict[str, float]], folder: Path) -> dict[str, float | None]:
    import numpy as np

    # Imports belong to neither the time nor the memory of the job.
    job(np.linspace(0, 1, 2048, dtype=np.float32).reshape(2, 32, 32), np.arange(2048).reshape(2, 32, 32) % 32 < 4)
    maps, masks = np.load(folder / "maps.npy"), np.load(folder / "masks.npy")
    before, start = peak_megabytes(), time.perf_counter()
    figures = job(maps, masks)
    seconds, after = time.perf_counter() - start, peak_megabytes()
    return {"seconds": seconds, "megabytes": None if before is None or after is None else after - before, **figures}


def peak_megabytes() -> float | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer", metavar="PYTHON")
    parser.add_argument("--stage", choices=["make", "ours", "peer"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage == "make":
        make(options.folder, options.images, options.size)
    elif options.stage:
        print(json.dumps(measure(ours if options.stage == "ours" else peer, options.folder)))
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    # This process stays small: on Linux a child's peak starts from its parent's.
    with tempfile.TemporaryDirectory() as folder:

        def run(stage: str, python: str) -> str:
            size = ["--images", str(options.images), "--size", str(options.size)]
            command = [python, __file__, "--stage", stage, "--folder", folder, *size]
            return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

        run("make", sys.executable)
        sides = {"ours": sys.executable} | ({"peer": options.peer} if options.peer else {})
        results: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for _ in range(options.repeats):
            for side, python in sides.items():
                results[side].append(json.loads(run(side, python).splitlines()[-1]))

    print(f"AUPRO + AUROC + AP of {options.images} maps of {options.size} x {options.size}")
    for side, runs in results.items():
        seconds = [r["seconds"] for r in runs]
        memory = "?" if runs[0]["megabytes"] is None else f"{max(r['megabytes'] for r in runs):.0f} MB"
        figures = " ".join(f"{name} {runs[0][name]:.4f}" for name in ("aupro", "auroc", "ap"))
        print(f"{side}: {median(seconds):.2f} s ({min(seconds):.2f}-{max(seconds):.2f}), +{memory}; {figures}")
    if options.peer:
        ratio = median(r["seconds"] for r in results["peer"]) / median(r["seconds"] for r in results["ours"])
        print(f"ours is {ratio:.0f} times as fast")


if __name__ == "__main__":
    main()
