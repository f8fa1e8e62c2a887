"""The service under load beside the bare inspector, in turns on the same images: what HTTP and the records cost.

    python benchmarks/service.py [MODEL.onnx IMAGES_FOLDER] [--seconds 5] [--rounds 3] [--engine auto]

Without arguments it trains PaDiM on drawn boards, and sends their test images as PNG. The bare inspector gets the same
files, one at a time (`predict`) and as a stream, in a process of its own.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import numpy as np

_BARE = """
import sys, time
from pathlib import Path
from flawmap.line import Inspector
model, folder, engine, seconds = sys.argv[1:]
inspector = Inspector.load(model, engine=engine)
paths = sorted(Path(folder).rglob("*.png"))
inspector.warm_up()
for path in paths[:8]:
    inspector.predict(path)
times, start = [], time.perf_counter()
while time.perf_counter() - start < float(seconds):
    begun = time.perf_counter()
    inspector.predict(paths[len(times) % len(paths)]).regions
    times.append(time.perf_counter() - begun)
single = len(times) / (time.perf_counter() - start)
done, start = 0, time.perf_counter()
while time.perf_counter() - start < float(seconds):
    done += len([one.regions for one in inspector.stream(paths)])
print(single, done / (time.perf_counter() - start), *times)
"""


def main() -> None:
    """Prints a line for each number of clients."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("images", nargs="?", type=Path)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engine", default="auto")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model, images = (given.model, given.images) if given.images else drawn(Path(scratch))
        measure(model, images, Path(scratch), given)


def drawn(scratch: Path) -> tuple[Path, Path]:
    """A model of drawn boards, and their test images."""
    for arguments in (
        ["sample", scratch / "boards", "--kind", "boards"],
        ["train", scratch / "boards", "-o", scratch / "boards.safetensors", "--method", "padim"],
        ["export", scratch / "boards.safetensors", "-o", scratch / "boards.onnx"],
    ):
        subprocess.run([sys.executable, "-m", "flawmap", *map(str, arguments)], check=True, stderr=subprocess.DEVNULL)
    return scratch / "boards.onnx", scratch / "boards" / "test"


def measure(model: Path, images: Path, scratch: Path, given: argparse.Namespace) -> None:
    """All of them in turns, medians of the rounds."""
    contents = [path.read_bytes() for path in sorted(images.rglob("*.png"))]
    found: dict[str, list[tuple[float, float, float, float]]] = {}
    for number in range(given.rounds):
        single, streamed, *times = map(
            float,
            subprocess.run(
                [sys.executable, "-c", _BARE, str(model), str(images), given.engine, str(given.seconds)],
                check=True,
                capture_output=True,
                text=True,
            ).stdout.split(),
        )
        found.setdefault("bare, one at a time", []).append((single, *percentiles(times)))
        found.setdefault("bare, streamed", []).append((streamed, np.nan, np.nan, np.nan))
        command = [sys.executable, "-m", "flawmap", "serve", str(model), "--port", "0", "--engine", given.engine]
        process = subprocess.Popen(
            [*command, "--store", str(scratch / f"store{number}")], stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        url = process.stderr.readline().split()[1].rstrip("/")
        threading.Thread(target=process.stderr.read, daemon=True).start()
        for clients in (1, 8, 32):
            times = load(f"{url}/v1/models/{model.stem}/inspections", contents, clients, given.seconds)
            key = f"service, {clients} client{'s' if clients > 1 else ''}"
            found.setdefault(key, []).append((len(times) / given.seconds, *percentiles(times)))
        process.terminate()
        process.wait()
    middle = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in found.items()}
    one, streamed = middle["bare, one at a time"], middle["bare, streamed"]
    print(f"{'':22} images/s  of one at a time  of streamed   p50 ms   p95 ms   p99 ms")
    for name, (rate, p50, p95, p99) in middle.items():
        print(
            f"{name:22} {rate:8.1f}  {rate / one[0]:16.2f}  {rate / streamed[0]:11.2f} {p50:8.1f} {p95:8.1f} {p99:8.1f}"
        )
    print(
        f"p99 at 1 client over the bare inspection's median: {middle['service, 1 client'][3] / one[1]:.2f}, "
        f"over its p99: {middle['service, 1 client'][3] / one[3]:.2f}"
    )


def load(url: str, contents: list[bytes], clients: int, seconds: float) -> list[float]:
    """Seconds that each answered request took."""
    times: list[float] = []
    until = time.perf_counter() + seconds

    def ask(number: int) -> None:
        with httpx.Client(timeout=60) as client:
            sent = number
            while time.perf_counter() < until:
                begun = time.perf_counter()
                answer = client.post(url, content=contents[sent % len(contents)])
                if answer.status_code == 200:
                    times.append(time.perf_counter() - begun)
                sent += clients

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times


def percentiles(times: list[float]) -> tuple[float, float, float]:
    """p50, p95 and p99 in milliseconds."""
    p50, p95, p99 = (1000 * np.quantile(times, (0.5, 0.95, 0.99))).tolist()
    return p50, p95, p99


if __name__ == "__main__":
    main()
