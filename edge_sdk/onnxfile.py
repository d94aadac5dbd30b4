# SPDX-License-Identifier: Apache-2.0
"""What is in a serialized ONNX model, read without `onnx`: enough to judge it, not to run it. Pure.

Weights are never copied: a tensor's bytes stay a view on the file. Counts, sizes and depth are
bounded; graphs in nodes of the graph are read, those nested deeper, functions and the like are not
entered, as nothing that has them is run.
"""

from __future__ import annotations

import math
from typing import Any

from edge_sdk.errors import BundleError
from edge_sdk.graphview import Attribute, GraphView, Nested, Operation, Port, Stored
from edge_sdk.onnxschema import (
    ATTRIBUTE,
    DIMENSION,
    ENTRY,
    GRAPH,
    KINDS,
    MODEL,
    NODE,
    OPSET,
    SHAPE,
    TENSOR,
    TENSOR_TYPE,
    TYPE,
    TYPED,
    VALUE,
    WIRES,
)
from edge_sdk.protobuf import Message, Reader, Span, signed

MAX_NODES = 20_000
MAX_TENSORS = 20_000
MAX_VALUES = 20_000
MAX_NAMES = 10_000  # of one node: inputs, or outputs
MAX_ATTRIBUTES = 64
MAX_OTHERS = 1000  # operator sets, metadata
MAX_RANK = 32
MAX_ELEMENTS = 1 << 31


def read(data: memoryview) -> GraphView:
    """Read a serialized ModelProto.

    Raises: BundleError when it is not one, is damaged, or is beyond the bounds.
    """
    reader = Reader(data.cast("B") if data.format != "B" else data)
    model = reader.message(Span(0, len(data)), MODEL, "model")
    graph = reader.message(_one(model, "graph", "model"), GRAPH, "graph")
    counted = ("functions", "training_info", "configuration")
    extras = {name: len(model.get(name, [])) for name in counted}
    whole = _graph(reader, graph, is_nested=False)
    extras["sparse_initializer"] = whole.sparse
    return GraphView(
        opsets=_opsets(reader, model),
        nodes=whole.nodes,
        inputs=whole.inputs,
        outputs=whole.outputs,
        values=whole.values,
        initializers=whole.initializers,
        extras=extras,
        metadata=_keys(reader, model),
    )


def _graph(reader: Reader, graph: Message, *, is_nested: bool) -> Nested:
    stored = [_tensor(reader, s) for s in _several(graph, "initializer", MAX_TENSORS, "graph")]
    initializers = {tensor.name: tensor for tensor in stored}
    if len(initializers) != len(stored):
        raise BundleError("graph: expected initializers of different names, got a name twice")
    spans = _several(graph, "node", MAX_NODES, "graph")
    return Nested(
        nodes=tuple(_node(reader, span, is_nested=is_nested) for span in spans),
        inputs=_ports(reader, graph, "input"),
        outputs=_ports(reader, graph, "output"),
        values=_ports(reader, graph, "value_info"),
        initializers=initializers,
        sparse=len(graph.get("sparse_initializer", [])),
    )


def _one(message: Message, name: str, what: str) -> Any:
    if name not in message:
        raise BundleError(f"{what}: expected a {name}, got none")
    return message[name][0]


def _several(message: Message, name: str, most: int, what: str) -> list[Any]:
    values = message.get(name, [])
    if len(values) > most:
        raise BundleError(f"{what}: expected at most {most} of {name}, got {len(values)}")
    return values


def _name(reader: Reader, message: Message, field: str, what: str) -> str:
    return reader.text(message[field][0], what) if field in message else ""


def _opsets(reader: Reader, model: Message) -> dict[str, int]:
    found: dict[str, int] = {}
    for span in _several(model, "opset_import", MAX_OTHERS, "model"):
        entry = reader.message(span, OPSET, "operator set")
        domain = _name(reader, entry, "domain", "operator set")
        if domain in found:
            raise BundleError(f"model: expected operator set {domain!r} once, got it again")
        found[domain] = entry.get("version", [0])[0]
    return found


def _keys(reader: Reader, model: Message) -> frozenset[str]:
    spans = _several(model, "metadata_props", MAX_OTHERS, "model")
    entries = [reader.message(span, ENTRY, "metadata") for span in spans]
    return frozenset(_name(reader, entry, "key", "metadata") for entry in entries)


def _node(reader: Reader, span: Span, *, is_nested: bool) -> Operation:
    node = reader.message(span, NODE, "node")
    name = _name(reader, node, "name", "node")
    what = f"node {name!r}"
    spans = _several(node, "attribute", MAX_ATTRIBUTES, what)
    names = {
        side: tuple(reader.text(s, what) for s in _several(node, side, MAX_NAMES, what))
        for side in ("input", "output")
    }
    return Operation(
        op=_name(reader, node, "op_type", what),
        domain=_name(reader, node, "domain", what),
        name=name,
        inputs=names["input"],
        outputs=names["output"],
        attributes=tuple(_attribute(reader, s, what, enters=not is_nested) for s in spans),
        overload=_name(reader, node, "overload", what),
        is_placed="device_configurations" in node,
    )


def _attribute(reader: Reader, span: Span, node: str, *, enters: bool) -> Attribute:
    found = reader.message(span, ATTRIBUTE, node)
    name = _name(reader, found, "name", node)
    what = f"{node}, attribute {name!r}"
    kind = KINDS.get(found.get("type", [0])[0])
    if kind is None or "ref_attr_name" in found:
        raise BundleError(f"{what}: expected a value of its own with a known type")
    extra = found.keys() - {"name", "type", "doc_string", kind}
    if extra:
        raise BundleError(f"{what}: expected {kind} alone, got {', '.join(sorted(extra))}")
    spans = found.get(kind, []) if kind in {"tensor", "tensors"} else []
    if len(spans) > MAX_OTHERS:
        raise BundleError(f"{what}: expected at most {MAX_OTHERS} tensors, got {len(spans)}")
    number = signed(found.get("int", [0])[0]) if kind == "int" else None
    inner = None
    if enters and kind == "graph" and kind in found:
        inner = _graph(reader, reader.message(found[kind][0], GRAPH, what), is_nested=True)
    return Attribute(name, kind, number, tuple(_tensor(reader, s) for s in spans), inner)


def _tensor(reader: Reader, span: Span) -> Stored:
    found = reader.message(span, TENSOR, "tensor")
    name = _name(reader, found, "name", "tensor")
    what = f"tensor {name!r}"
    if "segment" in found:
        raise BundleError(f"{what}: expected it whole, got a segment")
    dims = tuple(reader.numbers(found.get("dims", []), MAX_RANK, what))
    if max(math.prod(dims), *dims, 0) > MAX_ELEMENTS:  # unsigned here: a negative one is huge
        raise BundleError(f"{what}: expected at most {MAX_ELEMENTS} numbers, got dims {dims[:8]}")
    raw = found["raw_data"][0] if "raw_data" in found else None
    typed = {
        field: reader.count(found[field], WIRES[field], what) for field in TYPED if field in found
    }
    return Stored(
        name=name,
        dtype=found.get("data_type", [0])[0],
        dims=dims,
        data=reader.data[raw.start : raw.end] if raw is not None else None,
        offset=raw.start if raw is not None else 0,
        typed=typed,
        is_external="external_data" in found or found.get("data_location", [0])[0] != 0,
    )


def _ports(reader: Reader, graph: Message, side: str) -> tuple[Port, ...]:
    return tuple(_port(reader, span) for span in _several(graph, side, MAX_VALUES, "graph"))


def _port(reader: Reader, span: Span) -> Port:
    value = reader.message(span, VALUE, "value")
    name = _name(reader, value, "name", "value")
    what = f"value {name!r}"
    if "type" not in value:
        return Port(name, "", 0, None)
    kinds = reader.message(value["type"][0], TYPE, what)
    known = kinds.keys() - {"denotation"}
    if len(known) > 1:
        raise BundleError(f"{what}: expected one type, got {', '.join(sorted(known))}")
    kind = next(iter(known), "")
    if kind != "tensor":
        return Port(name, kind, 0, None)
    tensor = reader.message(kinds["tensor"][0], TENSOR_TYPE, what)
    dtype = tensor.get("elem_type", [0])[0]
    if "shape" not in tensor:
        return Port(name, kind, dtype, None)
    dims = _several(reader.message(tensor["shape"][0], SHAPE, what), "dim", MAX_RANK, what)
    return Port(name, kind, dtype, tuple(_dimension(reader, dim, what) for dim in dims))


def _dimension(reader: Reader, span: Span, what: str) -> int | None:
    found = reader.message(span, DIMENSION, what)
    if "value" in found and "param" in found:
        raise BundleError(f"{what}: expected a dimension's size or its name, got both")
    value = found["value"][0] if "value" in found else None
    if value is not None and value > MAX_ELEMENTS:
        raise BundleError(f"{what}: expected a dimension of at most {MAX_ELEMENTS}, got {value}")
    return value
