"""Soft labels: how strongly a synthetic defect's pixels should be called defective (Oh & Kim, IEEE Access 2024)."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Reading = Literal["abs_pixelwise", "official_signed_scalar", "binary"]


def soft_label(
    image: NDArray[np.floating[Any]],
    defective: NDArray[np.floating[Any]],
    mask: NDArray[np.bool_],
    reading: Reading = "abs_pixelwise",
    slope: float = 5.0,
) -> NDArray[np.float32]:
    """The classification target of a synthetic defect, zero outside its mask.

    - `abs_pixelwise`, as the paper says: sigmoid(slope · d) at each pixel, d the mean over the channels of
      |defective - image|; 0.5 to 0.9933. With one channel this is the |mean difference| of the text.
    - `official_signed_scalar`, as the authors' program computes it: one value for the whole mask, the mean over those
      of its pixels that changed of sigmoid(slope · d), d the signed mean difference; 0.0067 to 0.9933, below 0.5
      for defects darker than the image. 0.5 where nothing changed.
    - `binary`: 1.

    Args:
        image, defective: (H, W) or (H, W, C), values in [0, 1].
        mask: bool (H, W).

    Returns:
        float32 (H, W).
    """
    label = np.zeros(mask.shape, np.float32)
    if reading == "binary" or not mask.any():
        label[mask] = 1
        return label
    difference = (defective[mask] - image[mask]).reshape(int(mask.sum()), -1)  # (N, C)
    if reading == "abs_pixelwise":
        label[mask] = _sigmoid(slope * np.abs(difference).mean(axis=1))
        return label
    signed = difference.mean(axis=1)
    changed = signed[signed != 0]
    label[mask] = _sigmoid(slope * changed).mean() if changed.size else 0.5
    return label


def _sigmoid(values: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    likely: NDArray[np.floating[Any]] = 1 / (1 + np.exp(-values))
    return likely
