# SPDX-License-Identifier: Apache-2.0
"""Gradients of a large batch in little memory: slices of it one after the other, and their sum.

What depends on the examples becomes the body of one ONNX Loop over slices of `rows` rows. Its
carried tensors are the sums so far, of the loss and of each gradient, every slice weighted by its
share of the batch's rows, so that the sums are those of the whole batch for any number of rows.
What does not depend on the examples (rounded masters) is computed once, before; clip, proximal term
and optimizer read the sums, after. The sums start as scalar zeros, which broadcast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from coordinator.compiler.body import Body
from coordinator.compiler.emit import Emit
from coordinator.compiler.graph import Graph, Node, Value
from coordinator.compiler.lifetimes import bytes_of
from coordinator.compiler.losses import Learned
from coordinator.compiler.passes import rename, simplify

_TOTAL = "g.total"  # rows of the whole batch, float32 [1]: what a slice's share is reckoned from
_MUCH = 1 << 14  # bytes
_CUT = {"x": "g.x", "y": "g.y"}  # a body's names of its rows


def shared(e: Emit, made: Learned) -> Learned:
    """Weight a slice's loss and gradient by its share of the whole batch's rows."""
    rows = e.Cast(e.Shape("x", start=0, end=1), to=1)
    share = e.Squeeze(e.Div(rows, e.input(_TOTAL, np.float32, (1,))))
    gradient = e.Mul(made.gradient, share)
    return Learned(e.Mul(made.loss, share), e.declare(gradient, e.shape(made.gradient)))


def accumulated(e: Emit, results: Sequence[str], rows: int) -> tuple[Emit, list[str]]:
    """Move what makes `results` of one slice into a Loop over all of them.

    Args:
        e: a graph of inputs x and y, whose `results` were weighted by `shared`.
        results: the loss and the gradients of one slice.
        rows: of a slice.

    Returns: the graph around the Loop, which goes on, and the names of the sums in it.
    """
    whole = simplify(e.graph(outputs=results))
    inner, before = _parted(whole)
    inputs = tuple(v for v in whole.inputs if v.name != _TOTAL)
    outer = Emit(replace(whole, nodes=before, inputs=inputs, outputs=()))
    outer.reserve({name for node in inner for name in node.outputs})
    body, read = _body(whole, inner, rows)
    total = outer.Shape("x", start=0, end=1)
    trips = outer.Div(outer.Add(total, outer.ints(rows - 1)), outer.ints(rows))
    named = {_TOTAL: outer.Cast(total, to=1)}
    sums = tuple(outer.fresh("sum") for _ in results)
    zeros = [outer.const(0.0)] * len(sums)
    reads = ["x", "y", *(named.get(name, name) for name in read)]
    shapes = [whole.shape(name) for name in results]
    known = [Value(n, np.dtype(np.float32), s) for n, s in zip(sums, shapes, strict=True)]
    outer.add(Node("Loop", (trips, "", *zeros, *reads), sums, {"body": body}), known)
    return outer, list(sums)


def _parted(graph: Graph) -> tuple[list[Node], tuple[Node, ...]]:
    """Return the nodes for the body and those for before it: these need no example.

    What is before stands for the whole Loop. So what makes much of little (a banded matrix of a
    filter) is made anew in each turn. Frozen integer weights stay next to what reads them, for the
    runtime to see the pattern.
    """
    inside, fixed = {"x", "y", _TOTAL}, set(graph.initializers)
    inner: list[Node] = []
    before: list[Node] = []
    for node in graph.nodes:
        is_fixed = fixed.issuperset(node.inputs)
        is_frozen = is_fixed and node.kind == "DequantizeLinear"
        if is_fixed and not is_frozen:
            fixed.update(node.outputs)
        grows = not is_fixed and _grows(graph, node)
        if is_frozen or grows or inside.intersection(node.inputs):
            inside.update(node.outputs)
            inner.append(node)
        else:
            before.append(node)
    return inner, tuple(before)


def _grows(graph: Graph, node: Node) -> bool:
    """Tell whether a node makes much more than it reads."""
    made, read = (sum(bytes_of(graph, n) for n in names) for names in (node.outputs, node.inputs))
    return made > _MUCH + 2 * read


def _body(whole: Graph, inner: list[Node], rows: int) -> tuple[Body, list[str]]:
    """Return the body and what it reads from outside, but x and y."""
    made = {name for node in inner for name in node.outputs}
    results = [value.name for value in whole.outputs]
    asked = dict.fromkeys(name for node in inner for name in node.inputs) | dict.fromkeys(results)
    own = {name: whole.initializers[name] for name in asked if name in whole.initializers}
    read = [n for n in asked if n and n not in made and n not in own and n not in _CUT]
    before = [replace(v, name=f"g.sum.in.{i}") for i, v in enumerate(whole.outputs)]
    after = [replace(v, name=f"g.sum.out.{i}") for i, v in enumerate(whole.outputs)]
    adding = [
        Node("Add", (old.name, name), (new.name,))
        for old, name, new in zip(before, results, after, strict=True)
    ]
    values = {**whole.values, **{v.name: v for v in (*before, *after)}}
    graph = replace(
        whole,
        nodes=(*inner, *adding),
        initializers=own,
        inputs=(*(values[n] for n in _CUT), *before, *(values[n] for n in read)),
        outputs=tuple(after),
        values=values,
    )
    inside = rename(graph, {**_CUT, **{name: f"{name}.in" for name in own}})
    return Body(inside, rows, len(before)), read
