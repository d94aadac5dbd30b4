# SPDX-License-Identifier: Apache-2.0
"""Poolings: the average spreads its gradient over the window, the maximum sends it to one place."""

from __future__ import annotations

import math

import numpy as np

from coordinator.compiler.emit import Emit
from coordinator.compiler.graph import Node
from coordinator.compiler.rules.reduce import shared
from coordinator.compiler.rules.window import Window, counts, spatial, transposed, window_of
from coordinator.compiler.vjp import Grads, vjp
from edge_sdk.errors import CompileError


@vjp("GlobalAveragePool")
def _global_average(e: Emit, n: Node, g: str) -> Grads:
    x = n.inputs[0]
    g = e.Mul(g, e.const(1.0 / math.prod(spatial(e, n, x))))
    return (e.Expand(g, e.size(x)),)


@vjp("GlobalMaxPool")
def _global_max(e: Emit, n: Node, g: str) -> Grads:
    """Equal maxima share the gradient."""
    x = n.inputs[0]
    return (shared(e, x, n.outputs[0], g, tuple(range(2, e.rank(x)))),)


@vjp("AveragePool")
def _average(e: Emit, n: Node, g: str) -> Grads:
    x = n.inputs[0]
    w = window_of(e, n, tuple(n.attr("kernel_shape")))
    sizes = counts(w, include_pad=bool(n.attr("count_include_pad", 0)))
    g = e.Mul(g, e.const(1.0 / (sizes.flat[0] if np.all(sizes == sizes.flat[0]) else sizes)))
    if w.kernel == w.size and not any(w.pads):
        return (e.Expand(g, e.size(x)),)
    # One channel at a time: channels join the batch, so one [1, 1, *kernel] filter of ones serves.
    flat = e.Reshape(g, e.ints(-1, 1, *w.out))
    ones = e.const(np.ones((1, 1, *w.kernel)))
    spread = transposed(e, flat, ones, w, 1)
    return (_restored(e, spread, x, w),)


def _restored(e: Emit, flat: str, x: str, w: Window) -> str:
    channels = e.dims(x)[1]
    if channels is None:
        raise CompileError(f"expected a known number of channels in {x!r}, got {e.dims(x)}")
    return e.Reshape(flat, e.ints(-1, channels, *w.size))


@vjp("MaxPool")
def _max(e: Emit, n: Node, g: str) -> Grads:
    """Send each gradient to the index of its maximum, adding up where windows overlap."""
    x = n.inputs[0]
    w = window_of(e, n, tuple(n.attr("kernel_shape")))
    if n.attr("storage_order", 0):
        raise CompileError(f"expected storage_order=0 in {n.label}, got 1: export it row-major")
    flat_g, flat_i = (e.Reshape(t, e.ints(-1)) for t in (g, _indices(e, n)))
    length = e.ReduceProd(e.Shape(x), keepdims=1)
    zeros = e.ConstantOfShape(length, value=np.zeros(1, np.float32))
    overlap = any(k > s or d > 1 for k, s, d in zip(w.kernel, w.strides, w.dilations, strict=True))
    total = e.ScatterElements(zeros, flat_i, flat_g, axis=0, reduction="add" if overlap else None)
    return (_restored(e, total, x, w),)


def _indices(e: Emit, n: Node) -> str:
    """Return where the maxima are; a second MaxPool finds them, so that the forward stays quick."""
    if len(n.outputs) > 1 and n.outputs[1]:
        return n.outputs[1]
    return e.MaxPool(n.inputs[0], outputs=2, **n.attributes)[1]
