"""Image files decoded: their pixels, their size, and what counts as white in them. Needs numpy and Pillow only."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from flawmap.errors import ImageError
from flawmap.imaging.arrays import over_black

PIXEL_LIMIT = 178_000_000
"""Larger pictures are refused before they are decoded. Just under where Pillow itself refuses some formats."""

# Opening with the reader's class, where Image.open would do, keeps Pillow's other forty formats (some of which start
# programs) away from untrusted files, gives the first picture of a multi-picture JPEG, and needs no change to the
# process-wide Image.MAX_IMAGE_PIXELS.
_READERS: dict[bytes, type[ImageFile]] = {
    b"\xff\xd8\xff": JpegImageFile,
    b"\x89PNG\r\n\x1a\n": PngImageFile,
    b"BM": BmpImageFile,
    b"II": TiffImageFile,
    b"MM": TiffImageFile,
    b"RIFF": WebPImageFile,
}
_WHITES = (255, 1023, 4095, 16383, 65535)


def read_image(path: Path) -> NDArray[Any]:
    """The pixels of a JPEG, PNG, BMP, TIFF or WebP file, told by content whatever the suffix says.

    The EXIF orientation is applied. Palette, CMYK and 1-bit pictures become RGB or grey; transparency is laid onto
    black. Colour with 16 bits a channel keeps its upper 8. A multi-picture JPEG, as phones write, gives its first
    picture. 16-bit values are returned as stored: what counts as white is `Preprocessing.white`.

    Returns:
        uint8 (H, W) for grey, uint8 (H, W, 3) for colour, uint16 (H, W) for 16-bit grey.

    Raises:
        ImageError: the file is missing, unreadable, empty, damaged, cut off, not a picture, animated, multi-page,
            of more than `PIXEL_LIMIT` pixels, or its values do not fit 16 bits.
    """
    with _opened(path) as image:
        if image.width * image.height > (Image.MAX_IMAGE_PIXELS or PIXEL_LIMIT):
            with warnings.catch_warnings():  # only here: PIXEL_LIMIT has judged the size, and catching is process-wide
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                image.load()
        ImageOps.exif_transpose(image, in_place=True)

        if image.mode == "F":
            raise ImageError(f"{path}: holds floating-point values; save it as 8- or 16-bit grey")
        if _is_deep(image):
            values = np.array(image)
            low, high = int(values.min()), int(values.max())
            if low < 0 or high > 65535:
                raise ImageError(f"{path}: holds values from {low} to {high}; save it as 8- or 16-bit grey")
            return values.astype(np.uint16, copy=False)

        base = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
        if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
            return over_black(np.array(image.convert(base + "A")))
        return np.array(image if image.mode == base else image.convert(base))


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) of the array `read_image` gives, from the header where the format allows it.

    Raises:
        ImageError: as `read_image`, as far as the header tells.
    """
    with _opened(path) as image:
        width, height = image.size
        # The TIFF reader has turned the size already.
        if not isinstance(image, TiffImageFile) and image.getexif().get(0x0112) in (5, 6, 7, 8):
            return width, height
        return height, width


def infer_white(paths: Iterable[Path]) -> int | None:
    """The value that counts as white in a set of images, for `Preprocessing.white`.

    Pixels are read of the 16-bit images only. Files that cannot be read are passed over: whoever reads them for
    their pixels reports them.

    Returns:
        The smallest of 255, 1023, 4095, 16383 and 65535 (8, 10, 12, 14 and 16 bits) that holds the largest value of
        all 16-bit images; None where there are none.
    """
    largest = -1
    for path in paths:
        try:
            with _opened(path) as image:
                deep = _is_deep(image)
            if deep:
                largest = max(largest, int(read_image(path).max()))
        except ImageError:
            continue
    return None if largest < 0 else min(white for white in _WHITES if white >= largest)


@contextmanager
def _opened(path: Path) -> Iterator[ImageFile]:
    """The picture with its header read and checked; whatever fails while it is open becomes an ImageError."""
    try:
        if path.exists() and not path.is_file():
            raise ImageError(f"{path}: is not a file; give an image, or its folder where a folder is expected")
        with path.open("rb") as file:
            start = file.read(16)
            if not start:
                raise ImageError(f"{path}: is empty (0 bytes); copy it again or leave it out")
            reader = next((reader for magic, reader in _READERS.items() if start.startswith(magic)), None)
            if reader is None:
                raise ImageError(f"{path}: is not a JPEG, PNG, BMP, TIFF or WebP picture; convert it or leave it out")
            file.seek(0)
            image = reader(file)
            if image.width * image.height > PIXEL_LIMIT:
                raise ImageError(
                    f"{path}: has {image.width * image.height} pixels, over the limit of {PIXEL_LIMIT}; "
                    "cut it into parts or shrink it"
                )
            frames = getattr(image, "n_frames", 1)
            if frames > 1:
                raise ImageError(f"{path}: holds {frames} pictures (animated or multi-page); save each to its own file")
            yield image
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(f"{path}: does not exist; check the path") from error
    except PermissionError as error:
        raise ImageError(f"{path}: may not be read (permission denied); change its permissions") from error
    except OSError as error:
        if error.errno is None:  # Pillow's own
            raise _undecodable(path, error) from error
        raise ImageError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    except Exception as error:  # damaged data makes Pillow's readers raise nearly every type there is
        raise _undecodable(path, error) from error


def _undecodable(path: Path, error: Exception) -> ImageError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ImageError(
        f"{path}: cannot be decoded, damaged or of an unsupported kind ({reason}); "
        "copy it again or save it as 8- or 16-bit grey or RGB"
    )


def _is_deep(image: Image.Image) -> bool:
    return image.mode.startswith("I")
