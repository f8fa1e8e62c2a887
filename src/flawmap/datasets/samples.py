"""The table of samples that every layout is read into."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flawmap.errors import ImageError
from flawmap.imaging.decoding import image_size
from flawmap.text import counted, printable

_HEADERS_READ = 20  # for the sizes in describe(): a PNG without orientation has to be decoded for its size


@dataclass(frozen=True)
class Sample:
    """One image and what is known of it.

    Attributes:
        path: the image, as given (not resolved).
        split: "train" or "test".
        label: 0 good, 1 defective, None not known.
        kind: "good" or the kind of defect.
        mask: where its defects are drawn, see `flawmap.imaging.masks.read_mask`; None for good images and where it is
            missing.
    """

    path: Path
    split: Literal["train", "test"]
    label: Literal[0, 1] | None
    kind: str
    mask: Path | None = None


@dataclass(frozen=True)
class Dataset:
    """Images for training and testing. Made by `find_dataset`.

    Attributes:
        name: the folder's, category's or table's name.
        root: where it was found, as given.
        layout: in words.
        samples: sorted by path within each kind; training samples are good ones only.
        notes: what was left out or does not fit together, one line each.
    """

    name: str
    root: Path
    layout: str
    samples: tuple[Sample, ...]
    notes: tuple[str, ...] = ()

    @property
    def train(self) -> list[Sample]:
        """The good training samples."""
        return [sample for sample in self.samples if sample.split == "train" and sample.label == 0]

    @property
    def test(self) -> list[Sample]:
        """All test samples."""
        return [sample for sample in self.samples if sample.split == "test"]

    @property
    def good_test(self) -> list[Sample]:
        """The good test samples."""
        return [sample for sample in self.test if sample.label == 0]

    @property
    def defect_test(self) -> list[Sample]:
        """The defective test samples."""
        return [sample for sample in self.test if sample.label == 1]

    def describe(self) -> str:
        """What was found, in several lines, whatever names hold: layout, split, counts, masks, image sizes, notes."""
        lines = [
            f"{self.name}: {self.layout} in {self.root}",
            f"train: {len(self.train)} good",
            f"test: {self._test_text()}",
            f"masks: {self._mask_text()}",
            f"image size: {self._size_text()}",
        ]
        return "\n".join(map(printable, lines + [f"note: {note}" for note in self.notes]))

    def _test_text(self) -> str:
        if not self.test:
            return "none"
        text = f"{len(self.good_test)} good, {len(self.defect_test)} defective"
        kinds = Counter(sample.kind for sample in self.defect_test)
        return text + (f" ({', '.join(f'{kind} {kinds[kind]}' for kind in sorted(kinds))})" if kinds else "")

    def _mask_text(self) -> str:
        defects = self.defect_test
        missing = [sample.path for sample in defects if sample.mask is None]
        if len(missing) == len(defects):
            return "none"
        text = f"{len(defects) - len(missing)} of {counted(len(defects), 'defective image')}"
        return text + (f"; none for {first_few(missing)}" if missing else "")

    def _size_text(self) -> str:
        chosen = self.samples[:: max(1, -(-len(self.samples) // _HEADERS_READ))]
        sizes = []
        for sample in chosen:
            try:
                sizes.append(image_size(sample.path))
            except ImageError:
                continue  # reported by whoever reads the pixels
        extent = "unknown"
        if sizes:
            heights, widths = zip(*sizes, strict=True)
            extent = f"height {_range_text(heights)}, width {_range_text(widths)} pixels"
        unread = len(chosen) - len(sizes)
        return f"{extent} in {len(chosen)} of {counted(len(self.samples), 'image')} looked at" + (
            f", {unread} of them unreadable" if unread else ""
        )


def first_few(paths: list[Path]) -> str:
    """Up to three paths, and how many more there are."""
    return ", ".join(str(path) for path in paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def _range_text(values: Iterable[int]) -> str:
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low}-{high}"
