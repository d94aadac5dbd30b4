# SPDX-License-Identifier: Apache-2.0
"""Losses on the raw outputs (logits), each with its gradient written down rather than derived.

A model that ends in Softmax or Sigmoid is read from before it: the loss then works on logits, which
is stable, and the gradient is one subtraction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from coordinator.compiler.emit import Emit
from coordinator.compiler.graph import Graph
from edge_sdk.errors import CompileError


class Emitted(NamedTuple):
    """Names a loss emitted: the mean loss (0-d), its gradient by the logits, the count of hits."""

    loss: str
    gradient: str | None
    correct: str | None


class Loss(NamedTuple):
    """A loss as a value.

    Attributes:
        name: as the manifest spells it.
        strips: a last activation of the model that the loss contains itself.
        target: dtype of the targets.
        emit: (e, logits, targets, wants gradient) -> Emitted; without the gradient it emits the
            count of correct examples where the loss has one.
    """

    name: str
    strips: frozenset[str]
    target: str
    emit: Callable[[Emit, str, str, bool], Emitted]


def cross_entropy() -> Loss:
    """Softmax cross entropy of logits [N, C] and class ids int64 [N], mean over the batch."""

    def emit(e: Emit, logits: str, target: str, wants_gradient: bool) -> Emitted:
        logp = e.LogSoftmax(logits, axis=-1)
        column = e.Unsqueeze(target, e.ints(1))
        picked = e.GatherElements(logp, column, axis=1)  # an id out of range is an error here
        loss = e.Neg(e.ReduceMean(picked, keepdims=0))
        if not wants_gradient:
            return Emitted(
                loss, None, _hits(e, e.Equal(e.ArgMax(logits, axis=1, keepdims=0), target))
            )
        classes = e.dims(logits)[1]
        hot = e.OneHot(target, e.ints(classes or 0), e.const(np.array([0, 1], np.float32)))
        gradient = e.Div(e.Sub(e.Exp(logp), hot), _count(e, target))
        return Emitted(loss, e.declare(gradient, e.shape(logits)), None)

    return Loss("cross_entropy", frozenset({"Softmax", "LogSoftmax"}), "int64", emit)


def mse() -> Loss:
    """Mean squared error over every element; targets have the output's shape."""

    def emit(e: Emit, logits: str, target: str, wants_gradient: bool) -> Emitted:
        off = e.Sub(logits, target)
        loss = e.ReduceMean(e.Mul(off, off), keepdims=0)
        if not wants_gradient:
            return Emitted(loss, None, None)
        return Emitted(loss, e.Mul(off, e.Div(e.const(2.0), _count(e, off))), None)

    return Loss("mse", frozenset(), "float32", emit)


def bce_logits() -> Loss:
    """Binary cross entropy of logits and targets in [0, 1], mean over every element.

    An example counts as correct when each of its labels is on the right side of a half.
    """

    def emit(e: Emit, logits: str, target: str, wants_gradient: bool) -> Emitted:
        loss = e.ReduceMean(e.Sub(e.Softplus(logits), e.Mul(logits, target)), keepdims=0)
        if not wants_gradient:
            right = e.Equal(e.Greater(logits, e.const(0.0)), e.Greater(target, e.const(0.5)))
            return Emitted(loss, None, _hits(e, right))
        off = e.Sub(e.Sigmoid(logits), target)
        return Emitted(loss, e.Div(off, _count(e, off)), None)

    return Loss("bce_logits", frozenset({"Sigmoid"}), "float32", emit)


LOSSES: dict[str, Callable[[], Loss]] = {
    "bce_logits": bce_logits,
    "cross_entropy": cross_entropy,
    "mse": mse,
}
"""Losses by the name that `build` and the manifest use."""


def from_name(name: str) -> Loss:
    """Return a loss by name. Raises: CompileError naming those that exist."""
    if name not in LOSSES:
        raise CompileError(f"expected a loss out of {', '.join(LOSSES)}, got {name!r}")
    return LOSSES[name]()


def logits_of(graph: Graph, loss: Loss) -> str:
    """Return the tensor that a loss works on: the output, or what enters its last activation."""
    name = graph.outputs[0].name
    while (node := graph.producers.get(name)) is not None:
        if node.kind in loss.strips:
            rank = len(graph.shape(name) or ()) or 2
            if node.kind == "Sigmoid" or node.attr("axis", -1) in {-1, rank - 1}:
                return node.inputs[0]
            break
        if node.kind not in {"Identity", "QuantizeLinear", "DequantizeLinear"}:
            break
        name = node.inputs[0]
    return graph.outputs[0].name


def _count(e: Emit, name: str) -> str:
    """Emit the number of elements of a tensor as float32."""
    return e.Cast(e.Size(name), to=1)


def _hits(e: Emit, right: str) -> str:
    """Emit how many examples are right in every label: int64, 0-d."""
    ones = e.Cast(right, to=7)
    if e.rank(ones) > 1:
        ones = e.ReduceMin(ones, e.ints(*range(1, e.rank(ones))), keepdims=0)
    return e.ReduceSum(ones, keepdims=0)
