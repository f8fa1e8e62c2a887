"""The pretrained backbone in 8-bit numbers, and what that costs and gains; distances and flows stay float32."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flawmap.detector import Detector
from flawmap.errors import FlawmapError, ImageError
from flawmap.export.proof import model_inputs
from flawmap.imaging.image_files import digest
from flawmap.judging.calibration import Calibration
from flawmap.learning.data import Progress
from flawmap.learning.fitting import SHORT
from flawmap.line import Inspector
from flawmap.line.exported import inspector_of
from flawmap.text import counted
from flawmap.tuning.criterion import Criterion
from flawmap.tuning.scorer import Scorer
from flawmap.tuning.synthetic import FEWEST, synthetic_images

_QUANTISED = ("Conv", "Gemm", "MatMul")
_BACKBONE = re.compile(r"/(backbone|tuned)/network/")
_RANGES = 32  # images by which the range of each activation is found
_SHOWN = 20  # images in which synthetic defects are made
_ROUNDS = 30


@dataclass(frozen=True)
class Quantised:
    """What 8-bit numbers cost and gain here.

    Attributes:
        before, after: how well synthetic defects stand out in float32 and in 8-bit numbers, 0..1.
        milliseconds_before, milliseconds: medians for one image.
        vnni: whether this processor multiplies 8-bit numbers in one instruction; None where it does not say.
        calibrated: good images that calibrate the file.
        engine: what ran both.
    """

    before: float
    after: float
    milliseconds_before: float
    milliseconds: float
    vnni: bool | None
    calibrated: int
    engine: str

    def describe(self) -> str:
        """Some lines."""
        known = {True: "with VNNI", False: "without VNNI", None: "VNNI not known"}[self.vnni]
        images = counted(self.calibrated, "good image that was", "good images that were")
        now, before = f"{self.milliseconds:.1f} ms", f"{self.milliseconds_before:.1f} in float32"
        return (
            f"int8: synthetic defects stand out {self.after:.3f} (float32 {self.before:.3f}); one image takes "
            f"{now} ({before}; {self.engine}, processor {known})\n"
            f"calibrated anew on {images} not learnt from"
        )


def quantise(
    detector: Detector,
    graph: bytes,
    content: Mapping[str, Any],
    images: Sequence[Path],
    max_drop: float,
    progress: Progress,
) -> tuple[bytes, dict[str, Any], Quantised]:
    """The graph with its backbone in 8-bit numbers and the metadata calibrated anew: see `export`.

    Raises:
        FlawmapError: there is no pretrained backbone, too few good images are left, or synthetic defects stand out
            less by more than `max_drop`.
    """
    ranges, unseen = _parted(detector, images)
    preparation = detector.preparation_
    quantised = _quantised(graph, list(model_inputs(ranges, preparation)), preparation.masked)
    progress("quantisation", 1, 1)
    whole, eighth = inspector_of(graph, content), inspector_of(quantised, content)
    calibration = _calibration(eighth, unseen)
    before, after = (_stand_out(one, unseen[:_SHOWN], detector, progress) for one in (whole, eighth))
    if before - after > max_drop:
        raise FlawmapError(
            f"in 8-bit numbers synthetic defects stand out {after:.3f} and not {before:.3f}, a loss of more than "
            f"--max-drop {max_drop:g}: export in float32, or allow more"
        )
    kept = {
        "mode": calibration.mode,
        "scores": calibration.scores.tolist(),
        "peaks": calibration.peaks.tolist(),
    }
    full, short = _timed([whole, eighth])
    found = Quantised(before, after, full, short, _vnni(), len(calibration.scores), eighth.engine.name)
    return quantised, {**content, "calibration": kept}, found


def _parted(detector: Detector, images: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Images by which ranges are found, and those that calibrate, which the detector has not learnt from."""
    if not images:
        raise FlawmapError("--precision int8 needs --check FOLDER: good images that were not learnt from, to calibrate")
    fitted, seen = set(detector.training_["fitted"]), set[str]()
    known, new = list[Path](), list[Path]()
    for path in images:
        try:
            own = digest(path)[:SHORT]
        except ImageError:
            continue
        if own not in seen:
            (known if own in fitted else new).append(path)
        seen.add(own)
    if len(known) < _RANGES:  # what finds the ranges must not calibrate
        spared = new[: min(_RANGES - len(known), len(new) // 4)]
        known, new = known + spared, new[len(spared) :]
    if len(new) < FEWEST or not known:
        found = counted(len(new), "good image that was", "good images that were")
        raise FlawmapError(
            f"--check holds {found} not learnt from: give at least {FEWEST + 2}, since the "
            "8-bit file is calibrated on them"
        )
    return known[:_RANGES], new


def _quantised(graph: bytes, inputs: Sequence[tuple[NDArray[Any], NDArray[np.bool_]]], masked: bool) -> bytes:
    """`inputs` are model inputs (3, h, w), and where they are scored, (h, w), which a `masked` graph is told."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.feeds: Iterator[dict[str, NDArray[Any]]] = (
                {"images": pixels[None], **({"inside": inside[None, None].astype(np.float32)} if masked else {})}
                for pixels, inside in inputs
            )

        def get_next(self) -> dict[str, NDArray[Any]] | None:
            return next(self.feeds, None)

    with tempfile.TemporaryDirectory(prefix="flawmap-", ignore_cleanup_errors=True) as folder:
        plain, prepared, made = (Path(folder, f"{name}.onnx") for name in ("plain", "prepared", "made"))
        plain.write_bytes(graph)
        quant_pre_process(str(plain), str(prepared), skip_symbolic_shape=True)
        nodes = [
            node.name
            for node in onnx.load(prepared).graph.node
            if node.op_type in _QUANTISED and _BACKBONE.search(node.name)
        ]
        if not nodes:
            raise FlawmapError("--precision int8 quantises a pretrained backbone, and this method has none: use fp32")
        quantize_static(
            str(prepared),
            str(made),
            Reader(),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            # Without VNNI two products of 8-bit numbers can overflow the 16 bits that they are added in.
            reduce_range=not _vnni(),
            nodes_to_quantize=nodes,
        )
        model = onnx.load(made)
        used = {node.domain for node in model.graph.node}
        opsets = [entry for entry in model.opset_import if entry.domain in used]  # the quantiser names many more
        del model.opset_import[:]
        model.opset_import.extend(opsets)
        whole: bytes = model.SerializeToString()
        return whole


def _calibration(inspector: Inspector, images: Sequence[Path]) -> Calibration:
    scores, peaks = [], []
    for inspection in inspector.stream(images):
        if inspection.score is not None:
            scores.append(inspection.score)
            peaks += [] if inspection.maps is None else [float(inspection.maps.max())]
    if not scores:
        raise FlawmapError("none of the --check images can be judged: give good images of this part")
    return Calibration(np.array(scores, np.float32), np.array(peaks, np.float32), "folder")


def _stand_out(inspector: Inspector, images: Sequence[Path], detector: Detector, progress: Progress) -> float:
    """The tuning criterion: how well synthetic defects stand out, 0..1."""

    scorer, criterion = Scorer(inspector), Criterion(inspector.card.localises)
    preparation = inspector.card.preparation
    for batch in scorer.scored(synthetic_images(images, preparation, 0, detector.method_.trained_on)):
        criterion.update(batch, scorer.labels)
        progress("synthetic defects", len(scorer.labels), len(images) * 5)
    values, seen = criterion.values(scorer.labels)
    defective = np.array(scorer.labels) & seen
    if not defective.any():
        raise FlawmapError("no synthetic defect can be seen where images are scored: draw a larger region")
    return float(values[defective].mean())


def _timed(inspectors: Sequence[Inspector]) -> list[float]:
    """Median milliseconds of one model input by each, in turns."""
    preparation = inspectors[0].card.preparation
    images = np.zeros((1, 3, *preparation.size), preparation.preprocessing.dtype)
    inside = np.ones((1, 1, *preparation.size), np.float32) if preparation.masked else None
    times: list[list[float]] = [[] for _ in inspectors]
    for _ in range(_ROUNDS):
        for inspector, own in zip(inspectors, times, strict=True):
            start = time.perf_counter()
            inspector.engine(images, inside)
            own.append(1000 * (time.perf_counter() - start))
    return [float(np.median(own[_ROUNDS // 5 :])) for own in times]


def _vnni() -> bool | None:
    """Whether the processor says that it has VNNI; None where it says nothing (not on Linux, not x86)."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return None
    return bool(re.search(r"\bavx(512)?_vnni\b", flags)) if "flags" in flags else None
