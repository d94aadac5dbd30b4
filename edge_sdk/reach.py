# SPDX-License-Identifier: Apache-2.0
"""What can get where in a graph, and the nodes that clip gradients, found by what they do. Pure.

A clip stage of limit c is, whatever its tensors are called: the squares of some gradients summed
(ReduceSumSquare, Sum), the root of the sum (Sqrt), c / max(root, c), and each of those gradients
multiplied by that. Cut at these products, nothing of an example may get past.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from edge_sdk.onnxfile import OnnxFile, Operation, Stored

_FLOAT32 = 1


class Clip(NamedTuple):
    """A clip stage: the tensors it clips, each once for each parameter, and what it makes."""

    reads: tuple[str, ...]
    makes: frozenset[str]


def reached(
    nodes: Sequence[Operation], sources: Collection[str], cut: Collection[str] = ()
) -> set[str]:
    """Return the tensors that depend on the sources, not counting ways through the cut ones.

    Requires: nodes in topological order. Every input of a node counts, for its shape if nothing
    else, and whatever a Loop's body reads reaches all that the Loop makes.
    """
    found = set(sources) - {""}
    for node in nodes:
        if not found.isdisjoint(node.reads):
            found.update(name for name in node.outputs if name and name not in cut)
    return found


def clips(graph: OnnxFile, limit: float) -> list[Clip]:
    """Return the clip stages of that limit."""
    makers = {name: node for node in graph.nodes for name in node.outputs}
    found = [_clip(graph, makers, node, limit) for node in graph.nodes if _is(node, "Div", 2)]
    return [clip for clip in found if clip is not None]


def _clip(
    graph: OnnxFile, makers: Mapping[str, Operation], node: Operation, limit: float
) -> Clip | None:
    """Read a clip stage back from its division ``limit / max(root, limit)``."""
    over = makers.get(node.inputs[1])
    if not _is_number(graph, node.inputs[0], limit) or over is None or not _is(over, "Max", 2):
        return None
    roots = [name for name in over.inputs if not _is_number(graph, name, limit)]
    root = makers.get(roots[0]) if len(roots) == 1 else None
    if root is None or not _is(root, "Sqrt", 1):
        return None
    reads = _squared(makers, root.inputs[0])
    by = node.outputs[0]
    reshaped = (n for n in graph.nodes if _is(n, "Reshape", 2) and n.inputs[0] == by)
    factors = {by, *(n.outputs[0] for n in reshaped)}
    return Clip(reads, _products(graph.nodes, factors, reads)) if reads else None


def _squared(makers: Mapping[str, Operation], total: str) -> tuple[str, ...]:
    """Return the tensors whose squares, and nothing else, are summed up in `total`."""
    node = makers.get(total)
    terms = node.inputs if node is not None and _is(node, "Sum") else (total,)
    squares = [makers.get(term) for term in terms]
    if not all(s is not None and _is(s, "ReduceSumSquare", 1) and _is_total(s) for s in squares):
        return ()
    return tuple(s.inputs[0] for s in squares if s is not None)


def _is_total(node: Operation) -> bool:
    """Say whether a reduction is over all axes, to a scalar."""
    return [(a.name, a.number) for a in node.attributes] == [("keepdims", 0)]


def _products(
    nodes: Sequence[Operation], factors: set[str], reads: Collection[str]
) -> frozenset[str]:
    return frozenset(
        node.outputs[0]
        for node in nodes
        if _is(node, "Mul", 2)
        and not factors.isdisjoint(node.inputs)
        and not set(reads).isdisjoint(node.inputs)
    )


def _is(node: Operation, op: str, inputs: int | None = None) -> bool:
    is_plain = node.domain in {"", "ai.onnx"} and len(node.outputs) == 1
    return node.op == op and is_plain and inputs in {None, len(node.inputs)}


def _is_number(graph: OnnxFile, name: str, value: float) -> bool:
    stored: Stored | None = graph.initializers.get(name)
    if stored is None or stored.dtype != _FLOAT32 or stored.elements != 1 or stored.data is None:
        return False
    return bytes(stored.data) == struct.pack("<f", value)
