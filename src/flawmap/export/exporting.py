"""From a fitted detector to a file, and back through the reader of the line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from flawmap.backbones.tracing import to_onnx, trace
from flawmap.detector import Detector
from flawmap.errors import FlawmapError
from flawmap.export.live_graph import LiveGraph, live_description, with_defaults
from flawmap.export.proof import Proof, prove
from flawmap.export.quantisation import Quantised, quantise
from flawmap.files import replacing
from flawmap.imaging.image_files import find_images
from flawmap.learning.data import Progress, quiet
from flawmap.line.exported import LIMIT, arrays_to_json, read_exported, with_metadata

_OVERHEAD = 32 << 20  # of a graph beside its tensors, generously


@dataclass(frozen=True)
class Exported:
    """What became of a detector.

    Attributes:
        path: the file.
        proofs: how far it is from the detector in torch, by each engine that is installed.
        quantised: what 8-bit numbers cost and gain; None for float32.
    """

    path: Path
    proofs: list[Proof]
    quantised: Quantised | None


def export(
    detector: Detector,
    path: str | Path,
    *,
    precision: Literal["fp32", "int8"] = "fp32",
    check: str | Path | None = None,
    max_drop: float = 0.01,
    progress: Progress = quiet,
) -> Exported:
    """Writes a detector as one ONNX file, after holding what it says against the detector in torch.

    The graph takes `images` (B, 3, h, w) uint8, or float32 from 0 to 1 for a model of 16-bit images, at the model's
    input size and any B; `inside` (B, 1, h, w) float32 of 0 and 1 where parts of it are not scored; and the live
    settings, which have their trained values until others are given. It gives `map` (B, 1, h, w), `score` (B,) and
    `embedding` (B, M). Its metadata holds all that `Inspector.load` needs; equal models give equal bytes.

    Args:
        detector: a fitted one.
        path: where to, ending in .onnx.
        precision: "int8" computes the pretrained backbone in 8-bit numbers; all else stays float32.
        check: a folder of images to prove the file on; drawn ones by default. For "int8" good images that the detector
            has not learnt from, by which it is quantised and calibrated anew.
        max_drop: how much worse synthetic defects may stand out in 8-bit numbers, see `flawmap.tuning.criterion`.
        progress: is told how it goes.

    Raises:
        FlawmapError: it cannot be exported, is too large for one file, would say something else than the detector, or
            loses too much in 8-bit numbers.
    """
    path = Path(path)
    if path.suffix.lower() != ".onnx":
        raise FlawmapError(f"-o {path}: the name of an exported file ends in .onnx")
    images = [] if check is None else find_images(Path(check))
    if check is not None and not images:
        raise FlawmapError(f"--check {check} holds no images: give a folder of good images")
    detector.calibrate()
    graph, live = _traced(detector, movable=precision == "fp32")  # latents are those of the float32 backbone
    content = {
        **detector.card().to_json(),
        "arrays": arrays_to_json(detector.preparation_.arrays()),
        "model": detector.digest_,
        "precision": precision,
        "live": live,
    }
    quantised = None
    if precision == "int8":
        graph, content, quantised = quantise(detector, graph, content, images, max_drop, progress)
    whole = with_metadata(graph, content)
    if len(whole) > LIMIT:
        raise _too_large(len(whole))
    with replacing(path) as file:
        file.write(whole)
        file.flush()
        proofs = [] if quantised else prove(detector, *read_exported(Path(file.name)), images, progress)
    return Exported(path, proofs, quantised)


def _traced(detector: Detector, *, movable: bool) -> tuple[bytes, dict[str, Any] | None]:
    """The graph, and what the line has to know of its live settings, if they are to be moved."""
    network, masked = detector.graph(), detector.preparation_.masked
    size, deep = detector.preparation_.size, detector.preparation_.preprocessing.deep
    dtype = torch.float32 if deep else torch.uint8
    latents = detector.latents_
    held = [*network.parameters(), *network.buffers(), *([] if latents is None else [latents.values])]
    if (count := sum(tensor.nbytes for tensor in held) + _OVERHEAD) > LIMIT:
        raise _too_large(count)
    if not (movable and detector.method_.live):
        return to_onnx(network, size, masked=masked, dtype=dtype)[0], None
    wrapped = LiveGraph(network, latents, masked)
    images = torch.zeros(1, 3, *size, dtype=dtype)
    inputs = {"images": images, **({"inside": torch.ones(1, 1, *size)} if masked else {}), **wrapped.defaults}
    batched = [name for name in ("images", "inside") if name in inputs] + list(wrapped.outputs)
    graph = trace(wrapped, inputs, [*wrapped.outputs, *wrapped.further], batched)
    defaults = {name: value.cpu().numpy() for name, value in wrapped.defaults.items()}
    return with_defaults(graph, defaults), live_description(wrapped, latents)


def _too_large(count: int) -> FlawmapError:
    return FlawmapError(
        f"the model would take {count / 1e9:.1f} GB, and one ONNX file holds at most 2.1: choose a smaller backbone, "
        "bank (--set max_vectors) or image size, or inspect with the .safetensors model"
    )
