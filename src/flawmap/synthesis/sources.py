"""What is laid into an image: another good image of the set, or a texture, drawn or from a folder of photographs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flawmap.errors import FlawmapError
from flawmap.imaging.decoding import read_image
from flawmap.imaging.image_files import find_images

KEPT = 16
"""Images that a process keeps."""

Textures = Callable[[np.random.Generator, tuple[int, int]], NDArray[np.uint8]]
"""(rng, (H, W)) -> uint8 (H, W, 3). `flawmap.synthesis.textures.draw_texture` is one, a `TextureFolder` another."""


class TextureFolder:
    """Photographs of textures in a folder and those below it, such as DTD (Cimpoi et al., CVPR 2014).

    Called with a generator and (H, W), it gives one of them, resized without regard to its aspect ratio, as DRAEM does.

    Raises:
        FlawmapError: the folder holds no images or cannot be listed.
        ImageError: when called, an image cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.paths = find_images(folder)
        if not self.paths:
            raise FlawmapError(f"{folder}: holds no images; give a folder of texture photographs, or none to draw them")

    def __call__(self, rng: np.random.Generator, size: tuple[int, int]) -> NDArray[np.uint8]:
        return fitted(read_image(self.paths[rng.integers(len(self.paths))]), size)


@lru_cache(KEPT)
def read_kept(path: Path) -> NDArray[Any]:
    """`read_image`, the last few of which this process keeps."""
    return read_image(path)


class GoodImages(Sequence[Any]):
    """Images on disk, each read when it is asked for."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        return read_kept(self.paths[index])


def another_image(
    rng: np.random.Generator, others: Sequence[NDArray[Any]], size: tuple[int, int], white: int = 65535
) -> NDArray[np.uint8]:
    """One of the good images, at another image's size.

    Args:
        others: as `fitted` takes them, at least one.
        size: (H, W), in pixels.
        white: the value that counts as white in 16-bit images.

    Returns:
        uint8 (H, W, 3).
    """
    return fitted(others[int(rng.integers(len(others)))], size, white)


def fitted(image: NDArray[Any], size: tuple[int, int], white: int = 65535) -> NDArray[np.uint8]:
    """An image (H', W') or (H', W', 3) of uint8, uint16 or float in [0, 1] as uint8 (H, W, 3)."""
    if image.dtype != np.uint8:
        scale = 255.0 if image.dtype.kind == "f" else 255.0 / white
        image = np.minimum(image * scale, 255).round().astype(np.uint8)
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    if image.shape[:2] != tuple(size):
        image = np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))
    return image
