# SPDX-License-Identifier: Apache-2.0
"""Activations computed twice instead of kept: less memory for up to a third more arithmetic.

The forward pass is cut into segments. Of all but the last only what crosses a cut is kept; when the
backward pass comes to a segment, it is computed again from there (Chen et al. 2016, "Training deep
nets with sublinear memory cost"). Plain copies of nodes would not do: onnxruntime merges equal ones
back into one, and could run them at once. So a copy reads what was kept through a Reshape to the
shape that it has, plus a zero that is made of the shape of a gradient: no number moves, but the
copy is another node, and it cannot run before that gradient is there. Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from coordinator.compiler.body import bodies, body_of
from coordinator.compiler.graph import Graph, Node
from coordinator.compiler.lifetimes import at_batch, bytes_of, schedule
from coordinator.compiler.memory import NODE_BYTES
from coordinator.compiler.order import frees_early, late_last

SEGMENTS = (2, 3, 4, 5, 6, 8, 10, 12)
"""Into how many segments a forward pass may be cut."""

_AGAIN = "again."


class _Pass(NamedTuple):
    """Nodes of a training graph by what they are for.

    Attributes:
        forward: what makes the loss of x, in order, before y comes in.
        back: what else depends on x, in order: the loss itself, gradients, masks.
        late: the tensors that depend on y.
    """

    forward: list[Node]
    back: list[Node]
    late: set[str]


def arranged(graph: Graph, rows: int, *, again: bool) -> Graph:
    """Return a whole training graph in the order that takes least memory on `rows` rows.

    `again`: compute activations twice where that saves memory, too. In a graph that goes over
    slices it is the body that is arranged.
    """
    if not any(map(body_of, graph.nodes)):
        return _arranged(graph, "x", "y", rows, again=again)
    return replace(graph, nodes=tuple(_inside(node, rows, again=again) for node in graph.nodes))


def copied(graph: Graph) -> int:
    """Return how many nodes of a graph and its bodies compute again what was computed before."""
    parts = (graph, *bodies(graph))
    return sum(node.outputs[0].startswith(_AGAIN) for part in parts for node in part.nodes)


def _inside(node: Node, rows: int, *, again: bool) -> Node:
    body = body_of(node)
    if body is None:
        return node
    x, y = (value.name for value in body.graph.inputs[:2])
    graph = _arranged(body.graph, x, y, min(rows, body.rows), again=again)
    return replace(node, attributes={**node.attributes, "body": replace(body, graph=graph)})


def _arranged(graph: Graph, x: str, y: str, rows: int, *, again: bool) -> Graph:
    return recomputed(graph, x, y, rows) if again else frees_early(graph, y, rows)


def recomputed(graph: Graph, x: str, y: str, rows: int) -> Graph:
    """Return the same step with the cuts that take the least memory on `rows` rows.

    `x`, `y`: the names of the examples. The nodes come in an order that frees early. Where no cut
    saves anything the graph has none.

    Requires: nodes in topological order, and no pass afterwards that drops Reshapes.
    """
    parts, sized = _parts(graph, x, y), at_batch(graph, rows)
    best = frees_early(graph, y, rows)
    least = _bytes(best, rows)
    for cuts in sorted({tuple(_cuts(parts, sized, count)) for count in SEGMENTS} - {()}):
        made = late_last(_with_copies(graph, parts, cuts, x), y)
        takes = _bytes(made, rows)
        if takes < least:
            best, least = made, takes
    return best


def _bytes(graph: Graph, rows: int) -> int:
    """Return what a graph's activations and its nodes take together."""
    return schedule(graph, rows).resident() + NODE_BYTES * len(graph.nodes)


def _parts(graph: Graph, x: str, y: str) -> _Pass:
    early, late = {x}, {y}
    for node in graph.nodes:
        if late.intersection(node.inputs):
            late.update(node.outputs)
        elif early.intersection(node.inputs):
            early.update(node.outputs)
    asked = {graph.outputs[0].name}
    for node in reversed(graph.nodes):
        if asked.intersection(node.outputs):
            asked.update(node.inputs)
    on_x = [n for n in graph.nodes if (early | late).intersection(n.outputs)]
    core = [n for n in on_x if early.intersection(n.outputs) and asked.intersection(n.outputs)]
    ids = {id(n) for n in core}
    return _Pass(core, [n for n in on_x if id(n) not in ids], late)


def _cuts(parts: _Pass, sized: Graph, count: int) -> Iterator[int]:
    """Yield the places to cut the forward nodes at: where little crosses, near equal shares."""
    made = {name: i for i, node in enumerate(parts.forward) for name in node.outputs if name}
    kept = {name for node in parts.back for name in node.inputs if name in made}
    last = {name: i for i, node in enumerate(parts.forward) for name in node.inputs if name in made}
    weight = [0] * len(parts.forward)
    crossing = [0] * (len(parts.forward) + 1)
    for name, i in made.items():
        size = bytes_of(sized, name)
        weight[i] += size if name in kept else 0
        for at in range(i + 1, last.get(name, i) + 1):
            crossing[at] += size
    so_far = np.cumsum([0, *weight])[:-1] / max(sum(weight), 1)
    for j in range(1, count):
        near = [i for i, share in enumerate(so_far) if i and abs(share * count - j) <= 0.5]
        if near:
            yield min(near, key=lambda i: (crossing[i], abs(so_far[i] * count - j)))


def _with_copies(graph: Graph, parts: _Pass, cuts: Sequence[int], x: str) -> Graph:
    """Return the graph with all segments but the last computed again for the backward pass."""
    segment = {
        name: sum(i >= cut for cut in cuts)
        for i, node in enumerate(parts.forward)
        for name in node.outputs
        if name
    }
    last, kept = len(cuts), _crossing(parts.forward, segment)
    again = {
        name
        for node in parts.back
        for name in node.inputs
        if segment.get(name, last) < last and name not in kept
    }
    copies: list[Node] = []
    alias: dict[str, str] = {}
    for s, tie in _ties(graph, parts, segment, again).items():
        asked = [name for name in again if segment[name] == s]
        stays = {name: name in kept or at != s for name, at in segment.items()} | {x: True}
        copies += _copies(parts, s, tie, stays, asked)
        alias |= {name: _named(s, name) for name in asked}
    back = {id(node) for node in parts.back}
    nodes = [
        replace(n, inputs=tuple(alias.get(i, i) for i in n.inputs)) if id(n) in back else n
        for n in graph.nodes
    ]
    return replace(graph, nodes=(*nodes, *copies)).sorted()


def _crossing(forward: Sequence[Node], segment: Mapping[str, int]) -> set[str]:
    """Return what nodes of later segments read."""
    return {
        name
        for node in forward
        for name in node.inputs
        if name in segment and segment[name] < segment[_first(node)]
    }


def _first(node: Node) -> str:
    return next(name for name in node.outputs if name)


def _ties(
    graph: Graph, parts: _Pass, segment: Mapping[str, int], again: Collection[str]
) -> dict[int, str]:
    """Return, for each segment that is computed again, a gradient that is there just before.

    It is one that the first node needs which also needs something of the segment; nothing that node
    needs can have come from the segment.
    """
    asks: dict[str, set[int]] = {name: {segment[name]} for name in again}
    ties: dict[int, str] = {}
    for node in parts.back:
        asked = {s for name in node.inputs for s in asks.get(name, ())}
        gradients = [n for n in node.inputs if n in parts.late and graph.shape(n)]
        if not parts.late.intersection(node.outputs):  # a mask: whoever reads it asks
            for out in node.outputs:
                asks[out] = asked
        elif gradients:
            for s in asked:
                ties.setdefault(s, gradients[0])
        else:
            ties.update(dict.fromkeys(asked - ties.keys(), ""))
    return {s: name for s, name in ties.items() if name}


def _copies(
    parts: _Pass, s: int, tie: str, stays: Mapping[str, bool], asked: Collection[str]
) -> Iterator[Node]:
    """Yield copies of what makes the `asked` tensors of one segment.

    Args:
        parts: the training graph's nodes.
        s: the segment.
        tie: the gradient to wait for.
        stays: tensors that depend on x: whether they are kept, or there before the segment.
        asked: those whose copies are wanted.
    """
    needed, chosen = set(asked), list[Node]()
    for node in reversed(parts.forward):
        if needed.intersection(node.outputs):
            chosen.append(node)
            needed.update(name for name in node.inputs if not stays.get(name, True))
    shape, zero = f"{_AGAIN}{s}.shape", f"{_AGAIN}{s}.zero"
    yield Node("Shape", (tie,), (shape,), {"start": 0, "end": 1})
    yield Node("Sub", (shape, shape), (zero,))
    tied = dict.fromkeys(n for node in reversed(chosen) for n in node.inputs if stays.get(n))
    for name in tied:
        whole, same = _named(s, f"{name}/shape"), _named(s, f"{name}/same")
        yield Node("Shape", (name,), (whole,))
        yield Node("Add", (whole, zero), (same,))
        yield Node("Reshape", (name, same), (_named(s, name),))
    for node in reversed(chosen):
        inputs = tuple(_named(s, n) if n in stays else n for n in node.inputs)
        outputs = tuple(_named(s, n) if n else n for n in node.outputs)
        yield replace(node, inputs=inputs, outputs=outputs, name="")


def _named(s: int, name: str) -> str:
    return f"{_AGAIN}{s}.{name}"
