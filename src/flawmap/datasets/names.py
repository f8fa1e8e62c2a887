"""What people call the folders of a data set, in lower case; and those folders found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flawmap.errors import FlawmapError
from flawmap.imaging.image_files import hidden

GOOD_NAMES = ("good", "ok", "okay", "normal", "pass", "passed", "nominal")
BAD_NAMES = (
    *("bad", "ng", "nok", "ko", "defect", "defects", "defective", "anomaly", "anomalies", "anomalous", "abnormal"),
    *("fail", "failed", "faulty", "reject", "rejects", "rejected"),
)
MASK_NAMES = (
    *("mask", "masks", "label", "labels", "gt", "ground_truth", "groundtruth", "ground-truth", "ground truth"),
    *("annotation", "annotations", "segmentation", "segmentations"),
)
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "test_public")
VALIDATION_NAMES = ("validation", "val", "valid")


def named_folder(root: Path, names: Sequence[str]) -> Path | None:
    """The folder directly in `root` of one of these names, in any case; None where there is none.

    Raises:
        FlawmapError: there are several.
    """
    found = [folder for folder in subfolders(root) if folder.name.lower() in names] if root.is_dir() else []
    if len(found) > 1:
        raise FlawmapError(
            f"{root}: has the folders {' and '.join(folder.name for folder in found)}, which mean the same; keep one"
        )
    return found[0] if found else None


def subfolders(folder: Path) -> list[Path]:
    """The folders directly in one, but hidden ones, sorted."""
    return [child for child in children(folder) if child.is_dir()]


def children(folder: Path) -> list[Path]:
    """What lies directly in a folder, but what is hidden, sorted.

    Raises:
        FlawmapError: it cannot be listed.
    """
    try:
        return sorted(child for child in folder.iterdir() if not hidden(child.name))
    except OSError as error:
        raise FlawmapError(f"{folder}: cannot be listed ({error.strerror}); check its permissions") from error
