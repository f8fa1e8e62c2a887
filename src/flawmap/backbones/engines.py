"""Runs a frozen network: OpenVINO, onnxruntime or torch, in float32, chosen in that fixed order and never by timing."""

from __future__ import annotations

import importlib.util
import io
import logging
import os
import warnings
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from flawmap.errors import FlawmapError

ENGINES = ("openvino", "onnxruntime", "torch")
log = logging.getLogger(__name__)


class Engine(Protocol):
    """images (B, 3, H, W) float32 -> the network's outputs, float32, in order."""

    name: str

    def __call__(self, images: NDArray[np.float32]) -> list[NDArray[np.float32]]: ...


def available_engines() -> list[str]:
    """The engines installed here, in the order in which `auto` takes them."""
    return [name for name in ENGINES if importlib.util.find_spec(name) is not None]


def check_engine(engine: str) -> None:
    """Raises FlawmapError for an engine that is unknown or not installed."""
    if engine not in ("auto", *ENGINES):
        raise FlawmapError(f"unknown engine {engine}: choose auto, {', '.join(ENGINES)}")
    if engine not in ("auto", *available_engines()):
        raise FlawmapError(f"engine {engine} is not installed: pip install flawmap[{engine}], or use --engine auto")


def create_engine(
    network: nn.Module, size: tuple[int, int], engine: str = "auto", *, device: str = "cpu", threads: int | None = None
) -> Engine:
    """An engine that runs `network` on images of `size` (height, width), any batch size.

    `auto` takes torch on a GPU and the first of `ENGINES` that is installed on a CPU. A network that cannot be turned
    into ONNX runs in torch, which is logged.

    Raises:
        FlawmapError: an unknown engine, or one that is not installed or cannot run this network.
    """
    check_engine(engine)
    chosen = ("torch" if device != "cpu" else available_engines()[0]) if engine == "auto" else engine
    if chosen == "torch":
        return TorchEngine(network, device)
    try:
        graph = to_onnx(network, size)
    except Exception as error:  # the exporter raises whatever the operator it cannot express raises
        if engine != "auto":
            raise FlawmapError(f"engine {engine} cannot run this backbone ({error}): use --engine torch") from error
        log.warning("the backbone cannot be exported to ONNX (%s): it runs in torch, which is slower", error)
        return TorchEngine(network, device)
    return (OpenVinoEngine if chosen == "openvino" else OnnxEngine)(graph, threads or cpu_threads())


def cpu_threads() -> int:
    """Threads an engine uses: the cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def to_onnx(network: nn.Module, size: tuple[int, int]) -> bytes:
    """The network as an ONNX model: input `images` (B, 3, H, W) with any B, constants folded."""
    example = torch.zeros(1, 3, *size)
    outputs = len(network(example))
    file = io.BytesIO()
    names = [f"map{i}" for i in range(outputs)]
    dynamic = {"images": {0: "B"}} | {name: {0: "B"} for name in names}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        # The tracing exporter: the newer one needs a further package and ten times as long for the same graph.
        torch.onnx.export(
            network,
            (example,),
            file,  # type: ignore[arg-type]  # the tracing exporter takes a file object as well
            input_names=["images"],
            output_names=names,
            dynamic_axes=dynamic,
            dynamo=False,
        )
    return file.getvalue()


class TorchEngine:
    """The reference, the fallback, and the one that runs on a GPU."""

    name = "torch"

    def __init__(self, network: nn.Module, device: str) -> None:
        self.network = network.to(device)
        self.device = device

    def __call__(self, images: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        with torch.inference_mode():
            return [output.cpu().numpy() for output in self.network(torch.from_numpy(images).to(self.device))]


class OnnxEngine:
    name = "onnxruntime"

    def __init__(self, graph: bytes, threads: int) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self.session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def __call__(self, images: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        outputs: list[NDArray[np.float32]] = self.session.run(None, {"images": images})
        return outputs


class OpenVinoEngine:
    name = "openvino"

    def __init__(self, graph: bytes, threads: int) -> None:
        import openvino as ov

        core = ov.Core()
        # By default OpenVINO takes bfloat16 on processors that have it, which moves the scores.
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        self.model = core.compile_model(core.read_model(graph, b""), "CPU", settings)

    def __call__(self, images: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        result = self.model(images)
        return [np.array(result[output]) for output in self.model.outputs]
