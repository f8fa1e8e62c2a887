"""The user's object: fit on good images, predict, evaluate, save, load."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flawmap.backbones import DEFAULT_BACKBONE, Engine, check_engine, create_backbone, create_engine
from flawmap.datasets import Dataset, Sample, find_dataset
from flawmap.errors import FlawmapError, ImageError
from flawmap.imaging.arrays import as_pixels
from flawmap.imaging.captures import CaptureLimits, capture_statistics
from flawmap.imaging.geometry import Geometry
from flawmap.imaging.image_files import find_images
from flawmap.imaging.masks import read_mask
from flawmap.imaging.preparation import Preparation, read_region, read_template
from flawmap.imaging.reading import BATCH, Batch, Picture, read_batches
from flawmap.judging.calibration import Calibration, Threshold
from flawmap.judging.evaluation import EvaluationReport, Scored, evaluate
from flawmap.judging.inspection import Inspection
from flawmap.learning.data import Announce, Progress, TrainingData, quiet, silent
from flawmap.learning.fitting import SHORT, Atypical, Recipe, extraction_engine, fit, limits, report_unreadable
from flawmap.learning.good_scores import Split, good_scores
from flawmap.learning.latents import Latents
from flawmap.learning.loop import train
from flawmap.methods import Method, configure, method_class
from flawmap.model_file import read_model, write_model
from flawmap.report.overlays import HeatScale

log = logging.getLogger(__name__)

_PREPARATION, _LATENTS = "preparation.", "latents."  # before the names of their tensors in a model file


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
        guarantee: "marginal" or "confidence", see `flawmap.judging.calibration`.
        calibration: "auto", "holdout", "crossfit", or a folder of further good images.
        settings: the method's own.

    Attributes:
        method_: the fitted method.
        calibration_: scores of good images.
        threshold_: the threshold and what it promises.
        pixel_threshold_: where regions are cut; None for methods without a map.
        training_: what it was fitted on: number of images, their digest, seed, engine.
        capture_limits_: what a capture must be like to be judged.
        latents_: of the calibration images, for methods with settings that can be moved; None for the others.
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
        self.latents_: Latents | None = None
        self._calibrated = False
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
        recipe = Recipe(
            self.method,
            self._method_class,
            self.config,
            self.backbone,
            self.weights,
            self.image_size,
            self._size,
            self.geometry,
            self._region,
            self._template,
            self.engine,
            self.device,
            self.seed,
            str(self.calibration),
        )
        self._inspector = None
        fitted = fit(
            recipe,
            training_paths(source, category),
            source_name(source),
            strict=strict,
            drop_atypical=drop_atypical,
            folder=None if workspace is None else Path(workspace),
            resume=resume,
            progress=progress,
            announce=announce,
        )
        self.method_ = fitted.method
        self.preparation_ = fitted.preparation
        self.capture_limits_ = fitted.capture_limits
        self.training_ = fitted.training
        self.latents_ = fitted.latents
        self.atypical_ = fitted.atypical
        self.near_duplicates_ = fitted.near_duplicates
        self.left_out_ = fitted.left_out
        self.sizes_ = fitted.sizes
        self._calibrate(fitted.calibration)
        return self

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
        paths = training_paths(source, category)
        if not paths:
            raise FlawmapError(f"no good images found in {source_name(source)}: give a folder of new good images")
        with TrainingData(
            paths,
            self.preparation_,
            self.extraction_engine(),
            self.method_.backbone.medium,
            progress=progress,
            announce=announce,
        ) as data:
            self.left_out_ = data.unreadable
            report_unreadable(data.unreadable, strict)
            images = list({kept: i for i, kept in reversed(list(enumerate(data.digests)))}.values())[::-1]
            if not images:
                raise FlawmapError(f"none of the {len(paths)} images in {source_name(source)} can be read")
            self.sizes_ = [(height, width) for height, width in (data.record(i)["size"] for i in images)]
            unseen = Split([], images, "holdout")
            good = good_scores(self.method_, data, unseen, self.seed, self.device, progress)
            rows = data.rows(images)
            stages = self.method_.further_stages(len(rows))
            train(self.method_, data, rows, stages, seed=self.seed, progress=progress, announce=announce)
            digests = sorted(data.digests[i] for i in images)
            records = [data.record(i) for i in images]
        self.capture_limits_ = self.capture_limits_.joined(limits(records))
        before = self.calibration_
        scores, peaks = np.append(before.scores, good.scores), np.append(before.peaks, good.peaks)
        self._calibrate(Calibration(scores, peaks, "crossfit"))
        self.training_ = {
            **self.training_,
            "images": self.training_["images"] + len(images),
            "fitted": sorted({*self.training_["fitted"], *(kept[:SHORT] for kept in digests)}),
            "digest": hashlib.sha256("".join([self.training_["digest"], *digests]).encode()).hexdigest(),
        }
        self._inspector = None
        return self

    # Settings and thresholds

    def with_settings(self, *, calibrate: bool = True, **settings: Any) -> Detector:
        """The same detector with other values of the settings that its method lets move after training.

        It is calibrated anew from the latents of the good images it was calibrated on. Without `calibrate` that waits
        until `calibrate()` is called: maps and scores follow at once, p-values and verdicts are None till then.

        Raises:
            FlawmapError: a setting is fixed by training or not valid, or nothing was kept to calibrate from.
        """
        self.check_live()
        config = self.moved_config(settings)
        other = object.__new__(Detector)
        other.__dict__.update(self.__dict__)
        other.config = config
        other.method_ = self.method_.with_settings(other.config)
        other._inspector = None if self._inspector is None else self._inspector.moved(_Inspector(other.method_))
        other._calibrated = False
        return other.calibrate() if calibrate else other

    def calibrate(self) -> Detector:
        """Scores the good images kept for it once more, after `with_settings(calibrate=False)`."""
        if not self._calibrated:
            assert self.latents_ is not None
            scores, peaks = self.latents_.good_scores(self.method_, self.device)
            self._calibrate(Calibration(scores, peaks, self.calibration_.mode))
        return self

    def check_live(self) -> tuple[str, ...]:
        """The settings that can be moved.

        Raises:
            FlawmapError: there are none, or nothing was kept to calibrate from.
        """
        self._check_fitted()
        live = self._method_class.live
        if not live:
            raise FlawmapError(f"{self.method} has no setting that can be moved after training: train again with --set")
        if self.latents_ is None:
            raise FlawmapError(
                f"{' and '.join(live)} can be moved only where good images were held out: train with --calibration "
                "holdout or a folder"
            )
        return live

    def moved_config(self, settings: Mapping[str, Any]) -> Any:
        """The method's settings with some of the `live` ones moved.

        Raises:
            FlawmapError: a setting is fixed by training, or a value is not valid.
        """
        if fixed := [key for key in settings if key not in self._method_class.live]:
            movable = " and ".join(self._method_class.live)
            raise FlawmapError(
                f"{', '.join(fixed)} of {self.method} is fixed by training (only {movable} can be moved): train again"
            )
        return configure(self._method_class, {**self.method_.config.model_dump(), **settings})

    def _calibrate(self, calibration: Calibration) -> None:
        self.calibration_ = calibration
        self._calibrated = True
        self._set_threshold(calibration.threshold(self.max_false_reject, self.guarantee))

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
        self.calibrate()
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
                _Inspector(self.method_),
                self._size,
                self.engine,
                device=self.device,
                masked=self.preparation_.masked,
                given=[f"method.{name}" for name in self.method_.live_buffers],
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
        known: dict[str, Any] = {
            "score": score,
            "size": placement.size,
            "milliseconds": sum(output.milliseconds for output in outputs) if milliseconds is None else milliseconds,
            "maps": maps,
            "placement": placement,
        }
        if not self._calibrated:
            return Inspection(path, None, **known)
        return Inspection(
            path,
            "defect" if score >= self.threshold_.value else "good",
            p_value=self.calibration_.p_value(score),
            threshold=self.threshold_.value,
            pixel_threshold=self.pixel_threshold_,
            **known,
        )

    def extraction_engine(self) -> Engine:
        """What makes the features that `method_` reads, apart from it."""
        method = self.method_
        return extraction_engine(method.extracting(), method.pools, self.preparation_, self.engine, self.device)

    def _check_fitted(self) -> None:
        if not hasattr(self, "method_"):
            raise FlawmapError("this detector is not fitted: call fit(folder), or Detector.load(path)")

    def heat_scale(self) -> HeatScale | None:
        """What heatmap colours mean, from good images alone; None for methods without a map, or before calibration."""
        if self.pixel_threshold_ is None or not self._calibrated:
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
        self.calibrate()
        dataset, samples = labelled_samples(source, category)
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
            assert inspection.verdict is not None
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
        self.calibrate()
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
        kept = {_PREPARATION + k: torch.from_numpy(v) for k, v in self.preparation_.arrays().items()}
        if self.latents_ is not None:
            metadata["latents"] = self.latents_.digests
            kept[f"{_LATENTS}values"] = self.latents_.values
            if self.latents_.inside is not None:
                kept[f"{_LATENTS}inside"] = self.latents_.inside
        write_model(Path(path), {**self.method_.state_dict(), **kept}, metadata)

    @classmethod
    def load(cls, path: str | Path, *, engine: str = "auto", device: str = "auto") -> Detector:
        """Reads a model file.

        Raises:
            FlawmapError: it is missing, damaged, edited, of a newer format, or its method is unknown here.
        """
        tensors, metadata = read_model(Path(path))
        try:
            if "latents" in metadata:
                values, inside = tensors.pop(f"{_LATENTS}values"), tensors.pop(f"{_LATENTS}inside", None)
                latents = Latents(values, inside, metadata["latents"])
            else:
                latents = None
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
            detector.latents_ = latents
            detector.training_ = metadata["training"]
            scores, peaks = np.array(kept["scores"], np.float32), np.array(kept["peaks"], np.float32)
            detector._calibrate(Calibration(scores, peaks, kept["mode"]))
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


def labelled_samples(source: str | Path | Dataset, category: str | None) -> tuple[Dataset, list[Sample]]:
    """A data set and its labelled test images.

    Raises:
        FlawmapError: there are none.
    """
    dataset = source if isinstance(source, Dataset) else find_dataset(Path(source), category)
    samples = [sample for sample in dataset.test if sample.label is not None]
    if not samples:
        raise FlawmapError(
            f"{dataset.root} holds no labelled test images: give a folder with test/good and test/<defect>"
        )
    return dataset, samples


def _device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise FlawmapError(f"device {device} is not to be had here: use --device auto or cpu")
    return device


def training_paths(source: str | Path | Dataset | Sequence[str | Path], category: str | None) -> list[Path]:
    """The good training images that a folder, a data set or a list of paths holds."""
    if isinstance(source, (str, Path)):
        source = find_dataset(Path(source), category)
    if isinstance(source, Dataset):
        return [sample.path for sample in source.train]
    return list(dict.fromkeys(Path(path) for path in source))


def source_name(source: str | Path | Dataset | Sequence[str | Path]) -> str:
    """What messages call it."""
    if isinstance(source, Dataset):
        return str(source.root)
    return str(source) if isinstance(source, (str, Path)) else "the list"
