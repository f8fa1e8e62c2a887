"""From images to verdicts: running and judging, for a detector of the lab and for an exported file alike."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from flawmap.errors import FlawmapError, ImageError, lab_is_missing
from flawmap.imaging.arrays import as_pixels
from flawmap.imaging.image_files import find_images
from flawmap.imaging.reading import BATCH, Batch, Picture, as_source, is_several, pack, read_batches
from flawmap.imaging.window_maps import WindowMaps
from flawmap.judging.inspection import Inspection
from flawmap.judging.judge import Judge
from flawmap.line.engines import Engine
from flawmap.line.model_card import ModelCard, check_model_path
from flawmap.report.overlays import HeatScale

# Who reads a model file, by its suffix. A file of the lab is read by the lab, looked for when such a file is given.
_READERS = {".onnx": "flawmap.line.exported", ".safetensors": "flawmap.detector"}

Mover = Callable[[Mapping[str, Any], bool], "Inspector"]


class Inspector:
    """Says of an image: good or not, how sure, and where.

    It keeps nothing of a call, so one may be used from several threads at once, and it is never changed:
    `with_threshold` and `with_settings` give others, which share its engine.

    Attributes:
        card: what is known of the model.
        engine: runs the network, see `flawmap.graph.InspectionGraph`: model inputs -> maps (B, 1, h, w) float32, unless
            the method has none, scores (B,) and embeddings (B, M).
        judge: threshold, pixel threshold, and the scores of good images that they come from.
        digest: of the model file, in hexadecimal; None where there is none yet.
        live: the settings that can be moved, and calibrated anew.
        capture_check: whether captures unlike those learnt from are refused: verdict "error".

    Example:
        >>> from flawmap.line import Inspector
        >>> inspector = Inspector.load("boards.onnx")                    # doctest: +SKIP
        >>> inspector.predict("parts/new/0001.png").verdict              # doctest: +SKIP
        'good'
    """

    def __init__(
        self,
        card: ModelCard,
        engine: Engine,
        judge: Judge,
        digest: str | None,
        mover: Mover | None = None,
        live: tuple[str, ...] = (),
    ) -> None:
        """`mover` makes the inspector of other values of the `live` settings."""
        self.card = card
        self.engine = engine
        self.judge = judge
        self.digest = digest
        self.capture_check = card.capture_check
        self.live = live
        self._mover = mover
        self._warm: set[int] = set()  # batch sizes that the engine has made its kernels for
        self._warming = threading.Lock()
        self._process = os.getpid()

    @classmethod
    def load(
        cls, path: str | Path, *, engine: str = "auto", device: str = "auto", threads: int | None = None
    ) -> Inspector:
        """Reads an exported file, or a model file where the lab is installed.

        Args:
            path: an .onnx or a .safetensors file.
            engine: "auto", "openvino", "onnxruntime" or, for a model file, "torch".
            device: "auto", "cpu" or "cuda", for the engine torch.
            threads: how many each call may use; all cores by default.

        Raises:
            FlawmapError: the file is missing, damaged, edited or of a newer format, the engine is not installed or
                cannot run it, or the lab is needed and missing.
        """
        loaded: Inspector = _reader(Path(path)).load_inspector(
            Path(path), engine=engine, device=device, threads=threads
        )
        return loaded

    # Settings and thresholds

    def with_threshold(
        self,
        *,
        max_false_reject: float | None = None,
        guarantee: str | None = None,
        threshold: float | None = None,
        tail: bool = False,
        unsure: bool | None = None,
    ) -> Inspector:
        """The same inspector with another threshold: one that keeps a rate, or one the user names.

        Args:
            max_false_reject, guarantee, threshold, tail, unsure: see `flawmap.judging.judge.Judge.with_threshold`.

        Raises:
            FlawmapError: both or neither are given, a rate outside (0, 1), there are no calibration scores, or their
                tail is asked for and cannot be fitted.
        """
        other = copy(self)
        other.judge = self.judge.with_threshold(
            max_false_reject=max_false_reject, guarantee=guarantee, threshold=threshold, tail=tail, unsure=unsure
        )
        return other

    def with_settings(self, *, calibrate: bool = True, **settings: Any) -> Inspector:
        """The same inspector with other values of the settings that its method lets move after training.

        It is calibrated anew on what the model file keeps of good images, for the false-reject rate asked for last.
        Without `calibrate` maps and scores follow at once, and p-values and verdicts are None.

        Raises:
            FlawmapError: a setting is fixed by training or not valid, or nothing was kept to calibrate from.
        """
        if self._mover is None:
            raise FlawmapError(
                f"{self.card.method} has no setting that can be moved after training: train again with --set"
            )
        moved = copy(self._mover(settings, calibrate))
        moved.capture_check = self.capture_check
        rate, guarantee, unsure = self.judge.max_false_reject, self.judge.guarantee, self.judge.unsure
        found = moved.judge.calibration
        if found is None:
            moved.judge = Judge(rate, guarantee, unsure=unsure)
        else:
            moved.judge = Judge.of(found, rate, guarantee, unsure=unsure)
        return moved

    def without_capture_check(self) -> Inspector:
        """The same inspector, which judges every capture; `Inspection.refused` still tells which it doubts."""
        other = copy(self)
        other.capture_check = False
        return other

    def heat_scale(self) -> HeatScale | None:
        """What heatmap colours mean; None for methods without a map, or before calibration.

        It comes from good images that were not learnt from, or, where all were, from those: new good images may glow.
        """
        if self.judge.calibration is not None and self.judge.pixel_threshold is not None:
            return HeatScale.from_good(self.judge.calibration.peaks, self.judge.pixel_threshold)
        return None if self.card.heat is None else HeatScale(*self.card.heat, learnt=True)

    def settings(self) -> dict[str, Any]:
        """What made this inspector, as reports show it."""
        threshold = self.judge.threshold
        return {
            "method": self.card.method,
            **({"preset": self.card.training["preset"]} if "preset" in self.card.training else {}),
            "backbone": self.card.backbone,
            "image_size": list(self.card.preparation.image_size),
            "geometry": str(self.card.preparation.geometry),
            "engine": self.card.training["engine"],
            "training_images": self.card.training["images"],
            "seed": self.card.training["seed"],
            "threshold": None if threshold is None else threshold.value,
            "max_false_reject": None if threshold is None else threshold.requested,
            "guarantee": None if threshold is None else threshold.guarantee,
        }

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

        Pillow pictures, and tensors of an array's shape, are arrays too. An image file that cannot be read gets the
        verdict "error". `stream` does the same without holding all results.

        Raises:
            ImageError: an array is not an image, or it is neither an image nor a list of them.
        """
        if isinstance(source, (str, os.PathLike)):
            path = Path(source)
            return list(self.stream(find_images(path))) if path.is_dir() else next(self._inspected([path]))
        if is_several(source):
            return list(self._inspected([as_source(one) for one in source]))
        return next(self._inspected([as_source(source)]))

    def predict_batch(self, arrays: Iterable[NDArray[Any]]) -> list[Inspection]:
        """Inspects arrays (H, W) or (H, W, 3), of any sizes, `BATCH` model inputs at a time.

        Raises:
            ImageError: one of them is not an image.
        """
        if not isinstance(arrays, Iterable):
            raise ImageError(f"got {type(arrays).__name__} as a batch; give a list of arrays")
        return list(self._inspected([as_pixels(array) for array in arrays]))

    def stream(
        self, sources: Iterable[str | Path | NDArray[Any]], *, keep_pixels: bool = False
    ) -> Iterator[Inspection]:
        """Inspects images (files, arrays) one batch after the other, reading ahead, in bounded memory.

        What cannot be read, or is no image, gets the verdict "error". With `keep_pixels` each inspection has the pixels
        that were judged: a file may be another when it is read again.

        Raises:
            ImageError: there is nothing to go through.
        """
        if not is_several(sources):
            raise ImageError(f"got {type(sources).__name__} to stream; give a list of images, as find_images makes one")
        images = (Path(source) if isinstance(source, (str, os.PathLike)) else source for source in sources)
        return self._judged(self._ahead(read_batches(images, self.card.preparation, keep_pixels=keep_pixels)))

    def warm_up(self) -> None:
        """Lets the engine make ready for single images and for full batches, so that the first image does not wait."""
        for count in (1, BATCH):
            self._prepare(count)

    def _inspected(self, images: list[Path | NDArray[Any]]) -> Iterator[Inspection]:
        """In this thread, without reading ahead."""
        batches = pack(images, self.card.preparation)
        return self._judged((self._run(batch), batch.pictures) for batch in batches)

    def _ahead(self, batches: Iterator[Batch]) -> Iterator[tuple[list[_Output], list[Picture]]]:
        """Runs each batch while the caller is still busy with the one before."""
        with ThreadPoolExecutor(1) as pool:
            waiting: tuple[Future[list[_Output]], list[Picture]] | None = None
            for batch in batches:
                before, waiting = waiting, (pool.submit(self._run, batch), batch.pictures)
                if before is not None:
                    yield before[0].result(), before[1]
                if batch.large:  # the next is not read before this one's verdict is out
                    yield waiting[0].result(), waiting[1]
                    waiting = None
                del before, batch
            if waiting is not None:
                yield waiting[0].result(), waiting[1]

    def _run(self, batch: Batch) -> list[_Output]:
        """What came of each model input of a batch."""
        count = len(batch.inputs)
        if count == 0:
            return []
        self._prepare(count)
        start = time.perf_counter()
        inside = None if batch.inside is None else batch.inside.astype(np.float32)
        *maps, scores, embeddings = self.engine(batch.inputs, inside)
        milliseconds = 1000 * (time.perf_counter() - start) / count
        return [
            _Output(maps[0][i, 0] if maps else None, float(scores[i]), embeddings[i], milliseconds)
            for i in range(count)
        ]

    def _prepare(self, count: int) -> None:
        """One run of a batch size that the engine has not seen: what it compiles then is no image's time.

        Raises:
            FlawmapError: this is a fork of the process that made the engine, whose threads are not there: it would wait
                for them for ever.
        """
        if os.getpid() != self._process:
            raise FlawmapError(
                "the model was loaded before this process was forked, and its engine's threads stayed behind: load it "
                "in each process, or start processes by spawn"
            )
        if count in self._warm:
            return
        with self._warming:
            if count not in self._warm:
                preparation = self.card.preparation
                inside = np.ones((count, 1, *preparation.size), np.float32) if preparation.masked else None
                self.engine(np.zeros((count, 3, *preparation.size), preparation.preprocessing.dtype), inside)
                self._warm.add(count)

    def _judged(self, ran: Iterable[tuple[list[_Output], list[Picture]]]) -> Iterator[Inspection]:
        waiting: deque[_Output] = deque()
        maps = WindowMaps()
        for outputs, pictures in ran:
            waiting += outputs
            while pictures:  # let go one by one, with their pixels, before the next is judged
                picture = pictures.pop(0)
                if picture.error is not None:
                    yield Inspection(picture.path, "error", error=str(picture.error))
                else:
                    yield self._judge(picture, [waiting.popleft() for _ in range(picture.windows)], maps)
                del picture
            # The rest belongs to one image, whose next windows are to come.
            waiting = deque(output.without_map(maps) for output in waiting)

    def _judge(self, picture: Picture, outputs: list[_Output], before: WindowMaps) -> Inspection:
        """`before` holds the maps of the first windows, where they came in earlier batches."""
        assert picture.placement is not None
        assert picture.statistics is not None
        start = time.perf_counter()
        outputs = [output.without_map(before) for output in outputs]
        maps = before.take()
        embedding = np.mean([output.embedding for output in outputs], axis=0)
        reason = self.card.captures.reason(picture.statistics, embedding)
        taken = picture.milliseconds + sum(output.milliseconds for output in outputs)
        taken += 1000 * (time.perf_counter() - start)
        scores = [output.score for output in outputs]
        return self.judge.judge(
            picture.path,
            scores,
            maps,
            picture.placement,
            taken,
            reason,
            checked=self.capture_check,
            pixels=picture.pixels,
            digest=picture.digest,
            statistics=picture.statistics,
        )


def read_card(path: Path) -> tuple[ModelCard, dict[str, Any]]:
    """What a model file says of its model, which is not made ready to run.

    Returns:
        The card, and what is known of the file: its `kind`, the `digest` of the model, and `live`, the settings that
        can be moved.

    Raises:
        FlawmapError: as `Inspector.load`.
    """
    read: tuple[ModelCard, dict[str, Any]] = _reader(path).read_card(path)
    return read


def _reader(path: Path) -> Any:
    """The module that reads a model file."""
    check_model_path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise FlawmapError(f"{path} is no model: give a .safetensors file of `flawmap train`, or its .onnx export")
    try:
        return import_module(reader)
    except ModuleNotFoundError as error:
        raise lab_is_missing(
            f"{path} is a model of the lab; `flawmap export` makes an .onnx of it. It", error
        ) from error


@dataclass(frozen=True)
class _Output:
    """What came of one model input."""

    map: NDArray[np.float32] | None  # (h, w)
    score: float
    embedding: NDArray[np.float32]  # (M,)
    milliseconds: float

    def without_map(self, maps: WindowMaps) -> _Output:
        """The same, its map among those of its image."""
        if self.map is None:
            return self
        maps.add(self.map)
        return replace(self, map=None)
