# SPDX-License-Identifier: Apache-2.0
"""QuantizeLinear and DequantizeLinear, straight through (Bengio et al. 2013; Jacob et al. 2018).

An integer tensor's gradient is that of the real value it stands for, so DequantizeLinear passes it
on and QuantizeLinear blocks it where the quantizer saturates. Zero points carry none. Together the
two give a step its gradient of Esser et al. 2020 (LSQ, eq. 3): the rounding's error inside, and
the integer itself where the quantizer saturates.
"""

from __future__ import annotations

import numpy as np

from coordinator.compiler.emit import Emit
from coordinator.compiler.graph import Node
from coordinator.compiler.rules.activations import above, below
from coordinator.compiler.vjp import Grads, vjp
from edge_sdk.errors import CompileError


@vjp("DequantizeLinear")
def _dequantize(e: Emit, n: Node, g: str) -> Grads:
    return g, _by_step(e, n, g, n.outputs[0]) if e.needs(n.inputs[1]) else None


@vjp("QuantizeLinear")
def _quantize(e: Emit, n: Node, g: str) -> Grads:
    """Mask x / scale to [qmin - zp - 1/2, qmax - zp + 1/2]: outside, the integer is clipped."""
    inside = _through(e, n, g)
    by_step = e.Neg(_by_step(e, n, inside, n.inputs[0])) if e.needs(n.inputs[1]) else None
    return inside, by_step


def _by_step(e: Emit, n: Node, g: str, values: str) -> str:
    """Emit the sum of g * values / scale, for one scale: a product of two rows.

    Of 128,000 numbers Gemm with transB takes 0.014 ms, MatMul of a row and a column 0.18.
    """
    scale = n.inputs[1]
    if (e.static(scale) or ()) not in {(), (1,)}:
        raise CompileError(f"expected one step to learn in {n.label}, got one per channel")
    row = e.ints(1, -1)
    total = e.Gemm(e.Reshape(g, row), e.Reshape(values, row), transB=1)
    return e.Div(e.Reshape(total, e.ints(*(e.static(scale) or ()))), scale)


def _through(e: Emit, n: Node, g: str) -> str:
    x, scale, zero = n.inputs[0], n.inputs[1], n.input(2)
    if n.attr("block_size", 0):
        raise CompileError(f"expected per-tensor or per-axis scales in {n.label}, got blocks")
    dtype = e.dtype(n.outputs[0]) or np.dtype(np.uint8)
    low, high = np.iinfo(dtype).min - 0.5, np.iinfo(dtype).max + 0.5
    step, shift = e.value(scale), e.value(zero) if zero else np.zeros((), dtype)
    if step is not None and shift is not None and step.size == shift.size == 1:
        edge, centre = float(step.flat[0]), float(shift.flat[0])
        return _inside(e, g, x, ((low - centre) * edge, (high - centre) * edge))
    if shift is not None and shift.size == 1 and e.rank(scale) == 0:
        centre = float(shift.flat[0])
        return _inside(e, g, e.Div(x, scale), (low - centre, high - centre))
    along = n.attr("axis", 1) % max(e.rank(x), 1)
    steps = e.Div(x, _aligned(e, scale, x, along))
    if zero:
        steps = e.Add(steps, _aligned(e, e.Cast(zero, to=np.float32), x, along))
    return _inside(e, g, steps, (low, high))


def _inside(e: Emit, g: str, x: str, edges: tuple[float, float]) -> str:
    return e.Mul(e.Mul(g, above(e, x, edges[0])), below(e, x, edges[1]))


def _aligned(e: Emit, vector: str, x: str, axis: int) -> str:
    """Let a per-axis vector broadcast against `x`; a scalar stays as it is."""
    if not e.rank(vector) or e.rank(x) <= 1:
        return vector
    ones = [1] * e.rank(x)
    ones[axis] = -1
    return e.Reshape(vector, e.ints(*ones))
