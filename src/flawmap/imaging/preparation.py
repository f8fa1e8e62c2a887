"""From the pixels of an image to the inputs of a model, window by window. Needs numpy and Pillow only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flawmap.errors import FlawmapError, ImageError
from flawmap.imaging.arrays import as_pixels
from flawmap.imaging.decoding import read_image
from flawmap.imaging.geometry import Geometry
from flawmap.imaging.masks import read_mask
from flawmap.imaging.placement import Placement
from flawmap.imaging.preprocessing import Preprocessing
from flawmap.imaging.registration import Template

LOWEST_QUALITY = 0.3
"""No alignment of a lower quality is believed: the image shows something else than the template."""


@dataclass(frozen=True)
class Preparation:
    """What is done to every image before the backbone, in training and ever after.

    Attributes:
        preprocessing: the model's input size, and how pixel values become its numbers.
        image_size: (height, width) that an image is resized to; the model's input size, except for a crop.
        geometry: which windows of the image become model inputs.
        region: bool (Hr, Wr), True in the region of interest; None where everything is of interest.
        template: what images are aligned to first; None leaves them as they are.
        lowest_quality: alignments of a lower quality are refused.
    """

    preprocessing: Preprocessing
    image_size: tuple[int, int]
    geometry: Geometry = field(default_factory=Geometry)
    region: NDArray[np.bool_] | None = field(default=None, repr=False, compare=False)
    template: Template | None = field(default=None, repr=False, compare=False)
    lowest_quality: float = LOWEST_QUALITY

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the model's input."""
        return self.preprocessing.size

    @property
    def masked(self) -> bool:
        """Whether a model input may hold pixels that are not scored: padding, or outside the region of interest."""
        return self.geometry.kind in ("keep_aspect", "tile") or self.region is not None or self.template is not None

    def place(self, pixels: NDArray[Any]) -> Placement:
        """The windows on an image (H, W) or (H, W, 3).

        Raises:
            ImageError: it cannot be aligned to the template, or the region of interest does not fit it.
        """
        size = (pixels.shape[0], pixels.shape[1])
        alignment = None
        if self.template is not None:
            alignment = self.template.align(pixels)
            if alignment.quality < self.lowest_quality:
                raise ImageError(
                    f"the part cannot be found in the image (alignment quality {alignment.quality:.2f}, at least "
                    f"{self.lowest_quality:.2f} is needed); check the part and its pose"
                )
        return self.geometry.place(size, self.image_size, roi=self.region, alignment=alignment)

    def inputs(self, pixels: NDArray[Any], placement: Placement) -> Iterator[NDArray[Any]]:
        """The model inputs (3, h, w) of the windows of `place`, of `preprocessing.dtype`."""
        if self.geometry.kind == "stretch" and self.template is None:
            yield self.preprocessing(pixels)
            return
        if pixels.dtype == np.uint8:
            parts = placement.inputs(pixels)
        else:
            white = self.preprocessing.white if pixels.dtype == np.uint16 else 1
            scaled = np.minimum(pixels * np.float32(1 / white), np.float32(1))
            planes = [scaled] if scaled.ndim == 2 else [scaled[:, :, channel] for channel in range(3)]
            cut = zip(*(placement.inputs(plane) for plane in planes), strict=True)
            parts = (np.clip(part[0] if len(part) == 1 else np.stack(part, 2), 0, 1) for part in cut)
        for part in parts:
            yield self.preprocessing(part)

    def to_json(self) -> dict[str, Any]:
        """The settings as plain JSON types; `arrays` holds the rest."""
        return {
            **self.preprocessing.to_json(),
            "image_size": list(self.image_size),
            "geometry": self.geometry.to_json(),
            "template_size": None if self.template is None else list(self.template.size),
            "lowest_quality": self.lowest_quality,
        }

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The region of interest and the template, by name."""
        arrays: dict[str, NDArray[Any]] = {}
        if self.region is not None:
            arrays["region"] = self.region.astype(np.uint8)
        if self.template is not None:
            arrays["template"] = self.template.grey
        return arrays

    @classmethod
    def from_json(cls, settings: dict[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Preparation:
        """Undoes `to_json` and `arrays`.

        Raises:
            FlawmapError: a setting is missing, unknown or out of its range.
        """
        try:
            height, width = settings["image_size"]
            geometry = Geometry.from_json(settings["geometry"])
            own = ("image_size", "geometry", "template_size", "lowest_quality")
            preprocessing = Preprocessing.from_json({key: settings[key] for key in settings if key not in own})
            if preprocessing.size != geometry.input_size((height, width)):
                raise FlawmapError(f"preparation: size {preprocessing.size} does not belong to {settings['geometry']}")
            region = arrays["region"].astype(np.bool_) if "region" in arrays else None
            size = settings["template_size"]
            template = None if size is None else Template(arrays["template"], (size[0], size[1]))
            lowest = float(settings["lowest_quality"])
        except (KeyError, TypeError, ValueError) as error:
            raise FlawmapError(f"preparation: settings cannot be used ({error!r})") from error
        return cls(preprocessing, (height, width), geometry, region, template, lowest)


def read_region(path: Path) -> NDArray[np.bool_]:
    """The region of interest that a mask marks, bool (H, W).

    Raises:
        ImageError: it cannot be read.
        FlawmapError: it marks nothing.
    """
    region = read_mask(path)
    if not region.any():
        raise FlawmapError(f"--roi {path} marks no pixel: paint what is to be inspected white (255)")
    return region


def read_template(path: Path) -> Template:
    """The template that images are aligned to."""
    try:
        return Template.from_image(as_pixels(read_image(path)))
    except FlawmapError as error:
        raise error if str(path) in str(error) else FlawmapError(f"--register {path}: {error}") from error
