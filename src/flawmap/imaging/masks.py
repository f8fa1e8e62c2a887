"""Ground-truth masks: read from files, and brought to another size. Needs numpy and Pillow only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flawmap.errors import ImageError
from flawmap.imaging.arrays import size_text
from flawmap.imaging.decoding import read_image


def read_mask(path: Path, size: tuple[int, int] | None = None) -> NDArray[np.bool_]:
    """The defective pixels of a ground-truth mask in any mode that `read_image` reads.

    A pixel is defective where its value (the largest of its colours) is over 127, or over 0 in a mask whose largest
    value is 31 or less, which holds class indices.

    Args:
        path: the mask.
        size: (height, width) of the image it belongs to, checked where given.

    Returns:
        bool (H, W), True where defective.

    Raises:
        ImageError: as `read_image`; the sizes differ; all values are 127 or less and too large for class indices,
            so that no defect would be seen.
    """
    values = read_image(path)
    if values.ndim == 3:
        values = values.max(axis=2)
    if size is not None and values.shape != size:
        raise ImageError(
            f"{path}: the mask is {size_text(values.shape)} but its image is {size_text(size)}; "
            "redraw it on the image at the image's own size"
        )
    largest = int(values.max())
    if 31 < largest <= 127:
        raise ImageError(f"{path}: no mask value is over 127 (the largest is {largest}); save defects as white (255)")
    return values > (0 if largest <= 31 else 127)


def resize_mask(mask: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    """A bool (H, W) mask at another (height, width), by nearest neighbour."""
    height, width = size
    resized = Image.fromarray(mask.astype(np.uint8)).resize((width, height), Image.Resampling.NEAREST)
    return np.array(resized, dtype=np.bool_)
