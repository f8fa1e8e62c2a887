"""What Pillow takes TIFF files for where their tags say something else. Needs numpy and Pillow only."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.TiffImagePlugin import TiffImageFile

from flawmap.errors import ImageError

_BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _SAMPLES, _PLANAR = 258, 259, 262, 266, 277, 284
_EXTRA_SAMPLES, _SAMPLE_FORMAT, _SUBSAMPLING, _REFERENCE_BLACK_WHITE = 338, 339, 530, 532
_WHITE_IS_ZERO, _RGB, _INKS, _YCBCR = 0, 2, 5, 6
_SEPARATE = 2
_SIGNED = 2
_JPEGS = (6, 7)


def refuse_misread(image: TiffImageFile) -> None:
    """Of an opened TIFF, not loaded yet.

    Raises:
        ImageError: Pillow would read other pixels than the tags say.
    """
    tags = image.tag_v2
    compression = tags.get(_COMPRESSION, 1)
    if _PHOTOMETRIC not in tags and compression not in _JPEGS:
        raise ImageError("does not say whether 0 is black or white (no PhotometricInterpretation); save it again")
    if tags.get(_PHOTOMETRIC) == _YCBCR and compression == 1:
        subsampling = tuple(tags.get(_SUBSAMPLING, (2, 2)))
        if subsampling != (1, 1) or _REFERENCE_BLACK_WHITE in tags:
            raise ImageError("holds uncompressed YCbCr colours, subsampled or of a reduced range; save it as RGB")
    if tags.get(_PLANAR, 1) == _SEPARATE and tags.get(_SAMPLES, 1) > 1 and not _plain_planes(image):
        raise ImageError("holds its channels in separate planes, of a kind not read; save it with interleaved channels")


def as_tagged(pixels: NDArray[Any], image: TiffImageFile, mode: str) -> NDArray[Any]:
    """The array that Pillow made of a TIFF in `mode`, in accordance with its tags.

    Raises:
        ImageError: it holds negative values.
    """
    tags = image.tag_v2
    if mode == "I;16" and tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        inverted: NDArray[np.uint16] = np.invert(pixels)
        return inverted
    if mode == "L" and tuple(tags.get(_SAMPLE_FORMAT, (1,))) == (_SIGNED,) and int(pixels.max()) > 127:
        raise ImageError("holds negative values; save it as 8- or 16-bit grey")
    return pixels


def has_undeclared_sample(image: TiffImageFile) -> bool:
    """Whether a fourth sample beside RGB is nothing that the file explains: no alpha, for all that is known."""
    tags = image.tag_v2
    return image.mode == "RGBA" and tags.get(_PHOTOMETRIC) == _RGB and _EXTRA_SAMPLES not in tags


def _plain_planes(image: TiffImageFile) -> bool:
    """Whether its planes are 8-bit colours or inks, and nothing else that matters."""
    tags = image.tag_v2
    channels = {_RGB: 3, _INKS: 4}.get(tags.get(_PHOTOMETRIC, -1))
    extra = tuple(tags.get(_EXTRA_SAMPLES, ()))
    return (
        channels is not None
        and tags.get(_SAMPLES) == channels + len(extra)
        and not any(extra)
        and set(tags.get(_BITS, (1,))) == {8}
        and tags.get(_FILL_ORDER, 1) == 1
    )
