"""Near-duplicates: one photograph saved twice (encoded anew, resized, brightened, cropped a little).

Photographs of aligned parts look so alike that a perceptual hash takes any two of them for one. What tells them apart
is what is left after the best alignment: next to nothing between two savings of one photograph, grain, tolerances and
light between two parts. So all pairs are screened by their tangent distance (Simard, LeCun & Denker, "Efficient
pattern recognition using a new transformation distance", NIPS 1992), the nearest are aligned by Gauss-Newton steps
(Lucas & Kanade, IJCAI 1981), and the share of the contrast that still differs is held against a limit, and against
what is usual in the set. Needs numpy only.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flawmap.datasets.samples import Dataset, Sample
from flawmap.errors import ImageError
from flawmap.imaging.decoding import read_image
from flawmap.imaging.fingerprints import SIDE, fingerprint

DIFFERENCE = 0.12
"""Share of the contrast (root mean square) that may differ between near-duplicates."""

_COARSE = 16  # side of the pictures that are screened
_NEAREST = 8  # pictures that each one is aligned with, more than one part is usually taken
_BORDER = 2  # pixels that a crop may cut off each side
_STEPS = 6
_BLOCK = 128  # pictures screened, and pairs aligned, at once
_FAINT = 2 / 255  # contrast below which differences are not scaled up, as there is little but noise


def duplicate_pairs(fingerprints: ArrayLike) -> list[tuple[int, int]]:
    """The pairs of images that are one photograph, or the same part taken again without moving it.

    Two images are near-duplicates where, aligned by scales and shifts of up to about 6 % and with brightness and
    contrast evened out, they differ by less than `DIFFERENCE` of their contrast, and by less than half of what images
    of this set differ by from the eighth most like them. Identical images are among them. Memory grows with N, time
    with its square.

    Args:
        fingerprints: (N, SIDE * SIDE), from `fingerprint`.

    Returns:
        (i, j) with i < j, sorted. Of many duplicates of one image not every pair is listed, but each one is linked
        to the next: see `duplicate_groups`.
    """
    pictures = np.asarray(fingerprints, dtype=np.float32)
    if pictures.ndim != 2 or pictures.shape[1] != SIDE * SIDE:
        raise ValueError(f"fingerprints must have shape (N, {SIDE * SIDE}), got {pictures.shape}")
    if len(pictures) < 2:
        return []
    _, first, same = np.unique(pictures, axis=0, return_index=True, return_inverse=True)
    same = same.reshape(-1)
    pairs = {(int(first[group]), i) for i, group in enumerate(same) if first[group] != i}
    distinct = np.sort(first)
    if len(distinct) > 1:
        found = _screen(pictures[distinct])  # (n, K)
        own = np.broadcast_to(np.arange(len(found))[:, None], found.shape)
        near, place = np.unique(np.sort(np.stack([own, found], -1).reshape(-1, 2)), axis=0, return_inverse=True)
        left = np.concatenate(
            [
                _difference(pictures[distinct[part[:, 0]]], pictures[distinct[part[:, 1]]])
                for part in (near[start : start + _BLOCK] for start in range(0, len(near), _BLOCK))
            ]
        )
        limit = DIFFERENCE
        if len(distinct) > _NEAREST + 1:  # fewer say nothing of what is usual
            limit = min(limit, float(np.median(left[place.reshape(found.shape)].max(1))) / 2)
        pairs |= {(int(i), int(j)) for i, j in distinct[near[left < limit]]}
    return sorted(pairs)


def duplicate_groups(pairs: Iterable[tuple[int, int]], n: int) -> list[list[int]]:
    """The images 0..n-1 that pairs link, directly or through others: groups of two and more, sorted."""
    parent = list(range(n))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, j in pairs:
        low, high = sorted((root(i), root(j)))
        parent[high] = low
    groups: dict[int, list[int]] = {}
    for i in range(n):
        groups.setdefault(root(i), []).append(i)
    return [group for group in groups.values() if len(group) > 1]


def in_train_and_test(dataset: Dataset) -> list[tuple[Path, Path]]:
    """Pairs of a training and a test image that show the same, one for each such test image.

    Images that cannot be read are passed over.
    """
    kept: list[tuple[Sample, NDArray[np.float32]]] = []
    for sample in dataset.samples:
        with suppress(ImageError):
            kept.append((sample, fingerprint(read_image(sample.path))))
    if not dataset.test or not kept:
        return []
    found: list[tuple[Path, Path]] = []
    for group in duplicate_groups(duplicate_pairs(np.array([picture for _, picture in kept])), len(kept)):
        train = [kept[i][0].path for i in group if kept[i][0].split == "train"]
        found += [(train[0], kept[i][0].path) for i in group if train and kept[i][0].split == "test"]
    return found


def _screen(pictures: NDArray[np.float32]) -> NDArray[np.intp]:
    """(n, K): for each picture those that its own tangents (brightness, contrast, shifts, scales) explain best."""
    n, factor = len(pictures), SIDE // _COARSE
    coarse = pictures.reshape(n, _COARSE, factor, _COARSE, factor).mean((2, 4))  # (n, 16, 16)
    at = np.linspace(-1, 1, _COARSE, dtype=np.float32)
    unit = coarse.reshape(n, -1) - coarse.mean((1, 2))[:, None]
    unit /= np.linalg.norm(unit, axis=1, keepdims=True) + 1e-6
    nearest = min(_NEAREST, n - 1)
    found = np.empty((n, nearest), np.intp)
    for start in range(0, n, _BLOCK):
        block = coarse[start : start + _BLOCK]
        down, right = np.gradient(block, axis=(1, 2))
        tangents = [np.ones_like(block), block, right, down, at * right, at[:, None] * down]
        basis = np.linalg.qr(np.stack(tangents, -1).reshape(len(block), -1, 6))[0]  # (b, 256, 6)
        rows = basis.transpose(0, 2, 1).reshape(len(block) * 6, -1)
        explained = ((rows @ unit.T) ** 2).reshape(len(block), 6, n).sum(1)  # (b, n)
        own = np.arange(len(block))
        explained[own, start + own] = -1
        found[start : start + len(block)] = np.argpartition(-explained, nearest - 1, axis=1)[:, :nearest]
    return found


def _difference(moved: NDArray[np.float32], fixed: NDArray[np.float32]) -> NDArray[np.float64]:
    """(b,): the share of the contrast of `fixed` (b, F) that `moved` (b, F), aligned with it, does not explain."""
    b, inner = len(moved), slice(_BORDER, SIDE - _BORDER)
    rows, columns = (grid[inner, inner].ravel() for grid in np.indices((SIDE, SIDE)))  # (P,)
    x, y = columns * (2 / (SIDE - 1)) - 1, rows * (2 / (SIDE - 1)) - 1
    target = fixed.reshape(b, SIDE, SIDE)[:, inner, inner].reshape(b, -1).astype(np.float64)  # (b, P)
    target -= target.mean(1, keepdims=True)
    contrast = np.maximum(target.std(1), _FAINT)
    pictures = moved.reshape(b, SIDE, SIDE)
    slopes = np.gradient(pictures, axis=(1, 2))
    planes = np.stack([pictures, slopes[1], slopes[0]], 1).reshape(b, 3, -1)
    motion = np.zeros((b, 4))  # shift and stretch to the right, shift and stretch down, in pixels at the edge
    least = np.full(b, np.inf)
    for _ in range(_STEPS):
        to_right = columns + motion[:, 0, None] + motion[:, 1, None] * x
        to_down = rows + motion[:, 2, None] + motion[:, 3, None] * y
        picture, right, down = _sample(planes, to_down, to_right)
        picture -= picture.mean(1, keepdims=True)
        gain = np.maximum((picture * target).sum(1), 0) / ((picture**2).sum(1) + 1e-9)
        rest = target - gain[:, None] * picture
        least = np.minimum(least, np.sqrt((rest**2).mean(1)) / contrast)
        # The offset is fitted with the motion, as moving changes the mean.
        design = np.stack([np.ones_like(picture), picture, right, x * right, down, y * down], 2)  # (b, P, 6)
        normal = design.transpose(0, 2, 1) @ design
        ridge = 1e-6 * np.trace(normal, axis1=1, axis2=2) + 1e-12
        normal += ridge[:, None, None] * np.eye(6)
        solved = np.linalg.solve(normal, design.transpose(0, 2, 1) @ target[:, :, None])[:, :, 0]  # (b, 6)
        motion += np.clip(solved[:, 2:] / np.maximum(solved[:, 1:2], 0.2), -1, 1)
        np.clip(motion, -_BORDER, _BORDER, out=motion)
    return least


def _sample(
    planes: NDArray[np.float32], rows: NDArray[np.float64], columns: NDArray[np.float64]
) -> list[NDArray[np.float64]]:
    """Each of the planes (b, 3, F) at fractional positions (b, P), by linear interpolation."""
    rows, columns = np.clip(rows, 0, SIDE - 1.001), np.clip(columns, 0, SIDE - 1.001)
    top, left = rows.astype(np.intp), columns.astype(np.intp)
    low, high = (rows - top)[:, None], (columns - left)[:, None]
    index = (top * SIDE + left)[:, None]

    def take(offset: int) -> NDArray[np.float32]:
        return np.take_along_axis(planes, index + offset, 2)

    upper = take(0) * (1 - high) + take(1) * high
    lower = take(SIDE) * (1 - high) + take(SIDE + 1) * high
    sampled = upper * (1 - low) + lower * low  # (b, 3, P)
    return [sampled[:, 0], sampled[:, 1], sampled[:, 2]]
