# SPDX-License-Identifier: Apache-2.0
"""Arithmetic, comparisons and masks, element by element."""

from __future__ import annotations

import math

import numpy as np

from coordinator.compiler.graph import Node
from coordinator.compiler.tflite.lower.forms import Lowering
from coordinator.compiler.tflite.lower.quantized import integer_add
from coordinator.compiler.tflite.lower.table import lowers, refused

_BINARY = {
    "Add": "ADD", "Sub": "SUB", "Mul": "MUL", "Div": "DIV", "Pow": "POW",
    "Max": "MAXIMUM", "Min": "MINIMUM",
}  # fmt: skip
_COMPARED = {
    "Equal": "EQUAL", "Greater": "GREATER", "Less": "LESS", "GreaterOrEqual": "GREATER_EQUAL",
    "LessOrEqual": "LESS_EQUAL", "And": "LOGICAL_AND", "Or": "LOGICAL_OR",
}  # fmt: skip
_UNARY = {
    "Neg": "NEG", "Abs": "ABS", "Sqrt": "SQRT", "Exp": "EXP", "Log": "LOG", "Floor": "FLOOR",
    "Ceil": "CEIL", "Round": "ROUND", "Sin": "SIN", "Cos": "COS", "Not": "LOGICAL_NOT",
}  # fmt: skip
_ELEMENT = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int32", 9: "bool", 11: "float32"}
STEEP = 2.0**100


@lowers("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Sum", "Mean")
def _arithmetic(low: Lowering, n: Node) -> None:
    if n.kind == "Sub" and _complement(low, n):
        return
    if n.kind == "Add" and integer_add(low, n):
        return
    op = _BINARY.get(n.kind, "ADD")
    tensors, order = low.together(n.inputs)
    made = tensors[0]
    if n.kind == "Pow":
        tensors[1] = low.tape.cast(tensors[1], low.tape.dtype(made))
    for other in tensors[1:]:
        made = low.tape.binary(op, made, other)
    if n.kind == "Mean":
        made = low.tape.mul(made, low.tape.const(1.0 / len(n.inputs)))
    low.put(n.outputs[0], made, order if low.tape.shape(made) else ())


def _complement(low: Lowering, n: Node) -> bool:
    """Serve 1 - base**t in double, where float would cancel: 2h / (1 + h), h = tanh(-t ln(base)/2).

    It is the correction of Adam's averages.
    """
    one, power = low.constant(n.inputs[0]), low.graph.producers.get(n.inputs[1])
    is_double = low.graph.dtype(n.inputs[1]) == np.float64
    if one is None or not is_double or power is None or power.kind != "Pow":
        return False
    base = low.constant(power.inputs[0])
    if base is None or base.size != 1 or one.size != 1 or float(one.reshape(())) != 1.0:
        return False
    if not 0 < float(base.reshape(())) < 1:
        return False
    tape, t = low.tape, low.get(power.inputs[1])
    half = tape.mul(t, tape.const(-math.log(float(base.reshape(()))) / 2))
    h = tape.unary("TANH", half)
    made = tape.over(tape.mul(h, tape.const(2.0)), tape.plus(h, tape.const(1.0)))
    low.put(n.outputs[0], made)
    return True


@lowers(*_COMPARED)
def _compared(low: Lowering, n: Node) -> None:
    tensors, order = low.together(n.inputs)
    a, b = _same_type(low, tensors)
    made = low.tape.binary(_COMPARED[n.kind], a, b, "bool")
    low.put(n.outputs[0], made, order if low.tape.shape(made) else ())


def _same_type(low: Lowering, tensors: list[int]) -> list[int]:
    types = {low.tape.dtype(t) for t in tensors}
    if len(types) == 1:
        return tensors
    return [low.tape.cast(t, "int32") for t in tensors]


@lowers("Xor")
def _xor(low: Lowering, n: Node) -> None:
    tensors, order = low.together(n.inputs)
    a, b = (low.tape.cast(t, "int32") for t in tensors)
    low.put(n.outputs[0], low.tape.binary("NOT_EQUAL", a, b, "bool"), order)


@lowers(*_UNARY)
def _unary(low: Lowering, n: Node) -> None:
    low.each(_UNARY[n.kind], n)


@lowers("Reciprocal")
def _reciprocal(low: Lowering, n: Node) -> None:
    tensor, order = low.form(n.inputs[0])
    low.put(n.outputs[0], low.tape.over(low.tape.const(1.0), tensor), order)


@lowers("Sign")
def _sign(low: Lowering, n: Node) -> None:
    """Cut x * 2**100 off at -1 and 1: one operator that every runtime has."""
    tensor, order = low.form(n.inputs[0])
    made = low.tape.mul(tensor, low.tape.const(STEEP), "RELU_N1_TO_1")
    low.put(n.outputs[0], made, order)


@lowers("Tan")
def _tan(low: Lowering, n: Node) -> None:
    tensor, order = low.form(n.inputs[0])
    made = low.tape.over(low.tape.unary("SIN", tensor), low.tape.unary("COS", tensor))
    low.put(n.outputs[0], made, order)


@lowers("Identity", "Dropout")
def _identity(low: Lowering, n: Node) -> None:
    if low.has_levels(n.inputs[0]):
        tensor, order = low.level_form(n.inputs[0])
        low.put_levels(n.outputs[0], tensor, order)
        return
    tensor, order = low.form(n.inputs[0])
    low.put(n.outputs[0], tensor, order)


@lowers("Cast", "CastLike")
def _cast(low: Lowering, n: Node) -> None:
    to = n.attr("to", 1)
    if to not in _ELEMENT or n.kind == "CastLike":
        raise refused(n, f"casts to the ONNX type {to}")
    tensor, order = low.form(n.inputs[0])
    low.put(n.outputs[0], low.tape.cast(tensor, _ELEMENT[to]), order)


@lowers("Where")
def _where(low: Lowering, n: Node) -> None:
    tensors, order = low.together(n.inputs)
    shape = np.broadcast_shapes(*(low.tape.shape(t) for t in tensors))
    made = low.tape.add("SELECT_V2", tensors, shape, low.tape.dtype(tensors[1]))
    low.put(n.outputs[0], made, order)


@lowers("Clip")
def _clip(low: Lowering, n: Node) -> None:
    tensor, order = low.form(n.inputs[0])
    for name, op in ((n.input(1), "MAXIMUM"), (n.input(2), "MINIMUM")):
        if name:
            tensor = low.tape.binary(op, tensor, low.get(name))
    low.put(n.outputs[0], tensor, order)


@lowers("Erf")
def _erf(low: Lowering, n: Node) -> None:
    tensor, order = low.form(n.inputs[0])
    low.put(n.outputs[0], erf(low, tensor), order)


def erf(low: Lowering, x: int) -> int:
    """Record erf within 1.5e-7 (Abramowitz & Stegun 1964, 7.1.26): there is no builtin one."""
    t = low.tape
    size = t.unary("ABS", x)
    u = t.over(t.const(1.0), t.plus(t.mul(size, t.const(0.3275911)), t.const(1.0)))
    total = t.const(1.061405429)
    for factor in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        total = t.plus(t.mul(total, u), t.const(factor))
    bell = t.unary("EXP", t.unary("NEG", t.mul(x, x)))
    above = t.minus(t.const(1.0), t.mul(t.mul(total, u), bell))
    return t.mul(above, t.mul(x, t.const(STEEP), "RELU_N1_TO_1"))
