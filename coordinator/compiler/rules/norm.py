# SPDX-License-Identifier: Apache-2.0
"""Normalizations: by fixed statistics (batch), or by those of each example (layer, instance)."""

from __future__ import annotations

import numpy as np

from coordinator.compiler.emit import Emit
from coordinator.compiler.graph import Node
from coordinator.compiler.vjp import Grads, unbroadcast, vjp
from edge_sdk.errors import CompileError


@vjp("BatchNormalization")
def _batch_norm(e: Emit, n: Node, g: str) -> Grads:
    """Take y = (x - mean) * scale / sqrt(var + epsilon) + bias, with mean and var constant."""
    if n.attr("training_mode", 0):
        raise CompileError(
            f"expected {n.label} in inference mode, got training_mode=1: "
            "export the model in eval mode"
        )
    x, scale, bias, mean, var = n.inputs
    others = [axis for axis in range(e.rank(x)) if axis != 1]
    inverse = e.Reciprocal(e.Sqrt(e.Add(var, e.const(n.attr("epsilon", 1e-5)))))
    dx = ds = db = None
    if e.needs(x):
        dx = e.Mul(g, _channels(e, e.Mul(scale, inverse), e.rank(x)))
    if e.needs(scale) or e.needs(bias):
        db = e.ReduceSum(g, e.ints(*others), keepdims=0)
    if e.needs(scale) and db is not None:
        products = e.ReduceSum(e.Mul(g, x), e.ints(*others), keepdims=0)
        ds = e.Mul(e.Sub(products, e.Mul(db, mean)), inverse)
    return dx, ds, db


def _channels(e: Emit, vector: str, rank: int) -> str:
    """Turn a vector over channels into one that broadcasts over [N, C, ...]."""
    return e.Reshape(vector, e.ints(-1, *[1] * (rank - 2))) if rank > 2 else vector


@vjp("LayerNormalization")
def _layer_norm(e: Emit, n: Node, g: str) -> Grads:
    """Normalize over the trailing axes (Ba et al. 2016)."""
    x, scale, bias = n.inputs[0], n.inputs[1], n.input(2)
    first, epsilon = n.attr("axis", -1), n.attr("epsilon", 1e-5)
    rank = e.rank(x)
    axes = e.ints(*range(first % rank, rank))
    one = e.const(np.ones(e.static(scale) or (1,)))
    xhat, _, inverse = e.LayerNormalization(x, one, outputs=3, axis=first, epsilon=epsilon)
    dx = ds = None
    if e.needs(x):
        dx = _whitened(e, e.Mul(g, scale), xhat, inverse, axes)
    if e.needs(scale):
        ds = unbroadcast(e, e.Mul(g, xhat), scale)
    return dx, ds, unbroadcast(e, g, bias) if e.needs(bias) else None


@vjp("InstanceNormalization")
def _instance_norm(e: Emit, n: Node, g: str) -> Grads:
    """Normalize each example's channel over space (Ulyanov et al. 2016)."""
    x, scale, bias = n.inputs
    rank = e.rank(x)
    space, others = e.ints(*range(2, rank)), e.ints(0, *range(2, rank))
    centred = e.Sub(x, e.ReduceMean(x, space, keepdims=1))
    variance = e.ReduceMean(e.Mul(centred, centred), space, keepdims=1)
    inverse = e.Reciprocal(e.Sqrt(e.Add(variance, e.const(n.attr("epsilon", 1e-5)))))
    xhat = e.Mul(centred, inverse)
    dx = ds = None
    if e.needs(x):
        h = e.Mul(g, _channels(e, scale, rank))
        dx = _whitened(e, h, xhat, inverse, space)
    if e.needs(scale):
        ds = e.ReduceSum(e.Mul(g, xhat), others, keepdims=0)
    return dx, ds, e.ReduceSum(g, others, keepdims=0) if e.needs(bias) else None


def _whitened(e: Emit, h: str, xhat: str, inverse: str, axes: str) -> str:
    """Return inv * (h - mean(h) - xhat * mean(h * xhat)), the way back through xhat."""
    along = e.Mul(xhat, e.ReduceMean(e.Mul(h, xhat), axes, keepdims=1))
    return e.Mul(inverse, e.Sub(e.Sub(h, e.ReduceMean(h, axes, keepdims=1)), along))
