# SPDX-License-Identifier: Apache-2.0
"""Trigonometric and hyperbolic functions, and the rarer activations."""

from __future__ import annotations

from coordinator.compiler.emit import Emit
from coordinator.compiler.graph import Node
from coordinator.compiler.rules.activations import above
from coordinator.compiler.rules.elementwise import to_input
from coordinator.compiler.vjp import Grads, vjp
from edge_sdk.errors import CompileError


@vjp("Tan")
def _tan(e: Emit, n: Node, g: str) -> Grads:
    y = n.outputs[0]
    return (e.Mul(g, e.Add(e.const(1.0), e.Mul(y, y))),)


@vjp("Asin")
def _asin(e: Emit, n: Node, g: str) -> Grads:
    return (e.Div(g, _leg(e, n.inputs[0])),)


@vjp("Acos")
def _acos(e: Emit, n: Node, g: str) -> Grads:
    return (e.Neg(e.Div(g, _leg(e, n.inputs[0]))),)


def _leg(e: Emit, x: str) -> str:
    """Return sqrt(1 - x * x)."""
    return e.Sqrt(e.Sub(e.const(1.0), e.Mul(x, x)))


@vjp("Sinh")
def _sinh(e: Emit, n: Node, g: str) -> Grads:
    return (e.Mul(g, e.Cosh(n.inputs[0])),)


@vjp("Cosh")
def _cosh(e: Emit, n: Node, g: str) -> Grads:
    return (e.Mul(g, e.Sinh(n.inputs[0])),)


@vjp("Asinh")
def _asinh(e: Emit, n: Node, g: str) -> Grads:
    x = n.inputs[0]
    return (e.Div(g, e.Sqrt(e.Add(e.Mul(x, x), e.const(1.0)))),)


@vjp("Acosh")
def _acosh(e: Emit, n: Node, g: str) -> Grads:
    x = n.inputs[0]
    return (e.Div(g, e.Sqrt(e.Sub(e.Mul(x, x), e.const(1.0)))),)


@vjp("Atanh")
def _atanh(e: Emit, n: Node, g: str) -> Grads:
    x = n.inputs[0]
    return (e.Div(g, e.Sub(e.const(1.0), e.Mul(x, x))),)


@vjp("Celu")
def _celu(e: Emit, n: Node, g: str) -> Grads:
    """Below zero the slope is exp(x / alpha), which is 1 + y / alpha."""
    low = e.Min(n.outputs[0], e.const(0.0))
    return (e.Mul(g, e.Add(e.Mul(low, e.const(1.0 / n.attr("alpha", 1.0))), e.const(1.0))),)


@vjp("ThresholdedRelu")
def _thresholded_relu(e: Emit, n: Node, g: str) -> Grads:
    return (e.Mul(g, above(e, n.inputs[0], n.attr("alpha", 1.0))),)


@vjp("Shrink")
def _shrink(e: Emit, n: Node, g: str) -> Grads:
    """Pass the gradient outside [-lambd, lambd]; bias only shifts."""
    return (e.Mul(g, above(e, e.Abs(n.inputs[0]), n.attr("lambd", 0.5))),)


@vjp("Mod")
def _mod(e: Emit, n: Node, g: str) -> Grads:
    """Take y = a - b * q with a whole q (fmod): the slopes are 1 and -q."""
    if not n.attr("fmod", 0):
        raise CompileError(f"expected fmod=1 in {n.label} of floats, got 0: export it as fmod")
    a, b = n.inputs
    da = to_input(e, n, 0, g) if e.needs(a) else None
    if not e.needs(b):
        return (da,)
    whole = e.Div(e.Sub(a, n.outputs[0]), b)
    return da, to_input(e, n, 1, e.Neg(e.Mul(g, whole)))
