# SPDX-License-Identifier: Apache-2.0
"""p-norms over windows, and local response normalization."""

from __future__ import annotations

import math

import numpy as np

from coordinator.compiler.emit import Emit
from coordinator.compiler.graph import Node
from coordinator.compiler.rules.window import transposed, window_of
from coordinator.compiler.vjp import Grads, vjp
from edge_sdk.errors import CompileError

_TINY = 1e-19
"""What a norm of zero counts as: its square is the least float32."""


@vjp("LpPool")
def _lp_pool(e: Emit, n: Node, g: str) -> Grads:
    """Take y = (sum |x|^p)^(1/p): the slope is sign(x) |x|^(p-1) y^(1-p), summed over windows."""
    x, y, p = n.inputs[0], n.outputs[0], n.attr("p", 2)
    w = window_of(e, n, tuple(n.attr("kernel_shape")))
    if p > 1:
        g = e.Div(g, _power(e, e.Max(y, e.const(_TINY if p == 2 else 1e-6)), p - 1))
    channels = e.dims(x)[1]
    if channels is None:
        raise CompileError(f"expected a known number of channels in {n.label}, got {e.dims(x)}")
    flat = e.Reshape(g, e.ints(-1, 1, *w.out))  # one filter serves every channel
    wide = transposed(e, flat, e.const(np.ones((1, 1, *w.kernel))), w, 1)
    return (e.Mul(e.Reshape(wide, e.ints(-1, channels, *w.size)), _odd_power(e, x, p)),)


def _power(e: Emit, x: str, p: int) -> str:
    return x if p == 1 else e.Pow(x, e.const(float(p)))


def _odd_power(e: Emit, x: str, p: int) -> str:
    """Return sign(x) |x|^(p-1)."""
    if p == 1:
        return e.Sign(x)
    return x if p == 2 else e.Mul(e.Sign(x), _power(e, e.Abs(x), p - 1))


@vjp("LRN")
def _lrn(e: Emit, n: Node, g: str) -> Grads:
    """Take y = x d^-b, d = bias + a/size S(x^2), S a sum over neighbouring channels.

    The slope is d^-b g - 2 a b / size * x * S'(g x d^(-b-1)) (Krizhevsky et al. 2012, 3.3).
    """
    x, size = n.inputs[0], n.attr("size")
    alpha, beta = n.attr("alpha", 1e-4) / size, n.attr("beta", 0.75)
    channels = e.dims(x)[1]
    if channels is None:
        raise CompileError(f"expected a known number of channels in {n.label}, got {e.dims(x)}")
    band = _band(channels, size)
    sums = _mixed(e, e.Mul(x, x), band)
    d = e.Add(e.Mul(sums, e.const(alpha)), e.const(n.attr("bias", 1.0)))
    scaled = e.Mul(g, e.Pow(d, e.const(-beta)))
    back = _mixed(e, e.Div(e.Mul(scaled, x), d), band.T)
    return (e.Sub(scaled, e.Mul(e.Mul(x, back), e.const(2.0 * alpha * beta))),)


def _band(channels: int, size: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Return which channels (columns) each channel (row) sums."""
    at = np.arange(channels)
    ahead = at[None, :] - at[:, None]
    inside = (ahead >= -((size - 1) // 2)) & (ahead <= math.ceil((size - 1) / 2))
    return inside.astype(np.float32)


def _mixed(e: Emit, x: str, band: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> str:
    """Mix the channels of [N, C, ...] by a matrix."""
    if e.rank(x) == 2:
        return e.MatMul(x, e.const(band.T))
    return e.Conv(x, e.const(band.reshape(*band.shape, *[1] * (e.rank(x) - 2))))
