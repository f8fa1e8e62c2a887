"""The user's object: fit on good images, predict, evaluate, save, load."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flawmap.backbones import DEFAULT_BACKBONE, Backbone, Engine, check_engine, create_backbone, create_engine
from flawmap.backbones.engines import cpu_threads
from flawmap.calibration import Calibration, Threshold
from flawmap.captures import CaptureLimits, capture_statistics
from flawmap.datasets import Dataset, Sample, find_dataset
from flawmap.errors import FlawmapError, ImageError
from flawmap.evaluation import EvaluationReport, Scored, evaluate
from flawmap.geometry import Geometry
from flawmap.good_scores import GoodScores, Split, calibration_images, good_scores, split_images
from flawmap.images import Preprocessing, as_pixels, find_images, infer_white, read_mask
from flawmap.inspection import Inspection
from flawmap.methods import Method, configure, method_class
from flawmap.model_file import read_model, write_model
from flawmap.preparation import LOWEST_QUALITY, Preparation, read_region, read_template
from flawmap.reading import BATCH, Batch, Picture, read_batches
from flawmap.report.overlays import HeatScale
from flawmap.training import Announce, Progress, TrainingData, quiet, silent, train
from flawmap.views import Views
from flawmap.workspace import identity, work_in

log = logging.getLogger(__name__)

_LIBRARIES = ("flawmap", "torch", "timm", "numpy", "scipy", "pillow")
_DOUBTFUL, _OF_USUAL = 0.5, 0.75  # of an alignment's quality
_PREPARATION = "preparation."  # before the names of its tensors in a model file


@dataclass(frozen=True)
class Atypical:
    """A good training image that its own detector finds unusual.

    Attributes:
        path: the file.
        score, p_value: by a method that was not fitted on it, among the other good images.
    """

    path: Path
    score: float
    p_value: float


class Detector:
    """Learns what good parts look like, then says of an image: good or not, how sure, and where.

    Args:
        method: a name that `flawmap methods` prints.
        preset: named settings of the method, such as "paper".
        backbone: any timm model with intermediate features.
        weights: a local weight file; None for the embedded weights or timm's hub.
        image_size: what images (or tiles) are resized to, in pixels: a side or (height, width).
        geometry: which windows of an image become model inputs; the whole image, stretched, by default.
        roi: mask of the region of interest, a file or bool (H, W). Outside it nothing is learnt, scored or drawn.
        register: picture of a part in the pose in which `roi` is drawn; each image is first aligned to it.
        engine: "auto", "openvino", "onnxruntime" or "torch".
        device: "auto", "cpu" or "cuda".
        seed: of everything random.
        max_false_reject: the share of good parts that may be rejected.
        guarantee: "marginal" or "confidence", see `flawmap.calibration`.
        calibration: "auto", "holdout", "crossfit", or a folder of further good images.
        settings: the method's own.

    Attributes:
        method_: the fitted method.
        calibration_: scores of good images.
        threshold_: the threshold and what it promises.
        pixel_threshold_: where regions are cut; None for methods without a map.
        training_: what it was fitted on: number of images, their digest, seed, engine.
        capture_limits_: what a capture must be like to be judged.
        atypical_: after `fit`, the calibration images, most unusual first. Not kept in the model file.
        near_duplicates_: after `fit`, groups of training images that show the same photograph, or one part twice. Not
            kept either; cross-fitting keeps each group on one side.
        left_out_: after `fit` or `update`, what was wrong with images that could not be learnt from. Not kept either.
        sizes_: after `fit` or `update`, (height, width) of the images learnt from. Not kept either.

    Raises:
        FlawmapError: an unknown name or setting.

    Example:
        >>> from flawmap import Detector
        >>> detector = Detector("patchcore", image_size=224).fit("parts/good")   # doctest: +SKIP
        >>> detector.predict("parts/new/0001.png").verdict                       # doctest: +SKIP
        'good'
    """

    def __init__(
        self,
        method: str = "patchcore",
        *,
        preset: str | None = None,
        backbone: str = DEFAULT_BACKBONE,
        weights: str | Path | None = None,
        image_size: int | tuple[int, int] = 256,
        geometry: Geometry | None = None,
        roi: str | Path | NDArray[np.bool_] | None = None,
        register: str | Path | None = None,
        engine: str = "auto",
        device: str = "auto",
        seed: int = 0,
        max_false_reject: float = 0.01,
        guarantee: Literal["marginal", "confidence"] = "marginal",
        calibration: str | Path = "auto",
        **settings: Any,
    ) -> None:
        self.method = method
        self._method_class = method_class(method)
        self.config = configure(self._method_class, settings, preset)
        self.backbone = backbone
        self.weights = weights
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.geometry = geometry or Geometry()
        self._size = self.geometry.input_size(self.image_size)
        self._region = read_region(Path(roi)) if isinstance(roi, (str, Path)) else roi
        self._template = None if register is None else read_template(Path(register))
        if min(self._size) < 32:
            raise FlawmapError(f"image size {image_size} is too small: give at least 32 pixels")
        if not 0 < max_false_reject < 1:
            raise FlawmapError(f"--max-false-reject must lie between 0 and 1, got {max_false_reject}")
        check_engine(engine)
        self.engine = engine
        self.device = _device(device)
        self.seed = seed
        self.max_false_reject = max_false_reject
        self.guarantee = guarantee
        self.calibration = calibration
        self.method_: Method
        self.calibration_: Calibration
        self.threshold_: Threshold
        self.pixel_threshold_: float | None
        self.preparation_: Preparation
        self.training_: dict[str, Any]
        self.capture_limits_: CaptureLimits
        self.atypical_: list[Atypical] = []
        self.near_duplicates_: list[list[Path]] = []
        self.left_out_: list[ImageError] = []
        self.sizes_: list[tuple[int, int]] = []
        self._inspector: Engine | None = None

    # Fitting

    def fit(
        self,
        source: str | Path | Dataset | Sequence[str | Path],
        *,
        category: str | None = None,
        strict: bool = False,
        drop_atypical: int = 0,
        workspace: str | Path | None = None,
        resume: bool = False,
        progress: Progress = quiet,
        announce: Announce = silent,
    ) -> Detector:
        """Learns from the good training images of a folder, a data set or a list of paths, then calibrates.

        Unreadable images are left out with a warning, or refused where `strict`. What the training will hold in memory
        and on disk is told to `announce` before it starts.

        Args:
            source: what to learn from.
            category: of a data set root.
            strict: stop at the first image that cannot be read.
            drop_atypical: leave out so many images that the calibration finds most unusual, then fit again.
            workspace: a folder for features and checkpoints, deleted when all is done; a temporary one by default.
            resume: go on with what an interrupted `fit` left in `workspace`, to the same result.
            progress, announce: are told how it goes.

        Raises:
            FlawmapError: there are fewer than two good images, `workspace` holds an interrupted training and `resume`
                is not asked for or does not fit, or what `Detector` raises late: weights, memory, disk.
        """
        paths = _training_paths(source, category)
        if len(paths) < 2:
            raise FlawmapError(
                f"{len(paths)} good training image{'' if len(paths) == 1 else 's'} found in {_name(source)}: "
                "at least 2 are needed, one to learn from and one to calibrate on; some dozens make a good start"
            )
        further = calibration_images(self.calibration)
        config = self._method_class.resolved(self.config, self.backbone)
        if self._method_class.positional and self.geometry.kind == "tile":
            log.warning(
                "%s learns each position apart, and all tiles share theirs: --method patchcore fits", self.method
            )
        backbone = create_backbone(
            self.backbone, self._method_class.levels(config), weights=self.weights, size=self._size, seed=self.seed
        )
        mean, std = tuple(backbone.mean), tuple(backbone.std)
        preprocessing = Preprocessing(self._size, mean, std, infer_white([*paths, *further]))  # type: ignore[arg-type]
        self.preparation_ = Preparation(preprocessing, self.image_size, self.geometry, self._region, self._template)
        views = Views(*self._method_class.views(config), self.seed)
        engine = self._extraction_engine(config, backbone)
        made_by = self._made_by(backbone, engine, views)
        folder = None if workspace is None else Path(workspace)
        run = {**made_by, "method": self.method, "config": config, "seed": self.seed, "images": [*paths, *further]}
        self._inspector = None
        with (
            work_in(folder, run, resume),
            TrainingData(
                [*paths, *further],
                self.preparation_,
                engine,
                backbone.medium,
                views=views,
                folder=folder,
                identity=identity(**made_by),
                half=self._method_class.optimises,
                progress=progress,
                announce=announce,
            ) as data,
        ):
            del engine  # its memory is free for what is learnt from the features
            self._leave_out(data.unreadable, strict)
            readable = set(paths)
            images = [i for i, path in enumerate(data.paths) if path in readable]
            if len(images) < 2:
                raise FlawmapError(
                    f"only {len(images)} of {len(paths)} good training images in {_name(source)} can be read: "
                    "at least 2 are needed"
                )
            alike = data.near_duplicates(images)
            groups = _groups(data.digests, alike)
            self.sizes_ = [(height, width) for height, width in (data.record(i)["size"] for i in images)]
            self.near_duplicates_ = [[data.paths[i] for i in group] for group in alike]
            good = self._learn(config, backbone, data, images, groups, folder, progress, announce)
            if drop_atypical:
                unusual = {good.images[i] for i in np.argsort(-good.scores, kind="stable")[:drop_atypical]}
                images = [i for i in images if i not in unusual]
                if len(images) < 2:
                    raise FlawmapError(f"--drop-atypical {drop_atypical} leaves {len(images)} images: drop fewer")
                good = self._learn(config, backbone, data, images, groups, folder, progress, announce)
            calibration = self.calibration_
            self.atypical_ = [
                Atypical(data.paths[good.images[i]], float(good.scores[i]), calibration.p_value(float(good.scores[i])))
                for i in np.argsort(-good.scores, kind="stable")
            ]
        return self

    def _leave_out(self, unreadable: list[ImageError], strict: bool) -> None:
        self.left_out_ = unreadable
        for error in unreadable:
            if strict:
                raise error
            log.warning("left out of training: %s", error)

    def _extraction_engine(self, config: Any, backbone: Backbone) -> Engine:
        """What makes the features that are cached."""
        extractor = self._method_class.extractor(config, backbone, self._size)
        masked = self._method_class.pools and self.preparation_.masked
        return create_engine(extractor, self._size, self.engine, device=self.device, masked=masked)

    def _made_by(self, backbone: Backbone, engine: Engine, views: Views) -> dict[str, Any]:
        """What decides the features: an earlier run's may be used again only if all of it is the same."""
        prepared = {
            name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in self.preparation_.arrays().items()
        }
        return {
            "backbone": backbone.digest(),
            "levels": backbone.levels,
            "views": views if views.count > 1 else None,
            "preparation": {**self.preparation_.to_json(), **prepared},
            "engine": engine.name,
            "device": self.device,
            "threads": cpu_threads(),
            "libraries": {name: version(name) for name in _LIBRARIES},
        }

    def _learn(
        self,
        config: Any,
        backbone: Backbone,
        data: TrainingData,
        images: Sequence[int],
        groups: Sequence[int],
        folder: Path | None,
        progress: Progress,
        announce: Announce,
    ) -> GoodScores:
        """Fits on some images and calibrates."""
        optimises = self._method_class.optimises
        split = split_images(data.digests, groups, images, str(self.calibration), optimises, self.seed)
        shown: dict[str, Progress] = {"": progress}

        def fit(some: Sequence[int], what: str = "") -> Method:
            method = self._method_class(config, backbone, self._size).to(self.device)
            of = identity(images=[data.digests[i] for i in some])
            checkpoint = None if folder is None else folder / f"checkpoint-{of[:16]}"
            told = shown.setdefault(what, _renamed(progress, what))
            say = silent if what else announce
            train(method, data, data.rows(some), seed=self.seed, progress=told, announce=say, checkpoint=checkpoint)
            return method

        self.method_ = fit(split.fitting)
        good = good_scores(self.method_, data, split, self.seed, self.device, progress, fit)
        self.calibration_ = Calibration(good.scores, good.peaks, split.mode)
        self._set_threshold(self.calibration_.threshold(self.max_false_reject, self.guarantee))
        records = [data.record(i) for i in split.fitting]
        if self._template is not None:
            usual = float(np.median([record["quality"] for record in records]))
            if usual < _DOUBTFUL:
                log.warning(
                    "the parts are hard to align (quality %.2f): check that --register shows one of them", usual
                )
            lowest = max(LOWEST_QUALITY, _OF_USUAL * usual)
            self.preparation_ = replace(self.preparation_, lowest_quality=lowest)
        self.capture_limits_ = _limits(records)
        digests = sorted(data.digests[i] for i in split.fitting)
        self.training_ = {
            "images": len(split.fitting),
            "digest": hashlib.sha256("".join(digests).encode()).hexdigest(),
            "seed": self.seed,
            "engine": data.engine,
            "libraries": {name: version(name) for name in _LIBRARIES},
        }
        return good

    def update(
        self,
        source: str | Path | Dataset | Sequence[str | Path],
        *,
        category: str | None = None,
        strict: bool = False,
        progress: Progress = quiet,
        announce: Announce = silent,
    ) -> Detector:
        """Learns further good images, where the method can without those it already knows, and calibrates again.

        The new images are scored before they are learnt, and join the earlier calibration scores; since the method has
        changed after, the false-reject rate is an estimate from then on.

        Raises:
            FlawmapError: the method cannot be updated, or no new image can be read.
        """
        self._check_fitted()
        if not self.method_.updates:
            raise FlawmapError(f"{self.method} cannot learn images later: train again with all of them")
        paths = _training_paths(source, category)
        if not paths:
            raise FlawmapError(f"no good images found in {_name(source)}: give a folder of new good images")
        engine = self._extraction_engine(self.method_.config, self.method_.backbone)
        with TrainingData(
            paths, self.preparation_, engine, self.method_.backbone.medium, progress=progress, announce=announce
        ) as data:
            self._leave_out(data.unreadable, strict)
            images = list({kept: i for i, kept in reversed(list(enumerate(data.digests)))}.values())[::-1]
            if not images:
                raise FlawmapError(f"none of the {len(paths)} images in {_name(source)} can be read")
            self.sizes_ = [(height, width) for height, width in (data.record(i)["size"] for i in images)]
            unseen = Split([], images, "holdout")
            good = good_scores(self.method_, data, unseen, self.seed, self.device, progress)
            rows = data.rows(images)
            stages = self.method_.further_stages(len(rows))
            train(self.method_, data, rows, stages, seed=self.seed, progress=progress, announce=announce)
            digests = sorted(data.digests[i] for i in images)
            records = [data.record(i) for i in images]
        self.capture_limits_ = self.capture_limits_.joined(_limits(records))
        before = self.calibration_
        scores, peaks = np.append(before.scores, good.scores), np.append(before.peaks, good.peaks)
        self.calibration_ = Calibration(scores, peaks, "crossfit")
        self._set_threshold(self.calibration_.threshold(self.max_false_reject, self.guarantee))
        self.training_ = {
            **self.training_,
            "images": self.training_["images"] + len(images),
            "digest": hashlib.sha256("".join([self.training_["digest"], *digests]).encode()).hexdigest(),
        }
        self._inspector = None
        return self

    # Thresholds

    def _set_threshold(self, threshold: Threshold) -> None:
        self.threshold_ = threshold
        peaks = self.calibration_.peaks
        self.pixel_threshold_ = self.calibration_.pixel_threshold(self.max_false_reject).value if len(peaks) else None

    def with_threshold(
        self, *, max_false_reject: float | None = None, guarantee: str | None = None, threshold: float | None = None
    ) -> Detector:
        """The same detector with another threshold: one that keeps a rate, or one the user names.

        Raises:
            FlawmapError: both or neither are given, or a rate outside (0, 1).
        """
        if (max_false_reject is None) == (threshold is None):
            raise FlawmapError("give either a false-reject rate or a threshold")
        if max_false_reject is not None and not 0 < max_false_reject < 1:
            raise FlawmapError(f"--max-false-reject must lie between 0 and 1, got {max_false_reject}")
        other = object.__new__(Detector)
        other.__dict__.update(self.__dict__)
        if max_false_reject is not None:
            other.max_false_reject = max_false_reject
            other._set_threshold(self.calibration_.threshold(max_false_reject, guarantee or self.guarantee))
        else:
            assert threshold is not None
            other.threshold_ = self.calibration_.threshold_at(threshold)
        return other

    # Predicting

    @overload
    def predict(self, source: str | Path) -> Inspection | list[Inspection]: ...
    @overload
    def predict(self, source: NDArray[Any]) -> Inspection: ...
    @overload
    def predict(self, source: list[str | Path | NDArray[Any]]) -> list[Inspection]: ...
    def predict(
        self, source: str | Path | NDArray[Any] | list[str | Path | NDArray[Any]]
    ) -> Inspection | list[Inspection]:
        """Inspects one image (a path, or an array (H, W) or (H, W, 3)), the images of a folder, or a list of them.

        An image file that cannot be read gets the verdict "error". `stream` does the same without holding all results.

        Raises:
            ImageError: an array is not an image.
            FlawmapError: the detector is not fitted.
        """
        self._check_fitted()
        if isinstance(source, np.ndarray):
            return self._inspect_array(source)
        if isinstance(source, (str, Path)):
            path = Path(source)
            return list(self.stream(find_images(path))) if path.is_dir() else self._inspect(path)
        return [
            self._inspect_array(item) if isinstance(item, np.ndarray) else self._inspect(Path(item)) for item in source
        ]

    def stream(self, paths: Iterable[str | Path]) -> Iterator[Inspection]:
        """Inspects image files one batch after the other, reading ahead, in bounded memory."""
        self._check_fitted()
        files = [Path(path) for path in paths]
        waiting: deque[_Output] = deque()
        for outputs, pictures in self._ahead(read_batches(files, self.preparation_)):
            waiting += outputs
            for picture in pictures:
                if picture.error is not None:
                    yield Inspection(picture.path, "error", error=str(picture.error))
                else:
                    yield self._judge(picture, [waiting.popleft() for _ in range(picture.windows)])

    def _inspect(self, path: Path) -> Inspection:
        return next(self.stream([path]))

    def _inspect_array(self, array: NDArray[Any]) -> Inspection:
        start = time.perf_counter()
        pixels = as_pixels(array)
        try:
            placement = self.preparation_.place(pixels)
        except ImageError as error:
            return Inspection(None, "error", size=(pixels.shape[0], pixels.shape[1]), error=f"the array: {error}")
        inputs = np.stack(list(self.preparation_.inputs(pixels, placement)))
        inside = placement.inside()[:, None] if self.preparation_.masked else None
        outputs: list[_Output] = []
        for i in range(0, len(inputs), BATCH):
            outputs += self._run(inputs[i : i + BATCH], None if inside is None else inside[i : i + BATCH])
        statistics = capture_statistics(pixels, self.preparation_.preprocessing.white)
        picture = Picture(None, placement, statistics)
        return self._judge(picture, outputs, 1000 * (time.perf_counter() - start))

    def _ahead(self, batches: Iterator[Batch]) -> Iterator[tuple[list[_Output], list[Picture]]]:
        """Runs each batch while the caller is still busy with the one before."""
        with ThreadPoolExecutor(1) as pool:
            waiting: tuple[Future[list[_Output]], Batch] | None = None
            for batch in batches:
                before, waiting = waiting, (pool.submit(self._run, batch.inputs, batch.inside), batch)
                if before is not None:
                    yield before[0].result(), before[1].pictures
            if waiting is not None:
                yield waiting[0].result(), waiting[1].pictures

    def _run(self, inputs: NDArray[np.float32], inside: NDArray[np.bool_] | None) -> list[_Output]:
        """Model inputs (B, 3, h, w), and where they are scored, (B, 1, h, w) -> what came of each."""
        if len(inputs) == 0:
            return []
        start = time.perf_counter()
        masks = None if inside is None else inside.astype(np.float32)
        maps, scores, pooled = self._inspection_engine()(inputs, masks)
        milliseconds = 1000 * (time.perf_counter() - start) / len(inputs)
        return [
            _Output(maps[i, 0] if self.method_.localises else None, float(scores[i]), pooled[i], milliseconds)
            for i in range(len(inputs))
        ]

    def _inspection_engine(self) -> Engine:
        """Backbone, method and enlarging as one graph: two libraries' threads would get in each other's way."""
        if self._inspector is None:
            self._inspector = create_engine(
                _Inspector(self.method_), self._size, self.engine, device=self.device, masked=self.preparation_.masked
            )
        return self._inspector

    def _judge(self, picture: Picture, outputs: list[_Output], milliseconds: float | None = None) -> Inspection:
        """The verdict on an image from what came of its windows: the highest score counts."""
        path, placement = picture.path, picture.placement
        assert placement is not None
        score = float(np.max([output.score for output in outputs]))
        maps = None if outputs[0].map is None else np.stack([output.map for output in outputs])  # type: ignore[misc]
        name = path or "the array"
        embedding = np.mean([output.embedding for output in outputs], axis=0)
        reason = None if picture.statistics is None else self.capture_limits_.reason(picture.statistics, embedding)
        if not np.isfinite(score) or (maps is not None and not bool(np.isfinite(maps).all())):
            reason = "its score is not a finite number"
        if reason is not None:
            return Inspection(path, "error", size=placement.size, error=f"{name}: {reason}")
        return Inspection(
            path,
            "defect" if score >= self.threshold_.value else "good",
            score=score,
            p_value=self.calibration_.p_value(score),
            threshold=self.threshold_.value,
            pixel_threshold=self.pixel_threshold_,
            size=placement.size,
            milliseconds=sum(output.milliseconds for output in outputs) if milliseconds is None else milliseconds,
            maps=maps,
            placement=placement,
        )

    def _check_fitted(self) -> None:
        if not hasattr(self, "method_"):
            raise FlawmapError("this detector is not fitted: call fit(folder), or Detector.load(path)")

    def heat_scale(self) -> HeatScale | None:
        """What heatmap colours mean, from good images alone; None for methods without a map."""
        if self.pixel_threshold_ is None:
            return None
        return HeatScale.from_good(self.calibration_.peaks, self.pixel_threshold_)

    # Evaluating

    def evaluate(
        self,
        source: str | Path | Dataset,
        *,
        category: str | None = None,
        full_resolution: bool = False,
        progress: Progress = quiet,
    ) -> EvaluationReport:
        """Figures on the test images of a labelled data set, at this detector's threshold.

        Pixel figures are taken at the model's input size, masks resized nearest; or on the original pixels, with
        `full_resolution` and for tiles. What lies outside the region of interest counts nowhere.

        Raises:
            FlawmapError: there are no labelled test images.
        """
        self._check_fitted()
        dataset = source if isinstance(source, Dataset) else find_dataset(Path(source), category)
        samples = [sample for sample in dataset.test if sample.label is not None]
        if not samples:
            raise FlawmapError(
                f"{dataset.root} holds no labelled test images: give a folder with test/good and test/<defect>"
            )
        settings = {
            **self.settings(),
            "engine": self._inspection_engine().name,
            "full_resolution": full_resolution,
            "data": dataset.name,
        }
        return evaluate(self._scored(samples, full_resolution, progress), settings)

    def settings(self) -> dict[str, Any]:
        """What made this detector, as reports show it."""
        return {
            "method": self.method,
            "backbone": self.backbone,
            "image_size": list(self.image_size),
            "geometry": str(self.geometry),
            "engine": self.training_["engine"],
            "training_images": self.training_["images"],
            "seed": self.seed,
            "threshold": self.threshold_.value,
            "max_false_reject": self.threshold_.requested,
            "guarantee": self.threshold_.guarantee,
        }

    def _scored(self, samples: list[Sample], full_resolution: bool, progress: Progress) -> Iterator[Scored]:
        for number, (sample, inspection) in enumerate(
            zip(samples, self.stream(sample.path for sample in samples), strict=True), start=1
        ):
            anomaly_map, mask, inside = _pixels(sample, inspection, full_resolution)
            yield Scored(
                sample.kind,
                sample.label == 1,
                inspection.score,
                inspection.verdict,
                anomaly_map,
                mask,
                inspection.milliseconds,
                inspection.error,
                sample.path,
                inspection.p_value,
                inside,
            )
            progress("evaluation", number, len(samples))

    # Files

    def save(self, path: str | Path) -> None:
        """Writes one .safetensors file with everything that inspection needs, the backbone's weights included.

        Raises:
            FlawmapError: the file cannot be written.
        """
        self._check_fitted()
        metadata = {
            "method": self.method,
            "config": self.method_.config.model_dump(mode="json"),
            "backbone": self.backbone,
            "backbone_digest": self.method_.backbone.digest(),
            "levels": list(self.method_.backbone.levels),
            "preparation": self.preparation_.to_json(),
            "captures": self.capture_limits_.to_json(),
            "calibration": {
                "mode": self.calibration_.mode,
                "scores": self.calibration_.scores.tolist(),
                "peaks": self.calibration_.peaks.tolist(),
            },
            "max_false_reject": self.max_false_reject,
            "guarantee": self.guarantee,
            "training": self.training_,
        }
        prepared = {_PREPARATION + k: torch.from_numpy(v) for k, v in self.preparation_.arrays().items()}
        write_model(Path(path), {**self.method_.state_dict(), **prepared}, metadata)

    @classmethod
    def load(cls, path: str | Path, *, engine: str = "auto", device: str = "auto") -> Detector:
        """Reads a model file.

        Raises:
            FlawmapError: it is missing, damaged, edited, of a newer format, or its method is unknown here.
        """
        tensors, metadata = read_model(Path(path))
        try:
            arrays = {k: tensors.pop(k).numpy() for k in list(tensors) if k.startswith(_PREPARATION)}
            preparation = Preparation.from_json(
                metadata["preparation"], {k.removeprefix(_PREPARATION): v for k, v in arrays.items()}
            )
            detector = cls(
                metadata["method"],
                backbone=metadata["backbone"],
                image_size=preparation.image_size,
                geometry=preparation.geometry,
                engine=engine,
                device=device,
                seed=metadata["training"]["seed"],
                max_false_reject=metadata["max_false_reject"],
                guarantee=metadata["guarantee"],
                **metadata["config"],
            )
            backbone = create_backbone(detector.backbone, metadata["levels"], weights="random", size=preparation.size)
            detector.method_ = detector._method_class(detector.config, backbone, preparation.size)
            detector.method_.load_state(tensors)
            detector.method_.to(detector.device).eval().requires_grad_(False)
            detector.preparation_ = preparation
            detector.capture_limits_ = CaptureLimits.from_json(metadata["captures"])
            kept = metadata["calibration"]
            detector.calibration_ = Calibration(
                np.array(kept["scores"], np.float32), np.array(kept["peaks"], np.float32), kept["mode"]
            )
            detector.training_ = metadata["training"]
            detector._set_threshold(detector.calibration_.threshold(detector.max_false_reject, detector.guarantee))
            json.dumps(detector.settings())  # all that reports need is there
            if len(detector.capture_limits_.centre) not in (0, sum(backbone.channels[i] for i in backbone.medium)):
                raise ValueError("the captures' embedding has another length than the backbone's")
        except Exception as error:  # what a forged header may break is not to be foreseen
            reason = shorten(str(error), 160)  # PyTorch's spreads over lines and names every tensor
            raise FlawmapError(f"{path} does not fit this flawmap ({reason}): train again") from error
        return detector


@dataclass(frozen=True)
class _Output:
    """What came of one model input."""

    map: NDArray[np.float32] | None  # (h, w)
    score: float
    embedding: NDArray[np.float32]  # (C,)
    milliseconds: float


class _Inspector(nn.Module):
    """A method with the embedding by which captures of another part are known."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def forward(self, images: Tensor, inside: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        features = self.method.features(images, inside)
        anomaly_map, score = self.method.score(features, inside)
        pooled = torch.cat([features[i].mean((2, 3)) for i in self.method.backbone.medium], 1)
        return self.method.enlarge(anomaly_map, inside), score, pooled


def _pixels(
    sample: Sample, inspection: Inspection, full_resolution: bool
) -> tuple[NDArray[np.float32] | None, NDArray[np.bool_] | None, NDArray[np.bool_] | None]:
    """Map, mask and scored pixels of one test image, all of one size; None where there is none."""
    maps, placement = inspection.maps, inspection.placement
    if maps is None or placement is None:
        return None, None, None
    mask = None
    if sample.label == 1 and sample.mask is not None:
        mask = read_mask(sample.mask, placement.size)
    if full_resolution or len(maps) > 1:
        laid = inspection.anomaly_map
        assert laid is not None
        inside = ~np.isnan(laid)
        return np.where(inside, laid, np.float32(0)), mask, None if inside.all() else inside
    inside = placement.inside()[0]
    return maps[0], None if mask is None else placement.project(mask)[0], None if inside.all() else inside


def _limits(records: Sequence[dict[str, Any]]) -> CaptureLimits:
    return CaptureLimits.learn(
        [record["statistics"] for record in records], [record["embedding"] for record in records]
    )


def _groups(digests: Sequence[str], alike: Sequence[Sequence[int]]) -> list[int]:
    """The number of each image's group: those of `alike`, and those with one digest."""
    first = {digest: i for i, digest in reversed(list(enumerate(digests)))}
    groups = [first[digest] for digest in digests]
    for group in alike:
        for i in group:
            groups[i] = group[0]
    return groups


def _device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise FlawmapError(f"device {device} is not to be had here: use --device auto or cpu")
    return device


def _training_paths(source: str | Path | Dataset | Sequence[str | Path], category: str | None) -> list[Path]:
    if isinstance(source, (str, Path)):
        source = find_dataset(Path(source), category)
    if isinstance(source, Dataset):
        return [sample.path for sample in source.train]
    return list(dict.fromkeys(Path(path) for path in source))


def _name(source: str | Path | Dataset | Sequence[str | Path]) -> str:
    if isinstance(source, Dataset):
        return str(source.root)
    return str(source) if isinstance(source, (str, Path)) else "the list"


def _renamed(progress: Progress, prefix: str) -> Progress:
    return lambda what, done, total: progress(f"calibration, {prefix}: {what}", done, total)
