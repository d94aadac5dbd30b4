# SPDX-License-Identifier: Apache-2.0
"""Ranges of int8 activations that learn: the step of a quantizer as one more parameter.

A range that was fitted before training cuts off what training makes larger. Here each step is
trained with the weights by its own gradient (Esser et al. 2020, "Learned Step Size Quantization",
eq. 3), in octaves above the step that the model came with (Jain et al. 2020, "Trained Quantization
Thresholds", section 3.2: a power keeps it above 0 and its gradient free of scale).
Being a parameter it travels in deltas and is averaged like any weight, so that two devices with the
same version quantize alike. Zero points stay.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

import numpy as np
import onnx

from coordinator.compiler.emit import Emit
from coordinator.compiler.graph import Graph, Node
from coordinator.compiler.names import fresh
from coordinator.compiler.weights import Weight
from edge_sdk.requantize import MOST_OCTAVES, OCTAVES

ROLE = "range"

SLOWED = OCTAVES**-2
"""Factor of a range's gradient.

With it, plain descent and momentum move a range as if its parameter counted octaves; Adam, which
does not see factors of gradients, moves it `OCTAVES` octaves per unit of its rate: at 1 a range
lags behind its weights."""

_MOVES = frozenset(
    {"Flatten", "Gather", "MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
)
"""Operators that move numbers and change none: the runtime wants one step before and after."""

_STEPS = (1e-30, 1e30)


def learn_ranges(
    proto: onnx.ModelProto,
    forward: Graph,
    reached: Graph,
    weights: Sequence[Weight],
    *,
    fixed: Collection[str] = (),
    together: Sequence[Collection[str]] = (),
) -> tuple[onnx.ModelProto, Graph, list[Weight]]:
    """Give each quantizer that the trained weights reach a step of its own, and return the steps.

    Quantizers that move the same numbers on, or that shared a step by name, go on sharing one. One
    that makes an output of the model keeps its step: whoever reads the output counts on it.

    Args:
        proto: the model.
        forward: the same as a Graph.
        reached: what of it makes the logits.
        weights: the trained ones.
        fixed: steps by name that must not change.
        together: sets of steps by name that stay equal, and change for all their users or none.

    Returns: model and graph with the copied steps, and one Weight of shape [] for each: 0 octaves.
    """
    trained = {name for w in weights for name in w.tensors}
    groups = _groups(forward, reached, trained, fixed, together)
    taken = {w.name for w in weights}
    found = []
    for quantizers in groups:
        name = fresh(f"{quantizers[0].inputs[0]}.range", taken)
        old = list(dict.fromkeys(q.inputs[1] for q in quantizers))
        outputs = {q.outputs[0] for q in quantizers}
        outputs |= {n.outputs[0] for q in quantizers for n in forward.uses[q.outputs[0]]}
        proto = _in_proto(proto, outputs, old, name)
        forward = _in_graph(forward, outputs, old[0], name)
        at_start = np.zeros((), np.float32)
        found.append(Weight(name, name, (name,), at_start, ROLE, -1, quantizers[0]))
    return proto, forward, found


def step(e: Emit, value: str, start: float) -> str:
    """Emit ``start * 2**floor(t) * (1 + t - floor(t))``, t being `OCTAVES` times the parameter.

    Between whole octaves it is a straight line: float32 gives the same bits everywhere, which a
    power of a fraction does not.
    """
    t = e.Clip(e.Mul(value, e.const(OCTAVES)), e.const(-MOST_OCTAVES), e.const(MOST_OCTAVES))
    whole = e.Floor(t)
    octave = e.Mul(e.const(start), e.Pow(e.const(2.0), whole))
    return e.Mul(octave, e.Add(e.Sub(t, whole), e.const(1.0)))


def _groups(
    forward: Graph,
    reached: Graph,
    trained: Iterable[str],
    fixed: Collection[str],
    together: Sequence[Collection[str]],
) -> list[list[Node]]:
    """Return the quantizers that can learn, those of one step together, in topological order."""
    learning, quantizers = set(trained), []
    alike = Classes()
    for node in reached.nodes:
        if not learning.intersection(node.inputs):
            continue
        learning.update(node.outputs)
        if node.kind == "QuantizeLinear":
            quantizers.append(node)
            moved_from = _moved_from(reached, node)
            alike.join(node.inputs[1], node.outputs[0], *([moved_from] if moved_from else []))
    for names in together:
        alike.join(*names)
    groups: dict[str, list[Node]] = {}
    for node in quantizers:
        groups.setdefault(alike.of(node.inputs[1]), []).append(node)
    kept = {alike.of(n.inputs[1]) for n in quantizers if not _can_learn(forward, n)}
    kept |= {alike.of(name) for name in fixed}
    integers = {node.outputs[0] for node in quantizers}
    for name in (name for names in together for name in names):
        if not _makers(forward, name) <= integers:
            kept.add(alike.of(name))
    return [nodes for key, nodes in groups.items() if key not in kept]


class Classes:
    """Names in classes that are joined one by one."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def of(self, name: str) -> str:
        """Return the name that stands for a name's class."""
        while (parent := self._parent.get(name, name)) != name:
            name = parent
        return name

    def join(self, first: str, *others: str) -> None:
        """Make one class of those of several names."""
        for other in others:
            self._parent[self.of(other)] = self.of(first)


def _makers(graph: Graph, step: str) -> set[str]:
    """Return the integers that are made or read by a step."""
    users = graph.uses.get(step, ())
    return {n.outputs[0] if n.kind == "QuantizeLinear" else n.inputs[0] for n in users}


def _moved_from(graph: Graph, node: Node) -> str:
    """Return the integers that a quantizer quantizes again by the same step, or nothing."""
    back: Node | None = graph.producers.get(node.inputs[0])
    while back is not None and back.kind in _MOVES:
        back = graph.producers.get(back.inputs[0])
    if back is None or back.kind != "DequantizeLinear" or not _same(graph, back, node):
        return ""
    return back.inputs[0]


def _same(graph: Graph, a: Node, b: Node) -> bool:
    pairs = [
        (graph.initializers.get(a.input(i)), graph.initializers.get(b.input(i))) for i in (1, 2)
    ]
    return all(x is not None and y is not None and np.array_equal(x, y) for x, y in pairs)


def _can_learn(graph: Graph, node: Node) -> bool:
    """Tell whether a quantizer is one step for a whole int8 tensor that only the model reads."""
    scale, zero = (graph.initializers.get(node.input(i)) for i in (1, 2))
    if scale is None or scale.dtype != np.float32 or scale.size != 1 or zero is None:
        return False
    out, readers = node.outputs[0], graph.uses.get(node.outputs[0], ())
    is_inner = bool(readers) and out not in {value.name for value in graph.outputs}
    paired = all(n.kind == "DequantizeLinear" and _same(graph, n, node) for n in readers)
    is_int8 = zero.dtype in (np.int8, np.uint8)
    return is_inner and paired and is_int8 and _STEPS[0] < float(scale.reshape(())) < _STEPS[1]


def _in_proto(
    proto: onnx.ModelProto, outputs: set[str], old: Sequence[str], new: str
) -> onnx.ModelProto:
    own = onnx.ModelProto()
    own.CopyFrom(proto)
    copy = own.graph.initializer.add()
    copy.CopyFrom(next(t for t in own.graph.initializer if t.name == old[0]))
    copy.name = new
    for node in own.graph.node:
        if outputs.intersection(node.output):
            node.input[1] = new
    used = {name for node in own.graph.node for name in node.input}
    for tensor in [t for t in own.graph.initializer if t.name in old and t.name not in used]:
        own.graph.initializer.remove(tensor)
    return own


def _in_graph(graph: Graph, outputs: set[str], old: str, new: str) -> Graph:
    nodes = tuple(
        replace(n, inputs=(n.inputs[0], new, *n.inputs[2:])) if outputs & {*n.outputs} else n
        for n in graph.nodes
    )
    values = {**graph.values}
    if old in values:
        values[new] = replace(values[old], name=new)
    stored = {**graph.initializers, new: graph.initializers[old]}
    return replace(graph, nodes=nodes, initializers=stored, values=values)
