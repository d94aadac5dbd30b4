# SPDX-License-Identifier: Apache-2.0
"""Arithmetic, element by element, with broadcasting."""

from __future__ import annotations

import math

import numpy as np

from coordinator.compiler.emit import Emit
from coordinator.compiler.graph import Node
from coordinator.compiler.vjp import Grads, unbroadcast, vjp


def to_input(e: Emit, n: Node, index: int, g: str) -> str:
    """Sum a gradient over what broadcasting repeated of an input."""
    return unbroadcast(e, g, n.inputs[index])


@vjp("Add")
def _add(e: Emit, n: Node, g: str) -> Grads:
    return tuple(to_input(e, n, i, g) if e.needs(x) else None for i, x in enumerate(n.inputs))


@vjp("Sub")
def _sub(e: Emit, n: Node, g: str) -> Grads:
    a, b = n.inputs
    return (
        to_input(e, n, 0, g) if e.needs(a) else None,
        e.Neg(to_input(e, n, 1, g)) if e.needs(b) else None,
    )


@vjp("Mul")
def _mul(e: Emit, n: Node, g: str) -> Grads:
    a, b = n.inputs
    return (
        to_input(e, n, 0, e.Mul(g, b)) if e.needs(a) else None,
        to_input(e, n, 1, e.Mul(g, a)) if e.needs(b) else None,
    )


@vjp("Div")
def _div(e: Emit, n: Node, g: str) -> Grads:
    a, b = n.inputs
    over = e.Div(g, b)
    return (
        to_input(e, n, 0, over) if e.needs(a) else None,
        e.Neg(to_input(e, n, 1, e.Mul(over, n.outputs[0]))) if e.needs(b) else None,
    )


@vjp("Neg")
def _neg(e: Emit, _: Node, g: str) -> Grads:
    return (e.Neg(g),)


@vjp("Abs")
def _abs(e: Emit, n: Node, g: str) -> Grads:
    return (e.Mul(g, e.Sign(n.inputs[0])),)


@vjp("Reciprocal")
def _reciprocal(e: Emit, n: Node, g: str) -> Grads:
    y = n.outputs[0]
    return (e.Neg(e.Mul(g, e.Mul(y, y))),)


@vjp("Exp")
def _exp(e: Emit, n: Node, g: str) -> Grads:
    return (e.Mul(g, n.outputs[0]),)


@vjp("Log")
def _log(e: Emit, n: Node, g: str) -> Grads:
    return (e.Div(g, n.inputs[0]),)


@vjp("Sqrt")
def _sqrt(e: Emit, n: Node, g: str) -> Grads:
    return (e.Div(e.Mul(g, e.const(0.5)), n.outputs[0]),)


@vjp("Erf")
def _erf(e: Emit, n: Node, g: str) -> Grads:
    x = n.inputs[0]
    slope = e.Mul(e.Exp(e.Neg(e.Mul(x, x))), e.const(2.0 / math.sqrt(math.pi)))
    return (e.Mul(g, slope),)


@vjp("Pow")
def _pow(e: Emit, n: Node, g: str) -> Grads:
    """Differentiate x ** p by x; the exponent carries no gradient."""
    x, p = n.inputs
    exponent = e.value(p)
    if exponent is not None and exponent.size == 1:
        power = float(exponent.reshape(()))
        rest = x if power == 2.0 else e.Pow(x, e.const(power - 1.0))
        return (to_input(e, n, 0, e.Mul(e.Mul(g, e.const(power)), rest)),)
    p = e.Cast(p, to=np.float32)
    return (to_input(e, n, 0, e.Mul(e.Mul(g, p), e.Pow(x, e.Sub(p, e.const(1.0))))),)


@vjp("Where")
def _where(e: Emit, n: Node, g: str) -> Grads:
    condition, a, b = n.inputs
    chosen = e.Cast(condition, to=np.float32)
    return (
        None,
        to_input(e, n, 1, e.Mul(g, chosen)) if e.needs(a) else None,
        to_input(e, n, 2, e.Mul(g, e.Sub(e.const(1.0), chosen))) if e.needs(b) else None,
    )


@vjp("Sum")
def _sum(e: Emit, n: Node, g: str) -> Grads:
    return tuple(to_input(e, n, i, g) if e.needs(x) else None for i, x in enumerate(n.inputs))


@vjp("Mean")
def _mean(e: Emit, n: Node, g: str) -> Grads:
    g = e.Mul(g, e.const(1.0 / len(n.inputs)))
    return tuple(to_input(e, n, i, g) if e.needs(x) else None for i, x in enumerate(n.inputs))


@vjp("Max", "Min")
def _extreme(e: Emit, n: Node, g: str) -> Grads:
    """Pass the gradient to the inputs that equal the result, shared where several do."""
    hits = [e.Cast(e.Equal(x, n.outputs[0]), to=np.float32) for x in n.inputs]
    g = e.Div(g, e.Sum(*hits)) if len(hits) > 1 else g
    pairs = enumerate(zip(n.inputs, hits, strict=True))
    return tuple(to_input(e, n, i, e.Mul(g, hit)) if e.needs(x) else None for i, (x, hit) in pairs)


@vjp("Sin")
def _sin(e: Emit, n: Node, g: str) -> Grads:
    return (e.Mul(g, e.Cos(n.inputs[0])),)


@vjp("Cos")
def _cos(e: Emit, n: Node, g: str) -> Grads:
    return (e.Neg(e.Mul(g, e.Sin(n.inputs[0]))),)


@vjp("Atan")
def _atan(e: Emit, n: Node, g: str) -> Grads:
    x = n.inputs[0]
    return (e.Div(g, e.Add(e.const(1.0), e.Mul(x, x))),)
