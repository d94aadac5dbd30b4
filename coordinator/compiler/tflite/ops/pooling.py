# SPDX-License-Identifier: Apache-2.0
"""AVERAGE_POOL_2D, MAX_POOL_2D, L2_POOL_2D."""

from __future__ import annotations

from math import prod

from coordinator.compiler.tflite.forward import Forward
from coordinator.compiler.tflite.ops.convolutions import same
from coordinator.compiler.tflite.ops.fused import activation
from coordinator.compiler.tflite.ops.rounding import away_from_zero
from coordinator.compiler.tflite.table import imports
from edge_sdk.tflitefile import Operator


@imports("AVERAGE_POOL_2D")
def _(f: Forward, op: Operator) -> None:
    x, y = op.inputs[0], op.outputs[0]
    f.share(x, y)
    kernel, strides, pads = _window(f, op)
    value = f.read(x, "first")
    if kernel == f.shape(x)[1:3] and not any(pads):
        value = f.e.GlobalAveragePool(value)
    else:
        value = f.e.AveragePool(value, kernel_shape=kernel, strides=strides, pads=pads)
    if f.is_quantized(y) and (any(pads) or prod(kernel) % 2 == 0):
        value = away_from_zero(f, y, value, prod(kernel), int(f.tensor(y).zero_point[0]))
    _finish(f, op, value)


@imports("MAX_POOL_2D")
def _(f: Forward, op: Operator) -> None:
    f.share(op.inputs[0], op.outputs[0])
    kernel, strides, pads = _window(f, op)
    value = f.read(op.inputs[0], "first")
    _finish(f, op, f.e.MaxPool(value, kernel_shape=kernel, strides=strides, pads=pads))


@imports("L2_POOL_2D")
def _(f: Forward, op: Operator) -> None:
    kernel, strides, pads = _window(f, op)
    value = f.read(op.inputs[0], "first")
    square = f.e.Mul(value, value)
    mean = f.e.AveragePool(square, kernel_shape=kernel, strides=strides, pads=pads)
    _finish(f, op, f.e.Sqrt(mean))


def _window(f: Forward, op: Operator) -> tuple[tuple[int, int], tuple[int, int], list[int]]:
    """Return kernel, strides and ONNX's pads."""
    o = op.options
    kernel = (o["filter_height"], o["filter_width"])
    strides = (o["stride_h"], o["stride_w"])
    pads = [(0, 0), (0, 0)]
    if o["padding"] == "SAME":
        sizes = zip(f.shape(op.inputs[0])[1:3], kernel, strides, strict=True)
        pads = [same(*size) for size in sizes]
    return kernel, strides, [*(p[0] for p in pads), *(p[1] for p in pads)]


def _finish(f: Forward, op: Operator, value: str) -> None:
    y = op.outputs[0]
    f.write(y, activation(f, op.options["fused_activation_function"], value, y, op), "first")
