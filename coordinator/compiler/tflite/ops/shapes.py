# SPDX-License-Identifier: Apache-2.0
"""The same numbers under another shape, and sizes as numbers."""

from __future__ import annotations

from math import prod

import numpy as np

from coordinator.compiler.tflite.forward import Forward, to_first
from coordinator.compiler.tflite.table import imports
from edge_sdk.tflitefile import Operator


@imports("RESHAPE", "SQUEEZE", "EXPAND_DIMS")
def _(f: Forward, op: Operator) -> None:
    x, y = op.inputs[0], op.outputs[0]
    f.share(x, y)
    before, after = f.shape(x), f.shape(y)
    layout = f.layout(x, rank=len(before))
    value = f.read(x, layout)
    if layout == "last" or prod(before[1:-1]) == 1 or before[-1] == 1:
        f.write(y, f.e.Reshape(value, f.e.ints(*after)))
    elif len(after) > 2 and (before[0], before[-1]) == (after[0], after[-1]):
        f.write(y, f.e.Reshape(value, f.e.ints(after[0], after[-1], *after[1:-1])), "first")
    else:
        f.write(y, f.e.Reshape(f.read(x), f.e.ints(*after)))


@imports("TRANSPOSE")
def _(f: Forward, op: Operator) -> None:
    x, y = op.inputs[0], op.outputs[0]
    f.share(x, y)
    rank = f.rank(x)
    order = f.axes(op.inputs[1], op, rank)
    layout = f.layout(x, rank=rank)
    value = f.read(x, layout)
    if layout == "first":
        order = tuple(to_first(rank).index(n) for n in order)
    if rank > 2 and tuple(order[n] for n in to_first(rank)) == tuple(range(rank)):
        f.write(y, f.e.Identity(value), "first")  # laid out last, it is what it was
    elif order == tuple(range(rank)):
        f.write(y, f.e.Identity(value))
    else:
        f.write(y, f.transposed(value, order))


@imports("SHAPE")
def _(f: Forward, op: Operator) -> None:
    y = op.outputs[0]
    f.know(y, np.array(f.shape(op.inputs[0]), f.tensor(y).dtype))


@imports("RANK")
def _(f: Forward, op: Operator) -> None:
    f.know(op.outputs[0], np.array(f.rank(op.inputs[0]), np.int32))


@imports("SPACE_TO_DEPTH", "DEPTH_TO_SPACE")
def _(f: Forward, op: Operator) -> None:
    x, y = op.inputs[0], op.outputs[0]
    f.share(x, y)
    block = op.options["block_size"]
    value = f.read(x, "first")
    if op.op == "DEPTH_TO_SPACE":
        f.write(y, f.e.DepthToSpace(value, blocksize=block, mode="DCR"), "first")
    else:
        f.write(y, f.e.SpaceToDepth(value, blocksize=block), "first")
