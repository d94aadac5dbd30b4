# SPDX-License-Identifier: Apache-2.0
"""Arithmetic, comparisons and logic, number by number, with broadcasting."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from coordinator.compiler.tflite.forward import Forward
from coordinator.compiler.tflite.ops.fused import activation
from coordinator.compiler.tflite.ops.rounding import has_ties, upwards
from coordinator.compiler.tflite.table import imports
from edge_sdk.tflitefile import Operator

_BINARY = {
    "ADD": "Add", "SUB": "Sub", "MUL": "Mul", "DIV": "Div", "POW": "Pow", "MAXIMUM": "Max",
    "MINIMUM": "Min", "LESS": "Less", "LESS_EQUAL": "LessOrEqual", "GREATER": "Greater",
    "GREATER_EQUAL": "GreaterOrEqual", "EQUAL": "Equal", "LOGICAL_AND": "And", "LOGICAL_OR": "Or",
}  # fmt: skip
_UNARY = {
    "ABS": "Abs", "CEIL": "Ceil", "COS": "Cos", "EXP": "Exp", "FLOOR": "Floor", "LOG": "Log",
    "LOGICAL_NOT": "Not", "NEG": "Neg", "ROUND": "Round", "SIGN": "Sign", "SIN": "Sin",
    "SQRT": "Sqrt",
}  # fmt: skip


@imports(*_BINARY)
def _(f: Forward, op: Operator) -> None:
    _combine(f, op, lambda a, b: f.e.op(_BINARY[op.op], (a, b))[0])


@imports("SQUARED_DIFFERENCE")
def _(f: Forward, op: Operator) -> None:
    def square(a: str, b: str) -> str:
        difference = f.e.Sub(a, b)
        return f.e.Mul(difference, difference)

    _combine(f, op, square)


@imports("NOT_EQUAL")
def _(f: Forward, op: Operator) -> None:
    _combine(f, op, lambda a, b: f.e.Not(f.e.Equal(a, b)))


@imports("FLOOR_DIV")
def _(f: Forward, op: Operator) -> None:
    def divided(a: str, b: str) -> str:
        if f.e.dtype(a) == np.float32:
            return f.e.Floor(f.e.Div(a, b))
        rest = f.e.Mod(a, b)  # of the divisor's sign, as Python has it
        return f.e.Div(f.e.Sub(a, rest), b)

    _combine(f, op, divided)


@imports("FLOOR_MOD")
def _(f: Forward, op: Operator) -> None:
    def rest(a: str, b: str) -> str:
        if f.e.dtype(a) == np.float32:
            return f.e.Sub(a, f.e.Mul(f.e.Floor(f.e.Div(a, b)), b))
        return f.e.Mod(a, b)

    _combine(f, op, rest)


@imports(*_UNARY)
def _(f: Forward, op: Operator) -> None:
    _map(f, op, lambda x: f.e.op(_UNARY[op.op], (x,))[0])


@imports("RSQRT")
def _(f: Forward, op: Operator) -> None:
    _map(f, op, lambda x: f.e.Reciprocal(f.e.Sqrt(x)))


@imports("SQUARE")
def _(f: Forward, op: Operator) -> None:
    _map(f, op, lambda x: f.e.Mul(x, x))


@imports("ADD_N")
def _(f: Forward, op: Operator) -> None:
    y = op.outputs[0]
    rank = max(map(f.rank, op.inputs))
    layout = f.layout(*op.inputs, rank=rank)
    total = f.operand(op.inputs[0], layout, rank)
    for i in op.inputs[1:]:
        total = f.e.Add(total, f.operand(i, layout, rank))
    f.write(y, total, layout)


@imports("SELECT", "SELECT_V2")
def _(f: Forward, op: Operator) -> None:
    y = op.outputs[0]
    rank = max(map(f.rank, op.inputs))
    layout = f.layout(*op.inputs, rank=rank)
    f.write(y, f.e.Where(*(f.operand(i, layout, rank) for i in op.inputs)), layout)


@imports("CAST")
def _(f: Forward, op: Operator) -> None:
    y = op.outputs[0]
    layout = f.layout(op.inputs[0], rank=f.rank(op.inputs[0]))
    value = f.read(op.inputs[0], layout)
    f.write(y, f.e.Cast(value, to=np.dtype(f.tensor(y).dtype)), layout)


@imports("ZEROS_LIKE")
def _(f: Forward, op: Operator) -> None:
    x, y = op.inputs[0], op.outputs[0]
    sizes = f.sizes(x)
    f.know(y, *(np.zeros(size, f.tensor(y).dtype) for size in sizes))


def _combine(f: Forward, op: Operator, make: Callable[[str, str], str]) -> None:
    """Write a function of two operands and its fused activation."""
    a, b = op.inputs
    y = op.outputs[0]
    rank = max(f.rank(a), f.rank(b))
    layout = f.layout(a, b, rank=rank)
    if op.op in {"MAXIMUM", "MINIMUM"}:
        f.share(a, b, y)
    value = make(f.operand(a, layout, rank), f.operand(b, layout, rank))
    if op.op in {"ADD", "SUB"} and f.is_quantized(y) and has_ties(f, (a, b), y):
        value = upwards(f, y, value)
    word = op.options.get("fused_activation_function", "NONE")
    f.write(y, activation(f, word, value, y, op), layout)


def _map(f: Forward, op: Operator, make: Callable[[str], str]) -> None:
    x, y = op.inputs[0], op.outputs[0]
    layout = f.layout(x, rank=f.rank(x))
    f.write(y, make(f.read(x, layout)), layout)
