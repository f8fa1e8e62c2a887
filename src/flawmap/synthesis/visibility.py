"""How well a synthetic defect can be seen."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def change(difference: NDArray[np.float32], mask: NDArray[np.bool_]) -> float:
    """Mean over the mask (H, W) of the size of the difference (H, W, C), averaged over 5 x 5 pixels of the mask."""
    from scipy.ndimage import uniform_filter

    near = uniform_filter(mask.astype(np.float32), 5, mode="constant")
    together = uniform_filter(difference, (5, 5, 1), mode="constant")  # alpha and seamless blends are 0 outside
    return float((np.abs(together[mask]) / near[mask][:, None]).mean())


def contrast(defective: NDArray[Any], image: NDArray[Any], mask: NDArray[np.bool_], white: int) -> float:
    """Mean absolute difference of two images inside the mask, over pixels and channels, in 8-bit levels: 0..255.

    Args:
        defective, image: of one type, uint8, uint16 or float in [0, 1]; (H, W) or (H, W, 3).
        white: the value that counts as white in 16-bit images.
    """
    full = 1 if image.dtype.kind == "f" else 255 if image.dtype == np.uint8 else white
    return float(np.abs(defective[mask].astype(np.float64) - image[mask]).mean()) * 255 / full
