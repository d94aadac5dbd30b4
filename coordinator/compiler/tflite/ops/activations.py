# SPDX-License-Identifier: Apache-2.0
"""Activations and softmax."""

from __future__ import annotations

from collections.abc import Callable

from coordinator.compiler.tflite.forward import Forward, place
from coordinator.compiler.tflite.table import imports
from edge_sdk.tflitefile import Operator

_PLAIN = {
    "ELU": "Elu", "HARD_SWISH": "HardSwish", "LOGISTIC": "Sigmoid", "RELU": "Relu", "TANH": "Tanh",
}  # fmt: skip
_CLIPS = {"RELU6": (0.0, 6.0), "RELU_N1_TO_1": (-1.0, 1.0), "RELU_0_TO_1": (0.0, 1.0)}
_FIXED = frozenset({"LOGISTIC", "TANH"})


@imports(*_PLAIN)
def _(f: Forward, op: Operator) -> None:
    if op.op in _FIXED:
        f.fix(op.outputs[0])
    _map(f, op, lambda x: f.e.op(_PLAIN[op.op], (x,))[0])


@imports(*_CLIPS)
def _(f: Forward, op: Operator) -> None:
    _map(f, op, lambda x: f.clip(x, _CLIPS[op.op], op.outputs[0]))


@imports("LEAKY_RELU")
def _(f: Forward, op: Operator) -> None:
    _map(f, op, lambda x: f.e.LeakyRelu(x, alpha=op.options["alpha"]))


@imports("GELU")
def _(f: Forward, op: Operator) -> None:
    kind = "tanh" if op.options.get("approximate") else "none"
    _map(f, op, lambda x: f.e.Gelu(x, approximate=kind))


@imports("PRELU")
def _(f: Forward, op: Operator) -> None:
    x, slope, y = op.inputs[0], op.inputs[1], op.outputs[0]
    rank = f.rank(op.inputs[0])
    layout = f.layout(x, rank=rank)
    f.write(y, f.e.PRelu(f.read(x, layout), f.operand(slope, layout, rank)), layout)


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
    f.write(y, f.activation(word, f.e.Div(value, norm), y, op), layout)


def _map(f: Forward, op: Operator, make: Callable[[str], str]) -> None:
    x, y = op.inputs[0], op.outputs[0]
    layout = f.layout(x, rank=f.rank(x))
    f.write(y, make(f.read(x, layout)), layout)
