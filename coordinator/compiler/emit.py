# SPDX-License-Identifier: Apache-2.0
"""Emit: adds operators to a graph as if they were functions, and knows dtypes and shapes.

e = Emit(graph)
y = e.MatMul("x", e.const(w))            # -> the output's name
a, b = e.Split(y, outputs=2, axis=1)     # several outputs: a tuple of names
new = e.graph(outputs=[y, a])            # the forward graph and everything emitted
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol, cast, overload

import numpy as np
import onnx
from numpy.typing import DTypeLike
from onnx import defs, numpy_helper, shape_inference

from coordinator.compiler.graph import (
    IR_VERSION,
    OPSET_FLOOR,
    Graph,
    Node,
    Shape,
    Tensor,
    Value,
    from_type,
    to_proto,
    to_type,
)
from edge_sdk.errors import CompileError

_SMALL = 64  # elements: larger constants never steer shape inference


class Operator(Protocol):
    """An operator as a function: names (None: absent) and attributes in, output names out."""

    @overload
    def __call__(self, *inputs: str | None, outputs: int, **attributes: Any) -> tuple[str, ...]: ...
    @overload
    def __call__(self, *inputs: str | None, **attributes: Any) -> str: ...
    def __call__(self, *inputs: str | None, **attributes: Any) -> Any:
        """Add one node."""


class Emit:
    """A recorder of nodes on top of a forward graph (or of nothing).

    Attributes:
        nodes: forward nodes first, then the emitted ones, in order.
        initializers: tensors by name; ``const`` adds to them.
    """

    def __init__(self, graph: Graph | None = None, *, opset: int = OPSET_FLOOR) -> None:
        self._graph = graph or Graph((), {}, (), (), {}, {"": opset})
        self.nodes: list[Node] = list(self._graph.nodes)
        self.initializers: dict[str, Tensor] = dict(self._graph.initializers)
        self._inputs: dict[str, Value] = {v.name: v for v in self._graph.inputs}
        self._values: dict[str, Value] = dict(self._graph.values)
        self._values |= {v.name: v for v in self._graph.inputs if v.name not in self._values}
        self._constants: dict[tuple[str, Shape, bytes], str] = {}
        self._counts: dict[str, int] = {}
        self._wanted: frozenset[str] | None = None
        self._taken = set(self._values) | set(self.initializers)
        self._taken |= {name for node in self.nodes for name in (*node.inputs, *node.outputs)}

    # -- adding -----------------------------------------------------------------------------

    def __getattr__(self, op: str) -> Operator:
        """Return the standard operator of that name as a function."""
        if not op[:1].isupper():
            raise AttributeError(op)

        def call(*inputs: str | None, outputs: int | None = None, **attributes: Any) -> Any:
            made = self.op(op, inputs, outputs=outputs or 1, **attributes)
            return made[0] if outputs is None else made

        return cast("Operator", call)

    def op(
        self,
        op: str,
        inputs: Sequence[str | None],
        *,
        outputs: int | Sequence[str] = 1,
        domain: str = "",
        **attributes: Any,
    ) -> tuple[str, ...]:
        """Add a node and return its outputs' names; `outputs` is a count or the wanted names.

        A None attribute is left out, a None input is an absent optional one.
        """
        if isinstance(outputs, int):
            outputs = tuple(self.fresh(op.lower()) for _ in range(outputs))
        for name in outputs:
            self._taken.add(name)
        names = [name or "" for name in inputs]
        while names and not names[-1]:
            names.pop()
        kept = {k: _plain(v) for k, v in attributes.items() if v is not None}
        node = Node(op, tuple(names), tuple(outputs), kept, domain)
        self.nodes.append(node)
        self._infer(node)
        return node.outputs

    def add(self, node: Node, made: Iterable[Value]) -> None:
        """Add a finished node and what is known of its outputs."""
        self.nodes.append(node)
        self._values |= {value.name: value for value in made}
        self._taken.update(node.outputs)

    def reserve(self, names: Iterable[str]) -> None:
        """Keep names out of use: they are taken elsewhere."""
        self._taken.update(names)

    def output(self, node: Node, index: int) -> str:
        """Return the name of a node's output, adding an optional one that the node left out."""
        at = next(i for i, made in enumerate(self.nodes) if made.outputs[0] == node.outputs[0])
        outputs = list(self.nodes[at].outputs)
        outputs += [""] * (index + 1 - len(outputs))
        if not outputs[index]:
            outputs[index] = self.fresh(f"{node.op.lower()}.{index}")
            self.nodes[at] = replace(self.nodes[at], outputs=tuple(outputs))
            self._infer(self.nodes[at])
        return outputs[index]

    def const(self, value: Any, dtype: DTypeLike = np.float32, *, name: str = "") -> str:
        """Return the name of a constant tensor (float32 unless told); equal constants share one."""
        array = np.ascontiguousarray(np.asarray(value, dtype))
        array = array.reshape(np.shape(value))  # ascontiguousarray makes 0-d arrays 1-d
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants or name:
            self._constants[key] = self.initializer(name or self.fresh("const"), array)
        return self._constants[key]

    def ints(self, *values: int) -> str:
        """Return a constant int64 vector: axes, shapes, pads."""
        return self.const(np.array(values, np.int64), np.int64)

    def initializer(self, name: str, array: Tensor) -> str:
        """Add a named tensor and return its name."""
        self._taken.add(name)
        self.initializers[name] = array
        self._values[name] = Value(name, array.dtype, array.shape)
        return name

    def input(self, name: str, dtype: DTypeLike = np.float32, shape: Shape | None = ()) -> str:
        """Declare a graph input; an initializer of that name becomes this input."""
        self.initializers.pop(name, None)
        self._taken.add(name)
        self._inputs[name] = self._values[name] = Value(name, np.dtype(dtype), shape)
        return name

    def fresh(self, stem: str) -> str:
        """Return a name that nothing in the graph has."""
        while True:
            self._counts[stem] = self._counts.get(stem, 0) + 1
            name = f"g.{stem}.{self._counts[stem]}"
            if name not in self._taken:
                self._taken.add(name)
                return name

    def declare(self, name: str, shape: Shape | None, dtype: np.dtype[Any] | None = None) -> str:
        """State a shape, and a type, that inference cannot know, and return the name."""
        known = self._values.get(name, Value(name))
        self._values[name] = replace(known, shape=shape, dtype=dtype or known.dtype)
        return name

    # -- asking -----------------------------------------------------------------------------

    @property
    def opset(self) -> int:
        """Return the version of the standard operator set."""
        return self._graph.opset

    def shape(self, name: str) -> Shape | None:
        """Return a shape, None for an unknown dimension; None when even the rank is unknown."""
        return self._values[name].shape if name in self._values else None

    def dims(self, name: str) -> Shape:
        """Return a tensor's shape; raise CompileError when even its rank is unknown."""
        shape = self.shape(name)
        if shape is None:
            raise CompileError(
                f"expected a known rank for tensor {name!r}, shape inference found none: "
                "give the model's inputs their shapes"
            )
        return shape

    def static(self, name: str) -> tuple[int, ...] | None:
        """Return a tensor's shape if every dimension is known."""
        shape = self.shape(name)
        if shape is None or None in shape:
            return None
        return cast("tuple[int, ...]", shape)

    def rank(self, name: str) -> int:
        """Return the number of dimensions; raise CompileError when it is unknown."""
        return len(self.dims(name))

    def dtype(self, name: str) -> np.dtype[Any] | None:
        """Return a tensor's dtype where it is known."""
        return self._values[name].dtype if name in self._values else None

    def value(self, name: str) -> Tensor | None:
        """Return a constant's value, or None for a tensor known only at run time."""
        return self.initializers.get(name)

    def needs(self, name: str) -> bool:
        """Tell whether anybody wants this tensor's gradient: a rule need not emit the others."""
        return bool(name) and (self._wanted is None or name in self._wanted)

    def want(self, names: Iterable[str] | None) -> None:
        """Set what ``needs`` answers; ``backward`` calls this (None: everything is wanted)."""
        self._wanted = None if names is None else frozenset(names)

    def size(self, name: str) -> str:
        """Return the run-time shape of a tensor (int64 vector), constant where it is static."""
        static = self.static(name)
        return self.ints(*static) if static is not None else self.Shape(name)

    # -- the result -------------------------------------------------------------------------

    def graph(self, *, outputs: Iterable[str], inputs: Iterable[str] | None = None) -> Graph:
        """Return the whole graph with these outputs; inputs default to all declared, in order.

        Nothing is removed: ``passes`` drops what no output needs.
        """
        chosen = self._inputs if inputs is None else {n: self._inputs[n] for n in inputs}
        return replace(
            self._graph,
            nodes=tuple(self.nodes),
            initializers=dict(self.initializers),
            inputs=tuple(chosen.values()),
            outputs=tuple(self._values.get(name, Value(name)) for name in outputs),
            values=dict(self._values),
        )

    def _infer(self, node: Node) -> None:
        """Learn dtype and shape of a node's outputs from its schema; unknown stays unknown."""
        if node.domain or any(n and self.dtype(n) is None for n in node.inputs):
            self._values |= {n: Value(n) for n in node.outputs if n}
            return
        data = {n: self.initializers[n] for n in node.inputs if n in self.initializers}
        try:
            types = shape_inference.infer_node_outputs(
                defs.get_schema(node.op, self.opset),
                to_proto(node),
                {n: to_type(self._values[n]) for n in node.inputs if n},
                {n: numpy_helper.from_array(a, n) for n, a in data.items() if a.size <= _SMALL},
                opset_imports=[onnx.helper.make_opsetid("", self.opset)],
                ir_version=IR_VERSION,
            )
        except shape_inference.InferenceError as error:
            raise CompileError(f"cannot emit {node.label}{node.inputs}: {error}") from error
        self._values |= {name: from_type(name, proto) for name, proto in types.items()}


def _plain(value: Any) -> Any:
    """Write a dtype given as an attribute as ONNX's number for it."""
    if isinstance(value, (np.dtype, type)):
        return onnx.helper.np_dtype_to_tensor_dtype(np.dtype(value))
    return value
