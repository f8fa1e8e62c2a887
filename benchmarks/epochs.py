"""What caching features saves: an epoch of each method that trains by gradient, from the cache and with the backbone.

    python benchmarks/epochs.py [--data ../shared/data/mtd] [--methods cfa,cflow] [--images 200] [--size 256]

An epoch with the backbone is one that reads and prepares every image and runs the backbone first, as training without a
cache does. Without --data it draws boards. Prints one Markdown row for each method; seconds are of one run.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from flawmap import find_dataset
from flawmap.backbones import create_backbone, create_engine
from flawmap.datasets.drawn import draw_dataset
from flawmap.imaging.decoding import infer_white
from flawmap.imaging.preparation import Preparation
from flawmap.imaging.preprocessing import Preprocessing
from flawmap.learning.data import TrainingData
from flawmap.learning.loop import train
from flawmap.learning.views import Views
from flawmap.methods import METHODS, Optimise, Stage, configure, method_class


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--methods", default=",".join(name for name in METHODS if method_class(name).optimises))
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--size", type=int, default=256)
    options = parser.parse_args()
    print("| method | images | views | features, s | epoch from the cache, s | epoch with the backbone, s | ratio |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        if options.data is None:
            draw_dataset(Path(folder), "boards", 0)
        paths = sorted(sample.path for sample in find_dataset(options.data or Path(folder)).train)[: options.images]
        for name in options.methods.split(","):
            measure(name, paths, (options.size, options.size))


def measure(name: str, paths: list[Path], size: tuple[int, int]) -> None:
    kind = method_class(name)
    config = kind.resolved(configure(kind, {}), "tf_efficientnet_lite0")
    backbone = create_backbone(levels=kind.levels(config), size=size)
    preprocessing = Preprocessing(size, tuple(backbone.mean), tuple(backbone.std), infer_white(paths) or 65535)
    views = Views(*kind.views(config))
    engine = create_engine(kind.extractor(config, backbone, size), size)
    start = time.perf_counter()
    with TrainingData(paths, Preparation(preprocessing, size), engine, views=views, half=True) as data:
        features = time.perf_counter() - start
        method = kind(config, backbone, size)
        epochs: list[float] = []

        def stages() -> Iterator[Stage]:
            for stage in method.stages(len(paths)):
                if isinstance(stage, Optimise):
                    for _ in range(2):  # the first one also starts what starts from data
                        begun = time.perf_counter()
                        yield replace(stage, epochs=1)
                        epochs.append(time.perf_counter() - begun)
                else:
                    yield stage

        train(method, data, data.rows(range(len(data.paths))), stages())
    epoch = epochs[1]
    alone = features / views.count  # an epoch without a cache computes one view of each image
    print(
        f"| {name} | {len(paths)} | {views.count} | {features:.1f} | {epoch:.2f} | {alone + epoch:.2f} | "
        f"{(alone + epoch) / epoch:.1f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
