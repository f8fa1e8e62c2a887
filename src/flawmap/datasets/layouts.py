"""The ways data sets lie on disk, told apart and read into a `Dataset`."""

from __future__ import annotations

import csv
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from flawmap.datasets.samples import Dataset, Sample, first_few
from flawmap.errors import FlawmapError
from flawmap.imaging.image_files import IMAGE_SUFFIXES, find_images

GOOD_NAMES = ("good", "ok", "normal")
BAD_NAMES = ("bad", "ng", "defect", "anomaly")
_NOT_GOOD = ("train", "test", "ground_truth", "masks", *BAD_NAMES)  # folders no plain folder of good images has
_COLUMNS = ("path", "label", "mask", "split")


def find_dataset(path: Path | str, category: str | None = None) -> Dataset:
    """Read a data set in any of the known layouts, told apart by what is there.

    1. MVTec AD: `train/good`, `test/<kind>`, `ground_truth/<kind>/<stem>_mask.png` (or `<stem>.png`); or a folder of
       several such categories, of which `category` names one.
    2. `good/`, with `bad/` (images, or one folder of them for each kind of defect) and `masks/` (in the same folders
       as the images, or flat) beside it. `ok` and `normal` are read as `good`; `ng`, `defect` and `anomaly` as `bad`,
       in any case. With `bad/`, a fifth of the good images is held out as test images, chosen by a hash of their
       names: the same on every machine.
    3. A CSV file in UTF-8 with the columns `path,label` and, optionally, `mask,split`: label good, ok, normal or 0, or
       the kind of defect; split train or test. Paths are relative to the CSV file. Without splits as in layout 2.
    4. A folder of good images, in subfolders or not.

    Args:
        path: the folder or CSV file.
        category: the category within a folder of several.

    Raises:
        FlawmapError: nothing there, no good images, an unknown or missing category, or a faulty table.
    """
    root = Path(path)
    if not os.path.exists(root):  # noqa: PTH110 (Path.exists raises where a name is too long)
        raise FlawmapError(f"{root}: there is no such file or folder; check the path")
    if category is not None:
        return _read_mvtec(_category_folder(root, category))
    if not root.is_dir():
        if root.suffix.lower() != ".csv":
            raise FlawmapError(f"{root}: is a single file; give the folder of images, or a .csv file that lists them")
        return _read_csv(root)
    if _is_mvtec(root):
        return _read_mvtec(root)
    if categories := _categories(root):
        raise FlawmapError(f"{root}: holds several data sets; choose one category of: {', '.join(categories)}")
    if good := _named_folder(root, GOOD_NAMES):
        return _read_good_bad(root, good)
    return _read_plain(root)


def _read_mvtec(root: Path) -> Dataset:
    train, test, truth = root / "train", root / "test", root / "ground_truth"
    samples = [Sample(image, "train", 0, "good") for image in find_images(train / "good")]
    notes = _left_out(train, {"good"}) + _left_out(root, {"train", "test", "ground_truth"})

    defects: list[Sample] = []
    for image in find_images(test) if test.is_dir() else []:
        kind, *within = image.relative_to(test).parts
        if not within:
            continue
        if kind.lower() in GOOD_NAMES:
            samples.append(Sample(image, "test", 0, "good"))
        else:
            defects.append(Sample(image, "test", 1, kind))
    notes += _left_out(test, None)
    masks = [
        mask
        for mask in (find_images(truth) if truth.is_dir() else [])
        if mask.relative_to(truth).parts[0].lower() not in GOOD_NAMES
    ]
    defects = _with_masks(defects, test, masks, truth, notes)
    return _dataset(root, "MVTec AD layout", samples, defects, notes)


def _read_good_bad(root: Path, good: Path) -> Dataset:
    samples = [Sample(image, "train", 0, "good") for image in find_images(good)]
    bad, truth = _named_folder(root, BAD_NAMES), _named_folder(root, ("masks",))
    notes = _left_out(root, {folder.name for folder in (good, bad, truth) if folder})
    if bad is None:
        return _dataset(root, f"{good.name}/ folder", samples, [], notes)

    defects = []
    for image in find_images(bad):
        kind, *within = image.relative_to(bad).parts
        defects.append(Sample(image, "test", 1, kind if within else bad.name.lower()))
    defects = _with_masks(defects, bad, find_images(truth) if truth else [], truth or root, notes)
    if defects:
        samples = _hold_out(samples, [image.path.relative_to(good).as_posix() for image in samples], notes)
    return _dataset(root, f"{good.name}/ and {bad.name}/ folders", samples, defects, notes)


def _read_csv(table: Path) -> Dataset:
    good: list[Sample] = []
    names: list[str] = []
    defects: list[Sample] = []
    notes: list[str] = []
    left_out: list[Path] = []
    lines: dict[Path, int] = {}
    any_split = False
    for line, row in _csv_rows(table):
        where = f"{table}, line {line}"
        label, split = row["label"], row["split"].lower()
        path = _listed_file(table, row["path"], where)
        if path in lines:
            raise FlawmapError(f"{where}: {row['path']} is in line {lines[path]} already; remove one of the two")
        lines[path] = line
        if not label:
            raise FlawmapError(f"{where}: the label is empty; write good or the kind of defect")
        if split not in ("", "train", "test"):
            raise FlawmapError(f"{where}: the split is {row['split']!r}; write train, test or nothing")
        any_split = any_split or bool(split)
        if label.lower() in (*GOOD_NAMES, "0"):
            good.append(Sample(path, "test" if split == "test" else "train", 0, "good"))
            names.append(row["path"].replace("\\", "/"))
        elif split == "train":
            left_out.append(path)
        else:
            mask = _listed_file(table, row["mask"], where) if row["mask"] else None
            defects.append(Sample(path, "test", 1, label, mask))
    if left_out:
        notes.append(f"defective images of the train split are left out: {first_few(left_out)}")
    if defects and not any_split:
        good = _hold_out(good, names, notes)
    return _dataset(table, "CSV table", good, defects, notes)


def _read_plain(root: Path) -> Dataset:
    images = find_images(root)
    for image in images:
        for part in image.relative_to(root).parts[:-1]:
            if part.lower() in _NOT_GOOD:
                raise FlawmapError(
                    f"{root}: has a folder {part!r} but neither 'good' nor 'train/good'; "
                    "name the folder of good images 'good', or give that folder itself"
                )
    return _dataset(root, "folder of good images", [Sample(image, "train", 0, "good") for image in images], [], [])


def _dataset(
    root: Path, layout: str, good: Sequence[Sample], defects: Sequence[Sample], notes: Sequence[str]
) -> Dataset:
    if not any(sample.split == "train" for sample in good):
        if root.is_file():
            raise FlawmapError(f"{root}: lists no good images for training; add rows with the label good")
        kinds = ", ".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
        raise FlawmapError(f"{root}: holds no good images to learn from ({layout}); put images ({kinds}) there")
    # A link is called by its own name, not by that of the folder it leads to.
    named = root.resolve() if root.name in ("", "..") else root
    return Dataset(named.stem if root.is_file() else named.name, root, layout, (*good, *defects), tuple(notes))


def _with_masks(
    defects: list[Sample], image_root: Path, masks: list[Path], mask_root: Path, notes: list[str]
) -> list[Sample]:
    """The samples with their masks: in the same folder below `mask_root` as the image below `image_root`, or flat.

    Adds a note on masks that no image has.
    """
    by_key = {_key(mask, mask_root): mask for mask in masks}
    keys = [_key(sample.path, image_root) for sample in defects]
    stems = Counter(key.rpartition("/")[2] for key in keys)
    paired = []
    for sample, key in zip(defects, keys, strict=True):
        stem = key.rpartition("/")[2]
        # A flat mask says which image it belongs to only where one image has that name.
        wanted = [key, stem] if stems[stem] == 1 else [key]
        found = (by_key.get(name + end) for name in wanted for end in ("_mask", ""))
        paired.append(replace(sample, mask=next((mask for mask in found if mask), None)))
    used = {sample.mask for sample in paired}
    unused = [mask for mask in masks if mask not in used]
    if unused:
        notes.append(f"masks of no defective image are left out: {first_few(unused)}")
    return paired


def _hold_out(good: list[Sample], names: list[str], notes: list[str]) -> list[Sample]:
    """A fifth of the good samples moved to the test split, at least one, by a hash of their names."""
    if len(good) < 2:
        notes.append("held out for testing: none, as there is only one good image")
        return good
    hashes = [hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest() for name in names]
    held = set(sorted(range(len(good)), key=hashes.__getitem__)[: max(1, len(good) // 5)])
    notes.append(f"held out for testing: {len(held)} of {len(good)} good images, chosen by a hash of their names")
    split: tuple[Literal["train"], Literal["test"]] = ("train", "test")
    return [replace(sample, split=split[index in held]) for index, sample in enumerate(good)]


def _csv_rows(table: Path) -> Iterable[tuple[int, dict[str, str]]]:
    """(line number, row) of a table; every row has all four columns, stripped, "" where empty or absent."""
    line = 1
    try:
        # utf-8-sig: spreadsheet programs begin the file with a byte-order mark.
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            header = [column.strip().lower() for column in reader.fieldnames or ()]
            if "path" not in header or "label" not in header:
                raise FlawmapError(
                    f"{table}, line 1: the columns are {header}; the first line must be path,label,mask,split "
                    "(mask and split may be left out)"
                )
            reader.fieldnames = header
            for row in reader:
                line = reader.line_num
                if None in row:
                    raise FlawmapError(
                        f"{table}, line {line}: more values than columns; put values that hold a comma in quotes"
                    )
                yield line, {column: (row.get(column) or "").strip() for column in _COLUMNS}
    except UnicodeDecodeError as error:
        raise FlawmapError(f"{table}, after line {line}: is not UTF-8; save the table as CSV UTF-8") from error
    except csv.Error as error:
        raise FlawmapError(f"{table}, after line {line}: is not CSV ({error}); mend the line or its quotes") from error
    except OSError as error:
        raise FlawmapError(f"{table}: cannot be read ({error.strerror}); check its permissions") from error


def _listed_file(table: Path, name: str, where: str) -> Path:
    if not name:
        raise FlawmapError(f"{where}: the path is empty; write the image's path or remove the line")
    path = table.parent / name.replace("\\", "/")
    if not os.path.isfile(path):  # noqa: PTH113 (Path.is_file raises where a name is too long)
        raise FlawmapError(f"{where}: {path} does not exist; paths are relative to the table's folder")
    return path


def _category_folder(root: Path, category: str) -> Path:
    if _is_mvtec(root):
        raise FlawmapError(f"{root}: is one category itself; leave out the category {category!r}")
    categories = _categories(root) if root.is_dir() else []
    if not categories:
        raise FlawmapError(f"{root}: holds no categories (folders with train/good); leave out the category")
    if category not in categories:
        raise FlawmapError(f"{root}: has no category {category!r}; it has: {', '.join(categories)}")
    return root / category


def _categories(root: Path) -> list[str]:
    return [folder.name for folder in _subfolders(root) if _is_mvtec(folder)]


def _is_mvtec(root: Path) -> bool:
    return (root / "train" / "good").is_dir()


def _named_folder(root: Path, names: Sequence[str]) -> Path | None:
    found = [folder for folder in _subfolders(root) if folder.name.lower() in names]
    if len(found) > 1:
        raise FlawmapError(
            f"{root}: has the folders {' and '.join(folder.name for folder in found)}, which mean the same; keep one"
        )
    return found[0] if found else None


def _left_out(folder: Path, read: set[str] | None) -> list[str]:
    """Notes on the subfolders that are not read (`read` None: all are) and on images beside the subfolders."""
    if not folder.is_dir():
        return []
    others = [] if read is None else [other for other in _subfolders(folder) if other.name not in read]
    notes = [f"{other} is left out" for other in others]
    stray = [image for image in _children(folder) if image.suffix.lower() in IMAGE_SUFFIXES and image.is_file()]
    if stray:
        notes.append(f"images directly in {folder} are left out: {first_few(stray)}")
    return notes


def _subfolders(folder: Path) -> list[Path]:
    return [child for child in _children(folder) if child.is_dir()]


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(child for child in folder.iterdir() if not child.name.startswith("."))
    except OSError as error:
        raise FlawmapError(f"{folder}: cannot be listed ({error.strerror}); check its permissions") from error


def _key(path: Path, root: Path) -> str:
    return path.relative_to(root).with_suffix("").as_posix()
