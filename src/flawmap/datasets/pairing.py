"""Masks told apart from images, paired with them, and looked into."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from flawmap.datasets.names import MASK_NAMES
from flawmap.datasets.samples import Sample, first_few
from flawmap.errors import ImageError
from flawmap.imaging.image_files import find_images
from flawmap.imaging.masks import mask_values
from flawmap.text import counted

_ENDING = re.compile(r"[_\-. ](labels?|masks?|gt|ground[_\- ]?truth|segmentation|annotation)$", re.IGNORECASE)
_VALUES_SHOWN = 5


def told_apart(paths: Sequence[Path], root: Path) -> tuple[list[Path], list[Path]]:
    """Images, and the masks among them.

    A mask lies below `root` in a folder called so (mask, labels, gt ...), or beside an image, whose name it has plus
    `_label`, `_mask` or `_GT`.
    """
    beside = {_beside(path, path.stem) for path in paths}
    images: list[Path] = []
    masks: list[Path] = []
    for path in paths:
        within = any(part.lower() in MASK_NAMES for part in path.relative_to(root).parts[:-1])
        bare = _ENDING.sub("", path.stem)
        is_mask = within or (bare != path.stem and _beside(path, bare) in beside)
        (masks if is_mask else images).append(path)
    return images, masks


def paired(
    images: Sequence[Path], image_root: Path, masks: Sequence[tuple[Path, Path]]
) -> tuple[dict[Path, Path], list[Path]]:
    """The mask of each image that has one, and the masks that no image has.

    A mask lies in the same folders below its root as its image below its own, or directly there. Its name is the
    image's, with or without an ending. Several masks of one image lie in a folder of the image's name, which is given
    as its mask.

    Args:
        images: below `image_root`.
        masks: each with the root of its own.
    """
    keys = {image: _key(image, image_root) for image in images}
    stems = Counter(key.rpartition("/")[2] for key in keys.values())
    named: dict[str, Path] = {}
    for bare in (False, True):  # a name with an ending is that of a mask above all
        named |= {_key(mask, root, bare): mask for mask, root in masks if not bare or _ENDING.search(mask.stem)}
    folders = {_key(mask.parent, root): mask.parent for mask, root in masks if mask.parent != root}
    found: dict[Path, Path] = {}
    for image, key in keys.items():
        stem = key.rpartition("/")[2]
        # A mask directly in its root says which image it belongs to only where one image has that name.
        wanted = [key, stem] if stems[stem] == 1 else [key]
        mask = next((where[name] for where in (named, folders) for name in wanted if name in where), None)
        if mask is not None:
            found[image] = mask
    used = set(found.values())
    return found, [mask for mask, _ in masks if mask not in used and mask.parent not in used]


def with_masks(
    defects: list[Sample], image_root: Path, masks: Sequence[tuple[Path, Path]], notes: list[str]
) -> list[Sample]:
    """The samples with their masks. Adds a note on masks that no image has."""
    found, unused = paired([sample.path for sample in defects], image_root, masks)
    if unused:
        notes.append(f"masks of no defective image are left out: {first_few(unused)}")
    return [replace(sample, mask=found.get(sample.path)) for sample in defects]


def marked_values(mask: Path) -> list[int]:
    """The values other than 0 in a mask (or in a folder of masks), sorted.

    Raises:
        ImageError: it cannot be read.
    """
    parts = find_images(mask) if mask.is_dir() else [mask]
    return sorted({int(value) for part in parts for value in np.unique(mask_values(part)) if value})


def mask_notes(samples: Iterable[Sample], known: Mapping[Path, list[int]]) -> list[str]:
    """What is odd about the masks of defective images: black ones, and those of several values.

    Masks that cannot be read are reported by whoever reads them for their pixels.

    Args:
        known: of masks that were looked into already, their `marked_values`.
    """
    black: list[Path] = []
    mixed: dict[Path, list[int]] = {}
    for sample in samples:
        if sample.label != 1 or sample.mask is None:
            continue
        try:
            values = known[sample.mask] if sample.mask in known else marked_values(sample.mask)
        except ImageError:
            continue
        if not values:
            black.append(sample.path)
        elif len(values) > 1:
            mixed[sample.mask] = values
    notes = []
    if black:
        notes.append(f"the mask is all black, no pixel marked, for the defective {first_few(black)}")
    if mixed:
        mask, values = next(iter(mixed.items()))
        more = f" and {len(values) - _VALUES_SHOWN} more" if len(values) > _VALUES_SHOWN else ""
        shown = ", ".join(str(value) for value in values[:_VALUES_SHOWN]) + more
        count = counted(len(mixed), "mask holds", "masks hold")
        notes.append(f"{count} several values besides 0, all of which mark defects: {shown} in {mask}")
    return notes


def _beside(path: Path, stem: str) -> tuple[Path, str]:
    return path.parent, stem.lower()


def _key(path: Path, root: Path, bare: bool = False) -> str:
    """A name below a root without suffix and case and the folders called masks; `bare`: without a mask's ending."""
    *folders, _ = path.relative_to(root).parts
    stem = _ENDING.sub("", path.stem) if bare else path.stem
    return "/".join([folder for folder in folders if folder.lower() not in MASK_NAMES] + [stem]).lower()
