# SPDX-License-Identifier: Apache-2.0
"""Where each weight's bytes lie inside a serialized ONNX model: a walk over protobuf's wire format.

A device patches trained weights at these offsets, so it needs neither `onnx` nor protobuf.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from edge_sdk.errors import CompileError

_GRAPH, _INITIALIZER, _NAME, _RAW_DATA = 7, 5, 8, 9  # field numbers of onnx.proto
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class Place(NamedTuple):
    """A range of bytes: absolute offset and size."""

    offset: int
    size: int


def raw_data_places(model: bytes) -> dict[str, Place]:
    """Return where the ``raw_data`` of each initializer lies in a serialized ModelProto."""
    whole = Place(0, len(model))
    places = {}
    for number, graph in _fields(model, whole):
        if number != _GRAPH:
            continue
        for kind, tensor in _fields(model, graph):
            if kind == _INITIALIZER:
                parts = dict(_fields(model, tensor))
                if _RAW_DATA in parts and _NAME in parts:
                    name = parts[_NAME]
                    text = model[name.offset : name.offset + name.size].decode(errors="replace")
                    places[text] = parts[_RAW_DATA]
    return places


def _fields(data: bytes, where: Place) -> Iterator[tuple[int, Place]]:
    """Yield (field number, place of the value) of each length-delimited field, skipping others."""
    at, end = where.offset, where.offset + where.size
    while at < end:
        key, at = _varint(data, at, end)
        kind, start = key & 7, at
        if kind == _VARINT:
            _, at = _varint(data, at, end)
        elif kind == _BYTES:
            size, start = _varint(data, at, end)
            at = start + size
        elif kind in (_FIXED32, _FIXED64):
            at += 4 if kind == _FIXED32 else 8
        else:
            raise CompileError(f"expected a protobuf message, got wire type {kind} at byte {at}")
        if at > end:
            raise CompileError(f"expected a protobuf field to end by byte {end}, it ends at {at}")
        if kind == _BYTES:
            yield key >> 3, Place(start, at - start)


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 64:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise CompileError(f"expected a protobuf number that ends by byte {end}")
