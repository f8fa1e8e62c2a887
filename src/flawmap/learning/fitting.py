"""From paths of good images to a fitted and calibrated method."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from flawmap.backbones import Backbone, create_backbone, create_engine
from flawmap.errors import FlawmapError, ImageError, InputError
from flawmap.imaging.captures import CaptureLimits
from flawmap.imaging.decoding import infer_white
from flawmap.imaging.geometry import Geometry
from flawmap.imaging.preparation import LOWEST_QUALITY, Preparation
from flawmap.imaging.preprocessing import Preprocessing
from flawmap.imaging.registration import Template
from flawmap.judging.calibration import Calibration
from flawmap.learning.data import Announce, Progress, TrainingData, silent
from flawmap.learning.good_scores import GoodScores, Split, calibration_images, good_scores, split_images
from flawmap.learning.latents import Latents
from flawmap.learning.loop import train
from flawmap.learning.views import Views
from flawmap.learning.workspace import Workspace, identity, work_in
from flawmap.line.engines import Engine, cpu_threads
from flawmap.methods import Method
from flawmap.report.overlays import HeatScale
from flawmap.text import counted

log = logging.getLogger(__name__)

SHORT = 16
"""Hexadecimal digits by which a model file names the images it was fitted on."""

_LIBRARIES = ("flawmap", "torch", "timm", "numpy", "scipy", "pillow")
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")  # what NumPy's and the engines' follow
_DOUBTFUL, _OF_USUAL = 0.5, 0.75  # of an alignment's quality


@dataclass(frozen=True)
class Atypical:
    """A good training image that its own detector finds unusual.

    Attributes:
        path: the file.
        score, p_value: by a method that was not fitted on it, among the other good images.
        maps: by the same method, as `Inspection.maps`; None but for the few of the highest scores.
    """

    path: Path
    score: float
    p_value: float
    maps: NDArray[np.float32] | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Recipe:
    """What is fitted, and how; the attributes are `Detector`'s.

    Attributes:
        size: (height, width) of the model's input.
        region, template: what `roi` and `register` gave.
    """

    method: str
    method_class: type[Method]
    config: Any
    backbone: str
    weights: str | Path | None
    image_size: tuple[int, int]
    size: tuple[int, int]
    geometry: Geometry
    region: NDArray[np.bool_] | None
    template: Template | None
    engine: str
    device: str
    seed: int
    calibration: str


@dataclass
class Fitted:
    """What came of it; the attributes are `Detector`'s, without the underscore at their end.

    Attributes:
        calibration, heat: scores of good images, or, where all were learnt from, what heatmap colours mean.
        workspace: to be deleted once the rest is safe; None where there was none.
    """

    method: Method
    preparation: Preparation
    calibration: Calibration | None
    heat: HeatScale | None
    capture_limits: CaptureLimits
    training: dict[str, Any]
    latents: Latents | None
    atypical: list[Atypical]
    near_duplicates: list[list[Path]]
    left_out: list[ImageError]
    sizes: list[tuple[int, int]]
    workspace: Workspace | None


def fit(
    recipe: Recipe,
    paths: Sequence[Path],
    source: str,
    *,
    strict: bool,
    drop_atypical: int,
    folder: Path | None,
    resume: bool,
    progress: Progress,
    announce: Announce,
) -> Fitted:
    """Learns from the good images `paths`, found in `source`, and calibrates: see `Detector.fit`."""
    if drop_atypical and recipe.calibration == "none":
        raise FlawmapError("--drop-atypical needs scores of good images: leave it or --calibration none out")
    if len(paths) < 2:
        raise FlawmapError(
            f"{counted(len(paths), 'good training image')} found in {source}: "
            "at least 2 are needed, one to learn from and one to calibrate on; some dozens make a good start"
        )
    kind = recipe.method_class
    further = calibration_images(recipe.calibration)
    config = kind.resolved(recipe.config, recipe.backbone)
    if kind.positional and recipe.geometry.kind == "tile":
        log.warning("%s learns each position apart, and all tiles share theirs: --method patchcore fits", recipe.method)
    backbone = create_backbone(
        recipe.backbone, kind.levels(config), weights=recipe.weights, size=recipe.size, seed=recipe.seed
    )
    mean, std = tuple(backbone.mean), tuple(backbone.std)
    white = infer_white([*paths, *further])
    if white is not None:
        announce(f"16-bit images: {white} counts as white")
    preprocessing = Preprocessing(recipe.size, mean, std, white or 65535, deep=white is not None)  # type: ignore[arg-type]
    preparation = Preparation(preprocessing, recipe.image_size, recipe.geometry, recipe.region, recipe.template)
    views = Views(*kind.views(config), recipe.seed)

    def engine_of(extractor: nn.Module) -> Engine:
        return extraction_engine(extractor, kind.pools, preparation, recipe.engine, recipe.device)

    engine = engine_of(kind.extractor(config, backbone, recipe.size))
    made_by = _made_by(recipe, backbone, preparation, engine, views)
    run = {**made_by, "method": recipe.method, "config": config, "seed": recipe.seed, "images": [*paths, *further]}
    with (
        work_in(folder, run, resume) as workspace,
        TrainingData(
            [*paths, *further],
            preparation,
            engine,
            backbone.medium,
            views=views,
            folder=folder,
            identity=identity(**made_by),
            half=kind.optimises,
            retuned=lambda method: engine_of(method.extracting()),
            progress=progress,
            announce=announce,
        ) as data,
    ):
        del engine  # its memory is free for what is learnt from the features
        report_unreadable(data.unreadable, strict)
        readable = set(paths)
        images = [i for i, path in enumerate(data.paths) if path in readable]
        if len(images) < 2:
            raise InputError(
                f"only {len(images)} of {counted(len(paths), 'good training image')} in {source} can be read: "
                "at least 2 are needed"
            )
        alike = data.near_duplicates(images)
        groups = _groups(data.digests, alike)
        learning = _Learning(recipe, config, backbone, data, groups, folder, identity(**run), progress, announce)
        sizes = [(height, width) for height, width in (data.record(i)["size"] for i in images)]
        method, split, good = learning.learn(images)
        if drop_atypical:
            unusual = {good.images[i] for i in np.argsort(-good.scores, kind="stable")[:drop_atypical]}
            images = [i for i in images if i not in unusual]
            if len(images) < 2:
                raise FlawmapError(
                    f"--drop-atypical {drop_atypical} leaves {counted(len(images), 'image')}: drop fewer"
                )
            method, split, good = learning.learn(images)
        method.forget()
        latents = None
        if kind.live and split.held_out:
            latents = Latents.of(method, data.of(method), good.images, recipe.device)
        calibration = Calibration(good.scores, good.peaks, good.mode) if split.calibrates else None
        heat = HeatScale.from_learnt(good.peaks) if calibration is None and len(good.peaks) else None
        records = [data.of(method).record(i) for i in split.fitting]
        digests = sorted(data.digests[i] for i in split.fitting)
        return Fitted(
            method,
            _aligned(preparation, records),
            calibration,
            heat,
            limits(records),
            {
                "images": len(split.fitting),
                "digest": hashlib.sha256("".join(digests).encode()).hexdigest(),
                "fitted": [digest[:SHORT] for digest in digests],
                "seed": recipe.seed,
                "engine": data.engine,
                "libraries": {name: version(name) for name in _LIBRARIES},
                "levelling": good.levelling,
            },
            latents,
            []
            if calibration is None
            else [
                Atypical(data.paths[image], score, calibration.p_value(score), good.maps.get(image))
                for i in np.argsort(-good.scores, kind="stable")
                for image, score in [(good.images[i], float(good.scores[i]))]
            ],
            [[data.paths[i] for i in group] for group in alike],
            data.unreadable,
            sizes,
            workspace,
        )


@dataclass(frozen=True)
class _Learning:
    """Fitting on some of the images, and calibrating."""

    recipe: Recipe
    config: Any
    backbone: Backbone
    data: TrainingData
    groups: Sequence[int]
    folder: Path | None
    run: str
    progress: Progress
    announce: Announce

    def learn(self, images: Sequence[int]) -> tuple[Method, Split, GoodScores]:
        recipe, data = self.recipe, self.data
        optimises = recipe.method_class.optimises
        split = split_images(data.digests, self.groups, images, recipe.calibration, optimises, recipe.seed)
        shown: dict[str, Progress] = {"": self.progress}

        def fit(some: Sequence[int], what: str = "") -> Method:
            method = recipe.method_class(self.config, self.backbone, recipe.size).to(recipe.device)
            of = identity(images=[data.digests[i] for i in some])
            checkpoint = None if self.folder is None else self.folder / f"checkpoint-{of[:16]}"
            told = shown.setdefault(what, _renamed(self.progress, what))
            say = silent if what else self.announce
            rows = data.rows(some)
            groups = [self.groups[i] for i in some for _ in data.rows([i])]
            train(
                method,
                data,
                rows,
                groups=groups if split.mode == "loo" and not what else None,
                seed=recipe.seed,
                progress=told,
                announce=say,
                checkpoint=checkpoint,
                run=f"{self.run} {of}",
            )
            return method

        method = fit(split.fitting)
        return method, split, good_scores(method, data, split, recipe.seed, recipe.device, self.progress, fit)


def extraction_engine(extractor: nn.Module, pools: bool, preparation: Preparation, engine: str, device: str) -> Engine:
    """What makes the features that are cached; `pools` as `Method.pools`."""
    return create_engine(extractor, preparation.size, engine, device=device, masked=pools and preparation.masked)


def report_unreadable(unreadable: Sequence[ImageError], strict: bool) -> None:
    """Warns of images that cannot be learnt from, or raises the first."""
    for error in unreadable:
        if strict:
            raise error
        log.warning("left out of training: %s", error)


def limits(records: Sequence[dict[str, Any]]) -> CaptureLimits:
    """What a capture must be like, by the records that `TrainingData` keeps of good ones."""
    return CaptureLimits.learn(
        [record["statistics"] for record in records], [record["embedding"] for record in records]
    )


def _made_by(
    recipe: Recipe, backbone: Backbone, preparation: Preparation, engine: Engine, views: Views
) -> dict[str, Any]:
    """What decides the features: an earlier run's may be used again only if all of it is the same."""
    prepared = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in preparation.arrays().items()}
    return {
        "backbone": backbone.digest(),
        "levels": backbone.levels,
        "views": views if views.count > 1 else None,
        "preparation": {**preparation.to_json(), **prepared},
        "engine": engine.name,
        "device": recipe.device,
        "threads": [cpu_threads(), torch.get_num_threads(), *(os.environ.get(name) for name in _THREADS)],
        "processor": [platform.machine(), torch.backends.cpu.get_cpu_capability()],
        "libraries": {name: version(name) for name in _LIBRARIES},
    }


def _aligned(preparation: Preparation, records: Sequence[dict[str, Any]]) -> Preparation:
    """With the lowest alignment quality that is believed, from that of the training images."""
    if preparation.template is None:
        return preparation
    usual = float(np.median([record["quality"] for record in records]))
    if usual < _DOUBTFUL:
        log.warning("the parts are hard to align (quality %.2f): check that --register shows one of them", usual)
    return replace(preparation, lowest_quality=max(LOWEST_QUALITY, _OF_USUAL * usual))


def _groups(digests: Sequence[str], alike: Sequence[Sequence[int]]) -> list[int]:
    """The number of each image's group: those of `alike`, and those with one digest."""
    first = {digest: i for i, digest in reversed(list(enumerate(digests)))}
    groups = [first[digest] for digest in digests]
    for group in alike:
        for i in group:
            groups[i] = group[0]
    return groups


def _renamed(progress: Progress, prefix: str) -> Progress:
    return lambda what, done, total: progress(f"calibration, {prefix}: {what}", done, total)
