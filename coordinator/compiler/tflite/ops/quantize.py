# SPDX-License-Identifier: Apache-2.0
"""QUANTIZE and DEQUANTIZE: from numbers to a lattice, from one lattice to another, and back."""

from __future__ import annotations

from coordinator.compiler.tflite.forward import Forward
from coordinator.compiler.tflite.ops.rounding import coarse
from coordinator.compiler.tflite.table import imports
from edge_sdk.tflitefile import Operator


@imports("QUANTIZE")
def _(f: Forward, op: Operator) -> None:
    x, y = op.inputs[0], op.outputs[0]
    layout = f.layout(x, rank=f.rank(x))
    value = f.read(x, layout)
    f.write(y, coarse(f, x, y, value) if f.is_quantized(x) else value, layout)


@imports("DEQUANTIZE")
def _(f: Forward, op: Operator) -> None:
    x, y = op.inputs[0], op.outputs[0]
    if f.known(x) is not None:
        f.same(y, x)
        return
    layout = f.layout(x, rank=f.rank(x))
    value = f.read(x, layout)
    f.write(y, value if y not in f.graph.outputs else f.e.Identity(value), layout)


@imports("FAKE_QUANT")
def _(f: Forward, op: Operator) -> None:
    x, y = op.inputs[0], op.outputs[0]
    layout = f.layout(x, rank=f.rank(x))
    f.write(y, f.read(x, layout), layout)
