"""Ground-truth masks: read from files, and brought to another size. Needs numpy and Pillow only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from flawmap.errors import ImageError
from flawmap.imaging.arrays import size_text
from flawmap.imaging.decoding import opened, read_image
from flawmap.imaging.image_files import find_images

_LOSSY = ("JPEG", "WEBP", "AVIF", "HEIF", "JPEG2000")
_LOSSY_IN_TIFF = (6, 7)


def read_mask(path: Path, size: tuple[int, int] | None = None) -> NDArray[np.bool_]:
    """The defective pixels of a ground-truth mask: those that are not 0, see `mask_values`.

    Args:
        path: the mask; or a folder of several, which together are the mask.
        size: (height, width) of the image it belongs to, checked where given.

    Returns:
        bool (H, W), True where defective.

    Raises:
        ImageError: as `mask_values`; the sizes differ; a folder holds no mask.
    """
    if path.is_dir():
        files = find_images(path)
        if not files:
            raise ImageError(f"{path}: holds no mask; put the mask's pictures there or remove the folder")
        parts = [read_mask(files[0], size)]
        parts += [read_mask(file, parts[0].shape) for file in files[1:]]
        together: NDArray[np.bool_] = np.any(parts, axis=0)
        return together
    values = mask_values(path)
    if size is not None:
        _check_size(path, values.shape, size)
    marked: NDArray[np.bool_] = values != 0
    return marked


def mask_values(path: Path) -> NDArray[Any]:
    """The values of a mask's pixels, 0 where there is no defect.

    Of colours, it is the largest of a pixel's. Palettes are read by their colours, unless those do not tell the
    background: then index 0 is it. What was saved with losses is 0 or 1, cut at half.

    Returns:
        uint8 or uint16 (H, W).

    Raises:
        ImageError: as `read_image`; a mask saved with losses has no value over half, and is not black either, so that
            no defect would be seen.
    """
    with opened(path) as image:
        lossy, indexed = _lossy(image), image.mode == "P"
        indices = np.array(image) if indexed else None
    values = read_image(path)
    if values.ndim == 3:
        values = values.max(axis=2)  # of colours that are no grey, one channel alone may be all there is
    if indices is not None and indices.shape == values.shape and (values.any() != indices.any() or values.all()):
        return indices
    if not lossy:
        return values
    largest, half = int(values.max()), 127 if values.dtype == np.uint8 else 32767
    if _BLACK < largest <= half:
        raise ImageError(
            f"{path}: no mask value is over {half} (the largest is {largest}); save defects as white (255), best as PNG"
        )
    return (values > half).astype(np.uint8)


_BLACK = 15
"""Saving with losses leaves no more than this of black."""


def resize_mask(mask: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    """A bool (H, W) mask at another (height, width), by nearest neighbour."""
    height, width = size
    resized = Image.fromarray(mask.astype(np.uint8)).resize((width, height), Image.Resampling.NEAREST)
    return np.array(resized, dtype=np.bool_)


def _lossy(image: ImageFile) -> bool:
    if isinstance(image, TiffImageFile):
        return image.tag_v2.get(259, 1) in _LOSSY_IN_TIFF
    if image.format == "WEBP" and image.fp is not None:
        image.fp.seek(0)
        return b"VP8L" not in image.fp.read(64)
    return image.format in _LOSSY


def _check_size(path: Path, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise ImageError(
            f"{path}: the mask is {size_text(found)} but its image is {size_text(expected)}; "
            "redraw it on the image at the image's own size"
        )
