# SPDX-License-Identifier: Apache-2.0
"""Sums, means and maxima over axes (given as an input, as an attribute, or all of them)."""

from __future__ import annotations

import math

import numpy as np

from coordinator.compiler.emit import Emit
from coordinator.compiler.graph import Node
from coordinator.compiler.vjp import Grads, vjp
from edge_sdk.errors import CompileError

_TINY = 1e-19
"""What a norm of zero counts as: its square is the least float32."""


def axes_of(e: Emit, n: Node) -> tuple[int, ...]:
    """Return the reduced axes of a node, not negative; the empty tuple when it reduces nothing."""
    rank = e.rank(n.inputs[0])
    axes = n.attr("axes")
    if n.input(1):
        value = e.value(n.inputs[1])
        if value is None:
            raise CompileError(f"expected constant axes in {n.label}, got a computed tensor")
        axes = tuple(int(axis) for axis in value)
    if not axes:
        return () if n.attr("noop_with_empty_axes", 0) else tuple(range(rank))
    return tuple(sorted(axis % rank for axis in axes))


def spread(e: Emit, n: Node, g: str, axes: tuple[int, ...]) -> str:
    """Repeat a reduced gradient over the axes it was reduced over."""
    return e.Expand(kept(e, n, g, axes), e.size(n.inputs[0]))


def kept(e: Emit, n: Node, x: str, axes: tuple[int, ...]) -> str:
    """Give a reduced tensor its axes back with size 1."""
    return x if n.attr("keepdims", 1) or not axes else e.Unsqueeze(x, e.ints(*axes))


def count(e: Emit, x: str, axes: tuple[int, ...]) -> str:
    """Return, as float32, how many elements of `x` meet in one: constant where it is static."""
    dims = [e.dims(x)[axis] for axis in axes]
    if None not in dims:
        return e.const(math.prod(dim for dim in dims if dim is not None))
    sizes = e.Gather(e.Shape(x), e.ints(*axes))
    return e.Cast(e.ReduceProd(sizes, keepdims=0), to=np.float32)


@vjp("ReduceSum")
def _reduce_sum(e: Emit, n: Node, g: str) -> Grads:
    axes = axes_of(e, n)
    return (spread(e, n, g, axes) if axes else g,)


@vjp("ReduceMean")
def _reduce_mean(e: Emit, n: Node, g: str) -> Grads:
    axes = axes_of(e, n)
    if not axes:
        return (g,)
    return (spread(e, n, e.Div(g, count(e, n.inputs[0], axes)), axes),)


@vjp("ReduceMax", "ReduceMin")
def _reduce_extreme(e: Emit, n: Node, g: str) -> Grads:
    """Equal extremes share the gradient."""
    x, axes = n.inputs[0], axes_of(e, n)
    if not axes:
        return (g,)
    return (shared(e, x, kept(e, n, n.outputs[0], axes), kept(e, n, g, axes), axes),)


def shared(e: Emit, x: str, top: str, g: str, axes: tuple[int, ...]) -> str:
    """Share `g` among the elements of `x` that equal `top` along the axes."""
    mask = e.Cast(e.Equal(x, top), to=np.float32)
    return e.Mul(mask, e.Div(g, e.ReduceSum(mask, e.ints(*axes), keepdims=1)))


@vjp("ReduceSumSquare")
def _reduce_sum_square(e: Emit, n: Node, g: str) -> Grads:
    g = e.Mul(kept(e, n, g, axes_of(e, n)), e.const(2.0))
    return (e.Mul(g, n.inputs[0]),)


@vjp("ReduceL2")
def _reduce_l2(e: Emit, n: Node, g: str) -> Grads:
    """Take y = sqrt(sum(x * x)): the slope is x / y."""
    axes = axes_of(e, n)
    size = e.Max(kept(e, n, n.outputs[0], axes), e.const(_TINY))
    return (e.Mul(n.inputs[0], e.Div(kept(e, n, g, axes), size)),)


@vjp("ReduceLogSumExp")
def _reduce_log_sum_exp(e: Emit, n: Node, g: str) -> Grads:
    axes = axes_of(e, n)
    share = e.Exp(e.Sub(n.inputs[0], kept(e, n, n.outputs[0], axes)))
    return (e.Mul(share, kept(e, n, g, axes)),)


@vjp("ReduceL1")
def _reduce_l1(e: Emit, n: Node, g: str) -> Grads:
    return (e.Mul(e.Sign(n.inputs[0]), kept(e, n, g, axes_of(e, n))),)


@vjp("ReduceLogSum")
def _reduce_log_sum(e: Emit, n: Node, g: str) -> Grads:
    """Take y = log(sum(x)): the slope is exp(-y) everywhere."""
    axes = axes_of(e, n)
    slope = e.Exp(e.Neg(n.outputs[0]))
    return (spread(e, n, e.Mul(g, slope), axes),) if axes else (e.Mul(g, slope),)


@vjp("ReduceProd")
def _reduce_prod(e: Emit, n: Node, g: str) -> Grads:
    """Multiply the others: one zero leaves a slope at its own place only, two leave none."""
    x, axes = n.inputs[0], axes_of(e, n)
    if not axes:
        return (g,)
    along = e.ints(*axes)
    zero = e.Cast(e.Equal(x, e.const(0.0)), to=np.float32)
    full = e.Add(x, zero)
    product = e.Mul(kept(e, n, g, axes), e.ReduceProd(full, along, keepdims=1))
    zeros = e.ReduceSum(zero, along, keepdims=1)
    none, one = (e.Cast(e.Equal(zeros, e.const(c)), to=np.float32) for c in (0.0, 1.0))
    place = e.Add(e.Mul(none, e.Reciprocal(full)), e.Mul(one, zero))
    return (e.Mul(product, place),)
