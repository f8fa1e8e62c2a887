"""What users name their images by: a folder, a data set or a list of paths."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from flawmap.datasets.layouts import find_dataset
from flawmap.datasets.samples import Dataset, Sample
from flawmap.errors import FlawmapError


def training_paths(source: str | Path | Dataset | Sequence[str | Path], category: str | None) -> list[Path]:
    """The good training images that a folder, a data set or a list of paths holds.

    Raises:
        FlawmapError: as `find_dataset`, or it is none of these.
    """
    if isinstance(source, (str, os.PathLike)):
        source = find_dataset(Path(source), category)
    if isinstance(source, Dataset):
        return [sample.path for sample in source.train]
    try:
        return list(dict.fromkeys(Path(path) for path in source))
    except TypeError as error:
        raise FlawmapError(
            f"got {'None' if source is None else f'a {type(source).__name__}'} as training images ({error}); "
            "give the path of a folder, a Dataset or a list of paths of image files"
        ) from error


def source_name(source: str | Path | Dataset | Sequence[str | Path]) -> str:
    """What messages call it."""
    if isinstance(source, Dataset):
        return str(source.root)
    return str(source) if isinstance(source, (str, Path)) else "the list"


def labelled_samples(source: str | Path | Dataset, category: str | None) -> tuple[Dataset, list[Sample]]:
    """A data set and its labelled test images.

    Raises:
        FlawmapError: there are none.
    """
    dataset = source if isinstance(source, Dataset) else find_dataset(Path(source), category)
    samples = [sample for sample in dataset.test if sample.label is not None]
    if not samples:
        raise FlawmapError(
            f"{dataset.root} holds no labelled test images: give a folder with test/good and test/<defect>"
        )
    return dataset, samples
