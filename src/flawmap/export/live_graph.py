"""A method with settings that can still be moved, as one graph in which they are inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flawmap.graph import InspectionGraph
from flawmap.imaging.reading import BATCH
from flawmap.learning.latents import Latents


class LiveGraph(nn.Module):
    """An `InspectionGraph` whose method's live settings, and what takes long to make of them, are inputs.

    Further outputs are what belongs to the settings given: the buffers that take long to make, named `moved_...`, and
    scores and map maxima of `BATCH` of the good images' latents, those of the input `rows`.

    Attributes:
        defaults: the inputs by name, as trained.
        outputs, further: names of the outputs of an inspection, and of the others.
    """

    def __init__(self, graph: InspectionGraph, latents: Latents | None, masked: bool) -> None:
        super().__init__()
        self.graph = graph
        self.method = method = graph.method
        self.masked = masked
        self.live = method.live
        self.costly = method.costly_buffers
        settings = {method.symbols.get(name, name): float(getattr(method.config, name)) for name in self.live}
        self.defaults: dict[str, Tensor] = {name: torch.tensor(value) for name, value in settings.items()}
        self.defaults |= {name: method.get_buffer(name) for name in self.costly}
        self.outputs = graph.outputs
        self.further = tuple(f"moved_{name}" for name in self.costly)
        self.values: Tensor | None = None
        if latents is not None:
            self.register_buffer("kept_values", latents.values)
            self.values = latents.values
            if latents.inside is not None:
                self.register_buffer("kept_inside", latents.inside)
            self.defaults["rows"] = torch.arange(BATCH).remainder(len(latents.values))
            self.further = (*self.further, "good_scores", "good_peaks")

    def forward(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        """images, where `masked` inside, then the inputs of `defaults` -> `outputs` and `further`."""
        method = self.method
        shown = arguments[: 2 if self.masked else 1]
        given = dict(zip(self.defaults, arguments[len(shown) :], strict=True))
        settings = {name: given[method.symbols.get(name, name)] for name in self.live}
        state = method.live_state(settings)
        own = {name: method._buffers[name] for name in state}
        try:
            for name, value in state.items():
                method._buffers[name] = given.get(name, value)
            found = [*self.graph(*shown), *(state[name] for name in self.costly)]
            if self.values is not None:
                found += self._good(given["rows"])
        finally:
            method._buffers.update(own)
        return tuple(found)

    def _good(self, rows: Tensor) -> list[Tensor]:
        """Scores (R,) and map maxima (R,) of some of the latents."""
        method = self.method
        inside = self.get_buffer("kept_inside")[rows].float() if "kept_inside" in self._buffers else None
        anomaly_map, scores = method.score_latents(self.get_buffer("kept_values")[rows].float(), inside)
        return [scores, method.enlarge(anomaly_map, inside).amax((1, 2, 3))]


def live_description(graph: LiveGraph, latents: Latents | None) -> dict[str, Any]:
    """What the line has to know to move the settings: inputs, values, bounds, and which rows are one image."""
    method = graph.method
    fields = type(method.config).model_fields
    settings = {}
    for name in method.live:
        bounds: dict[str, float | None] = {"low": None, "high": None}
        for rule in fields[name].metadata:
            bounds["low"] = getattr(rule, "ge", bounds["low"])
            bounds["high"] = getattr(rule, "le", bounds["high"])
        settings[name] = {
            "input": method.symbols.get(name, name),
            "value": float(getattr(method.config, name)),
            **bounds,
        }
    return {
        "settings": settings,
        "buffers": list(method.costly_buffers),
        "images": None if latents is None else _numbered(latents.digests),
    }


def _numbered(digests: Sequence[str]) -> list[int]:
    numbers: dict[str, int] = {}
    return [numbers.setdefault(digest, len(numbers)) for digest in digests]


def with_defaults(model: bytes, defaults: dict[str, NDArray[np.generic]]) -> bytes:
    """An ONNX model whose inputs named by `defaults` have these values until others are given."""
    import onnx
    from onnx import numpy_helper

    parsed = onnx.load_from_string(model)
    parsed.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in defaults.items())
    serialised: bytes = parsed.SerializeToString()
    return serialised
