# SPDX-License-Identifier: Apache-2.0
"""Gradients of the rows that are trained, computed as such: not of all rows, to take some of them.

Where rows of a tensor learn, its gradient is taken whole and rows are gathered from it. A row of a
product is the product of a row, so the gather moves back through products, sums and reshapes to
what they are made of: most often the gradient that reaches the layer, of which a share of channels
is then enough.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from coordinator.compiler.emit import Emit
from coordinator.compiler.graph import Node

_DEEPEST = 8  # nodes between a gradient and what it is made of


def narrow(e: Emit, gradients: Sequence[str]) -> list[str]:
    """Return the gradients, those of rows computed from rows.

    Requires: rows are taken by GatherND with constant indices, as the rule of ScatterND does.
    """
    makers = {name: node for node in e.nodes for name in node.outputs if name}
    return [_narrowed(e, makers, name) for name in gradients]


def _narrowed(e: Emit, makers: dict[str, Node], name: str) -> str:
    node = makers.get(name)
    if node is not None and node.kind == "Transpose":
        inner = _narrowed(e, makers, node.inputs[0])
        return name if inner == node.inputs[0] else e.Transpose(inner, **node.attributes)
    if node is None or node.kind != "GatherND" or node.attr("batch_dims", 0):
        return name
    places = e.value(node.inputs[1])
    if places is None or places.ndim != 2 or places.shape[1] != 1:
        return name
    taken = _Rows(e, makers, places.reshape(-1)).take(node.inputs[0], 0, _DEEPEST)
    return name if taken is None else e.declare(taken, e.shape(name))


class _Rows:
    """Takes the same rows of tensors, along any axis of them."""

    def __init__(self, e: Emit, makers: dict[str, Node], rows: NDArray[np.int64]) -> None:
        self.e, self.makers, self.rows = e, makers, rows

    def take(self, name: str, axis: int, left: int) -> str | None:
        """Return the rows of a tensor by way of what it is made of; None where that is no way."""
        node = self.makers.get(name)
        shape = self.e.shape(name)
        if node is None or shape is None or not left or shape[axis] is None:
            return None
        ways = {
            "Reshape": self._reshape,
            "Transpose": self._transpose,
            "Gemm": self._gemm,
            "MatMul": self._matmul,
            "ReduceSum": self._sum,
        }
        return ways[node.kind](node, axis, left - 1) if node.kind in ways else None

    def _rows_of(self, name: str, axis: int, left: int) -> str:
        """Return the rows of a tensor, gathered from it if there is no better way."""
        found = self.take(name, axis, left)
        if found is not None:
            return found
        dims = list(self.e.dims(name))
        dims[axis] = len(self.rows)
        places = self.e.const(self.rows, np.int64)
        return self.e.declare(self.e.Gather(name, places, axis=axis), tuple(dims))

    def _reshape(self, node: Node, axis: int, left: int) -> str | None:
        before, after = self.e.shape(node.inputs[0]), self.e.shape(node.outputs[0])
        target = self.e.value(node.inputs[1])
        if before is None or after is None or target is None or node.attr("allowzero", 0):
            return None
        if axis or not before or before[0] != after[0] or (target == 0).any():
            return None
        to = target.copy()
        to[0] = len(self.rows)
        taken = self._rows_of(node.inputs[0], 0, left)
        return self.e.declare(self.e.Reshape(taken, self.e.ints(*to)), (len(self.rows), *after[1:]))

    def _transpose(self, node: Node, axis: int, left: int) -> str | None:
        perm = node.attr("perm")
        if perm is None:
            return None
        taken = self._rows_of(node.inputs[0], perm[axis], left)
        return self.e.Transpose(taken, perm=perm)

    def _gemm(self, node: Node, axis: int, left: int) -> str | None:
        if node.input(2):
            return None
        a, b = node.inputs[:2]
        if axis == 0:
            a = self._rows_of(a, node.attr("transA", 0), left)
        else:
            b = self._rows_of(b, 1 - node.attr("transB", 0), left)
        (made,) = self.e.op("Gemm", [a, b], **node.attributes)
        return made

    def _matmul(self, node: Node, axis: int, left: int) -> str | None:
        a, b = node.inputs
        ranks = self.e.rank(a), self.e.rank(b)
        if ranks == (2, 2):
            if axis == 0:
                return self.e.MatMul(self._rows_of(a, 0, left), b)
            return self.e.MatMul(a, self._rows_of(b, 1, left))
        whole = self.e.dims(node.outputs[0])[0]
        if axis or ranks != (3, 3) or {self.e.dims(a)[0], self.e.dims(b)[0]} != {whole}:
            return None
        return self.e.MatMul(self._rows_of(a, 0, left), self._rows_of(b, 0, left))

    def _sum(self, node: Node, axis: int, left: int) -> str | None:
        axes = self.e.value(node.inputs[1]) if node.input(1) else None
        if axes is None:
            return None
        rank = self.e.rank(node.inputs[0])
        gone = {int(i) % rank for i in axes}
        kept = (
            [*range(rank)]
            if node.attr("keepdims", 1)
            else [i for i in range(rank) if i not in gone]
        )
        if kept[axis] in gone:
            return None
        taken = self._rows_of(node.inputs[0], kept[axis], left)
        (made,) = self.e.op("ReduceSum", [taken, *node.inputs[1:]], **node.attributes)
        return made
