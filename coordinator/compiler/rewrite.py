# SPDX-License-Identifier: Apache-2.0
"""Operators that are spelled in simpler ones before they are differentiated.

A rewrite is a rule of the table REWRITES; it emits the same computation and returns its outputs:

    @rewrite("MeanVarianceNormalization")
    def _(e: Emit, n: Node) -> tuple[str, ...]: ...

Only what lies between a trained tensor and the loss is rewritten: a frozen LSTM keeps its kernel,
and so does the model that predicts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

from coordinator.compiler.emit import Emit
from coordinator.compiler.graph import Graph, Node
from coordinator.compiler.vjp import downstream

Rewrite: TypeAlias = Callable[[Emit, Node], tuple[str, ...]]
"""Emit what a node computes; return its outputs' new names, at least those that are used."""

REWRITES: dict[str, Rewrite] = {}
"""The table: operator (``LSTM``, ``com.microsoft.FastGelu``) to its spelling."""


def rewrite(*ops: str) -> Callable[[Rewrite], Rewrite]:
    """Register a rewrite."""

    def register(rule: Rewrite) -> Rewrite:
        REWRITES.update(dict.fromkeys(ops, rule))
        return rule

    return register


def rewritten(graph: Graph, leaves: Sequence[str]) -> Graph:
    """Return the graph with every such operator spelled out that depends on a leaf.

    Requires: nodes in topological order, shapes inferred. Ensures: the same, and the names of what
    those operators made.
    """
    while True:
        reached = downstream(graph.nodes, leaves)
        asked = [n for n in graph.nodes if n.kind in REWRITES and reached.intersection(n.inputs)]
        if not asked:
            return graph
        ready = [n for n in asked if all(graph.shape(x) is not None for x in n.inputs if x)]
        graph = _spelled(graph, ready or asked[:1])


def _spelled(graph: Graph, nodes: Sequence[Node]) -> Graph:
    left = tuple(n for n in graph.nodes if all(n is not other for other in nodes))
    e = Emit(replace(graph, nodes=left))
    for node in nodes:
        for old, new in zip(node.outputs, REWRITES[node.kind](e, node), strict=False):
            if old:
                e.op("Identity", [new], outputs=[old])
    outputs = [value.name for value in graph.outputs]
    return e.graph(outputs=outputs).sorted().inferred()
