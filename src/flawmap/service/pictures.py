"""The pictures of inspections: files named by their digest, within a budget."""

from __future__ import annotations

import hashlib
import threading
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from flawmap.errors import FlawmapError
from flawmap.files import replacing
from flawmap.judging.inspection import Inspection
from flawmap.report.overlays import HeatScale, as_rgb, map_levels
from flawmap.service.records import Records

_SCALE = "flawmap-scale"  # of a map's file
_BLOCK = 200  # inspections that are let go of at a time


class PicturesFullError(FlawmapError):
    """The disk of the pictures is full."""


class Pictures:
    """The files themselves. Which inspection has which is in the records.

    Attributes:
        folder: where they are.
        budget: bytes that they may take; the oldest good ones go first.
    """

    def __init__(self, folder: Path, records: Records, budget: int) -> None:
        """Raises FlawmapError where the folder cannot be made."""
        from flawmap.report.drawings import make_folder

        make_folder(folder)
        self.folder = folder
        self.budget = budget
        self._records = records
        self._stored: int | None = None
        self._counting = threading.Lock()

    def keep(self, content: bytes, inspection: Inspection, scale: HeatScale | None) -> tuple[str, str | None, int]:
        """Writes the bytes that were judged, and the map.

        Returns:
            The names of the two, the second None for a method without a map, and their bytes.

        Raises:
            PicturesFullError: the disk is full.
            FlawmapError: it cannot be written.
        """
        picture = self._write(content)
        if inspection.maps is None or scale is None:
            return picture, None, len(content)
        drawn = map_png(inspection, scale)
        return picture, self._write(drawn), len(content) + len(drawn)

    def read(self, name: str) -> bytes | None:
        """What is in a file; None where it is not there any more."""
        try:
            return self._path(name).read_bytes()
        except OSError:
            return None

    def added(self, stored: int) -> None:
        """Makes room after pictures of so many bytes were kept."""
        with self._counting:
            if self._stored is None:
                self._stored = self._records.stored()
            else:
                self._stored += stored
            while self._stored > self.budget:
                rows = self._records.disposable(_BLOCK)
                if not rows:
                    break
                going, freed = [], 0
                for row in rows:
                    going.append(row.id)
                    freed += row.stored
                    if self._stored - freed <= self.budget:
                        break
                for name in self._records.drop_pictures(going):
                    with suppress(OSError):
                        self._path(name).unlink()
                self._stored -= freed

    def _write(self, content: bytes) -> str:
        name = hashlib.sha256(content).hexdigest()
        path = self._path(name)
        if path.is_file() and path.stat().st_size == len(content):
            return name
        try:
            path.parent.mkdir(exist_ok=True)
            with replacing(path) as file:
                file.write(content)
        except (OSError, FlawmapError) as error:
            if "disk is full" in str(error) or getattr(error, "errno", None) == 28:
                raise PicturesFullError("the disk of the pictures is full: free some space, or keep fewer") from error
            raise FlawmapError("a picture cannot be written: check the folder of the records") from error
        return name

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / name


def map_png(inspection: Inspection, scale: HeatScale) -> bytes:
    """The map as `flawmap.report.overlays.write_map` writes it, with its scale: a later threshold has another one."""
    text = PngInfo()
    text.add_text(_SCALE, f"{scale.low!r} {scale.high!r}")
    out = BytesIO()
    Image.fromarray(map_levels(inspection, scale)).save(out, format="PNG", compress_level=1, pnginfo=text)
    return out.getvalue()


def map_of(content: bytes) -> tuple[NDArray[np.float32], HeatScale]:
    """Undoes `map_png`, to within its steps: (H, W) float32, in the method's units, and the scale."""
    with Image.open(BytesIO(content)) as image:
        low, high = map(float, image.info[_SCALE].split())
        values: NDArray[np.float32] = np.array(image, dtype=np.float32)
    values *= np.float32(2 * high / 65535)
    return values, HeatScale(low, high)


def jpeg_of(pixels: NDArray[Any], *, quality: int, side: int | None = None) -> bytes:
    """A picture as a browser shows it; with `side`, at most so large."""
    image = Image.fromarray(as_rgb(pixels))
    if side is not None:
        image.thumbnail((side, side))
    out = BytesIO()
    image.save(out, format="JPEG", quality=quality)
    return out.getvalue()


def png_of(pixels: NDArray[np.uint8]) -> bytes:
    """A picture (H, W, 3) or (H, W, 4), hardly compressed: it is drawn when it is asked for."""
    out = BytesIO()
    Image.fromarray(pixels).save(out, format="PNG", compress_level=1)
    return out.getvalue()
