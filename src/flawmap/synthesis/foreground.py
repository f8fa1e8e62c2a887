"""Where the part lies in its image, found from the images themselves; sets that show a texture have no such place."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flawmap.errors import FlawmapError

Polarity = Literal["bright", "dark", "either"]

WORKING_SIDE = 256
"""Images are shrunk to this longer side first: the 3 x 3 kernels below are meant for it."""
LEAST_DISTINCTNESS = 0.33
"""Between textures (at most 0.25) and parts on a ground (at least 0.4) of the sets it was chosen on."""
_ENOUGH = 20  # images to decide by
_LEAST_PIECE = 0.1  # of the largest piece's area; smaller ones are dirt on the ground
_LARGEST_HOLE = 0.05  # of the part's area; larger holes are its shape, smaller ones something dark on it
_BAND = 2  # pixels on either side of the outline that are compared


def otsu_threshold(values: NDArray[np.uint8]) -> int:
    """The t for which splitting into `values <= t` and `values > t` has the largest between-class variance.

    Otsu, IEEE Trans. SMC 1979, equation 18; the smallest such t.

    Args:
        values: uint8, any shape, at least one.

    Returns:
        0..255; the value itself where all are alike.
    """
    counts = np.bincount(values.ravel(), minlength=256).astype(np.float64)
    below = np.cumsum(counts)
    above = below[-1] - below
    sums = np.cumsum(counts * np.arange(256))
    split = (below > 0) & (above > 0)
    if not split.any():
        return int(values.flat[0])
    between = np.full(256, -1.0)
    apart = sums[split] / below[split] - (sums[-1] - sums[split]) / above[split]
    between[split] = below[split] * above[split] * apart**2
    return int(np.argmax(between))


@dataclass(frozen=True)
class Foreground:
    """How the part is told from its ground; made by `find_foreground` for a whole set.

    Attributes:
        polarity: the part is brighter than the ground, darker, or differs either way from the image's rim;
            None for a texture, which has no ground.
        distinctness: 0..1, how much like a part on a ground the best polarity looks; see `find_foreground`.
    """

    polarity: Polarity | None
    distinctness: float

    def describe(self) -> str:
        """The decision, in one line."""
        if self.polarity is None:
            return (
                f"texture: no foreground mask, defects may lie anywhere (distinctness {self.distinctness:.2f}, "
                f"a part on a ground has {LEAST_DISTINCTNESS:.2f} or more)"
            )
        how = {"bright": "brighter than", "dark": "darker than", "either": "unlike"}[self.polarity]
        return f"foreground: the part is {how} its ground, defects lie on it (distinctness {self.distinctness:.2f})"

    def mask(self, image: NDArray[Any]) -> NDArray[np.bool_]:
        """The part's pixels: Otsu, opened and closed, smoothed, small holes filled.

        Args:
            image: (H, W) or (H, W, 3), uint8, uint16 or float in [0, 1].

        Returns:
            bool (H, W), True on the part; True everywhere for a texture, and where no part is found.
        """
        if self.polarity is None:
            return np.ones(image.shape[:2], np.bool_)
        found, _ = _large_pieces(_segment(_signals(_small(image))[self.polarity]))
        if not found.any():
            found[:] = True
        height, width = image.shape[:2]
        enlarged = Image.fromarray(found.astype(np.uint8)).resize((width, height), Image.Resampling.NEAREST)
        return np.asarray(enlarged).astype(np.bool_)


def looked_at(images: int) -> range:
    """The positions of twenty images at most, spread over so many, by which `find_foreground` may decide."""
    return range(0, images, -(-images // _ENOUGH))


def find_foreground(images: Iterable[NDArray[Any]]) -> Foreground:
    """Decides for a set of images whether they show parts on a ground, and which side of Otsu's threshold is the part.

    Each polarity is tried on each image. A part has an outline across which the signal changes by much of what parts
    it from its ground (a ramp of light does not), keeps off the image's rim, is in one piece, and has much the same
    area in each image. So distinctness is the change across the outline over the difference of the class means (at most
    1), times the square of 1 - rim share / area share, times the largest piece's share of the area (medians over the
    images), times the first over the ninth decile of the areas. The better of bright and dark is taken if it reaches
    `LEAST_DISTINCTNESS`, else either if that does.

    Args:
        images: good images, (H, W) or (H, W, 3); twenty are plenty.

    Raises:
        FlawmapError: no images.
    """
    figures: dict[Polarity, list[tuple[float, float, float, float]]] = {"bright": [], "dark": [], "either": []}
    for image in images:
        for polarity, signal in _signals(_small(image)).items():
            figures[polarity].append(_outline_figures(signal, _segment(signal)))
    if not figures["bright"]:
        raise FlawmapError("no images to find the foreground in; give at least one")
    scores: dict[Polarity, float] = {}
    for polarity, rows in figures.items():
        sharp, rim, piece, area = np.median(rows, axis=0)
        low, high = np.percentile([row[-1] for row in rows], [10, 90])
        off_rim = max(0.0, 1 - rim / area) if area else 0.0
        scores[polarity] = float(np.clip(sharp, 0, 1) * off_rim**2 * piece * low / high) if high else 0.0
    best: Polarity = "bright" if scores["bright"] >= scores["dark"] else "dark"
    if scores[best] < LEAST_DISTINCTNESS and scores["either"] > scores[best]:
        best = "either"
    return Foreground(best if scores[best] >= LEAST_DISTINCTNESS else None, scores[best])


def _small(image: NDArray[Any]) -> NDArray[np.float32]:
    """float32 (h, w, C), 0..255, at most `WORKING_SIDE` high and wide."""
    from scipy.ndimage import uniform_filter

    planes = image[..., None] if image.ndim == 2 else image
    # uint16 of unknown depth, and floats: only the order of values matters to Otsu
    scale = 1.0 if image.dtype == np.uint8 else 255.0 / (float(image.max()) or 1.0)
    shrink = min(1.0, WORKING_SIDE / max(image.shape[:2]))
    size = (max(1, round(image.shape[1] * shrink)), max(1, round(image.shape[0] * shrink)))
    small = []
    for channel in range(planes.shape[2]):
        plane = Image.fromarray(planes[..., channel].astype(np.float32))
        if shrink < 1:
            plane = plane.resize(size, Image.Resampling.BOX)
        small.append(uniform_filter(np.asarray(plane), 3, mode="nearest"))
    values: NDArray[np.float32] = np.stack(small, axis=2) * np.float32(scale)
    return values


def _signals(small: NDArray[np.float32]) -> dict[Polarity, NDArray[np.uint8]]:
    """What Otsu splits for each polarity, uint8 (h, w), the part above."""
    grey = np.clip(small.mean(axis=2), 0, 255).astype(np.uint8)
    ground = np.median(small[_rim(grey.shape)], axis=0)
    distance = np.abs(small - ground).mean(axis=2)
    spread = max(1.0, float(np.median(distance[_rim(grey.shape)])))
    # The logarithm keeps a few brilliant spots from being split off the part.
    unlike = np.clip(np.log1p(distance / spread) * 50, 0, 255).astype(np.uint8)
    return {"bright": grey, "dark": 255 - grey, "either": unlike}


def _rim(shape: tuple[int, ...]) -> NDArray[np.bool_]:
    rim = np.ones(shape, np.bool_)
    width = max(1, min(shape) // 32)
    rim[width:-width, width:-width] = False
    return rim


def _segment(signal: NDArray[np.uint8]) -> NDArray[np.bool_]:
    from scipy import ndimage

    square = np.ones((3, 3), np.bool_)
    found = ndimage.binary_opening(signal > otsu_threshold(signal), square)
    found = ndimage.binary_closing(np.pad(found, 1, mode="edge"), square)[1:-1, 1:-1]
    found = ndimage.gaussian_filter(found.astype(np.float32), 2, mode="nearest") > 0.5
    holes = ndimage.binary_fill_holes(found) & ~found
    labels, count = ndimage.label(holes)
    if count:
        small = np.bincount(labels.ravel()) <= _LARGEST_HOLE * found.sum()
        small[0] = False
        found |= small[labels]
    return np.asarray(found)


def _large_pieces(found: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], float]:
    """The mask without its small pieces, and the largest piece's share of all."""
    from scipy.ndimage import label

    labels, count = label(found)
    if count == 0:
        return found, 0.0
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    return (areas >= _LEAST_PIECE * areas.max())[labels] & found, float(areas.max() / areas.sum())


def _outline_figures(signal: NDArray[np.uint8], found: NDArray[np.bool_]) -> tuple[float, float, float, float]:
    """Change across the outline over the means' difference; shares of the rim, of the largest piece, of the image."""
    from scipy.ndimage import binary_dilation, binary_erosion

    area = float(found.mean())
    if area in (0.0, 1.0):
        return 0.0, 1.0, 1.0, area
    square = np.ones((3, 3), np.bool_)
    inner = found & ~binary_erosion(found, square, _BAND, border_value=1)
    outer = binary_dilation(found, square, _BAND) & ~found
    step = float(signal[inner].mean()) - float(signal[outer].mean())
    apart = float(signal[found].mean()) - float(signal[~found].mean())
    _, piece = _large_pieces(found)
    return (step / apart if apart > 0 else 0.0), float(found[_rim(found.shape)].mean()), piece, area
