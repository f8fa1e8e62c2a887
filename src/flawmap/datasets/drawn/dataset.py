"""From a kind of part to pictures, masks and a data set on disk in the MVTec AD layout."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flawmap.datasets.drawn import boards, fabric, screws
from flawmap.datasets.drawn.camera import develop, expose, sample_camera
from flawmap.datasets.drawn.lighting import sample_light, shade
from flawmap.datasets.drawn.noise import Plane
from flawmap.datasets.drawn.surface import Surface
from flawmap.errors import FlawmapError
from flawmap.files import claim_folder, write_png

SMALLEST = 64  # pixels; below it threads, yarns and legs are finer than the picture
CHANGED = 5 / 255  # a pixel belongs to the mask from this difference on, about that of the sensor's noise
OBVIOUS = 20 / 255  # a defect counts as visible when this share of the picture differs by this much
OBVIOUS_SHARE = 0.0005
LARGEST_SHARE = 0.4
ATTEMPTS = 32


class Scene(Protocol):
    """One part under the camera; it can be shown as often as wanted, with a defect or without."""

    def surface(self, defect: str | None, flaw: np.random.Generator) -> Surface: ...


@dataclass(frozen=True)
class Kind:
    """`defects` names what can be wrong with a part, `scene(rng, size)` draws one at `size` x `size` picture pixels."""

    defects: tuple[str, ...]
    scene: Callable[[np.random.Generator, int], Scene]


KINDS: dict[str, Kind] = {
    "screws": Kind(screws.DEFECTS, screws.Screw),
    "fabric": Kind(fabric.DEFECTS, fabric.Cloth),
    "boards": Kind(boards.DEFECTS, boards.Board),
}


def draw_part(
    kind: str, defect: str | None, rng: np.random.Generator, size: int = 256
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """One picture (size, size, 3) uint8 RGB and its mask (size, size) bool, True where the defect shows.

    `defect` is one of `KINDS[kind].defects`, or None for a good part and an empty mask. Generators in the same state
    give the same part under the same light, camera and noise whatever the defect: more than 3 rows or columns away
    from the mask a defective part equals its good twin bit for bit. The mask holds the pixels that differ from the
    twin's by more than 5/255 before the sensor's noise, closed over gaps of a few pixels, holes filled; it is never
    empty and covers less than 40 % of the picture.

    Raises `FlawmapError` for an unknown kind or defect and for a size below 64.
    """
    _check(kind, size)
    if defect is not None and defect not in KINDS[kind].defects:
        raise FlawmapError(f"{defect!r} is not a defect of {kind}; choose one of {', '.join(KINDS[kind].defects)}")
    part_seed, light_seed, camera_seed, noise_seed, flaw_seed = (int(seed) for seed in rng.integers(2**63, size=5))
    scene = KINDS[kind].scene(np.random.default_rng(part_seed), size)
    light = sample_light(np.random.default_rng(light_seed))
    camera = sample_camera(np.random.default_rng(camera_seed))
    picture = develop(shade(scene.surface(None, np.random.default_rng(flaw_seed)), light), camera)
    mask = np.zeros((size, size), dtype=bool)
    if defect is not None:
        good = picture
        for attempt in range(ATTEMPTS):  # a scratch may lie under a component, a missing yarn under the others
            flaw = np.random.default_rng([flaw_seed, attempt])
            picture = develop(shade(scene.surface(defect, flaw), light), camera)
            difference = np.abs(picture - good).max(axis=0)
            mask = _mask(difference)
            if (difference > OBVIOUS).mean() >= OBVIOUS_SHARE and mask.mean() < LARGEST_SHARE:
                break
        else:
            raise FlawmapError(f"{defect}: cannot be shown on {kind} of {size} pixels; choose a larger size")
        picture = _blend(good, picture, mask)
    return expose(picture, camera, np.random.default_rng(noise_seed)), mask


def draw_dataset(
    directory: Path,
    kind: str = "screws",
    seed: int = 0,
    *,
    train: int = 60,
    good: int = 20,
    per_defect: int = 10,
    size: int = 256,
) -> None:
    """Write a small data set of drawn parts in the MVTec AD layout.

    `directory` receives `train` images in `train/good`, `good` in `test/good`, and `per_defect` in `test/<defect>` with
    masks of 0 and 255 in `ground_truth/<defect>/<stem>_mask.png` for each of the kind's defects. Each image depends on
    the kind, the seed, its split, its defect and its number alone: other counts leave it as it is, and the same call
    on the same machine writes the same bytes.

    Raises `FlawmapError` for an unknown kind, a negative seed or count, a size below 64, and a `directory` that is not
    a new or an empty folder or cannot be written.
    """
    _check(kind, size)
    for name, value in (("seed", seed), ("train", train), ("good", good), ("per_defect", per_defect)):
        if value < 0:
            raise FlawmapError(f"{name} is {value}; give 0 or more")
    directory = Path(directory)
    try:
        claim_folder(directory)
        wanted = [("train", None, train), ("test", None, good), *(("test", d, per_defect) for d in KINDS[kind].defects)]
        for split, defect, count in wanted:
            label = defect or "good"
            stream = zlib.crc32(f"{kind}/{split}/{label}".encode())
            for index in range(count):
                image, mask = draw_part(kind, defect, np.random.default_rng([seed, stream, index]), size)
                write_png(directory / split / label / f"{index:03d}.png", Image.fromarray(image))
                if defect is not None:
                    grey = mask.astype(np.uint8) * np.uint8(255)
                    write_png(directory / "ground_truth" / label / f"{index:03d}_mask.png", Image.fromarray(grey))
    except OSError as error:
        raise FlawmapError(
            f"{error.filename or directory}: cannot be written ({error.strerror}); make room or give another folder"
        ) from error


def _check(kind: str, size: int) -> None:
    if kind not in KINDS:
        raise FlawmapError(f"{kind!r} is not a kind of part that can be drawn; choose one of {', '.join(KINDS)}")
    if size < SMALLEST:
        raise FlawmapError(f"size is {size} pixels; give {SMALLEST} or more")


def _mask(difference: Plane) -> NDArray[np.bool_]:
    """(H, W) bool from the largest difference of any channel, (H, W) in 0..1."""
    from scipy.ndimage import binary_dilation, binary_erosion, binary_fill_holes

    radius = max(1, round(3 * difference.shape[0] / 256))
    axis = np.arange(-radius, radius + 1)
    disc = axis[:, None] ** 2 + axis**2 <= radius**2
    closed = binary_erosion(binary_dilation(difference > CHANGED, disc), disc, border_value=1)
    return np.asarray(binary_fill_holes(closed), dtype=bool)


def _blend(good: Plane, flawed: Plane, mask: NDArray[np.bool_]) -> Plane:
    """The flawed picture in the mask, the good one 3 pixels and more beside it, a ramp between, all (3, H, W)."""
    from scipy.ndimage import maximum_filter, uniform_filter

    weight = uniform_filter(maximum_filter(mask.astype(np.float32), 5), 3)
    # A running mean leaves rounding errors behind it, and outside the ramp the twins are to be equal exactly.
    weight = np.round(weight * 9) * np.float32(1 / 9)
    blended: Plane = good + np.clip(weight, 0, 1) * (flawed - good)
    return blended
