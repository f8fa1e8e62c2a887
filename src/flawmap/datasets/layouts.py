"""The way a data set lies on disk, found out, and read into a `Dataset`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from flawmap.datasets.names import subfolders
from flawmap.datasets.published import LAYOUTS, Layout, is_visa, read_images_with_masks
from flawmap.datasets.samples import Dataset
from flawmap.datasets.table import TABLE_SUFFIXES, read_table
from flawmap.errors import FlawmapError
from flawmap.imaging.image_files import search_folder

_VISA_TABLE = Path("split_csv", "1cls.csv")


def find_dataset(path: Path | str, category: str | None = None) -> Dataset:
    """Read a data set in any of the known layouts, told apart by what is there. Names of folders are in any case.

    1. MVTec AD: `train/good`, `test/<kind>`, `ground_truth/<kind>/<stem>_mask.png` (or `<stem>.png`, or several masks
       in a folder `<stem>`); or a folder of several such categories, of which `category` names one. So are MVTec AD 2
       (`test_public`) and LOCO, MPDD and BTAD.
    2. `good/`, with `bad/` (images, or one folder of them for each kind of defect) and `masks/` (in the same folders
       as the images, or flat) beside it. `ok` and `normal` are read as `good`; `ng`, `ko`, `defect`, `anomaly` and
       `abnormal` as `bad`; `mask`, `label`, `gt` and `ground_truth` as `masks`, singular or plural. With `bad/`, a
       fifth of the good images is held out as test images, chosen by a hash of their names: the same on every machine.
       VisA's `Data/Images` and `Data/Masks` are read so, unless the folder of its categories holds
       `split_csv/1cls.csv`, which is followed then.
    3. A CSV file in UTF-8, with commas, semicolons or tabs, with the columns `path,label` and, optionally,
       `mask,split,object`: label good, ok, normal or 0, or the kind of defect; split train or test; `category` names
       one object. Paths are relative to the CSV file. Without splits as in layout 2. VisA's tables are such.
    4. Images with masks beside them, `<stem>_label`, `<stem>_mask` or `<stem>_GT`, or in a folder of masks: an image
       is defective where its mask marks a pixel. In folders `train` and `test`, or else held out as in layout 2.
       KolektorSDD, KolektorSDD2, DAGM 2007; and magnetic tiles, `MT_<kind>/Imgs`.
    5. A folder of good images, in subfolders or not.

    Args:
        path: the folder or CSV file.
        category: the category within a folder or table of several.

    Raises:
        FlawmapError: nothing there, no good images, an unknown or missing category, or a faulty table.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise FlawmapError(f"got a {type(path).__name__} as data; give the path of a folder or of a .csv file")
    root = Path(path)
    if not os.path.exists(root):  # noqa: PTH110 (Path.exists raises where a name is too long)
        raise FlawmapError(f"{root}: there is no such file or folder; check the path")
    if not root.is_dir():
        if root.suffix.lower() not in TABLE_SUFFIXES:
            raise FlawmapError(f"{root}: is a single file; give the folder of images, or a .csv file that lists them")
        return read_table(root, category)
    if category is not None:
        folder = _category_folder(root, category)
        if (root / _VISA_TABLE).is_file() and is_visa(folder):
            return read_table(root / _VISA_TABLE, category)
        return _read(folder)
    if _layout_of(root) is None and (categories := _categories(root)):
        if len(categories) == 1:
            return find_dataset(root, categories[0])
        raise FlawmapError(f"{root}: holds several data sets; choose one category of: {', '.join(categories)}")
    return _read(root)


def _read(root: Path) -> Dataset:
    layout = _layout_of(root)
    dataset = (layout.read if layout else read_images_with_masks)(root)
    note = search_folder(root).note()
    return replace(dataset, notes=(*dataset.notes, note)) if note else dataset


def _layout_of(root: Path) -> Layout | None:
    return next((layout for layout in LAYOUTS if layout.fits(root)), None)


def _category_folder(root: Path, category: str) -> Path:
    if (layout := _layout_of(root)) and layout.category:
        raise FlawmapError(f"{root}: is one category itself; leave out the category {category!r}")
    categories = _categories(root)
    if not categories:
        raise FlawmapError(f"{root}: holds no categories (folders with train/good); leave out the category")
    if category not in categories:
        raise FlawmapError(f"{root}: has no category {category!r}; it has: {', '.join(categories)}")
    return root / category


def _categories(root: Path) -> list[str]:
    found = []
    for folder in subfolders(root):
        layout = _layout_of(folder)
        if layout is not None and layout.category:
            found.append(folder.name)
    return found
