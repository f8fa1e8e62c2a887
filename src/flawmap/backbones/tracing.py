"""From a network in torch to an engine: traced to ONNX for those that run graphs, or run by torch itself."""

from __future__ import annotations

import io
import logging
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flawmap.errors import FlawmapError
from flawmap.line.engines import Engine, GraphEngine, available_engines, check_engine, compile_graph

# Constants are copied several times on their way into an engine; from this many bytes on, a buffer is an input.
_LARGE = 32 << 20
# Tracing puts arguments in the place of a module's buffers for a while.
_TRACING = threading.Lock()
log = logging.getLogger(__name__)


def create_engine(
    network: nn.Module,
    size: tuple[int, int],
    engine: str = "auto",
    *,
    device: str = "cpu",
    threads: int | None = None,
    masked: bool = False,
    given: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
) -> Engine:
    """An engine that runs `network` on images (B, 3, H, W) of `size` (height, width) and `dtype`, any B.

    The buffers named by `given` can be exchanged later, see `moved`.

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
        graph, outputs = to_onnx(network, size, inputs, masked=masked, dtype=dtype)
    except Exception as error:  # the exporter raises whatever the operator it cannot express raises
        if engine != "auto":
            raise FlawmapError(f"engine {engine} cannot run this backbone ({error}): use --engine torch") from error
        log.warning("the backbone cannot be exported to ONNX (%s): it runs in torch, which is slower", error)
        return TorchEngine(network, device, masked)
    return compile_graph(graph, chosen, outputs=outputs, given=_values(network, inputs), threads=threads)


def moved(engine: Engine, network: nn.Module, given: Sequence[str]) -> Engine:
    """The engine of `create_engine` with the buffers `given` to it as they are in `network`, otherwise the same."""
    if isinstance(engine, TorchEngine):
        return TorchEngine(network, engine.device, engine.masked)
    graph: GraphEngine = engine  # type: ignore[assignment]
    return graph.moved(_values(network, given))


def _values(network: nn.Module, names: Iterable[str]) -> dict[str, NDArray[Any]]:
    buffers = dict(network.named_buffers())
    return {name: buffers[name].contiguous().numpy() for name in names}


def to_onnx(
    network: nn.Module,
    size: tuple[int, int],
    given: Mapping[str, Tensor] | None = None,
    *,
    masked: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[bytes, list[str]]:
    """The network as an ONNX model, constants folded, and the names of its outputs.

    Its input is `images` (B, 3, H, W) of `dtype` with any B; `masked` adds `inside` (B, 1, H, W) float32. The buffers
    `given` become inputs of their names instead of constants. Outputs are named by `network.outputs`, where it says so.
    """
    images = torch.zeros(1, 3, *size, dtype=dtype)
    inputs = {"images": images, **({"inside": torch.ones(1, 1, *size)} if masked else {})}
    given = given or {}
    with _TRACING, torch.no_grad():
        count = len(network(*inputs.values()))
        names = list(getattr(network, "outputs", [f"map{i}" for i in range(count)]))
        return trace(_Given(network, list(given), len(inputs)), {**inputs, **given}, names, [*inputs, *names]), names


def trace(network: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str], batched: Sequence[str]) -> bytes:
    """A network as an ONNX model; those of its inputs and outputs that are `batched` may have any length."""
    file = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        # The tracing exporter: the newer one needs a further package and ten times as long for the same graph.
        torch.onnx.export(
            network.eval(),  # the exporter leaves every part in the mode of the whole
            tuple(inputs.values()),
            file,  # type: ignore[arg-type]  # the tracing exporter takes a file object as well
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes={name: {0: "B"} for name in batched},
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


class TorchEngine:
    """The reference, the fallback, and the one that runs on a GPU."""

    name = "torch"

    def __init__(self, network: nn.Module, device: str, masked: bool = False) -> None:
        self.network = network.to(device)
        self.device = device
        self.masked = masked

    def __call__(self, images: NDArray[Any], inside: NDArray[np.float32] | None = None) -> list[NDArray[np.float32]]:
        arrays = [images] if inside is None or not self.masked else [images, inside]
        with torch.inference_mode():
            inputs = [torch.from_numpy(array).to(self.device) for array in arrays]
            return [output.cpu().numpy() for output in self.network(*inputs)]
