"""Image files decoded: their pixels, their size, and what counts as white in them. Needs numpy and Pillow only."""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from flawmap.errors import ImageError, TooManyPixelsError
from flawmap.imaging.deep_colours import has_deep_colours, read_deep_colours
from flawmap.imaging.formats import FORMATS, HEAD, format_of, reader_of
from flawmap.imaging.image_files import open_regular
from flawmap.imaging.modes import is_deep, pixels_of
from flawmap.imaging.orientation import orientation, turned, without_exif
from flawmap.imaging.pieces import raw_pieces, tiff_pieces
from flawmap.imaging.tiff import as_tagged, has_undeclared_sample, refuse_misread

PIXEL_LIMIT = 178_000_000
"""Larger pictures are refused before they are decoded, but within `pixel_limit`. Just under where Pillow itself refuses
some formats."""

IN_MEMORY = 1 << 26
"""Bytes; larger files are decoded from the disk: they are not held beside their pixels."""

WHOLE = 1 << 25
"""Pixels; larger pictures are decoded piece by piece where the format allows it, and else converted so."""

PATIENCE = 2.0
"""Seconds that a file which changes while it is read is waited for."""

_WHITES = (255, 1023, 4095, 16383, 65535)
_BRIGHTEST = 0.001
_BAND = 1 << 22  # pixels converted at a time


class _Limit:
    """What `pixel_limit` has set for the whole process: images are read in threads of their own."""

    pixels = PIXEL_LIMIT


@contextmanager
def pixel_limit(most: int) -> Iterator[None]:
    """Within it pictures of up to `most` pixels are read, in all threads of the process, instead of `PIXEL_LIMIT`."""
    before = _Limit.pixels, Image.MAX_IMAGE_PIXELS
    _Limit.pixels = most
    if before[1] is not None:  # by which Pillow's readers of GIF, TIFF and WebP refuse on their own
        Image.MAX_IMAGE_PIXELS = max(before[1], most)
    try:
        yield
    finally:
        _Limit.pixels, Image.MAX_IMAGE_PIXELS = before


def read_image(path: Path) -> NDArray[Any]:
    """The pixels of an image file of any of the `formats`, told by content whatever the suffix says.

    The EXIF orientation is applied. Palette, CMYK and 1-bit pictures become RGB or grey; transparency is laid onto
    black. Of a multi-picture JPEG or HEIF, as phones write, it is the main picture. 16-bit values of PNG, TIFF and PNM
    are returned as stored: what counts as white is `Preprocessing.white`. A file that another program is still
    writing is waited for, `PATIENCE` seconds.

    Returns:
        uint8 (H, W) for grey, uint8 (H, W, 3) for colour, uint16 (H, W) or (H, W, 3) for more than 8 bits.

    Raises:
        ImageError: the file is missing, unreadable, empty, damaged, cut off, not a picture, no regular file, animated,
            multi-page, of more pixels than the limit, still being written, or its values do not fit 16 bits.
    """
    return read_image_and_digest(path)[0]


def read_image_and_digest(path: Path) -> tuple[NDArray[Any], str]:
    """`read_image`, and the SHA-256, in hexadecimal, of the bytes that these pixels were decoded from.

    Raises:
        ImageError: as `read_image`.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        with _told(path), open_regular(path) as file:
            before = os.fstat(file.fileno())
            try:
                content, digest = _taken(file, before.st_size)
                pixels = _decoded(content)
                error = None
            except Exception as failure:  # of a file that is not whole yet, it may be of any kind
                error = failure
            after = os.fstat(file.fileno())
            settled = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
            if settled and error is None:
                return pixels, digest
            if settled and (time.monotonic() > deadline or not _grows(path, after)):
                assert error is not None
                raise error
        if time.monotonic() > deadline:
            raise ImageError(f"{path}: is still being written; wait until it is whole, or copy it again")
        time.sleep(0.05)


def decode_image(content: bytes, name: str) -> NDArray[Any]:
    """The pixels of an image file's bytes, as `read_image` gives them.

    Args:
        content: all of the file.
        name: what an error calls it.

    Raises:
        TooManyPixelsError: there are more than `PIXEL_LIMIT`; it is not decoded.
        ImageError: as `read_image`.
    """
    with _told(Path(name)):
        return _decoded(BytesIO(content))


def _grows(path: Path, seen: os.stat_result) -> bool:
    """Whether a file that could not be decoded was written so lately that more may come, and does."""
    if not 0 <= time.time() - seen.st_mtime < PATIENCE:
        return False
    time.sleep(0.1)
    with suppress(OSError):
        now = path.stat()
        return (now.st_size, now.st_mtime_ns) != (seen.st_size, seen.st_mtime_ns)
    return False


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) of the array `read_image` gives, from the header where the format allows it.

    Raises:
        ImageError: as `read_image`, as far as the header tells.
    """
    with opened(path) as image:
        width, height = image.size
        # The TIFF reader has turned the size already.
        if not isinstance(image, TiffImageFile) and orientation(image) in (5, 6, 7, 8):
            return width, height
        return height, width


def infer_white(paths: Iterable[Path]) -> int | None:
    """The value that counts as white in a set of images, for `Preprocessing.white`.

    Pixels are read of the 16-bit images only. Files that cannot be read are passed over: whoever reads them for
    their pixels reports them.

    Returns:
        The smallest of 255, 1023, 4095, 16383 and 65535 (8, 10, 12, 14 and 16 bits) that holds the values of all 16-bit
        images but the brightest thousandth, where the hot pixels of a sensor are; None where there are none.
    """
    counts = np.zeros(65536, np.int64)
    for path in paths:
        try:
            with opened(path) as image:
                deep = is_deep(image) or has_deep_colours(image)
            if deep:
                pixels = read_image(path)
                if pixels.dtype == np.uint16:
                    counts += np.bincount(pixels.ravel(), minlength=65536)
        except ImageError:
            continue
    total = int(counts.sum())
    if total == 0:
        return None
    above = total - np.cumsum(counts)  # values over each value
    largest = int(np.argmax(above <= int(_BRIGHTEST * total)))
    return min(white for white in _WHITES if white >= largest)


@contextmanager
def opened(path: Path) -> Iterator[ImageFile]:
    """The picture with its header read and checked; whatever fails while it is open becomes an ImageError.

    Raises:
        ImageError: as `read_image`, as far as the header tells.
    """
    with _told(path), open_regular(path) as file:
        yield _picture(file)


def _taken(file: BinaryIO, size: int) -> tuple[BinaryIO, str]:
    """A file's content, in memory unless it is very large, and its SHA-256."""
    state = hashlib.sha256()
    if size <= IN_MEMORY:
        content = file.read(size)
        state.update(content)
        return BytesIO(content), state.hexdigest()
    while block := file.read(1 << 20):
        state.update(block)
    return file, state.hexdigest()


def _picture(file: BinaryIO) -> ImageFile:
    """The picture in an open file, with its header read and checked.

    Raises:
        ImageError: whose message lacks the path.
        Exception: of nearly every type, where the file is damaged.
    """
    file.seek(0)
    head = file.read(HEAD)
    if not head:
        raise ImageError("is empty (0 bytes); copy it again or leave it out")
    kind = format_of(head)
    if kind is None:
        raise ImageError(f"is not a {FORMATS} picture; convert it or leave it out")
    image = _open(file, reader_of(kind))
    if (count := image.width * image.height) > _Limit.pixels:
        raise TooManyPixelsError(
            f"has {count} pixels, over the limit of {_Limit.pixels}; cut it into parts, shrink it, or read it all the "
            f"same with --max-pixels {count}"
        )
    # Whether there is a second one: to count them takes as long as a file of many asks for.
    if kind != "HEIF" and getattr(image, "is_animated", False):
        raise ImageError("holds several pictures (animated or multi-page); save each to its own file")
    if isinstance(image, TiffImageFile):
        refuse_misread(image)
    return image


def _open(file: BinaryIO, reader: type[ImageFile]) -> ImageFile:
    """The picture with its header read, whatever its EXIF is like."""
    file.seek(0)
    try:
        return reader(file)
    except Exception:  # of nearly every type
        file.seek(0)
        without = without_exif(file.read())
        if without is None:
            raise
    content, exif = without
    image = reader(BytesIO(content))
    image.info["exif"] = exif
    return image


def _decoded(file: BinaryIO, *, cut: bool = True) -> NDArray[Any]:
    """The pixels of the picture in an open file; with `cut`, a large one's piece by piece where that can be done.

    Raises:
        ImageError, Exception: as `_picture`.
    """
    image = _picture(file)
    large = image.width * image.height > WHOLE
    if large and cut:
        pieces = tiff_pieces(image, file) if isinstance(image, TiffImageFile) else raw_pieces(image, file)
        if pieces is not None:
            parts = (_decoded(piece, cut=False) if isinstance(piece, BytesIO) else piece for piece in pieces)
            return turned(_joined(parts, image.height), 1 if isinstance(image, TiffImageFile) else orientation(image))
    with _large(image):
        if has_deep_colours(image):
            pixels: NDArray[Any] = read_deep_colours(image, lambda: _picture(file))
            return pixels if isinstance(image, TiffImageFile) else turned(pixels, orientation(image))
        image.load()
        pixels = _joined(map(_whole, _bands(image)), image.height) if large else _whole(image)
    return pixels if isinstance(image, TiffImageFile) else turned(pixels, orientation(image))


def _whole(image: Image.Image) -> NDArray[Any]:
    """The pixels of a loaded picture, as stored but for a TIFF, which its reader has turned."""
    if not isinstance(image, TiffImageFile):
        return pixels_of(image)
    undeclared = has_undeclared_sample(image)
    return as_tagged(pixels_of(image.convert("RGB") if undeclared else image), image, image.mode)


def _bands(image: Image.Image) -> Iterator[Image.Image]:
    """A loaded picture in bands of rows, none of which has as many pixels as a large picture."""
    rows = max(1, _BAND // image.width)
    for top in range(0, image.height, rows):
        yield image.crop((0, top, image.width, min(top + rows, image.height)))


def _joined(parts: Iterable[NDArray[Any]], height: int) -> NDArray[Any]:
    """Consecutive rows as one array."""
    joined: NDArray[Any] | None = None
    done = 0
    for part in parts:
        if joined is None:
            joined = np.empty((height, *part.shape[1:]), part.dtype)
        joined[done : done + len(part)] = part
        done += len(part)
    assert joined is not None
    return joined


@contextmanager
def _large(image: ImageFile) -> Iterator[None]:
    """Keeps Pillow from warning of a size that has been judged."""
    if image.width * image.height <= (Image.MAX_IMAGE_PIXELS or PIXEL_LIMIT):
        yield
        return
    with warnings.catch_warnings():  # for large pictures only, as catching is process-wide
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Whatever fails inside becomes an ImageError that names the file and the remedy."""
    try:
        yield
    except ImageError as error:
        if str(error).startswith(f"{path}: "):
            raise
        raise type(error)(f"{path}: {error}") from error
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
