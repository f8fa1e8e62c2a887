"""What an inspection leaves in a folder of each image: its heatmap, its map, and a small picture of both."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from PIL import Image

from flawmap.errors import FlawmapError
from flawmap.files import replacing, unwritable
from flawmap.imaging.own_files import JPEG_MARK, MAP, OVERLAY, SMALL, is_own
from flawmap.judging.inspection import Inspection
from flawmap.report.overlays import HeatScale, rgb_rows, write_map, write_overlay
from flawmap.report.pictures import Picture, Shrinking, shrunk, side_by_side

_LONGEST = 255 - len(OVERLAY) - len(".0123456789.tmp")  # bytes of a name that file systems take, less what is added
_DIGITS = 8


def drawing_names(images: Sequence[tuple[Path, Path]]) -> list[Path]:
    """The name of each image's drawings, without their ends, relative to the folder that they are written to.

    A name is that of the image, its dots as underscores: a.png and a.jpg may lie side by side. Where two images would
    get one name, also where only the case of letters tells them apart, and where a name is too long for a file system,
    a digest of the image's path is added.

    Args:
        images: the path of each, and its path below the source that it was found in.
    """
    plain = [name.with_name(name.name.replace(".", "_")) for _, name in images]
    owners: dict[str, set[Path]] = {}
    for (path, _), name in zip(images, plain, strict=True):
        owners.setdefault(str(name).casefold(), set()).add(path)
    names = []
    for (path, _), name in zip(images, plain, strict=True):
        alone = len(owners[str(name).casefold()]) == 1
        names.append(name if alone and len(_bytes(name.name)) <= _LONGEST else _told_apart(name, path))
    return names


def _told_apart(name: Path, path: Path) -> Path:
    mark = "-" + hashlib.sha256(_bytes(str(path))).hexdigest()[:_DIGITS]
    kept = _bytes(name.name)[: _LONGEST - len(mark)].decode("utf-8", "ignore")
    return name.with_name(kept + mark)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def check_drawings(folder: Path, names: Sequence[Path], images: Sequence[Path]) -> None:
    """Raises FlawmapError where a drawing would be written over one of the images."""
    read = {image.resolve() for image in images}
    for name in names:
        for end in (OVERLAY, MAP):
            if (drawing := folder / name.with_name(name.name + end)).resolve() in read:
                raise FlawmapError(
                    f"{drawing} is to be inspected and would be overwritten: choose another folder with -o"
                )


def write_drawings(
    folder: Path, name: Path, inspection: Inspection, scale: HeatScale | None, *, caption: bool = False
) -> None:
    """Writes what there is to be shown of one image, and removes what an earlier run left of it and no longer holds.

    Args:
        folder: the output folder.
        name: of the drawings, see `drawing_names`.
        inspection: with its pixels, unless they could not be read.
        scale: what colours mean; None for a method without maps.
        caption: whether verdict and score are written into the heatmap.

    Raises:
        FlawmapError: a file cannot be written.
    """
    target = folder / name
    over, values = target.with_name(target.name + OVERLAY), target.with_name(target.name + MAP)
    small = small_picture(folder, name)
    heat: Shrinking | None = None
    if scale is None or inspection.maps is None or inspection.pixels is None:
        for old in (over, values):
            if is_own(old):
                with suppress(OSError):
                    old.unlink()
    else:
        make_folder(target.parent)
        heat = Shrinking(inspection.pixels.shape[:2])
        write_overlay(over, inspection.pixels, inspection, scale, caption=caption, seen=heat.add)
        write_map(values, inspection, scale)
    if inspection.pixels is None:
        with suppress(OSError):
            small.unlink(missing_ok=True)
        return
    make_folder(small.parent)
    original = shrunk(inspection.pixels.shape[:2], rgb_rows(inspection.pixels))
    picture = side_by_side(Picture(original, None if heat is None else heat.picture()))
    with replacing(small, durable=False) as file:
        Image.fromarray(picture).save(file, format="JPEG", quality=80, comment=JPEG_MARK)


def small_picture(folder: Path, name: Path) -> Path:
    """Where the small picture of an image lies."""
    return folder / SMALL / name.with_name(name.name + ".jpg")


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it.

    Raises:
        FlawmapError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error
