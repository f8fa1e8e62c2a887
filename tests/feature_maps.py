"""Feature maps that are drawn, without images, and the trunk that would give such."""

import numpy as np
import torch

from flawmap.backbones import Backbone, create_backbone

SIZE = (64, 64)
LEVELS = ("blocks.1", "blocks.2")


def small_trunk() -> Backbone:
    return create_backbone(levels=LEVELS, weights="random", size=SIZE)


def drawn_features(images, seed=0):
    """Correlated maps as the trunk gives them at 64 x 64: 24 channels at 1/4 and 40 at 1/8."""
    random = np.random.default_rng(seed)
    maps = []
    for channels, side in ((24, 16), (40, 8)):
        mixing = random.standard_normal((channels, channels)) / np.sqrt(channels)
        values = 3 + np.einsum("nchw,cd->ndhw", random.standard_normal((images, channels, side, side)), mixing)
        maps.append(torch.from_numpy(values.astype(np.float32)))
    return maps
