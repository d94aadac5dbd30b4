# SPDX-License-Identifier: Apache-2.0
"""Reductions: sums, means, extremes, and where an extreme is."""

from __future__ import annotations

import math

from coordinator.compiler.graph import Node
from coordinator.compiler.tflite.lower.forms import Lowering, Order
from coordinator.compiler.tflite.lower.table import lowers, refused

_PLAIN = {
    "ReduceSum": "SUM", "ReduceMean": "MEAN", "ReduceMax": "REDUCE_MAX", "ReduceMin": "REDUCE_MIN",
    "ReduceProd": "REDUCE_PROD",
}  # fmt: skip


@lowers(*_PLAIN)
def _reduce(low: Lowering, n: Node) -> None:
    tensor, order = low.form(n.inputs[0])
    _put(low, n, _PLAIN[n.kind], tensor, order)


@lowers("ReduceSumSquare", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp")
def _reduce_of(low: Lowering, n: Node) -> None:
    tensor, order = low.form(n.inputs[0])
    t = low.tape
    if n.kind == "ReduceLogSumExp":
        _log_sum_exp(low, n, tensor, order)
        return
    if n.kind in {"ReduceSumSquare", "ReduceL2"}:
        tensor = t.mul(tensor, tensor)
    elif n.kind == "ReduceL1":
        tensor = t.unary("ABS", tensor)
    after = {"ReduceL2": "SQRT", "ReduceLogSum": "LOG"}.get(n.kind)
    _put(low, n, "SUM", tensor, order, after=after)


def _log_sum_exp(low: Lowering, n: Node, x: int, order: Order) -> None:
    t, axes = low.tape, _axes(low, n)
    stored = [order.index(a) for a in axes]
    most = t.reduce("REDUCE_MAX", x, stored, keep=True)
    total = t.reduce("SUM", t.unary("EXP", t.minus(x, most)), stored, keep=True)
    made = t.plus(t.unary("LOG", total), most)
    if not n.attr("keepdims", 1):
        kept = [d for i, d in enumerate(t.shape(made)) if i not in stored]
        made = t.reshape(made, kept)
    low.put(n.outputs[0], made, _left(order, axes, keep=bool(n.attr("keepdims", 1))))


def _put(
    low: Lowering, n: Node, op: str, tensor: int, order: Order, *, after: str | None = None
) -> None:
    axes, keep = _axes(low, n), bool(n.attr("keepdims", 1))
    made = low.tape.reduce(op, tensor, sorted(order.index(a) for a in axes), keep=keep)
    if after:
        made = low.tape.unary(after, made)
    low.put(n.outputs[0], made, _left(order, axes, keep=keep))


def _axes(low: Lowering, n: Node) -> tuple[int, ...]:
    rank = low.rank(n.inputs[0])
    given = n.attr("axes")
    if given is None and n.input(1):
        found = low.constant(n.input(1))
        if found is None:
            raise refused(n, "has axes that are not constant")
        given = tuple(int(a) for a in found.reshape(-1))
    if not given:
        return () if n.attr("noop_with_empty_axes", 0) else tuple(range(rank))
    return tuple(a % rank for a in given)


def _left(order: Order, axes: tuple[int, ...], *, keep: bool) -> Order:
    """Return the order of what a reduction leaves."""
    if keep:
        return order
    kept = [a for a in order if a not in axes]
    return tuple(sum(1 for b in kept if b < a) for a in kept)


@lowers("ArgMax", "ArgMin")
def _arg(low: Lowering, n: Node) -> None:
    t, rank = low.tape, low.rank(n.inputs[0])
    axis, keep = n.attr("axis", 0) % rank, bool(n.attr("keepdims", 1))
    if n.attr("select_last_index", 0):
        raise refused(n, "asks for the last of equal ones")
    order: Order = (*(i for i in range(rank) if i != axis), axis)
    x = low.get(n.inputs[0], order)
    op = "ARG_MAX" if n.kind == "ArgMax" else "ARG_MIN"
    if op == "ARG_MIN":
        x, op = t.unary("NEG", x), "ARG_MAX"
    made = t.add(op, [x, t.const(rank - 1, "int32")], t.shape(x)[:-1], "int32", to_type="int32")
    if keep:
        low.put(n.outputs[0], t.reshape(made, (*t.shape(made), 1)), order)
    else:
        low.put(n.outputs[0], made, tuple(range(rank - 1)))


@lowers("CumSum")
def _cumsum(low: Lowering, n: Node) -> None:
    tensor, order = low.form(n.inputs[0])
    axis = low.constant(n.inputs[1])
    if axis is None:
        raise refused(n, "has an axis that is not constant")
    at = order.index(int(axis.reshape(())) % len(order))
    t = low.tape
    made = t.add(
        "CUMSUM",
        [tensor, t.const(at, "int32")],
        t.shape(tensor),
        exclusive=bool(n.attr("exclusive", 0)),
        reverse=bool(n.attr("reverse", 0)),
    )
    low.put(n.outputs[0], made, order)


@lowers("LayerNormalization", "RMSNormalization")
def _layer_norm(low: Lowering, n: Node) -> None:
    t, x, rank = low.tape, low.get(n.inputs[0]), low.rank(n.inputs[0])
    axes = tuple(range(n.attr("axis", -1) % rank, rank))
    if any(low.graph.uses.get(name) for name in n.outputs[1:]):
        mean = t.reduce("MEAN", x, axes, keep=True)
        off = t.minus(x, mean)
        spread = t.reduce("MEAN", t.mul(off, off), axes, keep=True)
        inverse = t.unary("RSQRT", t.plus(spread, t.const(float(n.attr("epsilon", 1e-5)))))
        for name, tensor in zip(n.outputs[1:], (mean, inverse), strict=False):
            if name:
                low.put(name, tensor)
    else:
        off = x
        if n.kind == "LayerNormalization":
            off = t.minus(x, t.reduce("MEAN", x, axes, keep=True))
        spread = t.reduce("MEAN", t.mul(off, off), axes, keep=True)
        inverse = t.unary("RSQRT", t.plus(spread, t.const(float(n.attr("epsilon", 1e-5)))))
    made = t.mul(t.mul(off, inverse), low.get(n.inputs[1]))
    if n.input(2):
        made = t.plus(made, low.get(n.input(2)))
    low.put(n.outputs[0], made)


@lowers("BatchNormalization")
def _batch_norm(low: Lowering, n: Node) -> None:
    """Scale and shift each channel by its running statistics."""
    if n.attr("training_mode", 0):
        raise refused(n, "is in training mode")
    t, (tensor, order) = low.tape, low.form(n.inputs[0])
    scale, shift, mean, var = (low.get(name) for name in n.inputs[1:5])
    inverse = t.unary("RSQRT", t.plus(var, t.const(float(n.attr("epsilon", 1e-5)))))
    factor = t.mul(scale, inverse)
    offset = t.minus(shift, t.mul(mean, factor))
    shape = [1] * len(order)
    shape[order.index(1)] = math.prod(t.shape(scale))
    made = t.plus(t.mul(tensor, t.reshape(factor, shape)), t.reshape(offset, shape))
    low.put(n.outputs[0], made, order)


@lowers("InstanceNormalization")
def _instance_norm(low: Lowering, n: Node) -> None:
    """Scale and shift each channel of each example by its own statistics."""
    t, (tensor, order) = low.tape, low.form(n.inputs[0])
    axes = [i for i, a in enumerate(order) if a > 1]
    off = t.minus(tensor, t.reduce("MEAN", tensor, axes, keep=True))
    spread = t.reduce("MEAN", t.mul(off, off), axes, keep=True)
    inverse = t.unary("RSQRT", t.plus(spread, t.const(float(n.attr("epsilon", 1e-5)))))
    shape = [1] * len(order)
    shape[order.index(1)] = low.shape(n.inputs[0])[1]
    scale, shift = (t.reshape(low.get(name), shape) for name in n.inputs[1:3])
    low.put(n.outputs[0], t.plus(t.mul(t.mul(off, inverse), scale), shift), order)
