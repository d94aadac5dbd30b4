# SPDX-License-Identifier: Apache-2.0
"""Float32 masters of quantized weights: rounded in the forward pass, trained straight through.

The gradient by the rounded weight is used as the gradient by its master (Bengio et al. 2013; Jacob
et al. 2018; what activations do is in `rules/quantize.py`). The scale of a trained weight follows
its master, so that a growing weight is never cut off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from coordinator.compiler.emit import Emit
from coordinator.compiler.graph import Graph
from coordinator.compiler.weights import Quantized
from edge_sdk.requantize import TINY, limits

_MOVES = frozenset(
    {"Flatten", "Gather", "MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
)
"""Operators that move numbers and change none."""


def quantized_master(e: Emit, master: str, scheme: Quantized) -> str:
    """Emit the float32 values that a master's quantized form stands for, and return their name.

    The scale is ``max(max(W) / (qmax - zp), max(-W) / (zp - qmin))`` per tensor or channel, in
    float32, exactly as `edge_sdk.requantize` derives it; a side without room is cut off.
    """
    if scheme.dtype == np.int32:  # a bias step is input scale times weight scale: below notice
        return master
    rank = e.rank(master)
    least, most = limits(str(scheme.dtype))
    above = (most - scheme.zero_point).astype(np.float32)
    below = (scheme.zero_point - least).astype(np.float32)
    axes = None if scheme.axis is None else e.ints(*(i for i in range(rank) if i != scheme.axis))
    scale = e.Max(*_sides(e, master, scheme, axes, (above, below)), e.const(TINY))
    steps = e.Round(e.Div(master, scale))
    if not above.all():
        steps = e.Min(steps, _spread(e, above, scheme, rank))
    if not below.all():
        steps = e.Max(steps, _spread(e, -below, scheme, rank))
    return e.Mul(steps, scale)


def drop_requantize(graph: Graph, leaves: Sequence[str]) -> Graph:
    """Drop quantizing again what has moved, not changed, since it was quantized by the same scale.

    Only where gradients flow: below, onnxruntime wants the pair around each integer kernel.

    Requires: equal scales share a name (`merge_equal`). Ensures: the same numbers.
    """
    learning, outputs = set(leaves), {value.name for value in graph.outputs}
    lattice: dict[str, tuple[str, ...]] = {}  # tensor: the scale and zero point it lies on
    quantized: dict[str, tuple[str, ...]] = {}  # integers: what they were made of
    alias: dict[str, str] = {}
    kept = []
    for old in graph.nodes:
        node = replace(old, inputs=tuple(alias.get(name, name) for name in old.inputs))
        first, out = node.input(0), node.outputs[0]
        if learning.intersection(node.inputs):
            learning.update(node.outputs)
        if node.kind == "QuantizeLinear":
            quantized[out] = node.inputs
        elif node.kind == "DequantizeLinear":
            x, *scheme = quantized.get(first, ("",))
            lattice[out] = node.inputs[1:]
            if (
                x in learning
                and lattice.get(x) == tuple(scheme) == lattice[out]
                and out not in outputs
            ):
                alias[out] = x
                continue
        elif node.kind in _MOVES and first in lattice:
            lattice[out] = lattice[first]
        kept.append(node)
    return replace(graph, nodes=tuple(kept))


def quantize_late(graph: Graph, leaves: Sequence[str]) -> Graph:
    """Move a quantize-dequantize pair past what only moves numbers, pooling first.

    Rounding is monotone, so the largest of the rounded is the rounded largest; the pair then works
    on fewer numbers, and the runtime pools floats, which it does much faster than integers.

    Requires: nodes in topological order. Ensures: the same numbers, where gradients flow.
    """
    learning = _downstream(graph, leaves)
    outputs = {value.name for value in graph.outputs}
    nodes = {node.outputs[0]: node for node in graph.nodes}  # in order; replaced as pairs move
    for out, node in list(nodes.items()):
        back = nodes.get(node.input(0))
        if node.kind not in _MOVES or len(node.outputs) > 1 or back is None:
            continue
        there = nodes.get(back.inputs[0])
        is_pair = back.kind == "DequantizeLinear" and there and there.kind == "QuantizeLinear"
        only = [len(graph.uses.get(name, ())) == 1 for name in back.inputs[:1] + back.outputs]
        if not is_pair or not all(only) or outputs & {*back.outputs, *back.inputs[:1]}:
            continue
        if there is None or there.inputs[0] not in learning:
            continue
        moved, q = f"{out}.moved", there.outputs[0]
        learning.add(moved)
        for name in (q, back.outputs[0], out):
            del nodes[name]
        nodes[moved] = replace(node, inputs=(there.inputs[0], *node.inputs[1:]), outputs=(moved,))
        nodes[q] = replace(there, inputs=(moved, *there.inputs[1:]))
        nodes[out] = replace(back, outputs=(out,))
    return replace(graph, nodes=tuple(nodes.values())).sorted()


def unsigned(graph: Graph) -> Graph:
    """Hold activations as uint8 with a zero point 128 higher: the same numbers, one type for all.

    onnxruntime on x86 does so itself, but not where several nodes read an activation, as backward
    passes do; the layer before, its types mixed, would then be computed in floats.

    Ensures: the same numbers; what is not read by DequantizeLinear alone keeps its type.
    """
    nodes, stored, raised = list(graph.nodes), dict(graph.initializers), dict[str, str]()
    kept = {value.name for value in graph.outputs}
    for node in graph.nodes:
        out, zero = node.outputs[0], graph.initializers.get(node.input(2))
        readers = graph.uses.get(out, ())
        if node.kind != "QuantizeLinear" or zero is None or zero.dtype != np.int8 or out in kept:
            continue
        if all(n.kind == "DequantizeLinear" and n.inputs[1:] == node.inputs[1:] for n in readers):
            name = f"g.unsigned.{node.inputs[2]}"
            stored[name] = (zero.astype(np.int16) + 128).astype(np.uint8)
            raised |= {out: name, **{n.outputs[0]: name for n in readers}}
    for i, node in enumerate(nodes):
        if node.outputs[0] in raised:
            nodes[i] = replace(node, inputs=(*node.inputs[:2], raised[node.outputs[0]]))
    return replace(graph, nodes=tuple(nodes), initializers=stored)


def _downstream(graph: Graph, leaves: Sequence[str]) -> set[str]:
    """Return every tensor that depends on a leaf."""
    found = set(leaves)
    for node in graph.nodes:
        if found.intersection(node.inputs):
            found.update(node.outputs)
    return found


def _sides(
    e: Emit, master: str, scheme: Quantized, axes: str | None, room: tuple[Any, Any]
) -> list[str]:
    """Emit the scale that each side of zero asks for; where both have equal room, one is enough."""
    above, below = room
    rank, keep = e.rank(master), int(axes is not None)
    if (above == below).all():
        widest = e.ReduceMax(e.Abs(master), axes, keepdims=keep)
        return [e.Div(widest, _spread(e, above, scheme, rank))]
    sides = []
    if above.any():
        divisor = np.where(above > 0, above, np.float32(np.inf))
        most = e.ReduceMax(master, axes, keepdims=keep)
        sides.append(e.Div(most, _spread(e, divisor, scheme, rank)))
    if below.any():
        divisor = np.where(below > 0, below, np.float32(np.inf))
        least = e.Neg(e.ReduceMin(master, axes, keepdims=keep))
        sides.append(e.Div(least, _spread(e, divisor, scheme, rank)))
    return sides


def _spread(e: Emit, values: Any, scheme: Quantized, rank: int) -> str:
    """Return a per-channel constant that broadcasts over the master; equal ones become a scalar."""
    if scheme.axis is None or (values == values.flat[0]).all():
        return e.const(np.float32(values.flat[0]))
    return e.const(scheme.spread(values, rank))
