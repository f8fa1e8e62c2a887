"""One decoded 224 px array to verdict and map, beside the bare backbone; the search, beside a bare matrix product.

    python benchmarks/latency.py [--model MODEL.safetensors] [--data FOLDER] [--rounds 100]

The model is PatchCore on mtd200 (every third of the sorted training images of `--data`, the first 200 of those, at
224 px), trained here if none is given. The bare backbone is the same engine reading the same levels of the same input,
preprocessed beforehand. Each pair takes turns in one process, for each installed engine. The search looks up 28 x 28
patches in banks of several sizes; the matrix product is NumPy's, of the same shape, into memory that is there already.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from flawmap import Detector  # before NumPy and PyTorch, which read how to wait when they load
from flawmap.backbones import create_engine
from flawmap.line.engines import available_engines, cpu_threads
from flawmap.neighbours import nearest, search_index

# isort: split
import numpy as np
import torch

DATA = Path(__file__).parents[2] / "shared" / "data" / "mtd"
SIZE, IMAGES, WARM_UP = 224, 200, 10
QUERIES, WIDTH, BANKS = 28 * 28, 176, (1_500, 10_000, 50_000)


def in_turns(jobs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each job."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(WARM_UP + rounds):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: median(values[WARM_UP:]) for name, values in times.items()}


def inspection(detector: Detector, rounds: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    detector.predict(pixels)  # creates the engine
    engine = create_engine(detector.method_.backbone, detector.image_size, detector.engine)
    images = detector.preparation_.preprocessing.normalised(detector.preparation_.preprocessing(pixels))[None]

    def inspect() -> None:
        found = detector.predict(pixels)
        _ = found.verdict, found.anomaly_map

    took = in_turns({"ours": inspect, "bare": lambda: engine(images)}, rounds)
    print(f"{engine.name:22}{took['ours']:10.2f}{took['bare']:10.2f}{took['ours'] / took['bare']:10.2f}", flush=True)


def search(vectors: int, rounds: int) -> None:
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(vectors, WIDTH, generator=generator)
    queries = torch.randn(QUERIES, WIDTH, generator=generator)
    index = search_index(bank)
    rows, columns, product = queries.numpy(), bank.numpy().T, np.empty((QUERIES, vectors), np.float32)

    def look_up() -> None:
        with torch.inference_mode():
            nearest(queries, index)

    took = in_turns({"ours": look_up, "bare": lambda: np.matmul(rows, columns, out=product)}, rounds)
    print(f"{vectors:<22}{took['ours']:10.2f}{took['bare']:10.2f}{took['ours'] / took['bare']:10.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args()
    print(f"medians of {options.rounds} rounds, ms; {cpu_threads()} threads, torch {torch.__version__}")
    good = options.data / "train" / "good"
    if options.model is None and not good.is_dir():
        print(f"{good} does not exist, so nothing is inspected: give --model, or a folder in MVTec layout with --data")
    else:
        with tempfile.TemporaryDirectory() as folder:
            model = options.model or Path(folder, "model.safetensors")
            if options.model is None:
                Detector("patchcore", image_size=SIZE).fit(sorted(good.iterdir())[::3][:IMAGES]).save(model)
            print(f"{'engine':22}{'ours':>10}{'backbone':>10}{'ratio':>10}")
            for name in available_engines():
                inspection(Detector.load(model, engine=name), options.rounds)
    print(f"{'vectors in the bank':22}{'ours':>10}{'product':>10}{'ratio':>10}")
    for vectors in BANKS:
        search(vectors, options.rounds)


if __name__ == "__main__":
    main()
