"""Pixels in, model input out, and anomaly maps back onto the pixels. Needs numpy and Pillow only.

An image is one of three arrays everywhere in flawmap: uint8 (H, W) for grey, uint8 (H, W, 3) for RGB and
uint16 (H, W) for 16-bit grey. Sizes are (height, width), as array shapes are.
"""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageOps
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from flawmap.errors import FlawmapError, ImageError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
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
_FORMS = "uint8, uint16 or float in [0, 1], shaped (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)"


def find_images(folder: Path) -> list[Path]:
    """The image files below a folder, by suffix, sorted by their path relative to it.

    Links to folders are followed, each real folder once. Hidden files and folders are left out.

    Raises:
        FlawmapError: a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise FlawmapError(
            f"{error.filename}: the folder cannot be listed ({error.strerror}); check the path and its permissions"
        ) from error

    found: list[Path] = []
    seen: set[str] = set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += (
            Path(parent, name)
            for name in files
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES
        )
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


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
            return _over_black(np.array(image.convert(base + "A")))
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
            f"{path}: the mask is {_size_text(values.shape)} but its image is {_size_text(size)}; "
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


def as_pixels(array: ArrayLike) -> NDArray[Any]:
    """An array given by a user, checked and brought to a form that `Preprocessing` takes.

    Alpha is laid onto black and a single channel's axis is dropped.

    Args:
        array: uint8, uint16 or float in [0, 1]; (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), colours in RGB order.

    Returns:
        uint8, uint16 or (for any float) float32; (H, W) or (H, W, 3). The input itself where nothing had to change.

    Raises:
        ImageError: another type, shape or range, or no pixels.
    """
    pixels = np.asarray(array)
    got = f"an array of {pixels.dtype}, shape {pixels.shape}"
    if not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (1, 3, 4))):
        raise ImageError(f"got {got}; expected {_FORMS}")
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
        return _over_black(pixels)
    return pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels


@dataclass(frozen=True)
class Preprocessing:
    """What is done to every image before the backbone, in training and ever after.

    Resize to `size` without regard to the aspect ratio, by Pillow's bilinear filter (which averages over the
    covered pixels when shrinking), scale to [0, 1], subtract `mean` and divide by `std`.

    Attributes:
        size: (height, width) of the model input, in pixels.
        mean: per channel R, G, B, of values in [0, 1].
        std: per channel, positive.
        white: the value that counts as white (1.0) in 16-bit images; larger ones are clipped. Cameras of 10, 12
            and 14 bits store at most 1023, 4095 and 16383 in 16-bit files: see `infer_white`.

    Raises:
        FlawmapError: a value out of its range.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    white: int = 65535

    def __post_init__(self) -> None:
        if not (len(self.size) == 2 and all(isinstance(side, int) and side > 0 for side in self.size)):
            raise FlawmapError(f"preprocessing: size is {self.size}; it must be (height, width), both at least 1")
        if not (len(self.mean) == 3 and all(math.isfinite(value) for value in self.mean)):
            raise FlawmapError(f"preprocessing: mean is {self.mean}; it must be three finite numbers")
        if not (len(self.std) == 3 and all(math.isfinite(value) and value > 0 for value in self.std)):
            raise FlawmapError(f"preprocessing: std is {self.std}; it must be three positive numbers")
        if not (isinstance(self.white, int) and 1 <= self.white <= 65535):
            raise FlawmapError(f"preprocessing: white is {self.white}; it must be a whole number from 1 to 65535")

    def to_json(self) -> dict[str, Any]:
        """The settings as plain JSON types."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, settings: dict[str, Any]) -> Preprocessing:
        """Undoes `to_json`.

        Raises:
            FlawmapError: a setting is missing, unknown or out of its range.
        """
        try:
            values: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()
            }
            return cls(**values)
        except (TypeError, AttributeError) as error:
            raise FlawmapError(
                f"preprocessing: settings cannot be used ({error}); expected size, mean, std, white"
            ) from error

    def __call__(self, pixels: ArrayLike, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """The model's input for one image.

        Args:
            pixels: an image as `as_pixels` takes it.
            out: float32 (3, height, width), filled and returned where given, so that a batch is filled in place.

        Returns:
            float32 (3, height, width), C-contiguous.

        Raises:
            ImageError: as `as_pixels`.
        """
        pixels = as_pixels(pixels)
        height, width = self.size
        if out is None:
            out = np.empty((3, height, width), np.float32)
        if pixels.dtype == np.uint8:
            resized = _resize(pixels, self.size)
            planes = [resized] * 3 if resized.ndim == 2 else [resized[:, :, channel] for channel in range(3)]
        else:
            white = self.white if pixels.dtype == np.uint16 else 1
            scaled = np.minimum(pixels * np.float32(255 / white), np.float32(255))
            # Pillow has no floating-point mode of several channels.
            if scaled.ndim == 2:
                planes = [_resize(scaled, self.size)] * 3
            else:
                planes = [_resize(scaled[:, :, channel], self.size) for channel in range(3)]
        for plane, mean, std, target in zip(planes, self.mean, self.std, out, strict=True):
            np.multiply(plane, np.float32(1 / (255 * std)), out=target)
            target -= np.float32(mean / std)
        return out


def infer_white(paths: Iterable[Path]) -> int:
    """The value that counts as white in a set of images, for `Preprocessing.white`.

    Pixels are read of the 16-bit images only. Files that cannot be read are passed over: whoever reads them for
    their pixels reports them.

    Returns:
        The smallest of 255, 1023, 4095, 16383 and 65535 (8, 10, 12, 14 and 16 bits) that holds the largest value of
        all 16-bit images; 65535 where there are none.
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
    return 65535 if largest < 0 else min(white for white in _WHITES if white >= largest)


def lay_back(anomaly_map: NDArray[np.floating[Any]], size: tuple[int, int]) -> NDArray[np.float32]:
    """An anomaly map (h, w) at the size (height, width) of the image it was made from: undoes `Preprocessing`'s resize.

    Bilinear with half-pixel centres: map pixel i covers the image from i/h to (i + 1)/h of its height, as it did on
    the way in. Where the image is smaller than the map, the covered map pixels are averaged.

    Returns:
        float32 (H, W), on the map's own scale.
    """
    return np.array(_resize(np.asarray(anomaly_map, dtype=np.float32), size))


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        ImageError: the file cannot be read.
    """
    state = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                state.update(block)
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    return state.hexdigest()


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


def _over_black(pixels: NDArray[Any]) -> NDArray[Any]:
    """(H, W, 2) or (H, W, 4) with alpha last, laid onto black: (H, W) or (H, W, 3) of the same type."""
    colours, alpha = pixels[:, :, :-1], pixels[:, :, -1:]
    if pixels.dtype.kind == "f":
        laid = colours * alpha
    else:
        most = int(np.iinfo(pixels.dtype).max)
        laid = (colours.astype(np.uint32) * alpha + most // 2) // most
    result: NDArray[Any] = laid.astype(pixels.dtype, copy=False)
    return result[:, :, 0] if result.shape[2] == 1 else result


def _resize(pixels: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """uint8 (H, W) or (H, W, 3), or float32 (H, W), at (height, width); read-only."""
    height, width = size
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))


def _size_text(size: tuple[int, ...]) -> str:
    return f"{size[0]} x {size[1]} (height x width)"
