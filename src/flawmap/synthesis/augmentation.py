"""Changing the look of a source, so that what is laid into an image is not what the part itself is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

Operation = Callable[[np.random.Generator, Image.Image], Image.Image]


def augment(
    rng: np.random.Generator, source: NDArray[np.uint8], count: int = 3, names: Sequence[str] = ()
) -> NDArray[np.uint8]:
    """`count` different of the nine `OPERATIONS` one after the other: the list of DRAEM (ICCV 2021), less its rotation.

    Args:
        source: uint8 (H, W, 3).
        count: of operations.
        names: of those that are drawn from; all of them where there are none.

    Returns:
        uint8 (H, W, 3).
    """
    picture = Image.fromarray(source)
    names = list(names or OPERATIONS)
    for number in rng.choice(len(names), count, replace=False):
        picture = OPERATIONS[names[number]](rng, picture)
    return np.asarray(picture)


def _gamma(rng: np.random.Generator, picture: Image.Image) -> Image.Image:
    levels = np.linspace(0, 1, 256)
    return _by_table(picture, np.concatenate([levels**power for power in rng.uniform(0.5, 2.0, 3)]) * 255)


def _brightness(rng: np.random.Generator, picture: Image.Image) -> Image.Image:
    return _by_table(picture, np.tile(np.arange(256) * rng.uniform(0.8, 1.2) + rng.uniform(-30, 30), 3))


def _sharpness(rng: np.random.Generator, picture: Image.Image) -> Image.Image:
    return ImageEnhance.Sharpness(picture).enhance(float(rng.uniform(0, 2)))


def _hue_and_saturation(rng: np.random.Generator, picture: Image.Image) -> Image.Image:
    levels = np.arange(256)
    hue, saturation = rng.integers(-50, 51, 2)
    table = np.concatenate([(levels + hue) % 256, levels + saturation, levels])
    return _by_table(picture.convert("HSV"), table).convert("RGB")


def _solarize(rng: np.random.Generator, picture: Image.Image) -> Image.Image:
    return ImageOps.solarize(picture, int(rng.integers(32, 129))) if rng.random() < 0.5 else picture


def _posterize(rng: np.random.Generator, picture: Image.Image) -> Image.Image:
    return ImageOps.posterize(picture, int(rng.integers(1, 9)))


def _invert(rng: np.random.Generator, picture: Image.Image) -> Image.Image:
    return ImageOps.invert(picture)


def _autocontrast(rng: np.random.Generator, picture: Image.Image) -> Image.Image:
    return ImageOps.autocontrast(picture, float(rng.uniform(0, 20)))


def _equalize(rng: np.random.Generator, picture: Image.Image) -> Image.Image:
    return ImageOps.equalize(picture)


def _by_table(picture: Image.Image, table: NDArray[np.floating]) -> Image.Image:
    """Each channel through its 256 entries of a table of 768."""
    return picture.point(np.clip(table, 0, 255).round().astype(np.uint8).tolist())


OPERATIONS: dict[str, Operation] = {
    "gamma": _gamma,
    "brightness": _brightness,
    "sharpness": _sharpness,
    "hue and saturation": _hue_and_saturation,
    "solarize": _solarize,
    "posterize": _posterize,
    "invert": _invert,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
}
