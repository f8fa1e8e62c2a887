"""The user's object: fit on good images, predict, evaluate, save, load."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flawmap.backbones import DEFAULT_BACKBONE, Backbone, Engine, check_engine, create_backbone, create_engine
from flawmap.calibration import Calibration, Threshold
from flawmap.datasets import Dataset, Sample, find_dataset
from flawmap.errors import FlawmapError, ImageError
from flawmap.evaluation import EvaluationReport, Scored, evaluate
from flawmap.images import Preprocessing, as_pixels, digest, find_images, infer_white, lay_back, read_mask, resize_mask
from flawmap.inspection import Inspection
from flawmap.methods import Method, configure, method_class
from flawmap.model_file import read_model, write_model
from flawmap.report.overlays import HeatScale
from flawmap.training import Announce, Progress, TrainingData, folds, quiet, read_batches, silent, train

log = logging.getLogger(__name__)

# Leaving out a third of many images changes a bank as little as leaving out a fifth of few.
_FOLDS, _FOLDS_OF_MANY, _MANY = 5, 3, 150
_HELD_OUT = 5  # one image in five
_LIBRARIES = ("flawmap", "torch", "timm", "numpy", "scipy", "pillow")


class Detector:
    """Learns what good parts look like, then says of an image: good or not, how sure, and where.

    Args:
        method: a name that `flawmap methods` prints.
        preset: named settings of the method, such as "paper".
        backbone: any timm model with intermediate features.
        weights: a local weight file; None for the embedded weights or timm's hub.
        image_size: input size in pixels, a side or (height, width).
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
        if min(self.image_size) < 32:
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
        self.preprocessing_: Preprocessing
        self.training_: dict[str, Any]
        self._inspector: Engine | None = None

    # Fitting

    def fit(
        self,
        source: str | Path | Dataset | Sequence[str | Path],
        *,
        category: str | None = None,
        strict: bool = False,
        progress: Progress = quiet,
        announce: Announce = silent,
    ) -> Detector:
        """Learns from the good training images of a folder, a data set or a list of paths, then calibrates.

        Unreadable images are left out with a warning, or refused where `strict`. What the training will hold in memory
        and on disk is told to `announce` before it starts.

        Raises:
            FlawmapError: there are fewer than two good images, or what `Detector` raises late: weights, memory, disk.
        """
        paths = _training_paths(source, category)
        if len(paths) < 2:
            raise FlawmapError(
                f"{len(paths)} good training image{'' if len(paths) == 1 else 's'} found in {_name(source)}: "
                "at least 2 are needed, one to learn from and one to calibrate on; some dozens make a good start"
            )
        further = self._calibration_paths()
        config = self._method_class.resolved(self.config, self.backbone)
        backbone = create_backbone(
            self.backbone,
            self._method_class.levels(config),
            weights=self.weights,
            size=self.image_size,
            seed=self.seed,
        )
        mean, std = tuple(backbone.mean), tuple(backbone.std)
        self.preprocessing_ = Preprocessing(self.image_size, mean, std, infer_white([*paths, *further]))  # type: ignore[arg-type]
        engine = create_engine(backbone, self.image_size, self.engine, device=self.device)
        self._inspector = None
        with TrainingData([*paths, *further], self.preprocessing_, engine, progress, announce) as data:
            for error in data.unreadable:
                if strict:
                    raise error
                log.warning("left out of training: %s", error)
            readable = set(data.paths)
            read = [path for path in paths if path in readable]
            fitting = list(range(len(read)))
            if len(fitting) < 2:
                raise FlawmapError(f"only {len(fitting)} of {len(paths)} good training images can be read")
            digests = [digest(path) for path in data.paths]
            fitting, held_out, mode = self._split(fitting, digests)
            self.method_ = self._fit_method(config, backbone, data, fitting, progress, announce)
            scores, peaks = self._calibration_scores(config, backbone, data, fitting, held_out, digests, mode, progress)
        self.calibration_ = Calibration(scores, peaks, mode)
        self._set_threshold(self.calibration_.threshold(self.max_false_reject, self.guarantee))
        self.training_ = {
            "images": len(fitting),
            "digest": hashlib.sha256("".join(sorted(digests[i] for i in fitting)).encode()).hexdigest(),
            "seed": self.seed,
            "engine": engine.name,
            "libraries": {name: version(name) for name in _LIBRARIES},
        }
        return self

    def _calibration_paths(self) -> list[Path]:
        if str(self.calibration) in ("auto", "holdout", "crossfit"):
            return []
        folder = Path(self.calibration)
        if not folder.is_dir():
            raise FlawmapError(f"--calibration {folder} is neither a folder of good images nor holdout or crossfit")
        paths = find_images(folder)
        if not paths:
            raise FlawmapError(f"--calibration {folder} holds no images: put good images there that are not trained on")
        return paths

    def _split(self, fitting: list[int], digests: list[str]) -> tuple[list[int], list[int], str]:
        """Images to fit on, images to calibrate on, mode. Byte-identical images never stand on both sides."""
        mode = str(self.calibration)
        if mode == "auto":
            mode = "holdout" if self._method_class.optimises else "crossfit"
        if mode in ("crossfit", "holdout") and len({digests[i] for i in fitting}) < 2:
            raise FlawmapError("all training images are byte-identical: give different ones, or --calibration FOLDER")
        if mode == "crossfit":
            return fitting, [], mode
        if mode == "holdout":
            held_out = folds([digests[i] for i in fitting], _HELD_OUT, self.seed)[0]
            return [i for i in fitting if i not in set(held_out)], held_out, mode
        known = {digests[i] for i in fitting}
        apart = [i for i in range(len(fitting), len(digests)) if digests[i] not in known]
        if not apart:
            raise FlawmapError(f"every image of --calibration {mode} is also trained on: give other good images")
        return fitting, apart, "folder"

    def _fit_method(
        self,
        config: Any,
        backbone: Backbone,
        data: TrainingData,
        indices: Sequence[int],
        progress: Progress,
        announce: Announce = silent,
    ) -> Method:
        method = self._method_class(config, backbone, self.image_size).to(self.device)
        train(method, data, indices, seed=self.seed, progress=progress, announce=announce)
        return method

    def _calibration_scores(
        self,
        config: Any,
        backbone: Backbone,
        data: TrainingData,
        fitting: list[int],
        held_out: list[int],
        digests: list[str],
        mode: str,
        progress: Progress,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Scores and map maxima of good images that the scoring method has not seen, each distinct image once."""
        found: dict[str, tuple[float, float]] = {}

        def keep(indices: Sequence[int], maps: Tensor, scores: Tensor) -> None:
            for i, peak, score in zip(indices, maps.amax((1, 2, 3)).tolist(), scores.tolist(), strict=True):
                found.setdefault(digests[i], (score, peak))

        def score_with(method: Method, indices: Sequence[int], done: int, total: int) -> None:
            for part in _parts(indices):
                keep(part, *_enlarged(method, method.score(self._features(data, part))))
                done += len(part)
                progress("calibration", done, total)

        with torch.inference_mode():
            closed_form = mode == "crossfit" and len(set(digests)) == len(digests)
            if closed_form and self.method_.leave_one_out(self._features(data, fitting[:1])) is not None:
                for part in _parts(fitting):
                    left_out = self.method_.leave_one_out(self._features(data, part))
                    assert left_out is not None
                    keep(part, *_enlarged(self.method_, left_out))
                    progress("calibration", part[-1] + 1, len(fitting))
            elif mode == "crossfit":
                done = 0
                count = _FOLDS if len(fitting) < _MANY else _FOLDS_OF_MANY
                split = folds([digests[i] for i in fitting], count, self.seed)
                for number, fold in enumerate(split, start=1):
                    rest = sorted(set(range(len(fitting))) - set(fold))
                    with torch.inference_mode(False):
                        method = self._fit_method(
                            config, backbone, data, rest, _renamed(progress, f"fold {number} of {len(split)}")
                        )
                    score_with(method, fold, done, len(fitting))
                    done += len(fold)
            else:
                score_with(self.method_, held_out, 0, len(held_out))
        pairs = np.array(list(found.values()), dtype=np.float32)
        return pairs[:, 0], pairs[:, 1] if self.method_.localises else np.empty(0, np.float32)

    def _features(self, data: TrainingData, indices: Sequence[int]) -> list[Tensor]:
        return [level.to(self.device) for level in data.features(indices)]

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
        done = 0
        for images, found in read_batches(files, self.preprocessing_):
            start = time.perf_counter()
            maps, scores = self._run(images)
            milliseconds = 1000 * (time.perf_counter() - start) / max(len(images), 1)
            row = 0
            for path, size in zip(files[done : done + len(found)], found, strict=True):
                if isinstance(size, ImageError):
                    yield Inspection(path, "error", error=str(size))
                else:
                    yield self._judge(path, size, None if maps is None else maps[row], float(scores[row]), milliseconds)
                    row += 1
            done += len(found)

    def _inspect(self, path: Path) -> Inspection:
        return next(self.stream([path]))

    def _inspect_array(self, array: NDArray[Any]) -> Inspection:
        start = time.perf_counter()
        pixels = as_pixels(array)
        maps, scores = self._run(self.preprocessing_(pixels)[None])
        milliseconds = 1000 * (time.perf_counter() - start)
        size = (pixels.shape[0], pixels.shape[1])
        return self._judge(None, size, None if maps is None else maps[0], float(scores[0]), milliseconds)

    def _run(self, images: NDArray[np.float32]) -> tuple[NDArray[np.float32] | None, NDArray[np.float32]]:
        """Preprocessed images (B, 3, h, w) -> maps (B, h, w), None without localisation, and scores (B,)."""
        if len(images) == 0:
            return None, np.empty(0, np.float32)
        maps, scores = self._inspection_engine()(images)
        return maps[:, 0] if self.method_.localises else None, scores

    def _inspection_engine(self) -> Engine:
        """Backbone, method and enlarging as one graph: two libraries' threads would get in each other's way."""
        if self._inspector is None:
            self._inspector = create_engine(self.method_, self.image_size, self.engine, device=self.device)
        return self._inspector

    def _judge(
        self,
        path: Path | None,
        size: tuple[int, int],
        anomaly_map: NDArray[np.float32] | None,
        score: float,
        milliseconds: float,
    ) -> Inspection:
        finite = np.isfinite(score) and (anomaly_map is None or bool(np.isfinite(anomaly_map).all()))
        if not finite:
            return Inspection(
                path, "error", size=size, error=f"{path or 'the array'}: its score is not a finite number"
            )
        return Inspection(
            path,
            "defect" if score >= self.threshold_.value else "good",
            score=score,
            p_value=self.calibration_.p_value(score),
            threshold=self.threshold_.value,
            pixel_threshold=self.pixel_threshold_,
            size=size,
            milliseconds=milliseconds,
            model_map=anomaly_map,
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

        Pixel figures are taken at the model's input size, masks resized nearest, or on the original pixels.

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
            "method": self.method,
            "backbone": self.backbone,
            "image_size": list(self.image_size),
            "engine": self._inspection_engine().name,
            "full_resolution": full_resolution,
            "training_images": self.training_["images"],
            "seed": self.seed,
            "threshold": self.threshold_.value,
            "max_false_reject": self.threshold_.requested,
            "guarantee": self.threshold_.guarantee,
            "data": dataset.name,
        }
        return evaluate(self._scored(samples, full_resolution, progress), settings)

    def _scored(self, samples: list[Sample], full_resolution: bool, progress: Progress) -> Iterator[Scored]:
        for number, (sample, inspection) in enumerate(
            zip(samples, self.stream(sample.path for sample in samples), strict=True), start=1
        ):
            mask, anomaly_map = None, inspection.model_map
            if (
                sample.label == 1
                and sample.mask is not None
                and inspection.size is not None
                and anomaly_map is not None
            ):
                mask = read_mask(sample.mask, inspection.size)
                mask = mask if full_resolution else resize_mask(mask, self.image_size)
            if full_resolution and anomaly_map is not None and inspection.size is not None:
                anomaly_map = lay_back(anomaly_map, inspection.size)
            yield Scored(
                sample.kind,
                sample.label == 1,
                inspection.score,
                inspection.verdict,
                anomaly_map,
                mask,
                inspection.milliseconds,
                inspection.error,
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
            "preprocessing": self.preprocessing_.to_json(),
            "calibration": {
                "mode": self.calibration_.mode,
                "scores": self.calibration_.scores.tolist(),
                "peaks": self.calibration_.peaks.tolist(),
            },
            "max_false_reject": self.max_false_reject,
            "guarantee": self.guarantee,
            "training": self.training_,
        }
        write_model(Path(path), self.method_.state_dict(), metadata)

    @classmethod
    def load(cls, path: str | Path, *, engine: str = "auto", device: str = "auto") -> Detector:
        """Reads a model file.

        Raises:
            FlawmapError: it is missing, damaged, edited, of a newer format, or its method is unknown here.
        """
        tensors, metadata = read_model(Path(path))
        try:
            preprocessing = Preprocessing.from_json(metadata["preprocessing"])
            detector = cls(
                metadata["method"],
                backbone=metadata["backbone"],
                image_size=preprocessing.size,
                engine=engine,
                device=device,
                seed=metadata["training"]["seed"],
                max_false_reject=metadata["max_false_reject"],
                guarantee=metadata["guarantee"],
                **metadata["config"],
            )
            backbone = create_backbone(
                detector.backbone, metadata["levels"], weights="random", size=detector.image_size
            )
            detector.method_ = detector._method_class(detector.config, backbone, detector.image_size)
            detector.method_.load_state(tensors)
            detector.method_.to(detector.device).eval().requires_grad_(False)
            detector.preprocessing_ = preprocessing
            kept = metadata["calibration"]
            detector.calibration_ = Calibration(
                np.array(kept["scores"], np.float32), np.array(kept["peaks"], np.float32), kept["mode"]
            )
            detector.training_ = metadata["training"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())  # PyTorch's spreads over lines
            raise FlawmapError(f"{path} does not fit this flawmap ({reason}): train again") from error
        detector._set_threshold(detector.calibration_.threshold(detector.max_false_reject, detector.guarantee))
        return detector


def _enlarged(method: Method, scored: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return method.enlarge(scored[0]), scored[1]


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


def _parts(indices: Sequence[int], size: int = 8) -> list[Sequence[int]]:
    return [indices[i : i + size] for i in range(0, len(indices), size)]


def _renamed(progress: Progress, prefix: str) -> Progress:
    return lambda what, done, total: progress(f"calibration, {prefix}: {what}", done, total)
