"""The part of an ONNX graph that some of its outputs need: onnxruntime computes every node, whatever is asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from flawmap.line.protobuf import field, fields

# Field numbers of ModelProto, GraphProto, NodeProto and AttributeProto.
_GRAPH = 7
_NODE, _INITIALIZER, _INPUT, _OUTPUT, _VALUE_INFO = 1, 5, 11, 12, 13
_TAKES, _GIVES, _ATTRIBUTE = 1, 2, 5
_SUBGRAPHS = (6, 11)
_NAME = {_INITIALIZER: 8, _INPUT: 1, _OUTPUT: 1, _VALUE_INFO: 1}  # where these parts of a graph keep their name


def pruned(model: bytes, outputs: Collection[str]) -> bytes:
    """An ONNX model without the nodes, weights, inputs and outputs that `outputs` do not need.

    Raises:
        ValueError, IndexError: it is no ONNX model.
    """
    asked = {name.encode() for name in outputs}
    return b"".join(
        field(number, _pruned(value, asked)) if number == _GRAPH else part for number, value, part in _parts(model)
    )


def _pruned(graph: memoryview, outputs: set[bytes]) -> bytes:
    parts, needed, nodes = list(_parts(graph)), set(outputs), []
    for number, value, part in reversed(parts):  # a node stands after those that it takes something from
        if number == _NODE and not needed.isdisjoint(_values(value, _GIVES)):
            needed.update(_taken(value))
            nodes.append(part)
    others = [
        part
        for number, value, part in parts
        if number != _NODE
        and (number not in _NAME or _values(value, _NAME[number])[0] in (outputs if number == _OUTPUT else needed))
    ]
    return b"".join([*reversed(nodes), *others])


def _taken(node: memoryview | bytes) -> Iterator[bytes]:
    """What a node takes, in its branches and loops too, whose own names do no harm."""
    yield from _values(node, _TAKES)
    for attribute in _values(node, _ATTRIBUTE):
        for which in _SUBGRAPHS:
            for graph in _values(attribute, which):
                for output in _values(graph, _OUTPUT):
                    yield _values(output, _NAME[_OUTPUT])[0]
                for inner in _values(graph, _NODE):
                    yield from _taken(inner)


def _values(message: memoryview | bytes, which: int) -> list[bytes]:
    return [bytes(value) for number, value, _ in fields(message) if number == which]


def _parts(message: memoryview | bytes) -> Iterator[tuple[int, memoryview, memoryview]]:
    """The fields of a message: number, value, and the field as it stands."""
    found, message = list(fields(message)), memoryview(message)
    starts = [start for _, _, start in found]
    for (number, value, start), end in zip(found, [*starts[1:], len(message)], strict=True):
        yield number, value, message[start:end]
