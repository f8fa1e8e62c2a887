"""A good image and a random generator in, an image with a defect and the defect's mask out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flawmap.errors import FlawmapError
from flawmap.imaging.arrays import as_pixels
from flawmap.synthesis.augmentation import OPERATIONS, augment
from flawmap.synthesis.blending import alpha_blend, seamless_blend
from flawmap.synthesis.cutpaste import cutpaste, scar
from flawmap.synthesis.perlin import perlin_mask
from flawmap.synthesis.rearrangement import rearrange
from flawmap.synthesis.sources import Textures, another_image, fitted
from flawmap.synthesis.textures import draw_texture
from flawmap.synthesis.visibility import change, contrast


@dataclass(frozen=True)
class SynthesisSettings:
    """How defects are made. The defaults mix all kinds; `CLS_CNF`, `DRAEM` and `POUTA` are the papers' own.

    Attributes:
        kinds: how often each of `KINDS` is made, in relation to the others.
        seamless: share of the defects that are laid in by their gradients; the others are alpha-blended.
        opacity: of alpha blending, uniform between the two; DRAEM's β is 1 - opacity.
        scales: Perlin masks have 2^k cells along an axis, k uniform between the two.
        threshold: of Perlin masks; of two numbers one uniform between them, drawn for each mask.
        isolated: share of the Perlin masks of which one to three spots are kept instead of all.
        augmented: whether sources other than CutPaste's are changed by three of the operations in `augmentation`.
        operations: names of those operations; all where there are none.
        own_share: of the image itself in what "merged" lays in, uniform between the two.
        coloured: whether images whose channels are all alike get coloured defects, if their sources are.
        attempts: how often what falls outside the region, or cannot be seen, is drawn, before the image stays good.
        jitter: by how much the brightness and contrast of CutPaste's patches change at most; its authors' is 0.1, which
            hardly shows on an even texture.
        least_change: defects that change the image by less than this, on the scale 0..1, are made anew. Counted is the
            mean over the mask of what 5 x 5 pixels of it change by together: threads laid beside threads of the same
            cloth are no defect.
        least_contrast: defects are made anew too whose `contrast` to the image is less than so many 8-bit levels.
        least_pixels: and those whose mask has fewer pixels.

    Raises:
        FlawmapError: a value out of its range.
    """

    kinds: dict[str, float] = field(
        default_factory=lambda: {"texture": 0.3, "image": 0.25, "rearranged": 0.1, "cutpaste": 0.15, "scar": 0.2}
    )
    seamless: float = 0.25
    opacity: tuple[float, float] = (0.2, 1.0)
    scales: tuple[int, int] = (0, 5)
    threshold: float | tuple[float, float] = 0.5
    isolated: float = 0.5
    augmented: bool = True
    operations: tuple[str, ...] = ()
    own_share: tuple[float, float] = (0.0, 0.8)
    coloured: bool = False
    attempts: int = 10
    jitter: float = 0.3
    least_change: float = 0.03
    least_contrast: float = 0.0
    least_pixels: int = 1

    def __post_init__(self) -> None:
        unknown = sorted(self.kinds.keys() - KINDS.keys())
        if unknown or not self.kinds:
            raise FlawmapError(f"synthesis: kinds are {', '.join(unknown) or 'none'}; choose from {', '.join(KINDS)}")
        if min(self.kinds.values()) < 0 or sum(self.kinds.values()) <= 0:
            raise FlawmapError(f"synthesis: kinds is {self.kinds}; give shares of 0 or more, not all 0")
        for name in ("seamless", "isolated", "jitter", "least_change"):
            if not 0 <= getattr(self, name) <= 1:
                raise FlawmapError(f"synthesis: {name} is {getattr(self, name)}; give 0 to 1")
        if not 0 <= self.least_contrast <= 255 or self.least_pixels < 1:
            least = f"least_contrast is {self.least_contrast}, least_pixels {self.least_pixels}"
            raise FlawmapError(f"synthesis: {least}; give 0 to 255, and 1 or more")
        if unknown := sorted({*self.operations} - OPERATIONS.keys()):
            raise FlawmapError(f"synthesis: operations are {', '.join(unknown)}; choose from {', '.join(OPERATIONS)}")
        if self.attempts < 1:
            raise FlawmapError(f"synthesis: attempts is {self.attempts}; give 1 or more")
        if not 0 <= self.own_share[0] <= self.own_share[1] <= 1:
            raise FlawmapError(f"synthesis: own_share is {self.own_share}; give two numbers in 0 to 1, the lower first")
        if not 0 <= self.opacity[0] <= self.opacity[1] <= 1:
            raise FlawmapError(f"synthesis: opacity is {self.opacity}; give two numbers in 0 to 1, the lower first")
        if not 0 <= self.scales[0] <= self.scales[1] <= 12:
            raise FlawmapError(
                f"synthesis: scales is {self.scales}; give two whole numbers in 0 to 12, the lower first"
            )


class Defect(NamedTuple):
    """A defective image, its mask, bool (H, W), and the kind of defect: "none", with no mask, where none was made."""

    image: NDArray[Any]
    mask: NDArray[np.bool_]
    kind: str


class _Canvas(NamedTuple):
    """What a kind of defect is made from."""

    image: NDArray[Any]
    others: Sequence[NDArray[Any]]
    region: NDArray[np.bool_]
    textures: Textures
    settings: SynthesisSettings
    white: int


_Made = tuple[NDArray[Any], NDArray[np.bool_]]  # a source like the image or uint8 (H, W, 3), and a mask


def synthesize(
    image: NDArray[Any],
    rng: np.random.Generator,
    others: Sequence[NDArray[Any]] = (),
    *,
    region: NDArray[np.bool_] | None = None,
    textures: Textures = draw_texture,
    settings: SynthesisSettings | None = None,
    white: int = 65535,
) -> Defect:
    """One synthetic defect on a good image. The same generator state and arguments give the same defect.

    Defects that fall outside the region or cannot be seen are drawn anew, a few times; after that the image is
    returned as it is, with an empty mask and the kind "none". Images whose channels are all alike get grey defects,
    unless `coloured`.

    Args:
        image: as `flawmap.imaging.arrays.as_pixels` takes it: uint8, uint16 or float in [0, 1], (H, W) or (H, W, 3).
        others: further good images, the image itself among them or not; without any, the image stands in, mirrored.
            They are asked for their length and for one of them only, so a sequence may read them as they are needed.
        region: bool (H, W), where defects may lie: the foreground, a region of interest, or both. None: everywhere.
        textures: where foreign textures come from.
        settings: None for the defaults.
        white: the value that counts as white in 16-bit images.

    Returns:
        The image with its defect, of the type and shape `as_pixels` gives, equal to it bit for bit outside the mask;
        the mask; and the kind of defect, a name of `KINDS`, with " (seamless)" where it was blended so.

    Raises:
        ImageError: the image is none.
        FlawmapError: the region is not of the image's size.
    """
    settings = settings or DEFAULTS
    pixels = as_pixels(image)
    size = (pixels.shape[0], pixels.shape[1])
    if region is None:
        region = np.ones(size, np.bool_)
    elif region.shape != size:
        raise FlawmapError(f"the region is {region.shape} but the image is {size}; resize one of them")
    canvas = _Canvas(pixels, others, region, textures, settings, white)
    names = list(settings.kinds)
    shares = np.array([settings.kinds[name] for name in names], dtype=np.float64)
    for _ in range(settings.attempts if region.any() else 0):
        kind = names[rng.choice(len(names), p=shares / shares.sum())]
        source, mask = KINDS[kind](rng, canvas)
        seamless = bool(rng.random() < settings.seamless)
        opacity = float(rng.uniform(*settings.opacity))
        mask = mask & region
        if mask.sum() < settings.least_pixels:
            continue
        box = _around(mask)
        plain, laid = _unit(pixels[box], white), _unit(source[box], white)  # (h, w, C), (h, w, C')
        if laid.shape[2] == 3 and (plain.shape[2] == 1 or (_colourless(plain) and not settings.coloured)):
            laid = laid.mean(axis=2, keepdims=True)
        if laid.shape[2] != plain.shape[2]:
            laid = np.repeat(laid, plain.shape[2], axis=2)
        inside = mask[box]
        blended = seamless_blend(plain, laid, inside) if seamless else alpha_blend(plain, laid, inside, opacity)
        np.clip(blended, 0, 1, out=blended)
        if settings.least_change and change(blended - plain, inside) < settings.least_change:
            continue
        defective = pixels.copy()
        defective[mask] = _stored(blended[inside], pixels, white)
        if settings.least_contrast and contrast(defective, pixels, mask, white) < settings.least_contrast:
            continue
        return Defect(defective, mask, f"{kind} (seamless)" if seamless else kind)
    return Defect(pixels.copy(), np.zeros(size, np.bool_), "none")


def generator(seed: int, index: int) -> np.random.Generator:
    """The generator of one defect of many: independent of all others, and of who makes which."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(index,)))


def _texture(rng: np.random.Generator, canvas: _Canvas) -> _Made:
    """A foreign texture in a Perlin mask (DRAEM)."""
    mask = _perlin(rng, canvas)
    return _augmented(rng, canvas.textures(rng, mask.shape), canvas), mask


def _image(rng: np.random.Generator, canvas: _Canvas) -> _Made:
    """Another good image in a Perlin mask (Oh & Kim, figure 1b)."""
    mask = _perlin(rng, canvas)
    if len(canvas.others):
        source = another_image(rng, canvas.others, mask.shape, canvas.white)
    else:
        source = fitted(canvas.image, mask.shape, canvas.white)[:, ::-1]
    return _augmented(rng, source, canvas), mask


def _rearranged(rng: np.random.Generator, canvas: _Canvas) -> _Made:
    """The image itself with its patches in other places, in a Perlin mask (MemSeg)."""
    mask = _perlin(rng, canvas)
    source = fitted(canvas.image, mask.shape, canvas.white)
    return rearrange(rng, _augmented(rng, source, canvas)), mask


def _merged(rng: np.random.Generator, canvas: _Canvas) -> _Made:
    """The image itself, moved, turned or as it is, merged with a foreign texture, in a Perlin mask (POUTA)."""
    mask = _perlin(rng, canvas)
    source = fitted(canvas.image, mask.shape, canvas.white)
    transform = rng.integers(3)
    if transform == 1:
        source = np.roll(source, rng.integers(mask.shape), axis=(0, 1))
    elif transform == 2:
        source = source[::-1, ::-1]
    texture = _augmented(rng, canvas.textures(rng, mask.shape), canvas)
    share = np.float32(rng.uniform(*canvas.settings.own_share))
    return (source * share + texture * (1 - share)).round().astype(np.uint8), mask


def _cutpaste(rng: np.random.Generator, canvas: _Canvas) -> _Made:
    return cutpaste(rng, canvas.image, canvas.region, canvas.settings.jitter)


def _scar(rng: np.random.Generator, canvas: _Canvas) -> _Made:
    return scar(rng, canvas.image, canvas.region, canvas.settings.jitter)


KINDS: dict[str, Callable[[np.random.Generator, _Canvas], _Made]] = {
    "texture": _texture,
    "image": _image,
    "rearranged": _rearranged,
    "merged": _merged,
    "cutpaste": _cutpaste,
    "scar": _scar,
}
"""The kinds of defect."""

DEFAULTS = SynthesisSettings()
VISIBLE = SynthesisSettings(least_contrast=16.0, least_pixels=16)
"""For defects that people look at: a sixteenth of the range from black to white, on 4 x 4 pixels' area or more."""
CLS_CNF = SynthesisSettings(kinds={"texture": 0.5, "image": 0.5}, seamless=0.0, isolated=0.0, least_change=0.0)
"""Oh & Kim (IEEE Access 2024); their program keeps empty masks (`attempts=1`) and lays colours on grey (`coloured`)."""
DRAEM = SynthesisSettings(kinds={"texture": 1.0}, seamless=0.0, isolated=0.0, least_change=0.0)
"""Zavrtanik, Kristan & Skočaj (ICCV 2021), as their program does it, whose β is 1 - opacity."""
DRAEM_TEXT = replace(
    DRAEM,
    opacity=(0.1, 1.0),
    threshold=(0.3, 0.7),
    operations=("posterize", "sharpness", "solarize", "equalize", "brightness", "hue and saturation", "autocontrast"),
)
"""The same as the paper prints it: Eq. 4's β in 0.1 to 1 is the opacity, the threshold is random (of what range it does
not say), and three of seven operations change a texture."""
POUTA = SynthesisSettings(kinds={"merged": 1.0}, seamless=0.0, opacity=(1.0, 1.0), isolated=0.0, least_change=0.0)
"""Wang et al. (arXiv 2312.12913); what it leaves open is taken from DRAEM, whose β is the share of the image itself."""


def _perlin(rng: np.random.Generator, canvas: _Canvas) -> NDArray[np.bool_]:
    settings = canvas.settings
    given = settings.threshold
    threshold = float(rng.uniform(*given)) if isinstance(given, tuple) else given
    mask = perlin_mask(rng, canvas.region.shape, settings.scales, threshold)
    if rng.random() < settings.isolated:
        from scipy.ndimage import label

        spots, count = label(mask & canvas.region)
        if count:
            kept = np.zeros(count + 1, np.bool_)
            kept[rng.integers(1, count + 1, size=rng.integers(1, 4))] = True
            mask = kept[spots]
    return mask


def _augmented(rng: np.random.Generator, source: NDArray[np.uint8], canvas: _Canvas) -> NDArray[np.uint8]:
    return augment(rng, source, names=canvas.settings.operations) if canvas.settings.augmented else source


def _around(mask: NDArray[np.bool_]) -> tuple[slice, slice]:
    """The mask's bounding box and a pixel beyond it, as far as the image reaches."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return (
        slice(max(0, int(rows[0]) - 1), int(rows[-1]) + 2),
        slice(max(0, int(columns[0]) - 1), int(columns[-1]) + 2),
    )


def _colourless(plain: NDArray[np.float32]) -> bool:
    return bool((plain == plain[..., :1]).all())


def _unit(pixels: NDArray[Any], white: int) -> NDArray[np.float32]:
    """float32 (H, W, C), 0..1."""
    planes = pixels[..., None] if pixels.ndim == 2 else pixels
    if planes.dtype.kind == "f":
        return planes.astype(np.float32)
    unit: NDArray[np.float32] = planes * np.float32(1 / (255 if planes.dtype == np.uint8 else white))
    return np.minimum(unit, 1, out=unit)


def _stored(values: NDArray[np.float32], pixels: NDArray[Any], white: int) -> NDArray[Any]:
    """Values (N, C) in 0..1 as the pixels of an image store them: (N,) or (N, 3)."""
    if pixels.dtype.kind != "f":
        values = (values * (255 if pixels.dtype == np.uint8 else white)).round()
    stored: NDArray[Any] = values.astype(pixels.dtype)
    return stored[:, 0] if pixels.ndim == 2 else stored
