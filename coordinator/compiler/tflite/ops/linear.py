# SPDX-License-Identifier: Apache-2.0
"""FULLY_CONNECTED, BATCH_MATMUL and EMBEDDING_LOOKUP: products with stored or computed matrices."""

from __future__ import annotations

from math import prod

from coordinator.compiler.tflite.forward import Forward, refusal
from coordinator.compiler.tflite.ops.fused import activation
from coordinator.compiler.tflite.ops.rounding import twice
from coordinator.compiler.tflite.table import imports
from edge_sdk.tflitefile import Operator


@imports("FULLY_CONNECTED")
def _(f: Forward, op: Operator) -> None:
    x, w, y = op.inputs[0], op.inputs[1], op.outputs[0]
    if op.options.get("weights_format", "DEFAULT") != "DEFAULT":
        raise refusal(op, f, "its weights are shuffled for one kernel: convert without that")
    outs, ins = f.shape(w)
    rows = prod(f.shape(x)) // max(ins, 1)
    value = f.read(x)
    if f.shape(x) != (rows, ins):
        value = f.again(x, f.e.Reshape(value, f.e.ints(rows, ins)))
    bias = f.weight(op.inputs[2]) if len(op.inputs) > 2 and op.inputs[2] >= 0 else None
    product = f.e.Gemm(value, f.weight(w), bias, transB=1)
    word = op.options.get("fused_activation_function", "NONE")
    product = activation(f, word, product, y, op)
    shape = (*f.shape(x)[:-1], outs) if op.options.get("keep_num_dims") else f.tensor(y).shape
    if prod(shape) == rows * outs and shape != (rows, outs):
        product = f.e.Reshape(product, f.e.ints(*shape))
    f.write(y, product)


@imports("BATCH_MATMUL")
def _(f: Forward, op: Operator) -> None:
    sides = []
    for i, word in zip(op.inputs[:2], ("adj_x", "adj_y"), strict=True):
        rank = f.rank(i)
        order = (*range(rank - 2), rank - 1, rank - 2) if op.options.get(word) else None
        sides.append(f.weight(i, order))
    y = op.outputs[0]
    value = f.e.MatMul(*sides)
    if f.is_quantized(y):
        first, second = (float(f.tensor(i).scale[0]) for i in op.inputs[:2])
        value = twice(f, y, value, first * second / float(f.tensor(y).scale[0]))
    f.write(y, value)


@imports("EMBEDDING_LOOKUP")
def _(f: Forward, op: Operator) -> None:
    ids, table = op.inputs
    f.write(op.outputs[0], f.e.Gather(f.weight(table), f.read(ids), axis=0))
