# SPDX-License-Identifier: Apache-2.0
"""Normalizations, p-norms and fused activations, in reductions and arithmetic."""

from __future__ import annotations

import math

import numpy as np

from coordinator.compiler.emit import Emit
from coordinator.compiler.graph import Node
from coordinator.compiler.rewrite import rewrite

_TINY = 1e-19  # a norm of zero: its square is the least float32
_SOFT = 1e-9
"""What MeanVarianceNormalization adds to the standard deviation."""


@rewrite("MeanVarianceNormalization")
def _mean_variance(e: Emit, n: Node) -> tuple[str, ...]:
    x, rank = n.inputs[0], e.rank(n.inputs[0])
    axes = e.ints(*[axis % rank for axis in n.attr("axes", (0, 2, 3))])
    centred = e.Sub(x, e.ReduceMean(x, axes, keepdims=1))
    spread = e.Sqrt(e.ReduceMean(e.Mul(centred, centred), axes, keepdims=1))
    return (e.Div(centred, e.Add(spread, e.const(_SOFT))),)


@rewrite("GroupNormalization")
def _group(e: Emit, n: Node) -> tuple[str, ...]:
    """Normalize groups of channels (Wu & He 2018), scales per channel (opset 21)."""
    x, scale, bias = n.inputs
    groups, rank = n.attr("num_groups"), e.rank(x)
    split = e.declare(e.Reshape(x, e.ints(0, groups, -1)), (e.dims(x)[0], groups, None))
    ones, zeros = e.const(np.ones(groups)), e.const(np.zeros(groups))
    even = e.InstanceNormalization(split, ones, zeros, epsilon=n.attr("epsilon", 1e-5))
    whole = e.Reshape(even, e.ints(*(0 if i == 0 else d or -1 for i, d in enumerate(e.dims(x)))))
    whole = e.declare(whole, e.dims(x))
    scaled = e.Mul(whole, _by_channel(e, scale, rank))
    return (e.Add(scaled, _by_channel(e, bias, rank)),)


def _by_channel(e: Emit, vector: str, rank: int) -> str:
    """Turn a value for each channel into one that broadcasts over [N, C, ...]."""
    return e.Reshape(vector, e.ints(-1, *[1] * (rank - 2)))


@rewrite("LpNormalization")
def _lp_normalization(e: Emit, n: Node) -> tuple[str, ...]:
    x, axis = n.inputs[0], e.ints(n.attr("axis", -1))
    norm = (e.ReduceL1 if n.attr("p", 2) == 1 else e.ReduceL2)(x, axis, keepdims=1)
    return (e.Div(x, e.Max(norm, e.const(_TINY))),)


@rewrite("GlobalLpPool")
def _global_lp_pool(e: Emit, n: Node) -> tuple[str, ...]:
    x, p = n.inputs[0], n.attr("p", 2)
    axes = e.ints(*range(2, e.rank(x)))
    if p <= 2:
        return ((e.ReduceL1 if p == 1 else e.ReduceL2)(x, axes, keepdims=1),)
    total = e.ReduceSum(e.Pow(e.Abs(x), e.const(float(p))), axes, keepdims=1)
    return (e.Pow(total, e.const(1.0 / p)),)


@rewrite("com.microsoft.Gelu")
def _gelu(e: Emit, n: Node) -> tuple[str, ...]:
    return (_normal_gelu(e, n.inputs[0]),)


@rewrite("com.microsoft.BiasGelu")
def _bias_gelu(e: Emit, n: Node) -> tuple[str, ...]:
    return (_normal_gelu(e, e.Add(*n.inputs)),)


def _normal_gelu(e: Emit, x: str) -> str:
    normal = e.Add(e.Erf(e.Mul(x, e.const(math.sqrt(0.5)))), e.const(1.0))
    return e.Mul(e.Mul(x, e.const(0.5)), normal)


@rewrite("com.microsoft.FastGelu")
def _fast_gelu(e: Emit, n: Node) -> tuple[str, ...]:
    x = e.Add(*n.inputs) if n.input(1) else n.inputs[0]
    root = math.sqrt(2.0 / math.pi)
    inner = e.Add(e.Mul(e.Mul(x, x), e.const(0.044715 * root)), e.const(root))
    return (e.Mul(e.Mul(x, e.const(0.5)), e.Add(e.Tanh(e.Mul(x, inner)), e.const(1.0))),)


@rewrite("com.microsoft.QuickGelu")
def _quick_gelu(e: Emit, n: Node) -> tuple[str, ...]:
    x = n.inputs[0]
    return (e.Mul(x, e.Sigmoid(e.Mul(x, e.const(n.attr("alpha", 1.702))))),)
