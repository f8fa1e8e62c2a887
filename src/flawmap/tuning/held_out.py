"""Good images held out of the fits that settings are chosen by, to make defects in."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flawmap.datasets.duplicates import duplicate_groups, duplicate_pairs
from flawmap.detector import Detector
from flawmap.errors import FlawmapError, ImageError
from flawmap.imaging.decoding import infer_white, read_image
from flawmap.imaging.fingerprints import fingerprint
from flawmap.learning.data import Progress
from flawmap.learning.good_scores import calibration_images
from flawmap.text import counted
from flawmap.tuning.synthetic import FEWEST

log = logging.getLogger(__name__)

_MOST_HELD_OUT = 40  # images; they carry 160 defects, which tell candidates apart well enough
_FEWEST_DIFFERENT = FEWEST + 4  # images that do not show the same


@dataclass(frozen=True)
class Parts:
    """Good images: those that candidates are fitted on, and those that defects are made in, one of each content.

    `left` are held out too: the latter, and what shows the same.
    """

    fitting: list[Path]
    held_out: list[Path]
    left: set[Path]


def hold_out(paths: Sequence[Path], source: str, given: Detector, strict: bool, progress: Progress) -> Parts:
    """Holds out a quarter of what the images show, 4 to 40 of them, drawn by the seed of `given`.

    What shows the same stands on one side; what a calibration folder shows as well is fitted on.

    Args:
        paths: the good images.
        source: what they come from, in words.
        given: the detector before tuning.
        strict: refuse an image that cannot be read, which is left out otherwise.

    Raises:
        ImageError: one cannot be read, where `strict`.
        FlawmapError: too few show different things.
    """
    further = calibration_images(given.calibration)
    white = infer_white([*paths, *further]) or 65535
    kept, pictures = [], []
    for done, path in enumerate([*paths, *further], start=1):
        try:
            pictures.append(fingerprint(read_image(path), white))
            kept.append(path)
        except ImageError:
            if strict:
                raise
        progress("near-duplicates", done, len(paths) + len(further))
    groups = list(range(len(kept)))
    if kept:
        for alike in duplicate_groups(duplicate_pairs(np.array(pictures)), len(kept)):
            for i in alike:
                groups[i] = alike[0]
    good, calibrating = set(paths), set(further)
    apart = {group for group, path in zip(groups, kept, strict=True) if path in calibrating}
    members: dict[int, list[Path]] = {}
    for group, path in zip(groups, kept, strict=True):
        if path in good:
            members.setdefault(group, []).append(path)
    free = [group for group in members if group not in apart]
    if len(members) < _FEWEST_DIFFERENT or len(free) < FEWEST:
        different = counted(len(members), "different good image")
        raise FlawmapError(
            f"{different} found in {source}: at least {_FEWEST_DIFFERENT} are needed to tune, "
            f"{FEWEST} of them to make defects in, which must not be those of --calibration"
        )
    count = min(max(len(free) // 4, FEWEST), _MOST_HELD_OUT)
    chosen = [free[i] for i in sorted(np.random.default_rng(given.seed).permutation(len(free))[:count])]
    left = {path for group in chosen for path in members[group]}
    return Parts([p for p in kept if p in good and p not in left], [members[group][0] for group in chosen], left)


def placed(paths: Sequence[Path], detector: Detector) -> list[Path]:
    """Those on which windows can be laid.

    Raises:
        FlawmapError: they are too few.
    """
    found = []
    for path in paths:
        try:
            detector.preparation_.place(read_image(path))
            found.append(path)
        except ImageError as error:
            log.warning("left out of tuning: %s: %s", path, error)
    if len(found) < FEWEST:
        raise FlawmapError(
            f"defects can be made in {counted(len(found), 'image')} held out, {FEWEST} are needed: give more images"
        )
    return found
