"""A data set on disk, in the MVTec AD layout, whose defects are synthetic."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flawmap.datasets import Dataset
from flawmap.errors import FlawmapError, ImageError
from flawmap.files import filling, unwritable, write_png
from flawmap.imaging.decoding import infer_white, read_image
from flawmap.imaging.deep_colours import png_of_deep_colours
from flawmap.imaging.image_files import find_images
from flawmap.imaging.masks import read_mask, resize_mask
from flawmap.ranges import SEEDS
from flawmap.synthesis.contact_sheet import contact_sheet
from flawmap.synthesis.defects import VISIBLE, Defect, generator, synthesize
from flawmap.synthesis.foreground import Foreground, find_foreground, looked_at
from flawmap.synthesis.sources import KEPT, GoodImages, TextureFolder, read_kept
from flawmap.synthesis.textures import draw_texture
from flawmap.text import counted

Progress = Callable[[str, int, int], None]
_Task = TypeVar("_Task")
_Result = TypeVar("_Result")

_SHOWN = 48  # defects on the contact sheet
_CHUNK = 8  # tasks a worker takes at a time


@dataclass(frozen=True)
class WrittenDefects:
    """What `write_defects` wrote.

    Attributes:
        foreground: where the defects were allowed to lie, before any region of interest.
        kinds: how many defects there are of each kind.
        held_out: how many good images the defects were made from, and in words which.
        failed: defects that found no place where they may lie and can be seen, and were left out.
        unreadable: images that could not be read, one line each.
    """

    foreground: Foreground
    kinds: Counter[str]
    held_out: str
    failed: int
    unreadable: tuple[str, ...]


def write_defects(
    dataset: Dataset,
    output: Path,
    *,
    count: int = 100,
    seed: int = 0,
    size: int | None = None,
    roi: Path | None = None,
    textures: Path | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> WrittenDefects:
    """Writes good images, synthetic defects with their masks, and a contact sheet.

    `output` receives `train/good`; `test/good`, which holds the good images that the defects are made from, and no
    image of `train/good`: the good test images of the data set or, without any, the last fifth of the training
    images; `test/synthetic/<number>_<kind>.png`; `ground_truth/synthetic/<number>_<kind>_mask.png`; and
    `contact_sheet.png`. Defects that can hardly be seen, see `VISIBLE`, are drawn anew, and left out where that does
    not help. A defect depends on the seed, its number and the images: not on how many are made, nor on the workers.

    Args:
        count: how many defects.
        size: the longer side that images are resized to; None leaves them as they are.
        roi: a mask, white where defects may lie; resized to each image.
        textures: a folder of texture photographs; None draws textures.
        workers: processes; with 1 the work is done in this one.
        progress: told (what, done, total).

    Raises:
        FlawmapError: a value out of its range; `output` is not new or empty, or cannot be written; no good image or no
            texture can be read.
    """
    limits = {"count": (1, 10_000_000), "seed": SEEDS, "size": (8, 100_000), "workers": (1, 1024)}
    for name, value in (("count", count), ("seed", seed), ("size", size), ("workers", workers)):
        least, most = limits[name]
        if value is not None and not least <= value <= most:
            raise FlawmapError(f"{name} is {value}; give {least} to {most}")
    if textures is not None:
        TextureFolder(textures)
    if roi is not None and not read_mask(roi).any():
        raise FlawmapError(f"{roi}: marks no pixel; paint where defects may lie white (255)")
    tell = progress or (lambda what, done, total: None)
    train, held, held_out = _split(dataset)
    white = infer_white([*train, *held]) or 65535
    for cached in (read_kept, _region, _texture_folder):  # files may have changed under the same names
        cached.cache_clear()
    try:
        with filling(output):
            with _Workers(workers) as run:
                unreadable: list[str] = []
                folders = {"train": train, "test": held}
                for split, paths in folders.items():
                    folder = output / split / "good"
                    folder.mkdir(parents=True)
                    tasks = list(zip(range(len(paths)), paths, strict=True))
                    for done, error in enumerate(run(partial(_write_good, folder, size), tasks), 1):
                        tell("good images", done, len(tasks))
                        unreadable += [] if error is None else [error]
                good = {split: tuple(find_images(output / split / "good")) for split in folders}
                if not good["test"]:
                    raise FlawmapError(f"{dataset.root}: none of the good images can be read; {unreadable[0]}")
                others = good["train"] or good["test"]
                foreground = find_foreground(read_image(others[i]) for i in looked_at(len(others)))
                maker = _Maker(output, good["test"], others, foreground, roi, textures, white, seed)
                kinds = []
                for done, kind in enumerate(run(maker, range(count)), 1):
                    tell("defects", done, count)
                    kinds.append(kind)
            made = [(number, kind) for number, kind in enumerate(kinds) if kind != "none"]
            if not made:
                raise FlawmapError(
                    f"{output}: no defect could be placed; check that the region of interest meets the part"
                )
            shown = made[:: -(-len(made) // _SHOWN)]
            pictures = (_read_defect(output, number, kind) for number, kind in shown)
            sheet = contact_sheet(pictures, numbers=[number for number, _ in shown], white=white)
            write_png(output / "contact_sheet.png", sheet)
    except OSError as error:
        raise unwritable(Path(error.filename or output), error) from error
    except BrokenProcessPool as error:
        raise FlawmapError("a worker was ended from outside, perhaps for want of memory; try --workers 1") from error
    failed = count - len(made)
    return WrittenDefects(foreground, Counter(kind for _, kind in made), held_out, failed, tuple(unreadable))


def _split(dataset: Dataset) -> tuple[list[Path], list[Path], str]:
    """Images to learn from, images to make defects from, and which those are."""
    train = [sample.path for sample in dataset.train]
    test = [sample.path for sample in dataset.good_test]
    if test:
        return train, test, counted(len(test), "good test image")
    if len(train) == 1:
        return train, train, "the only good image, which is also the one to learn from"
    # The last ones, not any: shots of one part tend to follow one another, and should stay on one side.
    cut = len(train) - max(1, len(train) // 5)
    last = f"the last {len(train) - cut} of {counted(len(train), 'good image')}"
    return train[:cut], train[cut:], f"{last}, held out from train/good"


@dataclass(frozen=True)
class _Maker:
    """Makes and writes the defect of a number; small enough to be sent to another process."""

    output: Path
    bases: tuple[Path, ...]
    others: tuple[Path, ...]
    foreground: Foreground
    roi: Path | None
    textures: Path | None
    white: int
    seed: int

    def __call__(self, number: int) -> str:
        path = self.bases[number % len(self.bases)]
        defect = synthesize(
            read_kept(path),
            generator(self.seed, number),
            GoodImages(self.others),
            region=_region(path, self.foreground, self.roi),
            textures=draw_texture if self.textures is None else _texture_folder(self.textures),
            settings=VISIBLE,
            white=self.white,
        )
        if defect.kind != "none":
            image, mask = _names(self.output, number, defect.kind)
            _write(image, defect.image)
            write_png(mask, Image.fromarray(defect.mask.astype(np.uint8) * np.uint8(255)))
        return defect.kind


@lru_cache(KEPT)
def _region(path: Path, foreground: Foreground, roi: Path | None) -> NDArray[np.bool_]:
    image = read_kept(path)
    region = foreground.mask(image)
    return region if roi is None else region & resize_mask(read_mask(roi), region.shape)


@lru_cache(1)
def _texture_folder(folder: Path) -> TextureFolder:
    return TextureFolder(folder)


def _write_good(folder: Path, size: int | None, task: tuple[int, Path]) -> str | None:
    """Writes one good image; what is wrong with it where it cannot be read."""
    number, path = task
    try:
        pixels = read_image(path)
    except ImageError as error:
        return str(error)
    name = f"{number:05d}_{path.stem}"
    if size is None:
        shutil.copyfile(path, folder / f"{name}{path.suffix.lower()}")
    else:
        _write(folder / f"{name}.png", _resized(pixels, size))
    return None


def _write(path: Path, pixels: NDArray[Any]) -> None:
    """As `write_png`, of an image in any of flawmap's arrays."""
    if pixels.dtype != np.uint16 or pixels.ndim == 2:
        write_png(path, Image.fromarray(pixels))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(png_of_deep_colours(pixels))
    partial.replace(path)


def _resized(pixels: NDArray[Any], longer: int) -> NDArray[Any]:
    scale = longer / max(pixels.shape[:2])
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    if pixels.dtype == np.uint8:
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))
    # Pillow has no floating-point mode of several channels.
    channels = [pixels] if pixels.ndim == 2 else [pixels[:, :, channel] for channel in range(3)]
    floats = [Image.fromarray(plane.astype(np.float32)) for plane in channels]
    planes = [np.asarray(plane.resize(size, Image.Resampling.BILINEAR)).round() for plane in floats]
    return (planes[0] if len(planes) == 1 else np.dstack(planes)).astype(pixels.dtype)


def _names(output: Path, number: int, kind: str) -> tuple[Path, Path]:
    stem = f"{number:05d}_{kind.replace(' (seamless)', '_seamless')}"
    return output / "test" / "synthetic" / f"{stem}.png", output / "ground_truth" / "synthetic" / f"{stem}_mask.png"


def _read_defect(output: Path, number: int, kind: str) -> Defect:
    image, mask = _names(output, number, kind)
    return Defect(read_image(image), read_mask(mask), kind)


class _Workers:
    """Runs a function over tasks, in order, in this process or in others."""

    def __init__(self, count: int) -> None:
        self._pool: ProcessPoolExecutor | None = None
        if count > 1:
            # Spawned everywhere: a fork beside the threads of other libraries may hang.
            self._pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_begin)

    def __call__(self, function: Callable[[_Task], _Result], tasks: Sequence[_Task]) -> Iterator[_Result]:
        if self._pool is None:
            return map(function, tasks)
        return self._pool.map(function, tasks, chunksize=_CHUNK)

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *reason: object) -> None:
        if self._pool is not None:
            for process in list((self._pool._processes or {}).values()) if reason[0] is not None else []:
                process.terminate()  # what it is at is of no use
            self._pool.shutdown(cancel_futures=True)


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the workers, and says so once
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that was killed ends no worker, and these would hold its pipes for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
