# SPDX-License-Identifier: Apache-2.0
"""MEAN, SUM and other reductions, ARG_MAX, CUMSUM."""

from __future__ import annotations

from math import prod

import numpy as np

from coordinator.compiler.tflite.forward import Forward
from coordinator.compiler.tflite.layout import place
from coordinator.compiler.tflite.ops.rounding import away_from_zero, has_ties
from coordinator.compiler.tflite.table import imports
from edge_sdk.tflitefile import Operator

_REDUCE = {
    "MEAN": "ReduceMean", "SUM": "ReduceSum", "REDUCE_MAX": "ReduceMax", "REDUCE_MIN": "ReduceMin",
    "REDUCE_PROD": "ReduceProd",
}  # fmt: skip


@imports(*_REDUCE)
def _(f: Forward, op: Operator) -> None:
    x, y = op.inputs[0], op.outputs[0]
    rank = f.rank(x)
    axes = sorted(set(f.axes(op.inputs[1], op, rank)))
    keeps = bool(op.options["keep_dims"])
    if op.op in {"REDUCE_MAX", "REDUCE_MIN"}:
        f.share(x, y)
    layout = f.layout(x, rank=rank)
    is_spatial = axes == list(range(1, rank - 1))
    if op.op == "MEAN" and is_spatial and rank == 4:
        mean = f.e.GlobalAveragePool(f.read(x, "first"))
        count = prod(f.shape(x)[1:3])
        if f.is_quantized(y) and count % 2 == 0 and has_ties(f, (x,), y):
            mean = away_from_zero(f, y, mean, count)
        if keeps:
            f.write(y, mean, "first")
        else:
            shape = f.shape(x)
            f.write(y, f.e.Reshape(mean, f.e.ints(shape[0], shape[-1])))
        return
    if not keeps and not is_spatial:
        layout = "last"
    places = [place(axis, rank, layout) for axis in axes]
    value = f.e.op(_REDUCE[op.op], (f.read(x, layout), f.e.ints(*places)), keepdims=int(keeps))[0]
    f.write(y, value, layout if keeps else "last")


@imports("ARG_MAX", "ARG_MIN")
def _(f: Forward, op: Operator) -> None:
    x, y = op.inputs[0], op.outputs[0]
    (axis,) = f.axes(op.inputs[1], op, f.rank(x))
    kind = "ArgMax" if op.op == "ARG_MAX" else "ArgMin"
    value = f.e.op(kind, (f.read(x),), axis=axis, keepdims=0)[0]
    f.write(y, f.e.Cast(value, to=np.dtype(f.tensor(y).dtype)))


@imports("CUMSUM")
def _(f: Forward, op: Operator) -> None:
    x, axis = op.inputs
    (at,) = f.axes(axis, op, f.rank(x))
    exclusive, back = (int(op.options[name]) for name in ("exclusive", "reverse"))
    value = f.e.CumSum(f.read(x), f.e.const(at, np.int64), exclusive=exclusive, reverse=back)
    f.write(op.outputs[0], value)
