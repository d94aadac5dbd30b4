# SPDX-License-Identifier: Apache-2.0
"""UNIDIRECTIONAL_SEQUENCE_LSTM and SVDF, each from the state that a fresh interpreter starts with.

TFLite clips an LSTM's cell state, which ONNX's LSTM does not. A cell grows by less than 1 a step,
so that short sequences never meet the clip; longer ones are written out step by step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from coordinator.compiler.tflite.forward import Forward, refusal
from coordinator.compiler.tflite.ops.fused import activation
from coordinator.compiler.tflite.table import imports
from edge_sdk.tflitefile import Operator

_GATES = ("input", "forget", "cell", "output")
_ONNX = (0, 3, 1, 2)  # input, output, forget, cell
_LONGEST = 512


@imports("UNIDIRECTIONAL_SEQUENCE_LSTM")
def _(f: Forward, op: Operator) -> None:
    inputs = [*op.inputs, *([-1] * (24 - len(op.inputs)))]
    _check_lstm(f, op, inputs)
    x, y = inputs[0], op.outputs[0]
    is_time_major = bool(op.options["time_major"])
    steps = f.shape(x)[0 if is_time_major else 1]
    clip = float(op.options["cell_clip"])
    weights, states, biases = inputs[1:5], inputs[5:9], inputs[12:16]
    if clip and steps > clip:
        if steps > _LONGEST:
            raise refusal(op, f, f"{steps} steps with cell_clip are too many: convert without it")
        value = _unrolled(f, op, x, (weights, states, biases), steps)
    else:
        value = f.read(x) if is_time_major else f.e.Transpose(f.read(x), perm=(1, 0, 2))
        w, r = (_joined(f, [parts[n] for n in _ONNX]) for parts in (weights, states))
        width = f.shape(states[0])[0]
        zeros = f.e.const(np.zeros((1, 4 * width)))
        b = f.e.Concat(_joined(f, [biases[n] for n in _ONNX]), zeros, axis=1)
        value = f.e.LSTM(value, w, r, b, hidden_size=width)
        value = f.e.Squeeze(value, f.e.ints(1))
        value = value if is_time_major else f.e.Transpose(value, perm=(1, 0, 2))
    f.write(y, value)


@imports("SVDF")
def _(f: Forward, op: Operator) -> None:
    x, features, times, bias = op.inputs[:4]
    y = op.outputs[0]
    if f.is_quantized(x):
        raise refusal(op, f, "its int8 form keeps state in 16 bits: convert it in float")
    filters, memory = f.shape(times)
    rank = op.options["rank"]
    made = f.e.Gemm(f.read(x), f.weight(features), transB=1)  # the newest column of the memory
    last = f.e.Slice(f.weight(times), f.e.ints(memory - 1), f.e.ints(memory), f.e.ints(1))
    made = f.e.Mul(made, f.e.Reshape(last, f.e.ints(1, filters)))
    grouped = f.e.Reshape(made, f.e.ints(f.shape(x)[0], filters // rank, rank))
    value = f.e.ReduceSum(grouped, f.e.ints(2), keepdims=0)
    value = f.e.Add(value, f.weight(bias)) if bias >= 0 else value
    f.write(y, activation(f, op.options["fused_activation_function"], value, y, op))


def _check_lstm(f: Forward, op: Operator, inputs: Sequence[int]) -> None:
    if f.is_quantized(inputs[0]):
        why = "its int8 form keeps state in 16 bits: convert it in float or dynamic range"
        raise refusal(op, f, why)
    lacking = [i for i in (*inputs[1:9], *inputs[12:16]) if i < 0]
    parts = {"peepholes": inputs[9:12], "a projection": inputs[16:18], "layer norm": inputs[20:24]}
    extra = next((name for name, found in parts.items() if max(found) >= 0), None)
    if lacking:
        raise refusal(op, f, "it couples gates: use an LSTM with an input gate")
    if extra is not None:
        raise refusal(op, f, f"it has {extra}: use a plain LSTM")
    if op.options["fused_activation_function"] != "TANH":
        raise refusal(op, f, "its activation is not TANH: use a plain LSTM")


def _joined(f: Forward, tensors: Sequence[int]) -> str:
    """Return the gates' tensors in one, with ONNX's axis of directions."""
    return f.e.Unsqueeze(f.e.Concat(*(f.weight(i) for i in tensors), axis=0), f.e.ints(0))


def _unrolled(
    f: Forward, op: Operator, x: int, parts: tuple[Sequence[int], ...], steps: int
) -> str:
    """Emit every step: gates of all steps at once, then what depends on the step before."""
    e, axis = f.e, 0 if op.options["time_major"] else 1
    weights, states, biases = parts
    limit = float(op.options["cell_clip"])
    cut = (e.const(-limit), e.const(limit))
    made = [
        e.Add(e.MatMul(f.read(x), f.weight(w, (1, 0))), f.weight(b))
        for w, b in zip(weights, biases, strict=True)
    ]
    ones = e.ints(*(1 for _ in range(steps)))
    gates = [
        [e.Squeeze(part, e.ints(axis)) for part in e.Split(g, ones, outputs=steps, axis=axis)]
        for g in made
    ]
    back = [f.weight(r, (1, 0)) for r in states]
    cell, out, outs = "", "", []
    for t in range(steps):
        now = [gates[n][t] for n in range(len(_GATES))]
        if out:
            now = [e.Add(g, e.MatMul(out, r)) for g, r in zip(now, back, strict=True)]
        added = e.Mul(e.Sigmoid(now[0]), e.Tanh(now[2]))
        cell = e.Add(e.Mul(e.Sigmoid(now[1]), cell), added) if cell else added
        cell = e.Clip(cell, *cut)
        out = e.Mul(e.Sigmoid(now[3]), e.Tanh(cell))
        outs.append(e.Unsqueeze(out, e.ints(axis)))
    return e.Concat(*outs, axis=axis)
