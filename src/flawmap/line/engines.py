"""Runs an ONNX graph: OpenVINO or onnxruntime, in float32, chosen in that fixed order and never by timing.

An engine may be called from several threads at once: nothing of one call is kept where another can reach it.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flawmap.errors import FlawmapError
from flawmap.line.pruning import pruned

ENGINES = ("openvino", "onnxruntime", "torch")

Arrays = Mapping[str, NDArray[Any]]


class Engine(Protocol):
    """images (B, 3, H, W) -> a network's outputs, in order. Of any B; safe to call from several threads at once.

    A network that is told where its inputs are scored takes `inside`, (B, 1, H, W) float32 of 0 and 1, as well; the
    others do not look at it.
    """

    name: str

    def __call__(
        self, images: NDArray[Any], inside: NDArray[np.float32] | None = None
    ) -> list[NDArray[np.float32]]: ...


class GraphEngine(Engine, Protocol):
    """An engine that runs an ONNX graph, some of whose inputs have values of their own until others are given."""

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> list[NDArray[np.float32]]:
        """Some outputs of the graph, and only what they need is computed."""
        ...

    def moved(self, given: Arrays) -> GraphEngine:
        """The same graph with other values of some of its inputs from now on."""
        ...


def available_engines() -> list[str]:
    """The engines installed here, in the order in which `auto` takes them."""
    return [name for name in ENGINES if importlib.util.find_spec(name) is not None]


def check_engine(engine: str) -> None:
    """Raises FlawmapError for an engine that is unknown or not installed."""
    if engine not in ("auto", *ENGINES):
        raise FlawmapError(f"unknown engine {engine}: choose auto, {', '.join(ENGINES)}")
    if engine not in ("auto", *available_engines()):
        extra = "train" if engine == "torch" else engine
        raise FlawmapError(f"engine {engine} is not installed: pip install 'flawmap[{extra}]', or use --engine auto")


def check_graph_engine(engine: str) -> None:
    """`check_engine` for what an ONNX graph is to be run by."""
    check_engine(engine)
    if engine == "torch":
        raise FlawmapError("engine torch does not run exported files: use --engine auto, or the .safetensors model")


def cpu_threads() -> int:
    """Threads an engine uses: the cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compile_graph(
    graph: bytes,
    engine: str = "auto",
    *,
    outputs: Sequence[str],
    given: Arrays | None = None,
    threads: int | None = None,
) -> GraphEngine:
    """An engine for an ONNX model.

    Args:
        graph: the model. Its inputs are `images`, perhaps `inside`, those of `given`, and any that have a default.
        engine: "auto", "openvino" or "onnxruntime".
        outputs: names of those that a call returns.
        given: inputs that are the same in every call.
        threads: how many each call may use; all cores by default.

    Raises:
        FlawmapError: an unknown engine, or one that is not installed or cannot run this graph.
    """
    check_graph_engine(engine)
    chosen = available_engines()[0] if engine == "auto" else engine
    made = OpenVinoEngine if chosen == "openvino" else OnnxEngine
    return made(graph, outputs, given or {}, threads or cpu_threads())


class OnnxEngine:
    """A graph in onnxruntime, made ready once for each choice of outputs."""

    name = "onnxruntime"

    def __init__(self, graph: bytes, outputs: Sequence[str], given: Arrays, threads: int) -> None:
        self._graph, self._threads = graph, threads
        self._sessions: dict[tuple[str, ...], tuple[Any, set[str]]] = {}
        self._lock = threading.Lock()
        self.outputs = list(outputs)
        self.given = dict(given)
        self._for(self.outputs)

    def __call__(self, images: NDArray[Any], inside: NDArray[np.float32] | None = None) -> list[NDArray[np.float32]]:
        inputs = {"images": images, **({} if inside is None else {"inside": inside})}
        return self.run(inputs, self.outputs)

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> list[NDArray[np.float32]]:
        session, names = self._for(outputs)
        shown = {name: value for name, value in {**self.given, **inputs}.items() if name in names}
        found: list[NDArray[np.float32]] = session.run(outputs, shown)
        return found

    def moved(self, given: Arrays) -> OnnxEngine:
        other = copy(self)
        other.given = {**self.given, **given}
        return other

    def _for(self, outputs: Sequence[str]) -> tuple[Any, set[str]]:
        """A session, and the names of what it takes."""
        key = tuple(outputs)
        with self._lock:
            if key not in self._sessions:
                self._sessions[key] = self._session(key)
            return self._sessions[key]

    def _session(self, outputs: Sequence[str]) -> tuple[Any, set[str]]:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3
        graph = pruned(self._graph, outputs)
        session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        entries = [*session.get_inputs(), *session.get_overridable_initializers()]
        return session, {entry.name for entry in entries}


class OpenVinoEngine:
    """A graph in OpenVINO, compiled once for each choice of outputs and of inputs that have a default.

    What has a default is a constant until it is given, which is faster.
    """

    name = "openvino"

    def __init__(self, graph: bytes, outputs: Sequence[str], given: Arrays, threads: int) -> None:
        self._graph, self._threads = graph, threads
        self._compiled: dict[tuple[tuple[str, ...], tuple[str, ...]], _Compiled] = {}
        self._lock = threading.Lock()
        self.outputs = list(outputs)
        self.given = dict(given)
        self._for(self.outputs, self.given)

    def __call__(self, images: NDArray[Any], inside: NDArray[np.float32] | None = None) -> list[NDArray[np.float32]]:
        inputs = {"images": images, **self.given}
        if inside is not None:
            inputs["inside"] = inside
        return self._for(self.outputs, self.given)(inputs)

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> list[NDArray[np.float32]]:
        inputs = {**self.given, **inputs}
        return self._for(outputs, inputs)(inputs)

    def moved(self, given: Arrays) -> OpenVinoEngine:
        other = copy(self)
        other.given = {**self.given, **given}
        return other

    def _for(self, outputs: Sequence[str], given: Arrays) -> _Compiled:
        key = tuple(outputs), tuple(sorted(given))
        with self._lock:
            if key not in self._compiled:
                self._compiled[key] = _Compiled(self._graph, *key, self._threads)
            return self._compiled[key]


class _Compiled:
    """Some outputs of a graph; each call takes an infer request of its own, as many as there are calls at once."""

    def __init__(self, graph: bytes, outputs: Sequence[str], given: Sequence[str], threads: int) -> None:
        import openvino as ov

        core = ov.Core()
        model = core.read_model(graph, b"")
        # OpenVINO takes an input that has a default for a constant.
        defaults = {op.get_friendly_name(): op for op in model.get_ops() if op.get_type_name() == "Constant"}
        for name in given:
            if name in defaults:
                constant = defaults[name].output(0)
                parameter = ov.opset13.parameter(constant.get_shape(), constant.get_element_type(), name=name)
                parameter.output(0).get_tensor().set_names({name})
                for target in constant.get_target_inputs():
                    target.replace_source_output(parameter.output(0))
        results = [model.output(name).get_node() for name in outputs]
        part = ov.Model(results, _parameters(results))
        self._names = {name for parameter in part.inputs for name in parameter.get_names()}
        # By default OpenVINO takes bfloat16 on processors that have it, which moves the scores.
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        self._model = core.compile_model(part, "CPU", settings)
        self._idle: deque[Any] = deque()

    def __call__(self, inputs: Arrays) -> list[NDArray[np.float32]]:
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._model.create_infer_request()
        try:
            request.infer({name: value for name, value in inputs.items() if name in self._names}, share_inputs=True)
            return [np.array(output.data) for output in request.output_tensors]
        finally:
            self._idle.append(request)


def _parameters(results: Sequence[Any]) -> list[Any]:
    """The parameters from which nodes of an OpenVINO graph are computed."""
    seen, waiting, found = set(), list(results), []
    while waiting:
        node = waiting.pop()
        if (name := node.get_friendly_name()) not in seen:
            seen.add(name)
            found += [node] if node.get_type_name() == "Parameter" else []
            waiting += [entry.get_source_output().get_node() for entry in node.inputs()]
    return found
