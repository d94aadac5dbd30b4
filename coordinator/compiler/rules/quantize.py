# SPDX-License-Identifier: Apache-2.0
"""QuantizeLinear and DequantizeLinear, straight through (Bengio et al. 2013; Jacob et al. 2018).

An integer tensor's gradient is that of the real value it stands for, so DequantizeLinear passes it
on and QuantizeLinear blocks it where the quantizer saturates. Scales and zero points carry none.
"""

from __future__ import annotations

import numpy as np

from coordinator.compiler.emit import Emit
from coordinator.compiler.graph import Node
from coordinator.compiler.rules.activations import above, below
from coordinator.compiler.vjp import Grads, vjp
from edge_sdk.errors import CompileError


@vjp("DequantizeLinear")
def _dequantize(_e: Emit, _n: Node, g: str) -> Grads:
    return (g,)


@vjp("QuantizeLinear")
def _quantize(e: Emit, n: Node, g: str) -> Grads:
    """Mask x / scale to [qmin - zp - 1/2, qmax - zp + 1/2]: outside, the integer is clipped."""
    x, scale, zero = n.inputs[0], n.inputs[1], n.input(2)
    if n.attr("block_size", 0):
        raise CompileError(f"expected per-tensor or per-axis scales in {n.label}, got blocks")
    dtype = e.dtype(n.outputs[0]) or np.dtype(np.uint8)
    low, high = np.iinfo(dtype).min - 0.5, np.iinfo(dtype).max + 0.5
    step, shift = e.value(scale), e.value(zero) if zero else np.zeros((), dtype)
    if step is not None and shift is not None and step.size == shift.size == 1:
        edge, centre = float(step.flat[0]), float(shift.flat[0])
        return (_inside(e, g, x, ((low - centre) * edge, (high - centre) * edge)),)
    along = n.attr("axis", 1) % max(e.rank(x), 1)
    steps = e.Div(x, _aligned(e, scale, x, along))
    if zero:
        steps = e.Add(steps, _aligned(e, e.Cast(zero, to=np.float32), x, along))
    return (_inside(e, g, steps, (low, high)),)


def _inside(e: Emit, g: str, x: str, edges: tuple[float, float]) -> str:
    return e.Mul(e.Mul(g, above(e, x, edges[0])), below(e, x, edges[1]))


def _aligned(e: Emit, vector: str, x: str, axis: int) -> str:
    """Let a per-axis vector broadcast against `x`; a scalar stays as it is."""
    if not e.rank(vector) or e.rank(x) <= 1:
        return vector
    ones = [1] * e.rank(x)
    ones[axis] = -1
    return e.Reshape(vector, e.ints(*ones))
