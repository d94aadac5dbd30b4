# SPDX-License-Identifier: Apache-2.0
"""Sums that a product can start from: ``Gemm(a, b) + c * v`` is one Gemm that adds to ``v``.

A step of momentum on a dense layer, ``decay * v + gradient``, is that, and so is plain descent,
``p + step``: neither then needs room for the gradient, nor a pass over it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from coordinator.compiler.graph import Graph, Node, Tensor, Value


class _Product(NamedTuple):
    """A Gemm without a third input, and the Reshape that alone reads it, if any."""

    gemm: Node
    reshape: Node | None


def start_products_from_sums(graph: Graph) -> Graph:
    """Let products add to what would be added to them.

    Requires: nodes in topological order, shapes of sums known. Ensures: the same numbers, up to the
    order of sums; each Gemm that took over a sum stands where the sum stood.
    """
    return _Sums(graph).run()


class _Sums:
    """One walk over a graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.stored = dict(graph.initializers)
        self.values = dict(graph.values)
        self.makers = dict(graph.producers)
        self.uses = Counter(name for node in graph.nodes for name in node.inputs if name)
        self.uses.update(value.name for value in graph.outputs)

    def run(self) -> Graph:
        made: dict[str, list[Node]] = {}
        gone: set[str] = set()
        for node in self.graph.nodes:
            found = self._found(node) if node.kind == "Add" else None
            if found is not None:
                made[node.outputs[0]], absorbed = found
                gone.update(absorbed)
        nodes: list[Node] = []
        for node in self.graph.nodes:
            if node.outputs[0] not in gone:
                nodes += made.get(node.outputs[0], [node])
        return replace(self.graph, nodes=tuple(nodes), initializers=self.stored, values=self.values)

    def _found(self, node: Node) -> tuple[list[Node], list[str]] | None:
        """Return what replaces a sum, and the outputs of the nodes that it makes needless."""
        for one, other in (node.inputs, node.inputs[::-1]):
            product = self._product(one)
            if product is None or self.graph.shape(one) != self.graph.shape(other):
                continue
            start, factor, absorbed = self._scaled(other)
            absorbed += [
                product.gemm.outputs[0],
                *(product.reshape.outputs if product.reshape else ()),
            ]
            return self._joined(node.outputs[0], product, start, factor), absorbed
        return None

    def _product(self, name: str) -> _Product | None:
        """Read back a Gemm, or one Reshape of it, of static shape that nothing else reads."""
        node = self.makers.get(name)
        if node is None or self.uses[name] != 1 or None in (self.graph.shape(name) or (None,)):
            return None
        if node.kind == "Reshape":
            inner = self._product(node.inputs[0])
            return inner._replace(reshape=node) if inner and inner.reshape is None else None
        return _Product(node, None) if node.kind == "Gemm" and not node.input(2) else None

    def _scaled(self, name: str) -> tuple[str, float, list[str]]:
        """Read ``c * v`` back, for a stored number c that nothing else needs multiplied."""
        node = self.makers.get(name)
        if node is not None and node.kind == "Mul" and self.uses[name] == 1:
            for v, by in (node.inputs, node.inputs[::-1]):
                number: Tensor | None = self.stored.get(by)
                same = self.graph.shape(v) == self.graph.shape(name)
                if number is not None and number.size == 1 and number.dtype == np.float32 and same:
                    return v, float(number.reshape(())), [name]
        return name, 1.0, []

    def _joined(self, out: str, product: _Product, start: str, factor: float) -> list[Node]:
        gemm, reshape = product
        beta = {} if factor == 1.0 else {"beta": factor}
        attributes = {**gemm.attributes, **beta}
        if reshape is None:
            return [Node("Gemm", (*gemm.inputs[:2], start), (out,), attributes)]
        shape = self.graph.shape(gemm.outputs[0]) or ()
        flat, total, sizes = f"{out}.start", f"{out}.flat", f"{out}.sizes"
        self.stored[sizes] = np.array(shape, np.int64)
        for name in (flat, total):
            self.values[name] = Value(name, np.dtype(np.float32), shape)
        return [
            Node("Reshape", (start, sizes), (flat,), {}),
            Node("Gemm", (*gemm.inputs[:2], flat), (total,), attributes),
            replace(reshape, inputs=(total, reshape.inputs[1]), outputs=(out,)),
        ]
