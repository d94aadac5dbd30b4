# SPDX-License-Identifier: Apache-2.0
"""Operators that pick elements by index or put them somewhere: each gradient goes the way back."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from coordinator.compiler.emit import Emit
from coordinator.compiler.graph import Node
from coordinator.compiler.rules.scatter import scatter_rows
from coordinator.compiler.vjp import Grads, reshape_like, vjp


def filled(e: Emit, like: str, value: float = 0.0) -> str:
    """Return a float32 tensor of the size of `like`, every element the same."""
    made = e.ConstantOfShape(e.size(like), value=np.full(1, value, np.float32))
    return e.declare(made, e.dims(like))


@vjp("GatherElements")
def _gather_elements(e: Emit, n: Node, g: str) -> Grads:
    x, indices = n.inputs
    axis = n.attr("axis", 0)
    return (e.ScatterElements(filled(e, x), indices, g, axis=axis, reduction="add"),)


@vjp("GatherND")
def _gather_nd(e: Emit, n: Node, g: str) -> Grads:
    x, indices = n.inputs
    where = _with_batch(e, indices, n.attr("batch_dims", 0))
    return (e.ScatterND(filled(e, x), where, g, reduction="add"),)


def _with_batch(e: Emit, indices: str, count: int) -> str:
    """Write the batch coordinates, which GatherND implies and ScatterND lacks, into the indices."""
    if not count:
        return indices
    dims = e.dims(indices)
    single = e.Concat(e.Shape(indices, end=-1), e.ints(1), axis=0)
    parts = []
    for axis in range(count):
        size = e.Reshape(e.Shape(indices, start=axis, end=axis + 1), e.ints())
        every = e.Range(e.const(0, np.int64), size, e.const(1, np.int64))
        ones = [1] * len(dims)
        ones[axis] = -1
        spread = e.Expand(e.Reshape(every, e.ints(*ones)), single)
        parts.append(e.declare(spread, (*dims[:-1], 1)))
    return e.Concat(*parts, indices, axis=-1)


@vjp("ScatterElements")
def _scatter_elements(e: Emit, n: Node, g: str) -> Grads:
    indices, axis = n.inputs[1], n.attr("axis", 0)

    def put(x: str, updates: str, how: str) -> str:
        return e.ScatterElements(x, indices, updates, axis=axis, reduction=how)

    return _scattered(e, n, g, put, lambda x: e.GatherElements(x, indices, axis=axis))


@vjp("ScatterND")
def _scatter_nd(e: Emit, n: Node, g: str) -> Grads:
    indices = n.inputs[1]

    def put(x: str, updates: str, how: str) -> str:
        return e.ScatterND(x, indices, updates, reduction=how)

    return _scattered(e, n, g, put, lambda x: e.GatherND(x, indices))


def _scattered(
    e: Emit, n: Node, g: str, put: Callable[[str, str, str], str], take: Callable[[str], str]
) -> Grads:
    """Differentiate by data and updates, given the scatter and the gather at its places."""
    data, _, updates = n.inputs
    how, y = n.attr("reduction", "none"), n.outputs[0]
    dd = du = None
    if how in {"none", "add"}:
        if e.needs(data):
            dd = g if how == "add" else put(g, filled(e, updates), "none")
        du = take(g) if e.needs(updates) else None
    elif how == "mul":
        if e.needs(data):
            dd = e.Mul(g, put(filled(e, data, 1.0), updates, "mul"))
        if e.needs(updates):
            du = e.Div(take(e.Mul(g, y)), updates)
    else:  # max, min: those that equal the result share the gradient
        kept = e.Cast(e.Equal(data, y), to=np.float32)
        new = e.Cast(e.Equal(updates, take(y)), to=np.float32)
        share = e.Div(g, put(kept, new, "add"))
        dd = e.Mul(kept, share) if e.needs(data) else None
        du = e.Mul(new, take(share)) if e.needs(updates) else None
    return dd, None, du


@vjp("TopK")
def _top_k(e: Emit, n: Node, g: str) -> Grads:
    """Send the gradient of the values to where they came from."""
    where, axis = e.output(n, 1), n.attr("axis", -1)
    return (e.ScatterElements(filled(e, n.inputs[0]), where, g, axis=axis),)


@vjp("Compress")
def _compress(e: Emit, n: Node, g: str) -> Grads:
    x, condition = n.inputs
    axis, kept = n.attr("axis"), e.value(condition)
    if kept is None:
        rows = e.declare(e.Squeeze(e.NonZero(condition), e.ints(0)), (None,))
    else:
        rows = e.ints(*np.flatnonzero(kept).tolist())
    if axis is not None:
        return (scatter_rows(e, g, rows, x, axis % e.rank(x)),)
    return (reshape_like(e, scatter_rows(e, g, rows, e.Reshape(x, e.ints(-1)), 0), x),)


@vjp("MaxUnpool")
def _max_unpool(e: Emit, n: Node, g: str) -> Grads:
    """Take the gradient at the indices, which count through the whole output."""
    return (e.Gather(e.Reshape(g, e.ints(-1)), n.inputs[1]),)


@vjp("OneHot")
def _one_hot(e: Emit, n: Node, g: str) -> Grads:
    """Differentiate by the two values: what stands for off, and what for on."""
    bits = e.const([0.0, 1.0])
    hot = e.OneHot(n.inputs[0], n.inputs[1], bits, axis=n.attr("axis", -1))
    on = e.Reshape(e.ReduceSum(e.Mul(g, hot), keepdims=0), e.ints(1))
    every = e.Reshape(e.ReduceSum(g, keepdims=0), e.ints(1))
    return None, None, e.Concat(e.Sub(every, on), on, axis=0)


@vjp("ReverseSequence")
def _reverse_sequence(e: Emit, n: Node, g: str) -> Grads:
    return (e.ReverseSequence(g, n.inputs[1], **n.attributes),)


@vjp("Range")
def _range(e: Emit, n: Node, g: str) -> Grads:
    """Take y[i] = start + i * delta; the limit only sets the length."""
    start, _, delta = n.inputs
    ds = e.ReduceSum(g, keepdims=0) if e.needs(start) else None
    if not e.needs(delta):
        return (ds,)
    places = e.CumSum(filled(e, g, 1.0), e.const(0, np.int64), exclusive=1)
    return ds, None, e.ReduceSum(e.Mul(g, places), keepdims=0)
