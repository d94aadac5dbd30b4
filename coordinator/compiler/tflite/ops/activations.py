# SPDX-License-Identifier: Apache-2.0
"""Activations and softmax."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from coordinator.compiler.tflite.forward import Forward
from coordinator.compiler.tflite.layout import place
from coordinator.compiler.tflite.ops.fused import activation, clip
from coordinator.compiler.tflite.ops.hardswish import hard_swish
from coordinator.compiler.tflite.ops.rounding import by_code, coarse, lattice, rounded_slope, twice
from coordinator.compiler.tflite.table import imports
from edge_sdk.tflitefile import Operator

_PLAIN = {
    "ELU": "Elu", "LOGISTIC": "Sigmoid", "TANH": "Tanh",
}  # fmt: skip
_CLIPS = {"RELU6": (0.0, 6.0), "RELU_N1_TO_1": (-1.0, 1.0), "RELU_0_TO_1": (0.0, 1.0)}
_FIXED = frozenset({"LOGISTIC", "TANH"})


@imports(*_PLAIN)
def _(f: Forward, op: Operator) -> None:
    if op.op in _FIXED:
        f.fix(op.outputs[0])
    _map(f, op, lambda x: f.e.op(_PLAIN[op.op], (x,))[0])


@imports("RELU", *_CLIPS)
def _(f: Forward, op: Operator) -> None:
    x, y = op.inputs[0], op.outputs[0]

    def made(value: str) -> str:
        if f.is_quantized(x):
            value = twice(f, y, value, float(f.tensor(x).scale[0]) / float(f.tensor(y).scale[0]))
        return f.e.Relu(value) if op.op == "RELU" else clip(f, value, _CLIPS[op.op], y)

    _map(f, op, made)


@imports("HARD_SWISH")
def _(f: Forward, op: Operator) -> None:
    x, y = op.inputs[0], op.outputs[0]

    def made(value: str) -> str:
        swish = f.e.HardSwish(value)
        if not f.is_quantized(x):
            return swish
        ours = lattice(f, x, y, lambda n: n * np.clip(n / np.float32(6) + np.float32(0.5), 0, 1))
        return by_code(f, x, y, swish, (hard_swish(f.tensor(x), f.tensor(y)), ours))

    _map(f, op, made)


@imports("LEAKY_RELU")
def _(f: Forward, op: Operator) -> None:
    x, y, slope = op.inputs[0], op.outputs[0], float(op.options["alpha"])
    if not f.is_quantized(x):
        _map(f, op, lambda value: f.e.LeakyRelu(value, alpha=slope))
        return
    slope = rounded_slope(f, x, y, slope)
    _map(f, op, lambda value: coarse(f, x, y, f.e.LeakyRelu(value, alpha=slope)))


@imports("GELU")
def _(f: Forward, op: Operator) -> None:
    kind = "tanh" if op.options.get("approximate") else "none"
    _map(f, op, lambda x: f.e.Gelu(x, approximate=kind))


@imports("PRELU")
def _(f: Forward, op: Operator) -> None:
    x, slope, y = op.inputs[0], op.inputs[1], op.outputs[0]
    rank = f.rank(op.inputs[0])
    layout = f.layout(x, rank=rank)
    value = f.e.PRelu(f.read(x, layout), f.operand(slope, layout, rank))
    if f.is_quantized(y) and len(f.tensor(slope).scale) == 1:
        ratio = float(f.tensor(x).scale[0]) / float(f.tensor(y).scale[0])
        positive = twice(f, y, value, ratio)
        negative = twice(f, y, value, ratio * float(f.tensor(slope).scale[0]))
        is_negative = f.e.Less(f.read(x, layout), f.e.const(0.0))
        value = f.e.Where(is_negative, negative, positive)
    f.write(y, value, layout)


@imports("SOFTMAX", "LOG_SOFTMAX")
def _(f: Forward, op: Operator) -> None:
    beta = op.options.get("beta", 1.0) or 1.0
    x, y = op.inputs[0], op.outputs[0]
    f.fix(y)
    rank = f.rank(op.inputs[0])
    layout = f.layout(x, rank=rank)
    value = f.read(x, layout)
    value = value if beta == 1.0 else f.e.Mul(value, f.e.const(beta))
    axis = place(rank - 1, rank, layout)
    kind = "Softmax" if op.op == "SOFTMAX" else "LogSoftmax"
    f.write(y, f.e.op(kind, (value,), axis=axis)[0], layout)


@imports("L2_NORMALIZATION")
def _(f: Forward, op: Operator) -> None:
    y = op.outputs[0]
    f.fix(y)
    rank = f.rank(op.inputs[0])
    layout = f.layout(op.inputs[0], rank=rank)
    value = f.read(op.inputs[0], layout)
    axis = f.e.ints(place(rank - 1, rank, layout))
    norm = f.e.Sqrt(f.e.Max(f.e.ReduceSumSquare(value, axis, keepdims=1), f.e.const(1e-6)))
    word = op.options.get("fused_activation_function", "NONE")
    f.write(y, activation(f, word, f.e.Div(value, norm), y, op), layout)


def _map(f: Forward, op: Operator, make: Callable[[str], str]) -> None:
    x, y = op.inputs[0], op.outputs[0]
    layout = f.layout(x, rank=f.rank(x))
    f.write(y, make(f.read(x, layout)), layout)
