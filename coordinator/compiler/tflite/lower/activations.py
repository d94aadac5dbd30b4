# SPDX-License-Identifier: Apache-2.0
"""Activations, softmax among them."""

from __future__ import annotations

import math

import numpy as np

from coordinator.compiler.graph import Node
from coordinator.compiler.tflite.lower.elementwise import STEEP, erf
from coordinator.compiler.tflite.lower.forms import Lowering
from coordinator.compiler.tflite.lower.table import lowers, refused

_NONNEGATIVE = frozenset({"Relu", "Sigmoid", "Softmax", "Abs", "Exp", "Sqrt", "HardSigmoid"})


@lowers("Relu")
def _relu(low: Lowering, n: Node) -> None:
    low.each("RELU", n)


@lowers("Sigmoid")
def _sigmoid(low: Lowering, n: Node) -> None:
    low.each("LOGISTIC", n)


@lowers("Tanh")
def _tanh(low: Lowering, n: Node) -> None:
    low.each("TANH", n)


@lowers("HardSwish")
def _hard_swish(low: Lowering, n: Node) -> None:
    low.each("HARD_SWISH", n)


@lowers("LeakyRelu")
def _leaky_relu(low: Lowering, n: Node) -> None:
    low.each("LEAKY_RELU", n, alpha=float(n.attr("alpha", 0.01)))


@lowers("PRelu")
def _prelu(low: Lowering, n: Node) -> None:
    (x, slope), order = low.together(n.inputs)
    t = low.tape
    below = t.mul(t.binary("MINIMUM", x, t.const(0.0)), slope)
    low.put(n.outputs[0], t.plus(t.unary("RELU", x), below), order)


@lowers("HardSigmoid")
def _hard_sigmoid(low: Lowering, n: Node) -> None:
    """Clip a * x + b to [0, 1]; a mask of what is never negative is one MUL."""
    x, order = low.form(n.inputs[0])
    a, b, t = float(n.attr("alpha", 0.2)), float(n.attr("beta", 0.5)), low.tape
    maker = low.graph.producers.get(n.inputs[0])
    made = t.mul(x, t.const(np.float32(a)), "RELU_N1_TO_1" if b == 0.0 else None)
    if b:
        made = t.plus(made, t.const(np.float32(b)), "RELU_N1_TO_1")
    is_mask = not b and a >= STEEP and maker is not None and maker.kind in _NONNEGATIVE
    low.put(n.outputs[0], made if is_mask else t.unary("RELU", made), order)


@lowers("Elu", "Selu", "Celu")
def _elu(low: Lowering, n: Node) -> None:
    x, order = low.form(n.inputs[0])
    t = low.tape
    alpha = float(n.attr("alpha", 1.67326319217681884765625 if n.kind == "Selu" else 1.0))
    gamma = float(n.attr("gamma", 1.05070102214813232421875)) if n.kind == "Selu" else 1.0
    low_part = t.binary("MINIMUM", x, t.const(0.0))
    if n.kind == "Celu":
        low_part = t.mul(low_part, t.const(1.0 / alpha))
    bent = t.mul(t.unary("ELU", low_part), t.const(alpha))
    made = t.plus(t.unary("RELU", x), bent)
    low.put(n.outputs[0], made if gamma == 1.0 else t.mul(made, t.const(gamma)), order)


@lowers("ThresholdedRelu")
def _thresholded(low: Lowering, n: Node) -> None:
    x, order = low.form(n.inputs[0])
    t = low.tape
    above = t.binary("GREATER", x, t.const(float(n.attr("alpha", 1.0))), "bool")
    low.put(n.outputs[0], t.mul(x, t.cast(above, "float32")), order)


@lowers("Softplus")
def _softplus(low: Lowering, n: Node) -> None:
    x, order = low.form(n.inputs[0])
    low.put(n.outputs[0], softplus(low, x), order)


def softplus(low: Lowering, x: int) -> int:
    """Record log(1 + exp(x)) as max(x, 0) - log(sigmoid(|x|)), which never overflows."""
    t = low.tape
    rest = t.unary("LOG", t.unary("LOGISTIC", t.unary("ABS", x)))
    return t.minus(t.unary("RELU", x), rest)


@lowers("Softsign")
def _softsign(low: Lowering, n: Node) -> None:
    x, order = low.form(n.inputs[0])
    t = low.tape
    low.put(n.outputs[0], t.over(x, t.plus(t.unary("ABS", x), t.const(1.0))), order)


@lowers("Mish")
def _mish(low: Lowering, n: Node) -> None:
    x, order = low.form(n.inputs[0])
    made = low.tape.mul(x, low.tape.unary("TANH", softplus(low, x)))
    low.put(n.outputs[0], made, order)


@lowers("Gelu", "com.microsoft.Gelu")
def _gelu(low: Lowering, n: Node) -> None:
    x, order = low.form(n.inputs[0])
    t = low.tape
    if n.attr("approximate", "none") == "tanh":
        cube = t.mul(t.mul(x, t.mul(x, x)), t.const(0.044715))
        bend = t.unary("TANH", t.mul(t.plus(x, cube), t.const(math.sqrt(2 / math.pi))))
    else:
        bend = erf(low, t.mul(x, t.const(math.sqrt(0.5))))
    half = t.mul(x, t.const(0.5))
    low.put(n.outputs[0], t.mul(half, t.plus(bend, t.const(1.0))), order)


@lowers("Softmax", "LogSoftmax")
def _softmax(low: Lowering, n: Node) -> None:
    rank = low.rank(n.inputs[0])
    axis = n.attr("axis", -1) % rank
    if rank > 4:
        raise refused(n, f"has {rank} dimensions, 4 are the most")
    order = (*(i for i in range(rank) if i != axis), axis)
    x = low.get(n.inputs[0], order)
    if n.kind == "Softmax":
        made = low.tape.unary("SOFTMAX", x, beta=1.0)
    else:
        made = low.tape.unary("LOG_SOFTMAX", x)
    low.put(n.outputs[0], made, order)
