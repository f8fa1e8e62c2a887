"""Protobuf messages, of which ONNX files consist: each field is its number and kind as one varint, then its value."""

from __future__ import annotations

from collections.abc import Iterator


def field(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def fields(message: memoryview | bytes) -> Iterator[tuple[int, memoryview, int]]:
    """The fields of a message: number, value (the bytes themselves of a number), and where the field starts.

    Raises:
        ValueError, IndexError: it is cut off or no protobuf message.
    """
    message, at = memoryview(message), 0
    while at < len(message):
        start = at
        key, at = _read_varint(message, at)
        kind = key & 7
        if kind == 0:
            end = _read_varint(message, at)[1]
        elif kind == 2:
            length, at = _read_varint(message, at)
            end = at + length
        elif kind in (1, 5):
            end = at + (8 if kind == 1 else 4)
        else:
            raise ValueError("it is no protobuf message")
        if end > len(message):
            raise ValueError("it is cut off")
        yield key >> 3, message[at:end], start
        at = end


def _read_varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("it is no protobuf message")
