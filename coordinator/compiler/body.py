# SPDX-License-Identifier: Apache-2.0
"""The body of a Loop over slices of a batch, as the compiler holds it and as ONNX spells it.

A Loop's node lists what its body reads from outside behind the Loop's own inputs, so that passes
see where everything comes from; the file does not. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
from onnx import helper, numpy_helper

from coordinator.compiler.graph import Graph, Node, Value, nested, to_proto, to_type

_LOOSE = 2  # inputs of a Loop before the carried ones: trip count and condition
_TURN, _GOES, _ROWS, _AXIS = "g.turn", ("g.goes", "g.goes.on"), "g.rows", "g.axis"


@dataclass(frozen=True)
class Body:
    """One turn of a Loop over slices of a batch.

    Attributes:
        graph: its inputs are the slice of x, the slice of y, the sums so far, and what it reads
            from outside; its outputs the sums after this turn. What it stores and makes has names
            that nothing outside has.
        rows: of a slice; the last one may have fewer.
        sums: how many tensors are carried.
    """

    graph: Graph = field(repr=False)
    rows: int
    sums: int

    @property
    def taken(self) -> int:
        """Return how many of the node's inputs are the Loop's own; the others are read inside."""
        return _LOOSE + self.sums

    def to_proto(self, read: Sequence[str]) -> onnx.GraphProto:
        """Write the body; `read`: x, y and what else it reads, by their names outside."""
        cuts, carried = self.graph.inputs[:2], self.graph.inputs[2 : 2 + self.sums]
        captured = self.graph.inputs[2 + self.sums :]
        names = {v.name: name for v, name in zip(captured, read[2:], strict=True)}
        goes = [helper.make_tensor_value_info(n, onnx.TensorProto.BOOL, []) for n in _GOES]
        turn = helper.make_tensor_value_info(_TURN, onnx.TensorProto.INT64, [])
        stored = {_ROWS: np.array([self.rows], np.int64), _AXIS: np.array([0], np.int64)}
        return helper.make_graph(
            [
                *_slicing({v.name: name for v, name in zip(cuts, read[:2], strict=True)}),
                *(to_proto(_reading(node, names)) for node in self.graph.nodes),
            ],
            "turn",
            [turn, goes[0], *map(_loose, carried)],
            [goes[1], *map(_loose, self.graph.outputs)],
            [
                numpy_helper.from_array(a, n)
                for n, a in {**stored, **self.graph.initializers}.items()
            ],
        )


def body_of(node: Node) -> Body | None:
    """Return the body of a Loop over slices; None for any other node."""
    found = nested(node)
    return found if isinstance(found, Body) else None


def bodies(graph: Graph) -> list[Graph]:
    """Return the graphs of all bodies in a graph."""
    return [body.graph for node in graph.nodes if (body := body_of(node)) is not None]


def _slicing(sources: Mapping[str, str]) -> list[onnx.NodeProto]:
    """Cut this turn's rows out of x and y (Slice itself stops at the end), and go on."""
    make = helper.make_node
    return [
        make("Unsqueeze", [_TURN, _AXIS], ["g.turn.1"]),
        make("Mul", ["g.turn.1", _ROWS], ["g.first"]),
        make("Add", ["g.first", _ROWS], ["g.end"]),
        *(make("Slice", [x, "g.first", "g.end", _AXIS], [cut]) for cut, x in sources.items()),
        make("Identity", [_GOES[0]], [_GOES[1]]),
    ]


def _reading(node: Node, names: Mapping[str, str]) -> Node:
    return replace(node, inputs=tuple(names.get(name, name) for name in node.inputs))


def _loose(value: Value) -> onnx.ValueInfoProto:
    """Say a sum's type and nothing of its shape: it starts as a scalar."""
    return helper.make_value_info(value.name, to_type(replace(value, shape=None)))
