"""A few good images to learn from, drawn by a seed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from flawmap.datasets.samples import Dataset, Sample
from flawmap.errors import FlawmapError, ImageError
from flawmap.imaging.decoding import read_image
from flawmap.imaging.image_files import digest
from flawmap.text import counted


def draw_shots(dataset: Dataset, shots: int, seed: int) -> Dataset:
    """The data set with so many of its good training images, the same for the same seed whoever learns from them.

    Images that cannot be read are passed over, and so are copies of drawn ones.

    Args:
        dataset: whose test images all stay.
        shots: how many, at least 2.
        seed: of the draw.

    Raises:
        FlawmapError: fewer than two are asked for, or more than there are.
    """
    if shots < 2:
        raise FlawmapError(f"--shots {shots} is too few: give at least 2, one to learn from and one to calibrate on")
    good = dataset.train
    drawn: dict[str, Sample] = {}
    for i in np.random.default_rng(seed).permutation(len(good)):
        if len(drawn) == shots:
            break
        try:
            read_image(good[i].path)
            drawn.setdefault(digest(good[i].path), good[i])
        except ImageError:
            continue
    if len(drawn) < shots:
        different = counted(len(drawn), "different good image")
        raise FlawmapError(
            f"--shots {shots} is more than the {different} that can be read in {dataset.root}: "
            f"give at most {len(drawn)}"
        )
    kept = {sample.path for sample in drawn.values()}
    samples = tuple(s for s in dataset.samples if s.split == "test" or s.label != 0 or s.path in kept)
    return replace(dataset, samples=samples)
