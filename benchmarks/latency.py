"""Decoded 224 px arrays to verdicts and maps, beside the bare backbone; the search, beside a bare matrix product.

    python benchmarks/latency.py [--model MODEL.safetensors] [--data FOLDER] [--rounds 100]

The model is PatchCore on mtd200 (every third of the sorted training images of `--data`, the first 200 of those, at
224 px), trained here if none is given. The bare backbone is the same engine reading the same levels of the same input,
preprocessed beforehand. Each pair takes turns in one process, for each installed engine: one array, eight arrays in one
call (milliseconds of one of them), and images a second where 1, 2 and 4 threads share one inspector. The search looks
up 28 x 28 patches in banks of several sizes; the matrix product is NumPy's, of the same shape, into memory that is
there already.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from flawmap import Detector  # before NumPy and PyTorch, which read how to wait when they load
from flawmap.backbones import create_engine
from flawmap.imaging.reading import BATCH
from flawmap.line.engines import available_engines, cpu_threads
from flawmap.neighbours import nearest, search_index

# isort: split
import numpy as np
import torch

DATA = Path(__file__).parents[2] / "shared" / "data" / "mtd"
SIZE, IMAGES, WARM_UP, CALLERS = 224, 200, 10, (1, 2, 4)
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
    pixels = np.random.default_rng(0).integers(0, 256, (BATCH, SIZE, SIZE, 3), dtype=np.uint8)
    inspector = detector.inspector()
    inspector.warm_up()
    preprocessing = detector.preparation_.preprocessing
    engine = create_engine(detector.method_.backbone, detector.image_size, detector.engine)
    for count in (1, BATCH):
        images = preprocessing.normalised(np.stack([preprocessing(image) for image in pixels[:count]]))

        def inspect(count: int = count) -> None:
            for found in inspector.predict_batch(pixels[:count]):
                _ = found.verdict, found.anomaly_map

        def bare(images: Any = images) -> None:
            engine(images)

        took = in_turns({"ours": inspect, "bare": bare}, max(5, rounds // count))
        ours, bare_took = took["ours"] / count, took["bare"] / count
        name = f"{engine.name}, {count} at a time"
        print(f"{name:30}{ours:10.2f}{bare_took:10.2f}{ours / bare_took:10.2f}", flush=True)
    for callers in CALLERS:
        with ThreadPoolExecutor(callers) as pool:
            start = time.perf_counter()
            list(pool.map(lambda i: inspector.predict(pixels[i % BATCH]).verdict, range(rounds)))
            rate = rounds / (time.perf_counter() - start)
        print(f"{f'{engine.name}, {callers} callers':30}{rate:10.1f} images a second", flush=True)


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
    print(f"{vectors:<30}{took['ours']:10.2f}{took['bare']:10.2f}{took['ours'] / took['bare']:10.2f}", flush=True)


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
            print(f"{'engine':30}{'ours':>10}{'backbone':>10}{'ratio':>10}")
            for name in available_engines():
                inspection(Detector.load(model, engine=name), options.rounds)
    print(f"{'vectors in the bank':30}{'ours':>10}{'product':>10}{'ratio':>10}")
    for vectors in BANKS:
        search(vectors, options.rounds)


if __name__ == "__main__":
    main()
