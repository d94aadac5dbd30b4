# SPDX-License-Identifier: Apache-2.0
"""What takes numbers by their place: gather, one-hot."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from coordinator.compiler.graph import Node
from coordinator.compiler.tflite.lower.forms import Lowering
from coordinator.compiler.tflite.lower.table import lowers, refused
from coordinator.compiler.tflite.tape import elements, is_free


@lowers("Gather")
def _gather(low: Lowering, n: Node) -> None:
    t, rank = low.tape, low.rank(n.inputs[0])
    axis = n.attr("axis", 0) % rank
    data, places = low.get(n.inputs[0]), low.get(n.inputs[1])
    fixed = low.constant(n.inputs[1])
    if fixed is not None and (fixed < 0).any():
        size = low.shape(n.inputs[0])[axis]
        places = t.const((fixed % size).astype("int32"), "int32")
    shape = (*t.shape(data)[:axis], *t.shape(places), *t.shape(data)[axis + 1 :])
    low.put(n.outputs[0], t.add("GATHER", [data, places], shape, axis=axis, batch_dims=0))


@lowers("GatherND")
def _gather_rows(low: Lowering, n: Node) -> None:
    """Take whole rows, which is what is asked for where some channels of a layer learn."""
    t, places = low.tape, _rows(low, n)
    data = low.get(n.inputs[0])
    shape = (len(places), *t.shape(data)[1:])
    inputs = [data, t.const(places, "int32")]
    low.put(n.outputs[0], t.add("GATHER", inputs, shape, axis=0, batch_dims=0))


@lowers("ScatterND")
def _scatter_rows(low: Lowering, n: Node) -> None:
    """Put rows into a tensor: both end to end, and of each row the one that counts."""
    if n.attr("reduction", "none") == "add" and low.shape(n.inputs[1])[-1:] == (1,):
        _add_rows(low, n)
        return
    t, places = low.tape, _rows(low, n)
    data, rows = low.get(n.inputs[0]), low.get(n.inputs[2])
    if n.attr("reduction", "none") != "none" or len({*places.tolist()}) != len(places):
        raise refused(n, "adds rows up, which no operator does")
    shape = t.shape(data)
    order = np.arange(int(shape[0]), dtype=np.int32)
    order[places] = int(shape[0]) + np.arange(len(places), dtype=np.int32)
    inputs = [t.concat([data, rows], 0), t.const(order, "int32")]
    low.put(n.outputs[0], t.add("GATHER", inputs, shape, axis=0, batch_dims=0))


def _add_rows(low: Lowering, n: Node) -> None:
    """Add rows up by their place: a product with a one-hot row for each."""
    t, (data, places, rows) = low.tape, n.inputs
    count, *rest = low.shape(data)
    if is_free(count):
        raise refused(n, "adds rows to a tensor as long as the batch")
    many, width = elements(low.shape(places)), elements(rest)
    fixed = low.constant(places)
    at = low.get(places) if fixed is None else t.const(fixed % count, np.int32)
    flat = t.reshape(at, (many,))
    hot = _hot(low, flat, count, 1, (1.0, 0.0))
    total = t.matmul(hot, t.reshape(low.get(rows), (many, width)), adj_x=True)
    made = t.reshape(total, (count, *rest))
    known = low.constant(data)
    is_nothing = known is not None and not known.any()
    low.put(n.outputs[0], made if is_nothing else t.plus(made, low.get(data)))


def _rows(low: Lowering, n: Node) -> NDArray[np.int32]:
    """Return which rows a node of indices [rows, 1] means."""
    places, shape = low.constant(n.inputs[1]), low.shape(n.inputs[0])
    if places is None or places.shape != (len(places), 1) or is_free(shape[0]):
        raise refused(n, "takes others than whole rows that are always the same")
    return np.asarray(places.reshape(-1) % int(shape[0]), np.int32)


@lowers("GatherElements")
def _gather_elements(low: Lowering, n: Node) -> None:
    """Take one element along an axis: a product with a one-hot row."""
    t, rank = low.tape, low.rank(n.inputs[0])
    axis = n.attr("axis", 0) % rank
    shape, places = low.shape(n.inputs[0]), low.shape(n.inputs[1])
    if places != (*shape[:axis], 1, *shape[axis + 1 :]) or is_free(shape[axis]):
        raise refused(n, f"takes {places} elements of {shape}, one along an axis is possible")
    flat = t.reshape(low.get(n.inputs[1]), (*shape[:axis], *shape[axis + 1 :]))
    picked = t.mul(low.get(n.inputs[0]), _hot(low, flat, shape[axis], axis, (1.0, 0.0)))
    low.put(n.outputs[0], t.reduce("SUM", picked, (axis,), keep=True))


@lowers("OneHot")
def _one_hot(low: Lowering, n: Node) -> None:
    depth, values = low.constant(n.inputs[1]), low.constant(n.inputs[2])
    if depth is None or values is None:
        raise refused(n, "has a depth or values that are not constant")
    rank = low.rank(n.inputs[0])
    off, on = (float(v) for v in values)
    made = _hot(
        low,
        low.get(n.inputs[0]),
        int(depth.reshape(-1)[0]),
        n.attr("axis", -1) % (rank + 1),
        (on, off),
    )
    low.put(n.outputs[0], made)


def _hot(low: Lowering, places: int, depth: int, axis: int, values: tuple[float, float]) -> int:
    t = low.tape
    shape = t.shape(places)
    inputs = [places, t.const(depth, "int32"), t.const(values[0]), t.const(values[1])]
    made = (*shape[:axis], depth, *shape[axis:])
    return t.add("ONE_HOT", inputs, made, "float32", axis=axis if axis < len(shape) else -1)
