"""The user's object: fit on good images, predict, evaluate, save, load."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray

from flawmap.backbones import DEFAULT_BACKBONE, create_backbone, create_engine, moved
from flawmap.datasets import Dataset
from flawmap.datasets.sources import source_name, training_paths
from flawmap.errors import FlawmapError, ImageError, shortage
from flawmap.graph import InspectionGraph
from flawmap.imaging.captures import CaptureLimits
from flawmap.imaging.geometry import Geometry
from flawmap.imaging.preparation import Preparation, read_region, read_template
from flawmap.judging.calibration import GUARANTEES, Calibration, Threshold
from flawmap.judging.evaluation import EvaluationReport
from flawmap.judging.inspection import Inspection
from flawmap.judging.judge import Judge
from flawmap.learning.data import Announce, Progress, quiet, silent
from flawmap.learning.fitting import SHORT, Atypical, Recipe, extraction_engine, fit
from flawmap.learning.latents import Latents
from flawmap.learning.updating import update
from flawmap.learning.workspace import Workspace
from flawmap.line import Inspector
from flawmap.line.engines import Engine, check_engine
from flawmap.line.evaluating import evaluate_inspector
from flawmap.line.model_card import ModelCard, check_model_path
from flawmap.methods import Method, automatic, configure, known_methods, method_class, preset_of
from flawmap.methods.checking import check_tensors, try_out
from flawmap.methods.presets import in_words
from flawmap.model_file import read_model, write_model
from flawmap.ranges import SEEDS, SIDES, rate, whole
from flawmap.report.overlays import HeatScale

log = logging.getLogger(__name__)

_PREPARATION, _LATENTS = "preparation.", "latents."  # before the names of their tensors in a model file
_COMPILING = threading.Lock()
_NONE = "none"  # the mode of calibration that gives no scores


class Detector:
    """Learns what good parts look like, then says of an image: good or not, how sure, and where.

    Args:
        method: a name that `flawmap methods` prints, or "auto": "gaussbank", or "patchcore" for tiles.
        preset: named settings, such as "paper": of the method, and of the arguments below that are None where one is
            not given. What is given wins.
        backbone: any timm model with intermediate features; the embedded one by default.
        weights: a local weight file; None for the embedded weights or timm's hub.
        image_size: what images (or tiles) are resized to, in pixels: a side or (height, width); 256 by default.
        geometry: which windows of an image become model inputs; the whole image, stretched, by default.
        roi: mask of the region of interest, a file or bool (H, W). Outside it nothing is learnt, scored or drawn.
        register: picture of a part in the pose in which `roi` is drawn; each image is first aligned to it.
        engine: "auto", "openvino", "onnxruntime" or "torch".
        device: "auto", "cpu" or "cuda".
        seed: of everything random.
        max_false_reject: the share of good parts that may be rejected.
        guarantee: "marginal", "confidence" or "tail", see `flawmap.judging.calibration`. Where no tail can be fitted to
            the calibration scores, `fit` says so in a warning and takes the threshold of "marginal".
        calibration: "auto", the default, "loo", "holdout", "crossfit", a folder of further good images, or "none": all
            images are learnt from, so there are scores and maps, but no threshold, p-values and verdicts.
        capture_check: whether captures unlike the good images (black, blurred, of another part) are refused: verdict
            "error".
        settings: the method's own.

    Attributes:
        preset: the preset in words, with what was given otherwise; None without one.
        method_: the fitted method.
        calibration_: scores of good images; None with calibration "none".
        threshold_, pixel_threshold_: where images are rejected, with what that promises, and where regions are cut;
            None with calibration "none".
        training_: what it was fitted on: number of images, their digest, seed, engine.
        capture_limits_: what a capture must be like to be judged.
        latents_: of the calibration images, for methods with settings that can be moved; None for the others.
        atypical_: after `fit`, the calibration images, most unusual first. Not kept in the model file.
        near_duplicates_: after `fit`, groups of training images that show the same photograph, or one part twice. Not
            kept either; cross-fitting keeps each group on one side.
        left_out_: after `fit` or `update`, what was wrong with images that could not be learnt from. Not kept either.
        sizes_: after `fit` or `update`, (height, width) of the images learnt from. Not kept either.
        digest_: of the model file it was loaded from or saved to last; None before.

    Raises:
        FlawmapError: an unknown name or setting.

    Example:
        >>> from flawmap import Detector
        >>> detector = Detector(image_size=224).fit("parts/good")   # doctest: +SKIP
        >>> detector.predict("parts/new/0001.png").verdict                       # doctest: +SKIP
        'good'
    """

    def __init__(
        self,
        method: str = "auto",
        *,
        preset: str | None = None,
        backbone: str | None = None,
        weights: str | Path | None = None,
        image_size: int | tuple[int, int] | None = None,
        geometry: Geometry | None = None,
        roi: str | Path | NDArray[np.bool_] | None = None,
        register: str | Path | None = None,
        engine: str = "auto",
        device: str = "auto",
        seed: int = 0,
        max_false_reject: float = 0.01,
        guarantee: Literal["marginal", "confidence", "tail"] = "marginal",
        calibration: str | Path | None = None,
        capture_check: bool = True,
        **settings: Any,
    ) -> None:
        tiled = geometry is not None and geometry.kind == "tile"
        self.method = automatic(tiled)[0] if method == "auto" else method
        self._method_class = method_class(self.method)
        own = {"backbone": backbone, "image_size": image_size, "crop": geometry, "calibration": calibration}
        given = {name: value for name, value in own.items() if value is not None}
        if geometry is not None and geometry.kind == "crop":
            given["crop"] = geometry.side
        kept, other = preset_of(self._method_class, preset).beside({**given, **settings})
        self.preset = None if preset in (None, "default") else in_words(preset, other)
        self.config = configure(self._method_class, {**kept.settings, **settings})
        self.geometry = geometry or Geometry.from_options(crop=int(kept.detector.get("crop", 0)) or None)
        self.backbone = backbone or kept.detector.get("backbone", DEFAULT_BACKBONE)
        self.weights = weights
        image_size = int(kept.detector.get("image_size", 256)) if image_size is None else image_size
        sides = image_size if isinstance(image_size, (tuple, list)) else (image_size, image_size)
        if len(sides) != 2:
            raise FlawmapError(f"image_size is {image_size}: give a side, or (height, width)")
        self.image_size = (whole("--image-size", sides[0], SIDES), whole("--image-size", sides[1], SIDES))
        self._size = self.geometry.input_size(self.image_size)
        self._region = read_region(Path(roi)) if isinstance(roi, (str, Path)) else roi
        self._template = None if register is None else read_template(Path(register))
        for side in self._size:  # of the crop, where there is one
            whole("the side of the model's input", side, SIDES)
        max_false_reject = rate("--max-false-reject", max_false_reject)
        if guarantee not in GUARANTEES:
            raise FlawmapError(f"unknown guarantee {guarantee}: choose {', '.join(GUARANTEES)}")
        check_engine(engine)
        self.engine = engine
        self.device = _device(device)
        self.seed = whole("--seed", seed, SEEDS)
        self.calibration = calibration or kept.detector.get("calibration", "auto")
        self.capture_check = capture_check
        self.method_: Method
        self.preparation_: Preparation
        self.training_: dict[str, Any]
        self.capture_limits_: CaptureLimits
        self.atypical_: list[Atypical] = []
        self.near_duplicates_: list[list[Path]] = []
        self.left_out_: list[ImageError] = []
        self.sizes_: list[tuple[int, int]] = []
        self.latents_: Latents | None = None
        self.digest_: str | None = None
        self._judge = Judge(max_false_reject, guarantee)
        self._mode = ""
        self._heat: HeatScale | None = None
        self._workspace: Workspace | None = None
        self._engine: Engine | None = None
        self._inspector: Inspector | None = None

    @property
    def max_false_reject(self) -> float:
        """The share of good parts that may be rejected."""
        return self._judge.max_false_reject

    @property
    def guarantee(self) -> str:
        """What is promised of it, "marginal" or "confidence"; nothing with "tail"."""
        return self._judge.guarantee

    @property
    def calibration_(self) -> Calibration | None:
        """Scores of good images; None where all were learnt from."""
        return self._calibrated.calibration

    @property
    def threshold_(self) -> Threshold | None:
        """The threshold and what it promises; None where all good images were learnt from."""
        return self._calibrated.threshold

    @property
    def pixel_threshold_(self) -> float | None:
        """Where regions are cut; None for methods without a map, and where all good images were learnt from."""
        return self._calibrated.pixel_threshold

    @property
    def _calibrated(self) -> Judge:
        self.calibrate()
        return self._judge

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
            workspace: a folder for features and checkpoints, deleted by `save`; a temporary one by default. One process
                at a time works in it.
            resume: go on with what an interrupted `fit` left in `workspace`, to the same result.
            progress, announce: are told how it goes.

        Raises:
            FlawmapError: there are fewer than two good images, `workspace` holds an interrupted training and `resume`
                is not asked for or does not fit, or what `Detector` raises late: weights, memory, disk.
        """
        drop_atypical = whole("--drop-atypical", drop_atypical, (0, 10**9))
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
        self._forget()
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
        named = {} if self.preset is None else {"preset": self.preset}
        self.training_ = {**fitted.training, "capture_check": self.capture_check, **named}
        self.latents_ = fitted.latents
        self.atypical_ = fitted.atypical
        self.near_duplicates_ = fitted.near_duplicates
        self.left_out_ = fitted.left_out
        self.sizes_ = fitted.sizes
        self._workspace = fitted.workspace
        self._heat = fitted.heat
        self._calibrate_anew(fitted.calibration)
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

        The new images are scored before they are learnt, and join the earlier calibration scores, where there are any;
        since the method has changed after, the false-reject rate is an estimate from then on.

        Raises:
            FlawmapError: the method cannot be updated, or no new image can be read.
        """
        self._check_fitted()
        if not self.method_.updates:
            raise FlawmapError(f"{self.method} cannot learn images later: train again with all of them")
        paths = training_paths(source, category)
        if not paths:
            raise FlawmapError(f"no good images found in {source_name(source)}: give a folder of new good images")
        updated = update(
            self.method_,
            paths,
            self.preparation_,
            self.extraction_engine(),
            self.device,
            self.seed,
            source_name(source),
            strict=strict,
            progress=progress,
            announce=announce,
        )
        self.left_out_, self.sizes_ = updated.left_out, updated.sizes
        self.capture_limits_ = self.capture_limits_.joined(updated.capture_limits)
        before, digests = self.calibration_, updated.digests
        if before is not None:
            scores, peaks = np.append(before.scores, updated.scores), np.append(before.peaks, updated.peaks)
            self._calibrate_anew(Calibration(scores, peaks, "crossfit"))
        self.training_ = {
            **self.training_,
            "images": self.training_["images"] + len(digests),
            "fitted": sorted({*self.training_["fitted"], *(kept[:SHORT] for kept in digests)}),
            "digest": hashlib.sha256("".join([self.training_["digest"], *digests]).encode()).hexdigest(),
        }
        self._forget()
        return self

    def _forget(self) -> None:
        """What was made of a method that has changed."""
        self._engine = self._inspector = self.digest_ = None

    def _copy(self) -> Detector:
        other = object.__new__(Detector)
        other.__dict__.update(self.__dict__)
        other._inspector = None
        return other

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_engine": None, "_inspector": None}  # compiled graphs cannot be copied

    # Settings and thresholds

    def with_settings(self, *, calibrate: bool = True, **settings: Any) -> Detector:
        """The same detector with other values of the settings that its method lets move after training.

        It is calibrated anew from the latents of the good images it was calibrated on, if any. Without `calibrate` that
        waits until `calibrate()` is called: maps and scores follow at once, p-values and verdicts are None till then.

        Raises:
            FlawmapError: a setting is fixed by training or not valid, or nothing was kept to calibrate from.
        """
        self.check_live()
        config = self.moved_config(settings)
        other = self._copy()
        other.config = config
        other.method_ = self.method_.with_settings(other.config)
        if self._engine is not None:
            other._engine = moved(self._engine, other.graph(), other._live_buffers())
        other._judge = Judge(self.max_false_reject, self.guarantee, unsure=self._judge.unsure)
        return other.calibrate() if calibrate else other

    def calibrate(self) -> Detector:
        """Scores the good images kept for it once more, after `with_settings(calibrate=False)`."""
        self._check_fitted()
        if self._judge.calibration is None and self._mode != _NONE:
            assert self.latents_ is not None
            scores, peaks = self.latents_.good_scores(self.method_, self.device)
            self._calibrate(Calibration(scores, peaks, self._mode))
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
        if self.latents_ is None and self._mode != _NONE:
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

    def _calibrate(self, calibration: Calibration | None) -> None:
        if calibration is None:
            self._mode, self._inspector = _NONE, None
            self._judge = Judge(self.max_false_reject, self.guarantee)
            return
        self._mode, self._inspector = calibration.mode, None
        self._judge = Judge.of(calibration, self.max_false_reject, self.guarantee, unsure=self._judge.unsure)

    def _calibrate_anew(self, calibration: Calibration | None) -> None:
        """After learning, which must not be lost because the scores that came of it have no tail."""
        try:
            self._calibrate(calibration)
        except FlawmapError as refusal:
            log.warning("%s: the model keeps that one", refusal)
            self._judge = Judge(self.max_false_reject, "marginal")
            self._calibrate(calibration)

    def with_threshold(
        self,
        *,
        max_false_reject: float | None = None,
        guarantee: str | None = None,
        threshold: float | None = None,
        tail: bool = False,
        unsure: bool | None = None,
    ) -> Detector:
        """The same detector with another threshold: one that keeps a rate, or one the user names.

        Args:
            max_false_reject, guarantee, threshold, tail, unsure: see `flawmap.judging.judge.Judge.with_threshold`.

        Raises:
            FlawmapError: both or neither are given, a rate outside (0, 1), or the tail of the calibration scores is
                asked for and cannot be fitted.
        """
        other = self._copy()
        other._judge = self._calibrated.with_threshold(
            max_false_reject=max_false_reject, guarantee=guarantee, threshold=threshold, tail=tail, unsure=unsure
        )
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
        return self.inspector().predict(source)

    def stream(self, sources: Iterable[str | Path | NDArray[Any]]) -> Iterator[Inspection]:
        """Inspects images one batch after the other, reading ahead, in bounded memory: see `Inspector.stream`."""
        return self.inspector().stream(sources)

    def inspector(self, *, threads: int | None = None) -> Inspector:
        """What runs and judges, safe to share between threads. Made ready once, for all that come after.

        Args:
            threads: how many each call may use; all cores by default.

        Raises:
            FlawmapError: the detector is not fitted, or the engine cannot run the method.
        """
        self._check_fitted()
        with _COMPILING:  # backbone, method and enlarging as one graph: two libraries' threads get in each other's way
            if self._engine is None or threads is not None:
                self._inspector = None
                self._engine = create_engine(
                    self.graph(),
                    self._size,
                    self.engine,
                    device=self.device,
                    threads=threads,
                    masked=self.preparation_.masked,
                    given=self._live_buffers(),
                    dtype=torch.float32 if self.preparation_.preprocessing.deep else torch.uint8,
                )
            if self._inspector is None:
                mover = self._moved if self._method_class.live else None
                live = () if self.latents_ is None else tuple(self._method_class.live)
                self._inspector = Inspector(self.card(), self._engine, self._judge, self.digest_, mover, live)
            return self._inspector

    def _moved(self, settings: Mapping[str, Any], calibrate: bool) -> Inspector:
        return self.with_settings(calibrate=calibrate, **settings).inspector()

    def graph(self) -> InspectionGraph:
        """The method with all that inspection needs around it, as one network."""
        return InspectionGraph(self.method_, self.preparation_.preprocessing)

    def _live_buffers(self) -> list[str]:
        return [f"method.{name}" for name in self.method_.live_buffers]

    def extraction_engine(self) -> Engine:
        """What makes the features that `method_` reads, apart from it."""
        method = self.method_
        return extraction_engine(method.extracting(), method.pools, self.preparation_, self.engine, self.device)

    def _check_fitted(self) -> None:
        if not hasattr(self, "method_"):
            raise FlawmapError("this detector is not fitted: call fit(folder), or Detector.load(path)")

    def heat_scale(self) -> HeatScale | None:
        """What heatmap colours mean: see `Inspector.heat_scale`."""
        return self.inspector().heat_scale()

    # Evaluating

    def evaluate(
        self,
        source: str | Path | Dataset,
        *,
        category: str | None = None,
        full_resolution: bool = False,
        progress: Progress = quiet,
    ) -> EvaluationReport:
        """Figures on the test images of a labelled data set: see `flawmap.line.evaluating.evaluate_inspector`.

        Raises:
            FlawmapError: there are no labelled test images.
        """
        inspector = self.calibrate().inspector()
        return evaluate_inspector(
            inspector, source, category=category, full_resolution=full_resolution, progress=progress
        )

    def settings(self) -> dict[str, Any]:
        """What made this detector, as reports show it."""
        return self.calibrate().inspector().settings()

    # Files

    def save(self, path: str | Path) -> None:
        """Writes one .safetensors file with everything that inspection needs, the backbone's weights included.

        When it is on the disk, the workspace of `fit` is deleted.

        Raises:
            FlawmapError: the file cannot be written.
        """
        metadata = self.calibrate().card().to_json()
        kept = {_PREPARATION + k: torch.from_numpy(v) for k, v in self.preparation_.arrays().items()}
        if self.latents_ is not None:
            metadata["latents"] = self.latents_.digests
            kept[f"{_LATENTS}values"] = self.latents_.values
            if self.latents_.inside is not None:
                kept[f"{_LATENTS}inside"] = self.latents_.inside
        self._inspector = None
        self.digest_ = write_model(Path(path), {**self.method_.state_dict(), **kept}, metadata)
        if self._workspace is not None:
            self._workspace.delete()
            self._workspace = None

    def card(self) -> ModelCard:
        """What a model file says of this detector beside its tensors."""
        self._check_fitted()
        return ModelCard(
            self.method,
            _without_paths(self.method_.config),
            self.backbone,
            self.method_.backbone.digest(),
            tuple(self.method_.backbone.levels),
            self.preparation_,
            self.capture_limits_,
            self._judge.calibration,
            self.max_false_reject,
            self.guarantee,
            self.training_,
            self._method_class.localises,
            None if self._heat is None else (self._heat.low, self._heat.high),
        )

    @classmethod
    def load(cls, path: str | Path, *, engine: str = "auto", device: str = "auto") -> Detector:
        """Reads a model file.

        Raises:
            FlawmapError: it is missing, damaged, edited, of a newer format, or its method is unknown here.
        """
        check_model_path(Path(path))
        tensors, metadata, digest = read_model(Path(path))
        _check_method(Path(path), metadata)
        try:
            if "latents" in metadata:
                values, inside = tensors.pop(f"{_LATENTS}values"), tensors.pop(f"{_LATENTS}inside", None)
                latents = Latents(values, inside, metadata["latents"])
            else:
                latents = None
            arrays = {k: tensors.pop(k).numpy() for k in list(tensors) if k.startswith(_PREPARATION)}
            card = ModelCard.from_json(metadata, {k.removeprefix(_PREPARATION): v for k, v in arrays.items()})
            preparation = card.preparation
            detector = cls(
                card.method,
                backbone=card.backbone,
                image_size=preparation.image_size,
                geometry=preparation.geometry,
                engine=engine,
                device=device,
                seed=card.training["seed"],
                max_false_reject=card.max_false_reject,
                guarantee=card.guarantee,  # type: ignore[arg-type]
                **card.config,
            )
            if tuple(detector._method_class.levels(detector.config)) != card.levels:
                raise ValueError("the backbone's levels are not those of its settings")
            backbone = create_backbone(detector.backbone, card.levels, weights="random", size=preparation.size)
            detector.method_ = detector._method_class(detector.config, backbone, preparation.size)
            check_tensors(detector.method_, tensors)
            detector.method_.load_state(tensors)
            detector.method_.to(detector.device).eval().requires_grad_(False)
            try_out(detector.method_, preparation.masked)
            detector.preparation_ = preparation
            detector.capture_limits_ = card.captures
            detector.latents_ = latents
            detector.training_ = dict(card.training)
            detector.capture_check = card.capture_check
            detector.digest_ = digest
            detector._heat = None if card.heat is None else HeatScale(*card.heat, learnt=True)
            detector._calibrate(card.calibration)
            if len(detector.capture_limits_.centre) not in (0, sum(backbone.channels[i] for i in backbone.medium)):
                raise ValueError("the captures' embedding has another length than the backbone's")
        except Exception as error:  # what a forged header may break is not to be foreseen
            raise _unfit(path, error) from error
        return detector


def _without_paths(config: Any) -> dict[str, Any]:
    """A method's settings as plain JSON types; of a folder its name, which says nothing of the machine."""
    kept = {name: getattr(config, name) for name in type(config).model_fields}
    return {**config.model_dump(mode="json"), **{k: v.name for k, v in kept.items() if isinstance(v, Path)}}


def _device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise FlawmapError(f"device {device} is not to be had here: use --device auto or cpu")
    return device


def read_card(path: Path) -> tuple[ModelCard, dict[str, Any]]:
    """What `flawmap.line.inspector.read_card` gives for a model file."""
    tensors, metadata, digest = read_model(path)
    _check_method(path, metadata)
    arrays = {k.removeprefix(_PREPARATION): v.numpy() for k, v in tensors.items() if k.startswith(_PREPARATION)}
    try:
        card = ModelCard.from_json(metadata, arrays)
        live = method_class(card.method).live if "latents" in metadata else ()
    except Exception as error:  # what a forged header may break is not to be foreseen
        raise _unfit(path, error) from error
    return card, {"kind": "a model of the lab", "digest": digest, "live": list(live)}


def _check_method(path: Path, metadata: Mapping[str, Any]) -> None:
    name = metadata.get("method")
    if isinstance(name, str) and name not in known_methods():
        raise FlawmapError(
            f"{path} is of the method {shorten(name, 40)}, which is not known here: name its file with --plugin, or "
            "install its package"
        )


def _unfit(path: str | Path, error: Exception) -> FlawmapError:
    if (short := shortage(error)) is not None:
        return short
    reason = shorten(str(error), 160)  # PyTorch's spreads over lines and names every tensor
    return FlawmapError(f"{path} does not fit this flawmap ({reason}): train again")


def load_inspector(path: Path, *, engine: str, device: str, threads: int | None) -> Inspector:
    """What `Inspector.load` gives for a model file."""
    return Detector.load(path, engine=engine, device=device).inspector(threads=threads)
