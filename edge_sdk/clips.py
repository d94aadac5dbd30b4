# SPDX-License-Identifier: Apache-2.0
"""The nodes that clip gradients, found by what they do. Pure.

A clip stage of limit c is, whatever its tensors are called: the squares of some gradients summed
up, the root of the sum, c / max(root, c), and each of those gradients multiplied by that. In ONNX
the operators are ReduceSumSquare, Sum, Sqrt, Max, Div and Mul; in TFLite MUL of a tensor with
itself, SUM over all axes, ADD, SQRT, MAXIMUM, DIV and MUL, where the numbers of a gradient may be
put in another order (RESHAPE, TRANSPOSE), as that changes no sum of squares.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from edge_sdk import ranks
from edge_sdk.graphview import GraphView, Operation

_FLOAT32 = 1
_ACTIVATION = "fused_activation_function"
_MOST_TERMS = 10_000
_MOST_STAGES = 16


class Clip(NamedTuple):
    """A clip stage: the tensors it clips, each once for each parameter, and what it makes."""

    reads: tuple[str, ...]
    makes: frozenset[str]


class _Words(NamedTuple):
    """What a format calls the operators of a clip."""

    divide: str
    larger: str
    root: str
    multiply: str
    rearrange: frozenset[str]


_WORDS = {
    False: _Words("Div", "Max", "Sqrt", "Mul", frozenset({"Reshape"})),
    True: _Words("DIV", "MAXIMUM", "SQRT", "MUL", frozenset({"RESHAPE", "TRANSPOSE"})),
}


def clips(graph: GraphView, limit: float) -> list[Clip]:
    """Return the clip stages of that limit."""
    finder = _Finder(graph)
    stages = (finder.stage(node, limit) for node in graph.nodes if finder.divides(node))
    return list(islice((stage for stage in stages if stage is not None), _MOST_STAGES))


class _Finder:
    """A graph, while its clip stages are looked for."""

    def __init__(self, graph: GraphView) -> None:
        self.graph = graph
        self.is_tflite = any(node.domain == "tflite" for node in graph.nodes)
        self.words = _WORDS[self.is_tflite]
        self.makers = {name: node for node in graph.nodes for name in node.outputs}
        self.ranks: Mapping[str, int] = ranks.of(graph) if self.is_tflite else {}
        self.origins: dict[str, str] = {}
        """Of a tensor that has another's numbers, maybe in another order: that other. TFLite's."""
        for node in graph.nodes if self.is_tflite else ():
            if self._rearranges(node):
                self.origins[node.outputs[0]] = self._origin(node.inputs[0])
        self.squared: dict[str, tuple[str, ...]] = {}

    def divides(self, node: Operation) -> bool:
        return self._is(node, self.words.divide, 2)

    def stage(self, node: Operation, limit: float) -> Clip | None:
        """Read a clip stage back from its division ``limit / max(root, limit)``."""
        over = self.makers.get(node.inputs[1])
        is_share = self._is_number(node.inputs[0], limit)
        if not is_share or over is None or not self._is(over, self.words.larger, 2):
            return None
        roots = [name for name in over.inputs if not self._is_number(name, limit)]
        root = self.makers.get(roots[0]) if len(roots) == 1 else None
        if root is None or not self._is(root, self.words.root, 1):
            return None
        total = root.inputs[0]
        if total not in self.squared:
            self.squared[total] = self._squared(total)
        reads = self.squared[total]
        return Clip(reads, self._products(node.outputs[0], reads)) if reads else None

    def _squared(self, total: str) -> tuple[str, ...]:
        """Return the tensors whose squares, and nothing else, are summed up in `total`."""
        if self.is_tflite:
            return self._squared_tflite(total)
        node = self.makers.get(total)
        terms = node.inputs if node is not None and self._is(node, "Sum") else (total,)
        found = [self.makers.get(term) for term in terms]
        squares = [s for s in found if s is not None and _is_sum_of_squares(s)]
        is_all = len(squares) == len(found) and all(self._is(s, s.op, 1) for s in squares)
        return tuple(s.inputs[0] for s in squares) if is_all else ()

    def _squared_tflite(self, total: str) -> tuple[str, ...]:
        found: list[str] = []
        waiting = [total]
        while waiting and len(found) < _MOST_TERMS:
            name = self._origin(waiting.pop())
            node = self.makers.get(name)
            if node is not None and (self._is(node, "ADD", 2) or self._is(node, "ADD_N")):
                waiting += reversed(node.inputs)
                continue
            read = self._squared_term(name, node)
            if read is None:
                return ()
            found.append(read)
        return () if waiting else tuple(found)

    def _squared_term(self, name: str, node: Operation | None) -> str | None:
        """Return what `name` is the sum of all squares of."""
        square = name
        if node is not None and self._is(node, "SUM", 2):
            square, rank = node.inputs[0], self.ranks.get(node.inputs[0])
            axes = ranks.axes(self.graph, node.inputs[1], rank)
            if rank is None or axes is None or len(axes) != rank:
                return None
        elif self.ranks.get(name) != 0:
            return None
        by = self.makers.get(self._origin(square))
        if by is None:
            return None
        is_own_product = self._is(by, "MUL", 2) and by.inputs[0] == by.inputs[1]
        is_square = is_own_product or self._is(by, "SQUARE", 1)
        return self._origin(by.inputs[0]) if is_square else None

    def _products(self, factor: str, reads: Sequence[str]) -> frozenset[str]:
        factors = {factor}
        for node in self.graph.nodes:
            if self._rearranges(node) and node.inputs[0] in factors:
                factors.update(node.outputs)
        gradients = set(reads)
        return frozenset(
            node.outputs[0]
            for node in self.graph.nodes
            if self._is(node, self.words.multiply, 2)
            and not factors.isdisjoint(node.inputs)
            and not gradients.isdisjoint(map(self._origin, node.inputs))
        )

    def _origin(self, name: str) -> str:
        return self.origins.get(name, name)

    def _rearranges(self, node: Operation) -> bool:
        if node.op not in self.words.rearrange or not self._is(node, node.op, 2):
            return False
        if node.op != "TRANSPOSE":
            return True
        order = node.inputs[1]  # not every runtime refuses one that names an axis twice
        return ranks.axes(self.graph, order, ranks.length(self.graph, order)) is not None

    def _is(self, node: Operation, op: str, inputs: int | None = None) -> bool:
        if node.op != op or len(node.outputs) != 1:
            return False
        is_plain = all(a.name != _ACTIVATION for a in node.attributes)
        domains = {"tflite"} if self.is_tflite else {"", "ai.onnx"}
        return is_plain and node.domain in domains and inputs in {None, len(node.inputs)}

    def _is_number(self, name: str, value: float) -> bool:
        stored = self.graph.initializers.get(name)
        if stored is None or stored.dtype != _FLOAT32 or stored.elements != 1:
            return False
        return stored.data is not None and bytes(stored.data) == struct.pack("<f", value)


def _is_sum_of_squares(node: Operation) -> bool:
    """Say whether a node sums all squares of a tensor up, to a scalar."""
    told = [(a.name, a.number) for a in node.attributes]
    return node.op == "ReduceSumSquare" and told == [("keepdims", 0)]
