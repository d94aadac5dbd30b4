# SPDX-License-Identifier: Apache-2.0
"""Nodes in an order that lets the runtime free memory early: same nodes, same results.

onnxruntime runs nodes depth first, back from the last one in the file whose results nobody reads,
later ones first (`lifetimes`). So the place of a node in the file says what runs before what: the
gradients of the last layers should be used up before those of earlier layers are computed, and a
mask should be made when its gradient is there, not on the way forward. Pure.
"""

from __future__ import annotations

from dataclasses import replace
from heapq import heapify, heappop, heappush

from coordinator.compiler.graph import Graph
from coordinator.compiler.lifetimes import schedule


def frees_early(graph: Graph, y: str, rows: int) -> Graph:
    """Return the graph in the order that takes the least memory on `rows` rows.

    `y`: the targets, on which gradients depend and nothing of the forward pass. The graph itself
    comes back where its own order is as good.

    Requires: nodes in topological order. Ensures: the same.
    """
    return min((graph, late_last(graph, y)), key=lambda g: schedule(g, rows).resident())


def late_last(graph: Graph, y: str) -> Graph:
    """Place what depends on `y` last, and of that what needs fewest nodes before it the very last.

    Requires: nodes in topological order. Ensures: the same.
    """
    made = {name: i for i, node in enumerate(graph.nodes) for name in node.outputs if name}
    reads = [{made[name] for name in node.inputs if name in made} for node in graph.nodes]
    needs, late = _needs(reads), _late(graph, y)
    readers = [0] * len(reads)
    for these in reads:
        for i in these:
            readers[i] += 1
    ready = [(not late[i], needs[i], -i) for i, count in enumerate(readers) if not count]
    heapify(ready)
    backwards: list[int] = []
    while ready:
        i = -heappop(ready)[2]
        backwards.append(i)
        for j in reads[i]:
            readers[j] -= 1
            if not readers[j]:
                heappush(ready, (not late[j], needs[j], -j))
    return replace(graph, nodes=tuple(graph.nodes[i] for i in reversed(backwards)))


def _needs(reads: list[set[int]]) -> list[int]:
    """Return how many nodes each one needs, itself included."""
    before: list[int] = []  # a bit for each node
    for i, these in enumerate(reads):
        bits = 1 << i
        for j in these:
            bits |= before[j]
        before.append(bits)
    return [bits.bit_count() for bits in before]


def _late(graph: Graph, y: str) -> list[bool]:
    depends, found = {y}, list[bool]()
    for node in graph.nodes:
        found.append(not depends.isdisjoint(node.inputs))
        if found[-1]:
            depends.update(node.outputs)
    return found
