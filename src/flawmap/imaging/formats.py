"""Which reader an image file gets, told by its first bytes. Needs Pillow only; HEIF pictures need pi-heif.

Opening with the reader's class, where Image.open would do, keeps Pillow's other forty formats (some of which start
programs) away from untrusted files, gives the first picture of a multi-picture JPEG, and needs no change to the
process-wide Image.MAX_IMAGE_PIXELS.
"""

from __future__ import annotations

from typing import Literal

from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

HEAD = 64
"""Bytes at the beginning of a file that `format_of` looks at."""

Format = Literal["JPEG", "PNG", "BMP", "TIFF", "WebP", "HEIF", "AVIF", "JPEG 2000", "GIF", "PNM"]

FORMATS = "JPEG, PNG, BMP, TIFF, WebP, HEIF, AVIF, JPEG 2000, GIF or PNM"
"""In words."""

_MAGIC: dict[bytes, Format] = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"BM": "BMP",
    b"II": "TIFF",
    b"MM": "TIFF",
    b"RIFF": "WebP",
    b"\0\0\0\x0cjP  \r\n\x87\n": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    **{b"P%d%c" % (kind, space): "PNM" for kind in range(1, 7) for space in b" \t\r\n#"},
}
_AVIF = (b"avif", b"avis")
_HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
_READERS: dict[Format, type[ImageFile]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "BMP": BmpImageFile,
    "TIFF": TiffImageFile,
    "WebP": WebPImageFile,
    "AVIF": AvifImageFile,
    "JPEG 2000": Jpeg2KImageFile,
    "GIF": GifImageFile,
    "PNM": PpmImageFile,
}


def format_of(head: bytes) -> Format | None:
    """The format of a file that begins with these bytes, at least `HEAD` where it has as many."""
    if head[4:8] == b"ftyp":
        # A brand that both share ("some picture") comes first in many files: what else they are compatible with tells.
        length = min(int.from_bytes(head[:4], "big"), len(head))
        brands = {head[8:12], *(head[at : at + 4] for at in range(16, length - 3, 4))}
        return "AVIF" if brands.intersection(_AVIF) else "HEIF" if brands.intersection(_HEIF) else None
    return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)


def reader_of(kind: Format) -> type[ImageFile]:
    """The class that reads a format."""
    if kind == "HEIF":
        from pi_heif.as_plugin import HeifImageFile  # loads a library, for whoever has such pictures

        reader: type[ImageFile] = HeifImageFile
        return reader
    return _READERS[kind]
