# SPDX-License-Identifier: Apache-2.0
"""A thin immutable view of an ONNX model: nodes as Python values, weights as numpy, shapes.

Constant nodes become initializers, model-local functions are inlined, and the operator set is
brought into [OPSET_FLOOR, OPSET_CEILING], so that nothing downstream meets two spellings of an
operator. An unknown dimension is ``None``; in fedge it is the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TypeAlias

import numpy as np
import onnx
import onnx.inliner
from numpy.typing import NDArray
from onnx import helper, numpy_helper, shape_inference, version_converter

from edge_sdk.errors import CompileError

OPSET_FLOOR = 18  # ReduceMean and friends take their axes as an input from here on
OPSET_CEILING = 22  # the newest that onnxruntime 1.22 runs
IR_VERSION = 10  # the newest that onnxruntime 1.22 loads

Shape: TypeAlias = tuple[int | None, ...]
Tensor: TypeAlias = NDArray[Any]

_CONTROL_FLOW = frozenset({"If", "Loop", "Scan", "SequenceMap"})


@dataclass(frozen=True, slots=True)
class Value:
    """What is known of a tensor before running: dtype and shape, None where unknown."""

    name: str
    dtype: np.dtype[Any] | None = None
    shape: Shape | None = None


@dataclass(frozen=True, slots=True)
class Node:
    """One operator. A missing optional input or output is the empty string, as in ONNX."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    domain: str = ""
    name: str = ""

    @property
    def kind(self) -> str:
        """Return the operator's key in tables: ``Conv``, or ``com.microsoft.Gelu`` outside ONNX."""
        return f"{self.domain}.{self.op}" if self.domain else self.op

    @property
    def label(self) -> str:
        """Return how messages call this node: its operator and its name or first output."""
        return f"{self.kind} node {self.name or self.outputs[0]!r}"

    def attr(self, name: str, default: Any = None) -> Any:
        """Return an attribute as int, float, str, tuple or ndarray, or `default`."""
        return self.attributes.get(name, default)

    def input(self, index: int) -> str:
        """Return an input's name, or the empty string where an optional input is absent."""
        return self.inputs[index] if index < len(self.inputs) else ""


@dataclass(frozen=True)
class Graph:
    """A model, immutable: change it with ``dataclasses.replace`` and write it with ``to_model``.

    ``values`` holds what shape inference found, for every tensor it knows, initializers included.
    ``inputs`` never lists initializers. ``opsets`` maps domain to version.
    """

    nodes: tuple[Node, ...]
    initializers: Mapping[str, Tensor]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    values: Mapping[str, Value] = field(default_factory=dict)
    opsets: Mapping[str, int] = field(default_factory=lambda: {"": OPSET_FLOOR})
    name: str = "graph"

    @property
    def opset(self) -> int:
        """Return the version of the standard operator set."""
        return self.opsets.get("", OPSET_FLOOR)

    @cached_property
    def producers(self) -> Mapping[str, Node]:
        """Map each tensor that a node makes to that node."""
        return {out: node for node in self.nodes for out in node.outputs if out}

    @cached_property
    def uses(self) -> Mapping[str, tuple[Node, ...]]:
        """Map each tensor to the nodes that read it, in order, each node once."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                if name:
                    found.setdefault(name, []).append(node)
        return {name: tuple(nodes) for name, nodes in found.items()}

    def shape(self, name: str) -> Shape | None:
        """Return a shape, None for an unknown dimension; None when even the rank is unknown."""
        return self.values[name].shape if name in self.values else None

    def dtype(self, name: str) -> np.dtype[Any] | None:
        """Return a tensor's dtype where it is known."""
        return self.values[name].dtype if name in self.values else None

    def inferred(self) -> Graph:
        """Return the same graph with ``values`` (and the outputs' shapes) inferred afresh."""
        return _with_values(replace(self, values={}), self.to_model())

    def sorted(self) -> Graph:
        """Return the same graph with its nodes in topological order, stable where order is free."""
        return replace(self, nodes=topological(self.nodes))

    @staticmethod
    def from_model(model: onnx.ModelProto) -> Graph:
        """Read a ModelProto; raise CompileError for control flow or an opset out of reach."""
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
        model = converted(model, min(max(opset_of(model), OPSET_FLOOR), OPSET_CEILING))
        initializers = {t.name: _to_array(t) for t in model.graph.initializer}
        nodes = []
        for node in map(_read_node, model.graph.node):
            if node.kind == "Constant":
                initializers[node.outputs[0]] = _constant(node)
            else:
                nodes.append(node)
        graph = Graph(
            nodes=topological(nodes),
            initializers=MappingProxyType(initializers),
            inputs=tuple(_read_value(v) for v in model.graph.input if v.name not in initializers),
            outputs=tuple(map(_read_value, model.graph.output)),
            opsets={_domain(o.domain): o.version for o in model.opset_import},
            name=model.graph.name or "graph",
        )
        return _with_values(graph, model)

    @staticmethod
    def load(model: str | Path | bytes | onnx.ModelProto) -> Graph:
        """Read a model from a file (external data included), from bytes or from a ModelProto."""
        if isinstance(model, bytes):
            model = onnx.load_from_string(model)
        elif not isinstance(model, onnx.ModelProto):
            model = onnx.load(model)
        return Graph.from_model(model)

    def to_model(self) -> onnx.ModelProto:
        """Write a ModelProto with IR version 10: same graph, same bytes."""
        graph = helper.make_graph(
            [to_proto(node) for node in self.nodes],
            self.name,
            [_write_value(value) for value in self.inputs],
            [_write_value(value) for value in self.outputs],
            [numpy_helper.from_array(array, name) for name, array in self.initializers.items()],
        )
        used = {"": self.opset, **self.opsets}
        for node in self.nodes:
            used.setdefault(node.domain, 1)
        model = helper.make_model(
            graph,
            producer_name="fedge",
            opset_imports=[helper.make_opsetid(d, v) for d, v in sorted(used.items())],
        )
        model.ir_version = IR_VERSION
        return model


def _with_values(graph: Graph, model: onnx.ModelProto) -> Graph:
    values = _infer(model)
    for value in (*graph.inputs, *graph.outputs):
        values.setdefault(value.name, value)
    for name, array in graph.initializers.items():
        values[name] = Value(name, array.dtype, array.shape)
    outputs = tuple(_sharper(value, values[value.name]) for value in graph.outputs)
    return replace(graph, values=MappingProxyType(values), outputs=outputs)


def topological(nodes: Iterable[Node]) -> tuple[Node, ...]:
    """Order nodes so that each follows its producers; nodes already in order stay as they are."""
    todo = list(nodes)
    made = {out: index for index, node in enumerate(todo) for out in node.outputs if out}
    done: set[int] = set()
    order: list[Node] = []
    stack = list(reversed(range(len(todo))))
    entered: set[int] = set()
    while stack:
        index = stack.pop()
        if index in done:
            continue
        waits = [made[i] for i in todo[index].inputs if i in made and made[i] not in done]
        if not waits:
            done.add(index)
            order.append(todo[index])
            continue
        if index in entered:
            raise CompileError(f"expected a graph without cycles, {todo[index].label} is on one")
        entered.add(index)
        stack += [index, *reversed(waits)]
    return tuple(order)


class Nested(Protocol):
    """A graph inside a node, as the value of an attribute."""

    @property
    def taken(self) -> int:
        """How many of the node's inputs are its own; the others are read by the graph inside."""

    def to_proto(self, read: Sequence[str]) -> onnx.GraphProto:
        """Write the graph; `read`: those others, by their names outside."""


def nested(node: Node) -> Nested | None:
    """Return the graph that a node holds, if it holds one."""
    found: Nested | None = node.attr("body")
    return found


def to_proto(node: Node) -> onnx.NodeProto:
    """Write one node as a NodeProto; arrays become tensors."""
    inner = nested(node)
    inputs = node.inputs if inner is None else node.inputs[: inner.taken]
    proto = helper.make_node(
        node.op, inputs, node.outputs, name=node.name or None, domain=node.domain or None
    )
    attributes = dict(node.attributes)
    if inner is not None:
        attributes["body"] = inner.to_proto(node.inputs[inner.taken :])
    proto.attribute.extend(_write_attribute(k, v) for k, v in sorted(attributes.items()))
    return proto


def _write_attribute(name: str, value: Any) -> onnx.AttributeProto:
    if isinstance(value, (np.ndarray, np.generic)):
        value = numpy_helper.from_array(np.asarray(value))
    elif isinstance(value, (tuple, list)) and not value:
        return helper.make_attribute(name, [], attr_type=onnx.AttributeProto.INTS)
    return helper.make_attribute(name, value)


def _read_node(proto: onnx.NodeProto) -> Node:
    if proto.op_type in _CONTROL_FLOW:
        raise CompileError(
            f"expected a graph without control flow, got {proto.op_type} node {proto.name!r}: "
            "export the model with fixed structure"
        )
    attributes = {a.name: _read_attribute(a) for a in proto.attribute}
    return Node(
        proto.op_type,
        tuple(proto.input),
        tuple(proto.output),
        attributes,
        _domain(proto.domain),
        proto.name,
    )


def _read_attribute(proto: onnx.AttributeProto) -> Any:
    value = helper.get_attribute_value(proto)
    if isinstance(value, onnx.TensorProto):
        return _to_array(value)
    if isinstance(value, bytes):
        return value.decode()
    if proto.type == onnx.AttributeProto.STRINGS:
        return tuple(item.decode() for item in value)
    if proto.type in (onnx.AttributeProto.INTS, onnx.AttributeProto.FLOATS):
        return tuple(value)
    return value


def _constant(node: Node) -> Tensor:
    for name, dtype in (
        ("value_float", np.float32),
        ("value_floats", np.float32),
        ("value_int", np.int64),
        ("value_ints", np.int64),
    ):
        if name in node.attributes:
            return np.asarray(node.attributes[name], dtype)
    value = node.attr("value")
    if not isinstance(value, np.ndarray):
        raise CompileError(
            f"expected a dense tensor in {node.label}, got {sorted(node.attributes)}"
        )
    return value


def _to_array(proto: onnx.TensorProto) -> Tensor:
    array: Tensor = numpy_helper.to_array(proto)
    return array


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def opset_of(model: onnx.ModelProto) -> int:
    """Return the version of the standard operator set that a model imports, 0 for none."""
    return next((o.version for o in model.opset_import if not _domain(o.domain)), 0)


def converted(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """Bring a model to another version of the standard operator set.

    Raises: CompileError when an operator of it has no counterpart there.
    """
    if opset_of(model) == opset:
        return model
    try:
        return version_converter.convert_version(model, opset)
    except Exception as error:  # the converter raises bare C++ exceptions of many kinds
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise CompileError(
            f"expected a model that converts from opset {opset_of(model)} to {opset}: "
            f"{said[-1]}; export the model at opset {opset}"
        ) from error


def _infer(model: onnx.ModelProto) -> dict[str, Value]:
    try:
        model = shape_inference.infer_shapes(model, data_prop=True)
    except shape_inference.InferenceError:  # a shape we cannot learn is a shape we do not know
        model = shape_inference.infer_shapes(model, data_prop=False)
    graph = model.graph
    known = (*graph.input, *graph.output, *graph.value_info)
    return {proto.name: _read_value(proto) for proto in known}


def _read_value(proto: onnx.ValueInfoProto) -> Value:
    return from_type(proto.name, proto.type)


def from_type(name: str, proto: onnx.TypeProto) -> Value:
    """Read a TypeProto: a symbolic or missing dimension is None."""
    if not proto.HasField("tensor_type"):
        return Value(name)
    tensor = proto.tensor_type
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type) if tensor.elem_type else None
    if not tensor.HasField("shape"):
        return Value(name, dtype)
    dims = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
    return Value(name, dtype, dims)


def to_type(value: Value) -> onnx.TypeProto:
    """Write a TypeProto: an unknown dimension stays without a name."""
    elem = helper.np_dtype_to_tensor_dtype(value.dtype) if value.dtype is not None else 0
    return helper.make_tensor_type_proto(elem, value.shape)


def _write_value(value: Value) -> onnx.ValueInfoProto:
    return helper.make_value_info(value.name, to_type(value))


def _sharper(declared: Value, inferred: Value) -> Value:
    """Join what the model declares of an output with what inference found."""
    if declared.shape is None or inferred.shape is None:
        shape = declared.shape or inferred.shape
    else:
        shape = tuple(
            a if a is not None else b for a, b in zip(declared.shape, inferred.shape, strict=True)
        )
    return Value(declared.name, declared.dtype or inferred.dtype, shape)
