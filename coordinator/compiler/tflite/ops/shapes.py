# SPDX-License-Identifier: Apache-2.0
"""The same numbers under another shape, and sizes as numbers."""

from __future__ import annotations

from math import prod

import numpy as np

from coordinator.compiler.tflite.forward import Forward, Spread
from coordinator.compiler.tflite.layout import to_first
from coordinator.compiler.tflite.table import imports
from edge_sdk.errors import CompileError
from edge_sdk.tflitefile import Operator


@imports("RESHAPE", "SQUEEZE", "EXPAND_DIMS")
def _(f: Forward, op: Operator) -> None:
    x, y = op.inputs[0], op.outputs[0]
    f.share(x, y)
    if f.is_weight(x) and f.is_stored(x):
        f.write(y, f.e.Reshape(f.weight(x), f.e.ints(*_target(f, op))))
        return
    before, after = f.shape(x), _target(f, op)
    at = _batch_axis(f, op)
    if at is not None and x not in f.spread:
        value = f.e.Reshape(f.read(x), f.e.ints(*after[:at], -1, *after[at + 1 :]))
        f.free.add(value)
        f.write(y, value)
        return
    layout = f.layout(x, rank=len(before))
    value = f.read(x, layout)
    if len(before) == 2 and len(after) == 4 and prod(after[1:-1]) == 1:
        f.write(y, f.e.Reshape(value, f.e.ints(after[0], after[-1], 1, 1)), "first")
    elif layout == "last" or prod(before[1:-1]) == 1 or before[-1] == 1:
        f.write(y, f.e.Reshape(value, f.e.ints(*after)))
    elif len(after) > 2 and (before[0], before[-1]) == (after[0], after[-1]):
        f.write(y, f.e.Reshape(value, f.e.ints(after[0], after[-1], *after[1:-1])), "first")
    else:
        f.write(y, f.e.Reshape(f.read(x), f.e.ints(*after)))


def _target(f: Forward, op: Operator) -> tuple[int, ...]:
    """Return the shape that an operator gives its input."""
    x, y = op.inputs[0], op.outputs[0]
    if x in f.spread:
        return _unspread(f, x, y)
    before = f.shape(x)
    if op.op == "EXPAND_DIMS":
        (axis,) = f.axes(op.inputs[1], op, len(before) + 1)
        return (*before[:axis], 1, *before[axis:])
    if op.op == "SQUEEZE":
        given = [n % len(before) for n in op.options["squeeze_dims"]]
        gone = given or [n for n, dim in enumerate(before) if dim == 1]
        return tuple(dim for n, dim in enumerate(before) if n not in gone)
    stored = f.known(op.inputs[1]) if len(op.inputs) > 1 else None
    target = tuple(op.options.get("new_shape") or ()) if stored is None else stored.reshape(-1)
    sizes = [int(n) for n in target] or list(f.tensor(y).shape)
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = prod(before) // max(-prod(sizes), 1)
    return tuple(sizes)


def _batch_axis(f: Forward, op: Operator) -> int | None:
    """Return the dimension of a computed target that grows with the batch, if one does."""
    if op.op != "RESHAPE" or len(op.inputs) < 2 or f.known(op.inputs[1]) is None:
        return None
    once, twice = f.known(op.inputs[1]), f.doubled(op.inputs[1])
    grown = np.flatnonzero(once != twice)
    return int(grown[0]) if len(grown) == 1 else None


def _unspread(f: Forward, x: int, y: int) -> tuple[int, ...]:
    """Return the shape that a tensor would have if its space were not kept in the batch."""
    before, after = f.shape(x), f.tensor(y).shape
    old, spread = f.tensor(x).shape, f.spread[x]
    if len(before) == 3 and len(after) == 4 and 1 in after[1:3]:
        at = 1 if after[1] == 1 and after[2] == old[1] else 2
        new = list(before[1:2])
        dilations, pads = list(spread.dilations), list(spread.pads)
        new.insert(at - 1, 1)
        dilations.insert(at - 1, 1)
        pads.insert(at - 1, (0, 0))
        f.spread[y] = Spread(tuple(dilations), tuple(pads))
        return (before[0], *new, before[2])
    if len(before) == 4 and len(after) == 3 and 1 in before[1:3]:
        at = 1 if before[1] == 1 else 2
        f.spread[y] = Spread((1,), ((0, 0),))
        return (before[0], before[3 - at], before[3])
    raise CompileError(
        f"expected a dilated convolution around {f.names[x]!r}, it is reshaped otherwise: convert "
        "the model again"
    )


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
    x, y = op.inputs[0], op.outputs[0]
    f.know(y, *(np.array(size, f.tensor(y).dtype) for size in f.sizes(x)))


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
