# SPDX-License-Identifier: Apache-2.0
"""Losses on the raw outputs (logits), each with its gradient written down rather than derived.

A model that ends in Softmax or Sigmoid is read from before it: the loss then works on logits, which
is stable, and the gradient is one subtraction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from coordinator.compiler.emit import Emit
from coordinator.compiler.graph import Graph
from coordinator.compiler.passes import is_identity
from edge_sdk.errors import CompileError


class Learned(NamedTuple):
    """Names a loss emitted for training: the mean loss (0-d) and its gradient by the logits."""

    loss: str
    gradient: str


class Measured(NamedTuple):
    """Names a loss emitted for evaluation: the mean loss, and how many examples are right (0-d)."""

    loss: str
    correct: str | None


class Loss(NamedTuple):
    """A loss as a value.

    Attributes:
        name: as the manifest spells it.
        strips: a last activation of the model that the loss contains itself.
        target: dtype of the targets.
        learn: (e, logits, targets) -> Learned.
        measure: (e, logits, targets) -> Measured; `correct` is None where nothing is right.
    """

    name: str
    strips: frozenset[str]
    target: str
    learn: Callable[[Emit, str, str], Learned]
    measure: Callable[[Emit, str, str], Measured]


def cross_entropy() -> Loss:
    """Softmax cross entropy of logits [N, C] and class ids int64 [N], mean over the batch.

    Logits may have axes of size 1 besides, as a last convolution leaves them: [N, C, 1, 1].
    """

    def flat(e: Emit, logits: str) -> str:
        return e.Flatten(logits, axis=1) if e.rank(logits) > 2 else logits

    def mean(e: Emit, logp: str, target: str) -> str:
        column = e.Unsqueeze(target, e.ints(1))
        picked = e.GatherElements(logp, column, axis=1)  # an id out of range is an error here
        return e.Neg(e.ReduceMean(picked, keepdims=0))

    def learn(e: Emit, logits: str, target: str) -> Learned:
        logp, shape = e.LogSoftmax(flat(e, logits), axis=-1), e.dims(logits)
        hot = e.OneHot(target, e.ints(classes_of(shape) or 0), e.const([0.0, 1.0]))
        gradient = e.Div(e.Sub(e.Exp(logp), hot), _count(e, target))
        if len(shape) > 2:
            gradient = e.Reshape(gradient, e.ints(-1, *(d or 0 for d in shape[1:])))
        return Learned(mean(e, logp, target), e.declare(gradient, shape))

    def measure(e: Emit, logits: str, target: str) -> Measured:
        rows = flat(e, logits)
        loss = mean(e, e.LogSoftmax(rows, axis=-1), target)
        return Measured(loss, _hits(e, e.Equal(e.ArgMax(rows, axis=1, keepdims=0), target)))

    strips = frozenset({"Softmax", "LogSoftmax"})
    return Loss("cross_entropy", strips, "int64", learn, measure)


def classes_of(shape: Sequence[int | None] | None) -> int | None:
    """Return C of logits [N, C], or with axes of size 1 besides; None for any other shape."""
    sizes = [d for d in (shape or ())[1:] if d != 1]
    return sizes[0] if len(sizes) == 1 else None


def mse() -> Loss:
    """Mean squared error over every element; targets have the output's shape."""

    def mean(e: Emit, off: str) -> str:
        return e.ReduceMean(e.Mul(off, off), keepdims=0)

    def learn(e: Emit, logits: str, target: str) -> Learned:
        off = e.Sub(logits, target)
        return Learned(mean(e, off), e.Mul(off, e.Div(e.const(2.0), _count(e, off))))

    def measure(e: Emit, logits: str, target: str) -> Measured:
        return Measured(mean(e, e.Sub(logits, target)), None)

    return Loss("mse", frozenset(), "float32", learn, measure)


def bce_logits() -> Loss:
    """Binary cross entropy of logits and targets in [0, 1], mean over every element.

    An example counts as correct when each of its labels is on the right side of a half.
    """

    def mean(e: Emit, logits: str, target: str) -> str:
        return e.ReduceMean(e.Sub(e.Softplus(logits), e.Mul(logits, target)), keepdims=0)

    def learn(e: Emit, logits: str, target: str) -> Learned:
        off = e.Sub(e.Sigmoid(logits), target)
        return Learned(mean(e, logits, target), e.Div(off, _count(e, off)))

    def measure(e: Emit, logits: str, target: str) -> Measured:
        right = e.Equal(e.Greater(logits, e.const(0.0)), e.Greater(target, e.const(0.5)))
        return Measured(mean(e, logits, target), _hits(e, right))

    return Loss("bce_logits", frozenset({"Sigmoid"}), "float32", learn, measure)


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
            shape = graph.shape(name) or (None, None)
            axis = node.attr("axis", -1) % len(shape)
            others = [d for i, d in enumerate(shape) if i not in {0, axis}]
            if node.kind == "Sigmoid" or (axis and all(d == 1 for d in others)):
                return node.inputs[0]
            break
        if node.kind not in {"QuantizeLinear", "DequantizeLinear"} and not is_identity(graph, node):
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
