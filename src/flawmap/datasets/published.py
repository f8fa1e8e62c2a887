"""Data sets read as their publishers, and most people, arrange them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flawmap.datasets.assembling import assembled, hold_out, left_out
from flawmap.datasets.names import BAD_NAMES, GOOD_NAMES, MASK_NAMES, TEST_NAMES, TRAIN_NAMES, named_folder, subfolders
from flawmap.datasets.pairing import marked_values, mask_notes, paired, told_apart, with_masks
from flawmap.datasets.samples import Dataset, Sample, first_few
from flawmap.errors import FlawmapError, ImageError
from flawmap.imaging.image_files import find_images

_DEFECT = "defect"


@dataclass(frozen=True)
class Layout:
    """A way of arranging a data set.

    Attributes:
        name: in words.
        fits: whether a folder is arranged so.
        read: reads it.
        category: whether several such folders may lie in one, as its categories.
    """

    name: str
    fits: Callable[[Path], bool]
    read: Callable[[Path], Dataset]
    category: bool = True


def has_split_folders(root: Path) -> bool:
    """MVTec AD, AD 2 and LOCO, MPDD, BTAD: `train/good`."""
    train = named_folder(root, TRAIN_NAMES)
    return train is not None and named_folder(train, GOOD_NAMES) is not None


def read_split_folders(root: Path) -> Dataset:
    """`train/good`, `test/<kind>` and masks in `ground_truth/<kind>`, or in a folder of masks in the test folder."""
    train = named_folder(root, TRAIN_NAMES)
    good = named_folder(train, GOOD_NAMES) if train else None
    assert train is not None
    assert good is not None
    test, truth = named_folder(root, TEST_NAMES), named_folder(root, MASK_NAMES)
    notes = left_out(train, {good.name}) + left_out(root, {one.name for one in (train, test, truth) if one})
    samples = _trained(good, notes)

    defects: list[Sample] = []
    masks: list[tuple[Path, Path]] = []
    images, beside = told_apart(find_images(test), test) if test else ([], [])
    for image in images:
        assert test is not None
        kind, *within = image.relative_to(test).parts
        if not within:
            continue
        if kind.lower() in GOOD_NAMES:
            samples.append(Sample(image, "test", 0, "good"))
        else:
            defects.append(Sample(image, "test", 1, kind))
    if test:
        notes += left_out(test, None)
        masks += [(mask, test) for mask in beside]
    if truth:
        masks += [(mask, truth) for mask in find_images(truth)]
    masks = [(mask, of) for mask, of in masks if not _of_good(mask, of)]
    defects = with_masks(defects, test or root, masks, notes)
    return assembled(root, "MVTec AD layout", samples, defects, notes + mask_notes(defects, {}))


def has_good_folder(root: Path) -> bool:
    """`good/`, alone or with `bad/` and `masks/` beside it."""
    return named_folder(root, GOOD_NAMES) is not None


def has_good_and_bad_folders(root: Path) -> bool:
    """`good/` and `bad/`."""
    return has_good_folder(root) and named_folder(root, BAD_NAMES) is not None


def read_good_and_bad_folders(root: Path) -> Dataset:
    """`good/`, with `bad/` (images, or one folder of them for each kind) and `masks/` beside it."""
    return _read_good_and_bad(root, root, named_folder(root, MASK_NAMES))


def is_visa(root: Path) -> bool:
    """VisA as it is published: `Data/Images/Normal`."""
    return (images := _visa_images(root)) is not None and has_good_folder(images)


def read_visa(root: Path) -> Dataset:
    """`Data/Images/Normal`, `Data/Images/Anomaly` and `Data/Masks/Anomaly`."""
    images = _visa_images(root)
    assert images is not None
    return _read_good_and_bad(root, images, named_folder(images.parent, MASK_NAMES))


def is_mtd(root: Path) -> bool:
    """Magnetic tile defects: `MT_Free/Imgs` and others like it."""
    return any(_mtd_images(folder) for folder in subfolders(root))


def read_mtd(root: Path) -> Dataset:
    """`MT_<kind>/Imgs`, images in .jpg and masks of the same name in .png; `MT_Free` is good."""
    good: list[Sample] = []
    defects: list[Sample] = []
    notes = left_out(root, {folder.name for folder in subfolders(root) if _mtd_images(folder)})
    for folder in subfolders(root):
        images = _mtd_images(folder)
        for image in find_images(images) if images else []:
            if image.suffix.lower() == ".png":
                continue
            kind, mask = folder.name[3:].lower(), next(iter(image.parent.glob(f"{image.stem}.[pP][nN][gG]")), None)
            if kind == "free":
                good.append(Sample(image, "train", 0, "good"))
            else:
                defects.append(Sample(image, "test", 1, kind, mask))
    if defects:
        good = hold_out(good, [sample.path.relative_to(root).as_posix() for sample in good], notes)
    return assembled(root, "magnetic tile layout", good, defects, notes + mask_notes(defects, {}))


def has_split_images(root: Path) -> bool:
    """DAGM 2007 and KolektorSDD2: images directly in `train` and `test`, masks beside them or in a folder there."""
    folders = [named_folder(root, TRAIN_NAMES), named_folder(root, TEST_NAMES)]
    return all(folders) and any(told_apart(find_images(folder), folder)[1] for folder in folders if folder)


def read_images_with_masks(root: Path) -> Dataset:
    """Images whose masks tell good from defective, beside them or in a folder of masks; without masks all are good.

    In `train` and `test`, or undivided; KolektorSDD and KolektorSDD2, DAGM 2007, a plain folder of good images.

    Raises:
        FlawmapError: folders called test or bad, or masks of no image, say that these are not good images alone.
    """
    images, masks = told_apart(find_images(root), root)
    _refuse_other_folders(root, images, divided=bool(masks))
    if not masks:
        samples = [Sample(image, "train", 0, "good") for image in images]
        return assembled(root, "folder of good images", samples, [], [])
    notes: list[str] = []
    found, unused = paired(images, root, [(mask, root) for mask in masks])
    if not found:
        raise FlawmapError(
            f"{root}: holds masks, such as {masks[0]}, none of which belongs to an image; "
            "give masks the names of their images, or name the folder of good images 'good'"
        )
    if unused:
        notes.append(f"masks of no image are left out: {first_few(unused)}")
    good: list[Sample] = []
    defects: list[Sample] = []
    trained: list[Path] = []
    known: dict[Path, list[int]] = {}
    divided = any(_split(image, root) == "test" for image in images)
    for image in images:
        split, mask = _split(image, root), found.get(image)
        try:
            known |= {} if mask is None else {mask: marked_values(mask)}
        except ImageError as error:
            notes.append(f"{image} is left out, because its mask tells whether it is good: {error}")
            continue
        if mask is None or not known[mask]:
            good.append(Sample(image, split, 0, "good"))
        elif divided and split == "train":
            trained.append(image)
        else:
            defects.append(Sample(image, "test", 1, _DEFECT, mask))
    bare = [image for image in images if image not in found]
    if bare:
        notes.append(f"images without a mask are taken for good: {first_few(bare)}")
    if trained:
        notes.append(f"defective images of the train split are left out: {first_few(trained)}")
    if defects and not divided:
        good = hold_out(good, [sample.path.relative_to(root).as_posix() for sample in good], notes)
    return assembled(root, "images with masks", good, defects, notes + mask_notes(defects, known))


LAYOUTS = (
    Layout("MVTec AD", has_split_folders, read_split_folders),
    Layout("good and bad folders", has_good_and_bad_folders, read_good_and_bad_folders),
    Layout("a folder of good images", has_good_folder, read_good_and_bad_folders, category=False),
    Layout("VisA", is_visa, read_visa),
    Layout("magnetic tiles", is_mtd, read_mtd, category=False),
    Layout("images with masks, in train and test", has_split_images, read_images_with_masks),
)
"""Tried in this order."""


def _read_good_and_bad(root: Path, images: Path, truth: Path | None) -> Dataset:
    """`images` holds the folders of good and bad, `truth` the masks of the bad."""
    good, bad = named_folder(images, GOOD_NAMES), named_folder(images, BAD_NAMES)
    assert good is not None
    notes = left_out(images, {folder.name for folder in (good, bad, truth) if folder})
    samples = _trained(good, notes)
    if bad is None:
        return assembled(root, f"{good.name}/ folder", samples, [], notes)
    paths, beside = told_apart(find_images(bad), bad)
    defects = []
    for image in paths:
        kind, *within = image.relative_to(bad).parts
        defects.append(Sample(image, "test", 1, kind if within else bad.name.lower()))
    masks = [(mask, bad) for mask in beside]
    if truth:
        within_bad = named_folder(truth, BAD_NAMES) or truth
        masks += [(mask, within_bad) for mask in find_images(within_bad)]
    defects = with_masks(defects, bad, masks, notes)
    if defects:
        samples = hold_out(samples, [sample.path.relative_to(good).as_posix() for sample in samples], notes)
    return assembled(root, f"{good.name}/ and {bad.name}/ folders", samples, defects, notes + mask_notes(defects, {}))


def _trained(folder: Path, notes: list[str]) -> list[Sample]:
    """The training samples in a folder of good images, but those whose masks say that they are defective."""
    images, masks = told_apart(find_images(folder), folder)
    found, _ = paired(images, folder, [(mask, folder) for mask in masks])
    marked = [image for image, mask in found.items() if _marks(mask)]
    if marked:
        notes.append(f"good images whose masks mark defects are left out: {first_few(marked)}")
    return [Sample(image, "train", 0, "good") for image in images if image not in marked]


def _marks(mask: Path) -> bool:
    try:
        return bool(marked_values(mask))
    except ImageError:
        return True


def _of_good(mask: Path, root: Path) -> bool:
    return any(part.lower() in GOOD_NAMES for part in mask.relative_to(root).parts[:-1])


def _split(image: Path, root: Path) -> Literal["train", "test"]:
    return "test" if image.relative_to(root).parts[0].lower() in TEST_NAMES else "train"


def _refuse_other_folders(root: Path, images: list[Path], divided: bool) -> None:
    """`divided`: folders called train and test are read."""
    for image in images:
        for depth, part in enumerate(image.relative_to(root).parts[:-1]):
            split = part.lower() in (*TRAIN_NAMES, *TEST_NAMES)
            if part.lower() in BAD_NAMES or (split and not (divided and depth == 0)):
                raise FlawmapError(
                    f"{root}: has a folder {part!r} but neither 'good' nor 'train/good'; "
                    "name the folder of good images 'good', or give that folder itself"
                )


def _visa_images(root: Path) -> Path | None:
    data = named_folder(root, ("data",))
    return named_folder(data, ("images",)) if data else None


def _mtd_images(folder: Path) -> Path | None:
    return named_folder(folder, ("imgs",)) if folder.name.lower().startswith("mt_") else None
