"""Samples put together to a data set, with notes on what was left out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from flawmap.datasets.names import VALIDATION_NAMES, children, subfolders
from flawmap.datasets.samples import Dataset, Sample, first_few
from flawmap.errors import FlawmapError
from flawmap.imaging.image_files import IMAGE_SUFFIXES


def assembled(
    root: Path, layout: str, good: Sequence[Sample], defects: Sequence[Sample], notes: Sequence[str]
) -> Dataset:
    """The data set of these samples.

    Raises:
        FlawmapError: none of them is a good one to learn from.
    """
    if not any(sample.split == "train" for sample in good):
        if root.is_file():
            raise FlawmapError(f"{root}: lists no good images for training; add rows with the label good")
        kinds = ", ".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
        raise FlawmapError(f"{root}: holds no good images to learn from ({layout}); put images ({kinds}) there")
    # A link is called by its own name, not by that of the folder it leads to.
    named = root.resolve() if root.name in ("", "..") else root
    return Dataset(named.stem if root.is_file() else named.name, root, layout, (*good, *defects), tuple(notes))


def hold_out(good: list[Sample], names: list[str], notes: list[str]) -> list[Sample]:
    """A fifth of the good samples moved to the test split, at least one, by a hash of their names."""
    if len(good) < 2:
        notes.append("held out for testing: none, as there is only one good image")
        return good
    hashes = [hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest() for name in names]
    held = set(sorted(range(len(good)), key=hashes.__getitem__)[: max(1, len(good) // 5)])
    notes.append(f"held out for testing: {len(held)} of {len(good)} good images, chosen by a hash of their names")
    split: tuple[Literal["train"], Literal["test"]] = ("train", "test")
    return [replace(sample, split=split[index in held]) for index, sample in enumerate(good)]


def left_out(folder: Path, read: set[str] | None) -> list[str]:
    """Notes on the subfolders that are not read (`read` None: all are) and on images beside the subfolders."""
    if not folder.is_dir():
        return []
    others = [] if read is None else [other for other in subfolders(folder) if other.name not in read]
    notes = [f"{other} is left out" + _use(other) for other in others]
    stray = [image for image in children(folder) if image.suffix.lower() in IMAGE_SUFFIXES and image.is_file()]
    if stray:
        notes.append(f"images directly in {folder} are left out: {first_few(stray)}")
    return notes


def _use(folder: Path) -> str:
    if folder.name.lower() not in VALIDATION_NAMES:
        return ""
    return f"; --calibration {folder} calibrates on its good images"
