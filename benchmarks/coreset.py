"""The greedy k-center coreset: seconds and picks a second beside plain greedy's on the same points, and cover radii.

    python benchmarks/coreset.py [--points 200000] [--share 0.01] [--data FOLDER] [--skip-data]

On random clustered points, and on the patches of all training images of `--data` at 256 px, blocks.2 and blocks.4 fused
(152 channels, averaged over 3 x 3 neighbours, standardised), as PatchCore fuses them. Plain greedy, one matrix-vector
product a pick, would take up to hours, so its speed is that of its first picks, half of them timed before ours and half
after. The cover radius, the largest distance of a point to its nearest pick, is compared on fewer points, in float64.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

from flawmap.backbones import create_backbone, create_engine  # before NumPy and PyTorch, for how they wait
from flawmap.imaging.preparation import Preparation
from flawmap.imaging.preprocessing import Preprocessing
from flawmap.imaging.reading import read_batches
from flawmap.neighbours import k_center_greedy

# isort: split
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

DATA = Path(__file__).parents[2] / "shared" / "data" / "mtd"
LEVELS, SIZE, WIDTH = ("blocks.2", "blocks.4"), 256, 152
PLAIN_PICKS = 30
COVER_POINTS, COVER_SIZES = 20_000, (10, 30, 100, 300, 1000)


def clustered(count: int, seed: int = 0) -> NDArray[np.float32]:
    """(count, WIDTH): clusters of very different sizes and spreads, as patch features form them."""
    rng = np.random.default_rng(seed)
    clusters = 50
    centres = 2 * rng.standard_normal((clusters, WIDTH), np.float32)
    spreads = rng.uniform(0.2, 1, clusters).astype(np.float32)
    members = rng.choice(clusters, count, p=rng.dirichlet(np.full(clusters, 0.5)))
    points = rng.standard_normal((count, WIDTH), np.float32)
    points *= spreads[members, None]
    points += centres[members]
    return points


def patches(paths: list[Path]) -> NDArray[np.float32]:
    """(images * 32 * 32, WIDTH): fused patch features."""
    backbone = create_backbone(levels=LEVELS, size=(SIZE, SIZE))
    engine = create_engine(backbone, (SIZE, SIZE))
    size = (SIZE, SIZE)
    prepare = Preparation(Preprocessing(size, tuple(backbone.mean), tuple(backbone.std)), size)
    side = SIZE // 8
    fused = np.empty((len(paths), side * side, WIDTH), np.float32)
    done = 0
    for batch in read_batches(paths, prepare):
        images = batch.inputs
        pooled = [F.avg_pool2d(torch.from_numpy(level), 3, 1, 1, count_include_pad=False) for level in engine(images)]
        deep = F.interpolate(pooled[1], size=(side, side), mode="bilinear", align_corners=False)
        fused[done : done + len(images)] = torch.cat([pooled[0], deep], 1).flatten(2).transpose(1, 2).numpy()
        done += len(images)
    points = fused[:done].reshape(-1, WIDTH)
    mean, std = points.mean(0, dtype=np.float64), points[::10].std(0, dtype=np.float64)
    points -= mean.astype(np.float32)
    points /= std.astype(np.float32)
    return points


class PlainGreedy:
    """Every distance brought up to date with every pick."""

    def __init__(self, points: NDArray[np.float32]) -> None:
        self.points = points
        self.norms = np.einsum("nd,nd->n", points, points)
        self.squared = np.full(len(points), np.inf, points.dtype)
        mean = points.mean(0)
        self.next = int((self.norms - 2 * (points @ mean)).argmax())  # the point farthest from the mean

    def pick(self) -> int:
        index = self.next
        distances = self.points @ self.points[index]
        distances *= -2
        distances += self.norms
        distances += self.norms[index]
        np.minimum(self.squared, distances, out=self.squared)
        self.squared[index] = -np.inf
        self.next = int(self.squared.argmax())
        return index


def speeds(name: str, points: NDArray[np.float32], share: float) -> None:
    k = int(share * len(points))
    plain = PlainGreedy(points)
    plain_seconds: list[float] = []

    def time_plain() -> None:
        for _ in range(PLAIN_PICKS // 2):
            start = time.perf_counter()
            plain.pick()
            plain_seconds.append(time.perf_counter() - start)

    time_plain()
    start = time.perf_counter()
    picks = k_center_greedy(points, k)
    seconds = time.perf_counter() - start
    time_plain()
    rate, plain_rate = len(picks) / seconds, 1 / median(plain_seconds)
    print(
        f"{name}, {len(points)} x {points.shape[1]}: {len(picks)} picks in {seconds:.1f} s, {rate:.0f} a second; "
        f"plain greedy {plain_rate:.1f} a second; ratio {rate / plain_rate:.1f}",
        flush=True,
    )


def cover_radii(points: NDArray[np.float32], order: NDArray[np.int64]) -> dict[int, float]:
    exact = points.astype(np.float64)
    squared = np.full(len(points), np.inf)
    norms = np.einsum("nd,nd->n", exact, exact)
    radii = {}
    for size, index in enumerate(order, start=1):
        np.minimum(squared, norms - 2 * (exact @ exact[index]) + norms[index], out=squared)
        if size in COVER_SIZES:
            radii[size] = float(np.sqrt(squared.max()))
    return radii


def covers() -> None:
    points = clustered(COVER_POINTS, seed=1)
    plain = PlainGreedy(points)
    plain_order = np.array([plain.pick() for _ in range(max(COVER_SIZES))])
    theirs, ours = cover_radii(points, plain_order), cover_radii(points, k_center_greedy(points, max(COVER_SIZES)))
    print(f"cover radius over plain greedy's, clustered float32, {COVER_POINTS} x {WIDTH}:")
    print("  " + ", ".join(f"{ours[size] / theirs[size]:.6f} at {size}" for size in COVER_SIZES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=200_000, help="random clustered points")
    parser.add_argument("--share", type=float, default=0.01, help="share of the points that is picked")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--images", type=int, help="only the first so many training images")
    parser.add_argument("--skip-data", action="store_true", help="random points only")
    options = parser.parse_args()
    print(f"share {options.share:g}, float32, NumPy {np.__version__}")
    covers()
    speeds("clustered", clustered(options.points), options.share)
    good = options.data / "train" / "good"
    if options.skip_data:
        return
    if not good.is_dir():
        print(f"{good} does not exist: no patches; give a folder in the MVTec AD layout with --data")
        return
    paths = sorted(good.iterdir())[: options.images]
    speeds(f"patches of {len(paths)} images", patches(paths), options.share)


if __name__ == "__main__":
    main()
