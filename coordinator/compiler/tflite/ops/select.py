# SPDX-License-Identifier: Apache-2.0
"""Looking numbers up: GATHER, GATHER_ND, ONE_HOT, TOPK_V2."""

from __future__ import annotations

import numpy as np

from coordinator.compiler.tflite.forward import Forward, refusal
from coordinator.compiler.tflite.table import imports
from edge_sdk.tflitefile import Operator


@imports("GATHER")
def _(f: Forward, op: Operator) -> None:
    x, at, y = op.inputs[0], op.inputs[1], op.outputs[0]
    if op.options.get("batch_dims"):
        raise refusal(op, f, "it has batch dimensions: use tf.gather without batch_dims")
    f.share(x, y)
    value = f.weight(x) if f.is_weight(x) else f.read(x)
    f.write(y, f.e.Gather(value, f.read(at), axis=op.options["axis"] % f.rank(x)))


@imports("GATHER_ND")
def _(f: Forward, op: Operator) -> None:
    x, at, y = op.inputs[0], op.inputs[1], op.outputs[0]
    f.share(x, y)
    f.write(y, f.e.GatherND(f.read(x), f.e.Cast(f.read(at), to=np.int64)))


@imports("ONE_HOT")
def _(f: Forward, op: Operator) -> None:
    ids, depth, on, off = op.inputs
    values = f.e.Concat(*(f.e.Reshape(f.read(i), f.e.ints(1)) for i in (off, on)), axis=0)
    size = f.e.const(np.int64(f.numbers(depth, op)[0]), np.int64)
    at = f.e.Cast(f.read(ids), to=np.int64)
    f.write(op.outputs[0], f.e.OneHot(at, size, values, axis=op.options["axis"]))


@imports("TOPK_V2")
def _(f: Forward, op: Operator) -> None:
    x, k = op.inputs
    f.share(x, op.outputs[0])
    values, places = f.e.TopK(f.read(x), f.e.ints(*f.numbers(k, op)), outputs=2, axis=-1)
    f.write(op.outputs[0], values)
    f.write(op.outputs[1], f.e.Cast(places, to=np.dtype(f.tensor(op.outputs[1]).dtype)))
