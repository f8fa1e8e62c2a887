"""The arrays that hold images, and arrays given by users brought to these forms. Needs numpy and Pillow only.

An image is one of four arrays everywhere in flawmap: uint8 or uint16, (H, W) for grey or (H, W, 3) for RGB.
Sizes are (height, width), as array shapes are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from flawmap.errors import ImageError
from flawmap.imaging.modes import over_black, pixels_of
from flawmap.imaging.orientation import orientation, turned

_FORMS = "uint8, uint16 or float in [0, 1], shaped (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)"


def as_pixels(array: Any) -> NDArray[Any]:
    """An image given by a user, checked and brought to a form that `Preprocessing` takes.

    Alpha is laid onto black and a single channel's axis is dropped. A Pillow picture becomes what `read_image` makes
    of its file.

    Args:
        array: uint8, uint16 or float in [0, 1]; (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), colours in RGB order: a
            NumPy array, or whatever turns into one, such as a tensor; or a Pillow picture.

    Returns:
        uint8, uint16 or (for any float) float32; (H, W) or (H, W, 3). The input itself where nothing had to change.

    Raises:
        ImageError: another type, shape or range, or no pixels.
    """
    if isinstance(array, Image.Image):
        return _of_picture(array)
    pixels = _as_array(array)
    got = f"an array of {pixels.dtype}, shape {pixels.shape}"
    if not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (1, 3, 4))):
        first = pixels.ndim == 3 and pixels.shape[0] in (1, 3, 4)
        remedy = "; bring the channels last, with .transpose(1, 2, 0)" if first else ""
        raise ImageError(f"got {got}; expected {_FORMS}{remedy}")
    if pixels.size == 0:
        raise ImageError(f"got {got}, which holds no pixels; expected at least one")
    if pixels.dtype.kind == "f":
        low, high = float(pixels.min()), float(pixels.max())
        if not (low >= 0 and high <= 1):  # written so that NaN fails
            raise ImageError(f"got {got}, values from {low:g} to {high:g}; expected {_FORMS}: scale or clip it")
        pixels = pixels.astype(np.float32, copy=False)
    elif pixels.dtype.kind == "u" and pixels.dtype.itemsize <= 2:
        pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    else:
        raise ImageError(f"got {got}; expected {_FORMS}: convert it with .astype")
    if pixels.ndim == 3 and pixels.shape[2] == 4:
        return over_black(pixels)
    return pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels


def is_array(given: Any) -> bool:
    """Whether what a user gave stands for one image: an array, a tensor or a Pillow picture, right or wrong."""
    return isinstance(given, Image.Image) or hasattr(given, "__array__") or hasattr(given, "__array_interface__")


def _of_picture(picture: Image.Image) -> NDArray[Any]:
    try:
        pixels = pixels_of(picture)
        # The TIFF reader turns what it loads.
        return pixels if isinstance(picture, TiffImageFile) else turned(pixels, orientation(picture))
    except ImageError as error:
        raise ImageError(f"got a picture that {error}") from error
    except Exception as error:  # of a file that is read only now, it may be of any kind
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"got a picture that cannot be read ({reason}); give the path of its file") from error


def _as_array(given: Any) -> NDArray[Any]:
    if given is None:
        raise ImageError(f"got None; expected an array of {_FORMS}: check where the image comes from")
    if not isinstance(given, np.ndarray):
        for step in ("detach", "cpu"):  # a tensor that is being trained, or on a GPU, does not turn by itself
            if callable(call := getattr(given, step, None)):
                given = call()
    try:
        return np.asarray(given)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ImageError(
            f"got a {type(given).__name__}, which is no array ({reason}); give a NumPy array of {_FORMS}"
        ) from error


def size_text(size: tuple[int, ...]) -> str:
    """(height, width) in words, such as "480 x 640 (height x width)"."""
    return f"{size[0]} x {size[1]} (height x width)"
