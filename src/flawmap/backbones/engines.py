"""Runs a frozen network: OpenVINO, onnxruntime or torch, in float32, chosen in that fixed order and never by timing."""

from __future__ import annotations

import importlib.util
import io
import logging
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flawmap.errors import FlawmapError

ENGINES = ("openvino", "onnxruntime", "torch")
# Constants are copied several times on their way into an engine; from this many bytes on, a buffer is an input.
_LARGE = 32 << 20
log = logging.getLogger(__name__)


class Engine(Protocol):
    """images (B, 3, H, W) float32 -> the network's outputs, float32, in order.

    A network made with `masked` also takes where the images are scored, (B, 1, H, W) float32 of 0 and 1; the others do
    not look at it.
    """

    name: str

    def __call__(
        self, images: NDArray[np.float32], inside: NDArray[np.float32] | None = None
    ) -> list[NDArray[np.float32]]: ...

    def moved(self, network: nn.Module) -> Engine:
        """The same graph with the buffers `given` to it as they are in `network`, which is otherwise the same."""
        ...


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
    network: nn.Module,
    size: tuple[int, int],
    engine: str = "auto",
    *,
    device: str = "cpu",
    threads: int | None = None,
    masked: bool = False,
    given: Sequence[str] = (),
) -> Engine:
    """An engine that runs `network` on images of `size` (height, width), any batch size.

    The buffers named by `given` can be exchanged later, see `Engine.moved`.

    `auto` takes torch on a GPU and the first of `ENGINES` that is installed on a CPU. A network that cannot be turned
    into ONNX runs in torch, which is logged.

    Raises:
        FlawmapError: an unknown engine, or one that is not installed or cannot run this network.
    """
    check_engine(engine)
    chosen = ("torch" if device != "cpu" else available_engines()[0]) if engine == "auto" else engine
    if chosen == "torch":
        return TorchEngine(network, device, masked)
    inputs = {name: tensor for name, tensor in network.named_buffers() if tensor.nbytes >= _LARGE or name in given}
    try:
        graph = to_onnx(network, size, inputs, masked=masked)
    except Exception as error:  # the exporter raises whatever the operator it cannot express raises
        if engine != "auto":
            raise FlawmapError(f"engine {engine} cannot run this backbone ({error}): use --engine torch") from error
        log.warning("the backbone cannot be exported to ONNX (%s): it runs in torch, which is slower", error)
        return TorchEngine(network, device, masked)
    values = _values(network, inputs)
    return (OpenVinoEngine if chosen == "openvino" else OnnxEngine)(graph, values, threads or cpu_threads(), masked)


def _values(network: nn.Module, names: Iterable[str]) -> dict[str, NDArray[Any]]:
    buffers = dict(network.named_buffers())
    return {name: buffers[name].contiguous().numpy() for name in names}


def cpu_threads() -> int:
    """Threads an engine uses: the cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def to_onnx(
    network: nn.Module, size: tuple[int, int], given: Mapping[str, Tensor] | None = None, *, masked: bool = False
) -> bytes:
    """The network as an ONNX model: input `images` (B, 3, H, W) with any B, constants folded.

    `masked` adds an input `inside` (B, 1, H, W). The buffers `given` become inputs of their names instead of constants.
    """
    inputs = {"images": torch.zeros(1, 3, *size), **({"inside": torch.ones(1, 1, *size)} if masked else {})}
    names = [f"map{i}" for i in range(len(network(*inputs.values())))]
    given = given or {}
    # The exporter leaves every part in the mode of the whole.
    module = _Given(network, list(given), len(inputs)).eval()
    file = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        # The tracing exporter: the newer one needs a further package and ten times as long for the same graph.
        torch.onnx.export(
            module,
            (*inputs.values(), *given.values()),
            file,  # type: ignore[arg-type]  # the tracing exporter takes a file object as well
            input_names=[*inputs, *given],
            output_names=names,
            dynamic_axes={name: {0: "B"} for name in (*inputs, *names)},
            dynamo=False,
        )
    return file.getvalue()


class _Given(nn.Module):
    """A network some of whose buffers are arguments, after its own `inputs` arguments."""

    def __init__(self, network: nn.Module, names: Sequence[str], inputs: int) -> None:
        super().__init__()
        self.network = network
        self.inputs = inputs
        self.owners = [(network.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]

    def forward(self, *arguments: Tensor) -> Any:
        own = [getattr(owner, key) for owner, key in self.owners]
        try:
            for (owner, key), tensor in zip(self.owners, arguments[self.inputs :], strict=True):
                setattr(owner, key, tensor)
            return self.network(*arguments[: self.inputs])
        finally:
            for (owner, key), tensor in zip(self.owners, own, strict=True):
                setattr(owner, key, tensor)


def _named(
    images: NDArray[np.float32], inside: NDArray[np.float32] | None, masked: bool
) -> dict[str, NDArray[np.float32]]:
    return {"images": images, "inside": inside} if masked and inside is not None else {"images": images}


class TorchEngine:
    """The reference, the fallback, and the one that runs on a GPU."""

    name = "torch"

    def __init__(self, network: nn.Module, device: str, masked: bool = False) -> None:
        self.network = network.to(device)
        self.device = device
        self.masked = masked

    def __call__(
        self, images: NDArray[np.float32], inside: NDArray[np.float32] | None = None
    ) -> list[NDArray[np.float32]]:
        with torch.inference_mode():
            inputs = [torch.from_numpy(value).to(self.device) for value in _named(images, inside, self.masked).values()]
            return [output.cpu().numpy() for output in self.network(*inputs)]

    def moved(self, network: nn.Module) -> Engine:
        return TorchEngine(network, self.device, self.masked)


class OnnxEngine:
    name = "onnxruntime"

    def __init__(self, graph: bytes, given: dict[str, NDArray[Any]], threads: int, masked: bool) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self.session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self.given = given
        self.masked = masked

    def __call__(
        self, images: NDArray[np.float32], inside: NDArray[np.float32] | None = None
    ) -> list[NDArray[np.float32]]:
        inputs = {**_named(images, inside, self.masked), **self.given}
        outputs: list[NDArray[np.float32]] = self.session.run(None, inputs)
        return outputs

    def moved(self, network: nn.Module) -> Engine:
        other = copy(self)
        other.given = _values(network, self.given)
        return other


class OpenVinoEngine:
    name = "openvino"

    def __init__(self, graph: bytes, given: dict[str, NDArray[Any]], threads: int, masked: bool) -> None:
        import openvino as ov

        core = ov.Core()
        # By default OpenVINO takes bfloat16 on processors that have it, which moves the scores.
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        self.model = core.compile_model(core.read_model(graph, b""), "CPU", settings)
        self.given = given
        self.masked = masked

    def __call__(
        self, images: NDArray[np.float32], inside: NDArray[np.float32] | None = None
    ) -> list[NDArray[np.float32]]:
        result = self.model({**_named(images, inside, self.masked), **self.given}, share_inputs=True)
        return [np.array(result[output]) for output in self.model.outputs]

    def moved(self, network: nn.Module) -> Engine:
        other = copy(self)
        other.given = _values(network, self.given)
        return other
