"""Whether an ONNX graph asks for nothing but arithmetic on what it holds, of a size that a machine has."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from flawmap.line.protobuf import fields

_GRAPH, _OPSETS, _FUNCTION = 7, 8, 25  # field numbers of ModelProto
_NODE, _INITIALIZER, _SPARSE = 1, 5, 15  # of GraphProto
_TAKES, _GIVES, _OPERATOR, _ATTRIBUTE, _DOMAIN = 1, 2, 4, 5, 7  # of NodeProto
_DIMS, _TYPE, _INTS, _NAME, _RAW = 1, 2, 7, 8, 9  # of TensorProto
_OUTSIDE = (13, 14)  # of TensorProto: where its data lies
_VALUE, _SUBGRAPHS, _TENSORS, _SPARSES = 5, (6, 11), (5, 10), (22, 23)  # of AttributeProto

_DOMAINS = (b"", b"ai.onnx", b"com.microsoft")
_QUANTISED = (b"QLinear", b"QuantizeLinear", b"DequantizeLinear")  # all that is taken from the last of them
_ENDLESS = (b"Loop", b"Scan", b"SequenceMap")
# What makes something of a size that one of its inputs, by number, only names.
_SIZED = {
    b"ConstantOfShape": (0,), b"Expand": (1,), b"Tile": (1,), b"Range": (1,), b"Pad": (1,), b"Resize": (2, 3),
    b"OneHot": (1,), b"Upsample": (1,), b"RandomNormal": (), b"RandomUniform": (), b"EyeLike": (),
}  # fmt: skip
_MOST = 1 << 28  # values
_DEEPEST = 16  # graphs in graphs


class HostileGraphError(ValueError):
    """What a graph must not hold, in words."""


def check_graph(model: bytes) -> None:
    """Looks through a model with all graphs and functions in it.

    Raises:
        HostileGraphError: it has operators of others, or that may run without end, data outside itself, tensors that
            hold less than they say, or that are as large as no image's need be.
        ValueError, IndexError: it is no ONNX model.
    """
    for number, value, _ in fields(model):
        if number == _OPSETS:
            _check_domain(next((bytes(v) for n, v, _ in fields(value) if n == 1), b""))
        elif number == _GRAPH:
            _check_part(value, 0)
        elif number == _FUNCTION:
            raise HostileGraphError("functions of its own")


def _check_part(graph: memoryview, depth: int) -> None:
    if depth > _DEEPEST:
        raise HostileGraphError("graphs in graphs without end")
    constants: dict[bytes, NDArray[np.float64]] = {}
    for number, value, _ in fields(graph):
        if number == _INITIALIZER:
            constants |= _checked(value)
        elif number == _SPARSE:
            raise HostileGraphError("sparse tensors")
    for number, value, _ in fields(graph):
        if number == _NODE:
            constants |= _check_node(value, constants, depth)


def _check_node(
    node: memoryview, constants: Mapping[bytes, NDArray[np.float64]], depth: int
) -> dict[bytes, NDArray[np.float64]]:
    """What it gives, where that is a small constant."""
    takes, gives, operator, domain = [], [], b"", b""
    found: dict[bytes, NDArray[np.float64]] = {}
    for number, value, _ in fields(node):
        if number == _TAKES:
            takes.append(bytes(value))
        elif number == _GIVES:
            gives.append(bytes(value))
        elif number == _OPERATOR:
            operator = bytes(value)
        elif number == _DOMAIN:
            domain = bytes(value)
        elif number == _ATTRIBUTE:
            for field, part, _ in fields(value):
                if field in _SUBGRAPHS:
                    _check_part(part, depth + 1)
                elif field in _TENSORS:
                    found |= _checked(part)
                elif field in _SPARSES:
                    raise HostileGraphError("sparse tensors")
    _check_domain(domain)
    if domain == b"com.microsoft" and not operator.startswith(_QUANTISED):
        raise HostileGraphError(f"the operator {operator.decode(errors='replace')} of com.microsoft")
    if operator in _ENDLESS:
        raise HostileGraphError(f"the operator {operator.decode()}, which may run without end")
    for place in _SIZED.get(operator, ()):
        named = constants.get(takes[place]) if place < len(takes) else None
        if named is not None and _product(named) > _MOST:
            raise HostileGraphError(f"a constant of {_product(named):.3g} values")
    return {gives[0]: next(iter(found.values()))} if operator == b"Constant" and found and gives else {}


def _checked(tensor: memoryview) -> dict[bytes, NDArray[np.float64]]:
    """A tensor's name and its values, where they are few: such as name the size of another."""
    dims: list[int] = []
    kind, size, name = 0, 0, b""
    values: NDArray[np.float64] = np.empty(0)
    for number, value, _ in fields(tensor):
        if number in _OUTSIDE:
            raise HostileGraphError("data outside itself")
        if number == _DIMS:
            dims += _varints(value)
        elif number == _TYPE:
            kind = next(_varints(value), 0)
        elif number == _NAME:
            name = bytes(value)
        elif number not in (3, 12):  # which say no value
            size += len(value)
            if number == _RAW and kind in (1, 7) and len(value) <= 128:
                values = np.frombuffer(value, "<i8" if kind == 7 else "<f4").astype(np.float64)
            elif number == _INTS and len(value) <= 128:
                signed = [one - (1 << 64) if one >> 63 else one for one in _varints(value)]
                values = np.append(values, np.array(signed, np.float64))
    # Four bits are the least that a value takes.
    if any(side < 0 for side in dims) or math.prod(dims) > max(1, 2 * size):
        raise HostileGraphError("a tensor that holds less than it says")
    return {name: values} if len(values) else {}


def _check_domain(domain: bytes) -> None:
    if domain not in _DOMAINS:
        raise HostileGraphError(f"operators of {domain!r}")


def _product(sizes: NDArray[np.float64]) -> float:
    return float(np.prod(np.maximum(np.abs(sizes), 1)))


def _varints(value: memoryview) -> Iterator[int]:
    """Numbers packed one after the other."""
    number = shift = 0
    for byte in value:
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            yield number
            number = shift = 0
