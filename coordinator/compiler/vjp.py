# SPDX-License-Identifier: Apache-2.0
"""Reverse-mode differentiation of a graph: a table of rules, and the walk that applies them.

A rule turns the gradient of a node's output into gradients of its inputs, emitting standard
operators (vector-Jacobian products; Griewank & Walther 2008, chapter 3).

    @vjp("Sigmoid")
    def _(e: Emit, n: Node, g: str) -> Grads:
        y = n.outputs[0]
        return (e.Mul(g, e.Mul(y, e.Sub(e.const(1.0), y))),)

Two unknown dimensions at one place are taken as the same size (both are the batch).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import onnx

from coordinator.compiler.emit import Emit
from coordinator.compiler.graph import OPSET_CEILING, OPSET_FLOOR, Node
from edge_sdk.errors import CompileError

Grads: TypeAlias = tuple[str | None, ...]
"""One gradient name per input of the node, None where there is none; may be shorter."""

Rule: TypeAlias = Callable[[Emit, Node, str], Grads]
"""A rule of an operator whose first output alone is differentiable."""

SeveralRule: TypeAlias = Callable[[Emit, Node, Grads], Grads]
"""A rule of an operator with several differentiable outputs: one upstream each, or None."""

RULES: dict[str, SeveralRule] = {}
"""The table: operator (``Conv``, ``com.microsoft.Gelu``) to its rule."""

_FLOATS = frozenset(
    int(getattr(onnx.TensorProto, name)) for name in ("FLOAT", "FLOAT16", "DOUBLE", "BFLOAT16")
)

NO_GRADIENT: dict[str, frozenset[int]] = {
    "Reshape": frozenset({1}),
    "Expand": frozenset({1}),
    "Squeeze": frozenset({1}),
    "Unsqueeze": frozenset({1}),
    "Split": frozenset({1}),
    "Slice": frozenset({1, 2, 3, 4}),
    "Gather": frozenset({1}),
    "Pad": frozenset({1, 2, 3}),
    "Tile": frozenset({1}),
    "ReduceSum": frozenset({1}),
    "ReduceMean": frozenset({1}),
    "ReduceL1": frozenset({1}),
    "ReduceLogSum": frozenset({1}),
    "ReduceProd": frozenset({1}),
    "GatherElements": frozenset({1}),
    "GatherND": frozenset({1}),
    "ScatterElements": frozenset({1}),
    "ScatterND": frozenset({1}),
    "TopK": frozenset({1}),
    "Compress": frozenset({1}),
    "MaxUnpool": frozenset({1, 2}),
    "OneHot": frozenset({0, 1}),
    "ReverseSequence": frozenset({1}),
    "CenterCropPad": frozenset({1}),
    "Col2Im": frozenset({1, 2}),
    "CastLike": frozenset({1}),
    "Range": frozenset({1}),
    "ReduceMax": frozenset({1}),
    "ReduceMin": frozenset({1}),
    "ReduceL2": frozenset({1}),
    "ReduceSumSquare": frozenset({1}),
    "ReduceLogSumExp": frozenset({1}),
    "Resize": frozenset({1, 2, 3}),
    "CumSum": frozenset({1}),
    "Trilu": frozenset({1}),
    "Where": frozenset({0}),
    "Clip": frozenset({1, 2}),
    "Pow": frozenset({1}),
    "Dropout": frozenset({1, 2}),
    "BatchNormalization": frozenset({3, 4}),
    "QuantizeLinear": frozenset({2}),
    "DequantizeLinear": frozenset({2}),
}
"""Inputs that carry no gradient by decision: indices, axes, statistics, exponents, zero points."""

FLAT: frozenset[str] = frozenset(
    {
        "And", "ArgMax", "ArgMin", "Bernoulli", "BitShift", "BitwiseAnd", "BitwiseNot",
        "BitwiseOr", "BitwiseXor", "BlackmanWindow", "Ceil", "ConstantOfShape", "Equal",
        "EyeLike", "Floor", "Greater", "GreaterOrEqual", "HammingWindow", "HannWindow", "Hardmax",
        "IsInf", "IsNaN", "Less", "LessOrEqual", "MelWeightMatrix", "Multinomial",
        "NonMaxSuppression", "NonZero", "Not", "Or", "RandomNormal", "RandomNormalLike",
        "RandomUniform", "RandomUniformLike", "Round", "Shape", "Sign", "Size",
        "TfIdfVectorizer", "Xor",
    }
)  # fmt: skip
"""Operators whose gradient is zero or undefined everywhere: the walk stops there."""


def vjp(*ops: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators whose first output alone is differentiable."""

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(ops, single(rule)))
        return rule

    return register


def single(rule: Rule) -> SeveralRule:
    """Return a rule of the first output as one of all: the others carry no gradient."""

    def checked(e: Emit, n: Node, upstream: Grads) -> Grads:
        first, *others = upstream
        if first is None or any(others):
            raise CompileError(
                f"expected gradients for the first output of {n.label} only: "
                "do not let the loss depend on its other outputs"
            )
        return rule(e, n, first)

    return checked


def vjp_several(*ops: str) -> Callable[[SeveralRule], SeveralRule]:
    """Register a rule for operators with several differentiable outputs."""

    def register(rule: SeveralRule) -> SeveralRule:
        RULES.update(dict.fromkeys(ops, rule))
        return rule

    return register


def unbroadcast(e: Emit, g: str, like: str) -> str:
    """Sum a gradient over the dimensions in which `like` was broadcast: it gets its shape."""
    source, target = e.dims(g), e.dims(like)
    lead = len(source) - len(target)
    axes = [lead + i for i, dim in enumerate(target) if dim == 1 and source[lead + i] != 1]
    if lead:
        g = e.ReduceSum(g, e.ints(*range(lead), *axes), keepdims=int(bool(axes)))
        return reshape_like(e, g, like) if axes else g
    return e.ReduceSum(g, e.ints(*axes), keepdims=1) if axes else g


def reshape_like(e: Emit, g: str, like: str) -> str:
    """Give a gradient the shape of `like`, which has as many elements."""
    shape = e.dims(like)
    if shape.count(None) <= 1:
        target = e.ints(*(-1 if dim is None else dim for dim in shape))
    else:
        target = e.Shape(like)
    return e.declare(e.Reshape(g, target), shape)


def backward(
    e: Emit,
    seeds: Mapping[str, str],
    targets: Sequence[str],
    rules: Mapping[str, SeveralRule] = RULES,
) -> dict[str, str]:
    """Emit the gradients of `targets` and return their names by target.

    Args:
        e: the forward graph, loss included, as emitted so far.
        seeds: gradients that are already known, by tensor (the loss with a constant 1, or the
            logits with the gradient a loss wrote down).
        targets: tensors to differentiate by; each may be an input, an initializer or any value.
        rules: the table to take them from; a back end may have some of its own.

    Only nodes between a target and a seed are visited, and ``e.needs`` answers for the rest.

    Raises:
        CompileError: a node on the way has no rule, or no path leads from a target to a seed.
    """
    _check_opset(e)
    nodes = tuple(e.nodes)
    wanted = downstream(nodes, targets)
    e.want(wanted)
    try:
        grads = {name: [g] for name, g in seeds.items()}
        for node in reversed(nodes):
            if any(out in grads and out in wanted for out in node.outputs):
                _visit(e, node, grads, wanted, kept=set(targets), rules=rules)
    finally:
        e.want(None)
    return {target: _total(e, grads, target, nodes) for target in targets}


def _visit(
    e: Emit,
    node: Node,
    grads: dict[str, list[str]],
    wanted: set[str],
    *,
    kept: set[str],
    rules: Mapping[str, SeveralRule],
) -> None:
    """Apply one node's rule and hand its gradients to its inputs."""
    if node.kind in FLAT:
        return
    upstream = tuple(_sum(e, grads, out) for out in node.outputs)
    if node.kind not in rules:
        raise CompileError(
            f"expected a gradient rule for every operator between the trained tensors and the "
            f"loss, {node.label} has none: train only tensors after it, or add @vjp({node.kind!r})"
        )
    for name, g in zip(node.inputs, rules[node.kind](e, node, upstream), strict=False):
        if g is not None and name in wanted:
            grads.setdefault(name, []).append(_shaped(e, node, name, g))
    for out in node.outputs:
        if out not in kept:
            grads.pop(out, None)


def _shaped(e: Emit, node: Node, name: str, g: str) -> str:
    """Give a gradient what is known of its tensor's shape; a mismatch is a fault of the rule."""
    expected, got = e.shape(name), e.shape(g)
    if expected is None or expected == got:
        return g
    pairs = zip(expected, got, strict=False) if got is not None else ()
    if got is not None and (
        len(expected) != len(got)
        or any(a != b for a, b in pairs if a is not None and b is not None)
    ):
        raise CompileError(
            f"expected the gradient of {name!r} through {node.label} to have shape {expected}, "
            f"got {got}: the rule is wrong, please report it"
        )
    merged = (
        expected
        if got is None
        else tuple(b if a is None else a for a, b in zip(expected, got, strict=True))
    )
    return e.declare(g, merged)


def _sum(e: Emit, grads: dict[str, list[str]], name: str) -> str | None:
    """Return the sum of the gradients that a tensor's uses sent back, kept as one from now on."""
    if name not in grads:
        return None
    total, *others = grads[name]
    for g in others:
        total = e.Add(total, g)
    grads[name] = [total]
    return total


def _total(e: Emit, grads: dict[str, list[str]], target: str, nodes: tuple[Node, ...]) -> str:
    total = _sum(e, grads, target)
    if total is not None:
        return total
    readers = [node for node in nodes if target in node.inputs]
    if not readers:
        raise CompileError(f"expected the loss to depend on {target!r}, no node reads it: drop it")
    raise CompileError(
        f"expected a path from {target!r} to the loss, none carries a gradient "
        f"(it enters {readers[0].label}): train other tensors, or a layer that the loss sees"
    )


def downstream(nodes: Iterable[Node], targets: Sequence[str]) -> set[str]:
    """Return every tensor that depends differentiably on a target, targets included."""
    found = set(targets)
    for node in nodes:
        if any(name in found for name in differentiable_inputs(node)):
            found.update(out for out in node.outputs if out)
    return found


def differentiable_inputs(node: Node) -> tuple[str, ...]:
    """Return the inputs of a node that can carry a gradient."""
    if node.kind in FLAT or (node.kind == "Cast" and node.attr("to") not in _FLOATS):
        return ()
    skip = NO_GRADIENT.get(node.kind, frozenset())
    return tuple(name for i, name in enumerate(node.inputs) if name and i not in skip)


def _check_opset(e: Emit) -> None:
    if not OPSET_FLOOR <= e.opset <= OPSET_CEILING:
        raise CompileError(
            f"expected opset {OPSET_FLOOR} to {OPSET_CEILING}, got {e.opset}: "
            "read the model with Graph.load, which converts it"
        )
