"""An exported model: one ONNX file whose metadata says all that inspection needs. Needs no onnx package.

An ONNX file is a protobuf message. Its metadata is one field of it, which stands last here: what lies before is the
graph, over which, and over the metadata, goes a digest.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flawmap.errors import FlawmapError, shortage
from flawmap.files import open_regular
from flawmap.line.engines import check_graph_engine, compile_graph
from flawmap.line.graph_check import HostileGraphError, check_graph
from flawmap.line.inspector import Inspector
from flawmap.line.model_card import ModelCard
from flawmap.line.moving import Mover
from flawmap.line.protobuf import field, fields

FORMAT = 1
LIMIT = 2**31 - 1
"""Bytes that a protobuf message, and so an ONNX file, may have."""

_KEY = "flawmap"
_GRAPH, _METADATA = 7, 14  # field numbers of ModelProto
_MOST_ARRAY, _MOST_ARRAYS = 64 << 20, 8  # bytes of one, and how many


def with_metadata(graph: bytes, content: Mapping[str, Any]) -> bytes:
    """An ONNX model with `content`, JSON without times, durations or paths. Equal arguments give equal bytes."""
    content = {**content, "format": FORMAT}
    content["digest"] = _digest(graph, content)
    entry = field(1, _KEY.encode()) + field(2, _canonical(content).encode())
    return graph + field(_METADATA, entry)


def read_exported(path: Path) -> tuple[bytes, dict[str, Any]]:
    """The model and its metadata, checked against its digest.

    Raises:
        FlawmapError: the file is missing, is no exported flawmap model, was cut off or edited, is of a newer format,
            or holds operators of others or data outside itself.
    """
    if not path.exists():
        raise FlawmapError(f"model file {path} does not exist: make one with `flawmap export MODEL -o {path}`")
    try:
        with open_regular(path) as file:
            whole = file.read(LIMIT + 1)
    except OSError as error:
        raise FlawmapError(f"model file {path} cannot be read ({error.strerror}): check the disk") from error
    if len(whole) > LIMIT:
        raise FlawmapError(f"{path} is larger than an ONNX file can be: export it again")
    try:
        found = list(fields(whole))
        graphs = [value for number, value, _ in found if number == _GRAPH]
        if len(graphs) != 1:
            raise ValueError("it holds no graph")
    except (ValueError, IndexError) as error:
        raise FlawmapError(f"{path} is not a whole ONNX file ({error}): copy it again, or export again") from error
    number, entry, start = found[-1]
    try:
        pair = {key: bytes(value) for key, value, _ in fields(entry)}
        if number != _METADATA or pair[1] != _KEY.encode():
            raise KeyError(_KEY)
        content = json.loads(pair[2])
        version, digest = content["format"], content.pop("digest")
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise FlawmapError(f"{path} was not made by flawmap: make one with `flawmap export MODEL -o FILE`") from error
    if version != FORMAT:
        raise FlawmapError(
            f"{path} has format {version}, this flawmap reads {FORMAT}: upgrade flawmap, or export again"
        )
    graph = whole[:start]
    try:
        intact = digest == _digest(graph, content)
    except (ValueError, RecursionError):  # a number that is not finite, or lists in lists, which are never written
        intact = False
    if not intact:
        raise FlawmapError(f"{path} was changed after its export (its digest differs): copy it again, or export again")
    try:
        check_graph(graph)
    except HostileGraphError as error:
        raise FlawmapError(f"{path} holds {error}, which is not run: export it again") from error
    except (ValueError, IndexError, RecursionError) as error:
        raise FlawmapError(f"{path} holds no graph that can be read ({error}): export it again") from error
    return graph, content


def load_inspector(path: Path, *, engine: str, device: str, threads: int | None) -> Inspector:
    """What `Inspector.load` gives for an exported file."""
    if device == "cuda":
        raise FlawmapError("an exported file runs on the CPU: use --device auto, or the .safetensors model")
    check_graph_engine(engine)
    graph, content = read_exported(path)
    try:
        return inspector_of(graph, content, engine=engine, threads=threads)
    except Exception as error:  # what a forged file may break is not to be foreseen
        raise _unfit(path, error) from error


def read_card(path: Path) -> tuple[ModelCard, dict[str, Any]]:
    """What `flawmap.line.inspector.read_card` gives for an exported file."""
    _, content = read_exported(path)
    try:
        card = ModelCard.from_json(content, arrays_from_json(content["arrays"]))
        live = [] if content["live"] is None else list(content["live"]["settings"])
        return card, {"kind": f"exported, {content['precision']}", "digest": content["model"], "live": live}
    except Exception as error:  # what a forged file may break is not to be foreseen
        raise _unfit(path, error) from error


def inspector_of(
    graph: bytes, content: Mapping[str, Any], *, engine: str = "auto", threads: int | None = None
) -> Inspector:
    """The inspector of what `read_exported` has read.

    Raises:
        FlawmapError, KeyError, TypeError, ValueError: a value is missing or cannot be used.
    """
    card = ModelCard.from_json(content, arrays_from_json(content["arrays"]))
    outputs = ("map", "score", "embedding") if card.localises else ("score", "embedding")
    compiled = compile_graph(graph, engine, outputs=outputs, threads=threads)
    live, mover = content["live"], None
    if live is not None:
        if set(live) != {"settings", "buffers", "images"} or not set(live["settings"]) <= set(card.config):
            raise ValueError("its live settings are not those of its method")
        mover = Mover(card, compiled, live, content["model"])
    movable = () if live is None else tuple(live["settings"])
    return Inspector(card, compiled, card.judge(), content["model"], mover, movable)


def _unfit(path: Path, error: Exception) -> FlawmapError:
    return shortage(error) or FlawmapError(
        f"{path} does not fit this flawmap ({shorten(str(error), 160)}): export it again"
    )


def arrays_to_json(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """Arrays of a few kinds as plain JSON types."""
    return {
        name: {
            "type": array.dtype.name,
            "shape": list(array.shape),
            "zlib": base64.b64encode(zlib.compress(np.ascontiguousarray(array).tobytes(), 9)).decode(),
        }
        for name, array in sorted(arrays.items())
    }


def arrays_from_json(content: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """Undoes `arrays_to_json`.

    Raises:
        KeyError, TypeError, ValueError: a value is missing, of another kind, or too large.
    """
    arrays = {}
    if len(content) > _MOST_ARRAYS:
        raise ValueError(f"it holds {len(content)} arrays")
    for name, kept in content.items():
        if kept["type"] not in ("uint8", "bool", "float16", "float32"):
            raise ValueError(f"{name} holds values of type {kept['type']}")
        inflate = zlib.decompressobj()
        try:
            data = inflate.decompress(base64.b64decode(kept["zlib"], validate=True), _MOST_ARRAY)
        except zlib.error as error:
            raise ValueError(f"{name} cannot be unpacked ({error})") from error
        if not inflate.eof:
            raise ValueError(f"{name} is larger than {_MOST_ARRAY} bytes")
        arrays[name] = np.frombuffer(data, kept["type"]).reshape(kept["shape"])
    return arrays


def _canonical(content: Mapping[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _digest(graph: bytes, content: Mapping[str, Any]) -> str:
    sha = hashlib.sha256(_canonical(content).encode())
    sha.update(graph)
    return sha.hexdigest()
