"""Rotated views of model inputs, for methods that train on rotations though features are computed once."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray


@dataclass(frozen=True)
class Views:
    """How many views of each model input there are, the plain one counted, and how far the others are turned.

    Angles are uniform in [-degrees, degrees]; they follow from the input's own pixels and the seed, so that neither the
    order of the images nor an interruption changes them.
    """

    count: int = 1
    degrees: float = 0.0
    seed: int = 0

    def __call__(
        self, inputs: NDArray[np.float32], inside: NDArray[np.bool_] | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
        """Inputs (N, 3, h, w), and where they are scored (N, 1, h, w) -> N * count rows of both, views of one together.

        What a rotation leaves empty is filled by reflection.
        """
        if self.count == 1:
            return inputs, inside
        angles = np.concatenate([self.angles(window) for window in inputs])
        rotated = _rotated(np.repeat(inputs, self.count, 0), angles, "bilinear")
        rotated[:: self.count] = inputs
        if inside is None:
            return rotated, None
        masks = _rotated(np.repeat(inside.astype(np.float32), self.count, 0), angles, "nearest") > 0.5
        masks[:: self.count] = inside
        return rotated, masks

    def angles(self, window: NDArray[np.float32]) -> NDArray[np.float64]:
        """(count,) degrees of one input's views; the first is 0."""
        rng = np.random.default_rng([self.seed, zlib.crc32(np.ascontiguousarray(window).data)])
        return np.append(0.0, rng.uniform(-self.degrees, self.degrees, self.count - 1))

    def describe(self) -> str:
        """What the line about features adds."""
        return "" if self.count == 1 else f", {self.count} views of each rotated by up to {self.degrees:g} degrees"


def _rotated(windows: NDArray[Any], angles: NDArray[np.float64], mode: str) -> NDArray[Any]:
    """(N, C, h, w) turned counter-clockwise about their centres."""
    height, width = windows.shape[2:]
    matrices = torch.zeros(len(angles), 2, 3)
    for matrix, angle in zip(matrices, np.radians(angles).tolist(), strict=True):
        cos, sin = math.cos(angle), math.sin(angle)
        # grid_sample's coordinates run from -1 to 1 on both axes: a rotation of pixels has to undo that scaling.
        matrix[0, 0], matrix[0, 1] = cos, -sin * height / width
        matrix[1, 0], matrix[1, 1] = sin * width / height, cos
    grid = F.affine_grid(matrices, list(windows.shape), align_corners=False)
    turned = F.grid_sample(torch.from_numpy(windows), grid, mode, "reflection", align_corners=False)
    return turned.numpy()
