# SPDX-License-Identifier: Apache-2.0
"""Activations that other operators carry, and clipping on a lattice."""

from __future__ import annotations

import numpy as np

from coordinator.compiler.tflite.forward import Forward, refusal
from edge_sdk.tflitefile import Operator


def activation(f: Forward, word: str, value: str, i: int, op: Operator) -> str:
    """Emit an operator's fused activation, before tensor `i` is written."""
    if word == "NONE":
        return value
    if word == "RELU":
        return f.e.Relu(value)
    if word == "TANH":
        return f.e.Tanh(value)
    bounds = {"RELU6": (0.0, 6.0), "RELU_N1_TO_1": (-1.0, 1.0)}.get(word)
    if bounds is None:
        raise refusal(op, f, f"its activation {word} has no gradient: convert without it")
    return clip(f, value, bounds, i)


def clip(f: Forward, value: str, bounds: tuple[float, float], i: int) -> str:
    """Emit a Clip before tensor `i`; an end that its lattice has lies where the lattice ends.

    TFLite clips the rounded number at the rounded bound. A bound that rounds to the lattice's
    last point is moved onto it: the same integers, and the runtime sees that it may drop it.
    """
    low, high = bounds
    if f.is_quantized(i):
        t = f.tensor(i)
        ends, step = np.iinfo(t.dtype), t.scale[0]
        least = np.float32(step * np.float32(ends.min - int(t.zero_point[0])))
        most = np.float32(step * np.float32(ends.max - int(t.zero_point[0])))
        low = float(least) if abs(low - least) < step / 2 else low
        high = float(most) if abs(high - most) < step / 2 else high
    return f.e.Clip(value, f.e.const(low), f.e.const(high))
