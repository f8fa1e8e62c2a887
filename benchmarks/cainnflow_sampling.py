"""Noise placed into z and carried back through CAINNFlow's inverse, drawn as in Fig. 11 of the paper.

    python benchmarks/cainnflow_sampling.py FOLDER|MODEL IMAGE... -o OUT.png [--image-size 224] [--strength 3]

A folder of good images, or a data set in MVTec layout, is trained on first; a model file has to hold `cainnflow`.
Each image is a row: the input with the places of the noise, then for each level the probability exp(-1/2 mean_c z^2)
with the noise in z, and how far the noise, carried back, moves the feature map at each position.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from flawmap import Detector
from flawmap.imaging.decoding import read_image
from flawmap.methods.blocks.latent_noise import disturbed, with_noise

PLACES = ((0.25, 0.3), (0.7, 0.65))  # (row, column) over the image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="FOLDER|MODEL")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--strength", type=float, default=3.0, help="standard deviation of the noise")
    options = parser.parse_args()
    if options.source.is_dir():
        detector = Detector("cainnflow", image_size=options.image_size).fit(options.source)
    else:
        detector = Detector.load(options.source)
    draw(detector, options.images, options.strength, options.output)
    print(options.output)


def draw(detector: Detector, paths: list[Path], strength: float, output: Path) -> None:
    """Writes the grid of pictures."""
    from matplotlib.figure import Figure

    method = detector.method_
    levels = method.backbone.levels
    columns = 1 + 2 * len(levels)
    figure = Figure(figsize=(2.4 * columns, 2.6 * len(paths)), layout="constrained")
    axes = figure.subplots(len(paths), columns, squeeze=False)
    for row, path in zip(axes, paths, strict=True):
        inputs = detector.preparation_.preprocessing.normalised(detector.preparation_.preprocessing(read_image(path)))
        with torch.no_grad():
            features = method.features(torch.from_numpy(inputs)[None])
            maps = method.inputs(features)
        noisy = with_noise(method.flows, maps, PLACES, strength=strength)
        disturbances = disturbed(method.flows, maps, noisy)
        mean, std = (np.reshape(value, (3, 1, 1)) for value in (method.backbone.mean, method.backbone.std))
        row[0].imshow(np.clip(inputs * std + mean, 0, 1).transpose(1, 2, 0))
        height, width = inputs.shape[1:]
        row[0].scatter([x * width for _, x in PLACES], [y * height for y, _ in PLACES], marker="+", c="red", s=120)
        row[0].set_title(path.stem, fontsize=9)
        pairs = zip(levels, noisy, disturbances, row[1::2], row[2::2], strict=True)
        for level, z, moved, left, right in pairs:
            left.imshow(torch.exp(-z.square().mean(1) / 2)[0], cmap="viridis", vmin=0, vmax=1)
            left.set_title(f"{level}: probability in z", fontsize=9)
            right.imshow(moved[0], cmap="magma", vmin=0)
            right.set_title(f"{level}: map moved", fontsize=9)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.savefig(output, dpi=100)


if __name__ == "__main__":
    main()
