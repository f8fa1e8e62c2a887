"""Good images and copies of them with synthetic defects: what settings are compared on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flawmap.imaging.preparation import Preparation
from flawmap.synthesis import DEFAULTS, GoodImages, find_foreground, generator, looked_at, synthesize
from flawmap.tuning.sweep import Labelled

DEFECTS = 4
"""Synthetic defects made from each good image."""
FEWEST = 4
"""Good images to tune on."""


def synthetic_images(
    paths: Sequence[Path], preparation: Preparation, seed: int, trained_on: frozenset[str] = frozenset()
) -> Iterator[Labelled]:
    """Each good image, followed by up to `DEFECTS` copies with a synthetic defect each, on the part and where it is
    scored.

    Defects are made on the original pixels, so they are the same for whatever size `preparation` resizes to. None is of
    a kind in `trained_on`, `Method.trained_on`: a method tells such ones more surely than real defects.
    """
    kinds = {kind: share for kind, share in DEFAULTS.kinds.items() if kind not in trained_on}
    settings = replace(DEFAULTS, kinds=kinds)
    others = GoodImages(paths)
    foreground = find_foreground(others[i] for i in looked_at(len(paths)))
    white = preparation.preprocessing.white
    for number in range(len(paths)):
        pixels = others[number]
        yield Labelled(pixels, False)
        region = foreground.mask(pixels) & _scored(pixels, preparation)
        for copy in range(DEFECTS):
            rng = generator(seed, number * DEFECTS + copy)
            defect = synthesize(pixels, rng, others, region=region, settings=settings, white=white)
            if defect.mask.any():
                yield Labelled(defect.image, True, defect.mask)


def _scored(pixels: NDArray[Any], preparation: Preparation) -> NDArray[np.bool_]:
    """(H, W), the region of interest on an image's own pixels, and what its alignment shows."""
    placement = preparation.place(pixels)
    if placement.region is None:
        return np.ones(placement.size, np.bool_)
    if placement.alignment is None:
        return placement.region
    laid = placement.alignment.unwarp(placement.region.astype(np.float32))
    return np.nan_to_num(laid) > 0.5
