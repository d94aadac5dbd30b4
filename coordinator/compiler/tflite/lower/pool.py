# SPDX-License-Identifier: Apache-2.0
"""Poolings, and the gradient of the maximum."""

from __future__ import annotations

import numpy as np

from coordinator.compiler.graph import Node
from coordinator.compiler.rules.window import Window, counts
from coordinator.compiler.tflite.lower.elementwise import STEEP
from coordinator.compiler.tflite.lower.forms import Lowering
from coordinator.compiler.tflite.lower.quantized import integer_pool
from coordinator.compiler.tflite.lower.table import lowers, refused
from coordinator.compiler.tflite.lower.windows import (
    flat,
    image,
    is_same,
    padding,
    put_image,
    reach,
    stuffed,
    taps,
    window_of,
)

_LOWEST = float(np.finfo(np.float32).min)


@lowers("MaxPool")
def _max(low: Lowering, n: Node) -> None:
    w = _window(low, n)
    if len(n.outputs) > 1 and low.graph.uses.get(n.outputs[1]):
        raise refused(n, "gives indices")
    if integer_pool(low, n, w):
        return
    x = image(low, n.inputs[0])
    low_x, pad = padding(low, x, w, _LOWEST)
    put_image(low, n.outputs[0], _pooled(low, "MAX_POOL_2D", low_x, w, pad), low.rank(n.inputs[0]))


@lowers("AveragePool")
def _average(low: Lowering, n: Node) -> None:
    w, include = _window(low, n), bool(n.attr("count_include_pad", 0))
    if integer_pool(low, n, w):
        return
    t, x, rank = low.tape, image(low, n.inputs[0]), low.rank(n.inputs[0])
    sizes = counts(w, include_pad=include)
    is_full = bool((sizes == w.taps).all())
    if is_same(w) and not (include and any(w.pads)):
        made = _pooled(low, "AVERAGE_POOL_2D", x, w, "SAME")
    else:
        padded = t.pad(x, [(b, max(e, 0)) for b, e in reach(w)])
        made = _pooled(low, "AVERAGE_POOL_2D", padded, w, "VALID")
        if not is_full:
            made = t.mul(made, t.const((w.taps / sizes)[None, :, :, None]))
    put_image(low, n.outputs[0], made, rank)


def _window(low: Lowering, n: Node) -> Window:
    w = window_of(low, n, n.inputs[0], (), None)
    if set(w.dilations) != {1}:
        raise refused(n, f"has dilations {w.dilations}")
    return w


def _pooled(low: Lowering, op: str, x: int, w: Window, pad: str) -> int:
    shape = (low.tape.shape(x)[0], *w.out, low.tape.shape(x)[3])
    return low.tape.add(
        op, [x], shape, padding=pad, stride_h=w.strides[0], stride_w=w.strides[1],
        filter_h=w.kernel[0], filter_w=w.kernel[1], activation="NONE",
    )  # fmt: skip


@lowers("GlobalAveragePool", "GlobalMaxPool")
def _global(low: Lowering, n: Node) -> None:
    if n.kind == "GlobalAveragePool" and integer_pool(low, n, None):
        return
    op = "MEAN" if n.kind == "GlobalAveragePool" else "REDUCE_MAX"
    rank = low.rank(n.inputs[0])
    made = low.tape.reduce(op, image(low, n.inputs[0]), (1, 2), keep=True)
    put_image(low, n.outputs[0], made, rank)


@lowers("fedge.MaxPoolInput")
def _max_input(low: Lowering, n: Node) -> None:
    """Send each gradient to the first maximum of its window, tap after tap."""
    x, y, g = n.inputs
    w = flat(Window(*(tuple(n.attr(name)) for name in Window._fields)))
    t, rank = low.tape, low.rank(x)
    padded = t.pad(image(low, x), [(b, max(e, 0)) for b, e in reach(w)], _LOWEST)
    whole = w._replace(begins=(0, 0), size=tuple(t.shape(padded)[1:3]))
    highest, left = image(low, y), image(low, g)
    total = -1
    for i, seen in enumerate(taps(low, padded, whole)):
        off = t.mul(t.minus(seen, highest), t.const(STEEP))
        part = t.mul(left, t.unary("RELU", t.plus(off, t.const(1.0))))
        left = t.minus(left, part)
        row, column = divmod(i, w.kernel[1])
        moved = _moved(low, part, w, (row, column))
        total = moved if total < 0 else t.plus(total, moved)
    put_image(low, n.outputs[0], total, rank)


def _moved(low: Lowering, part: int, w: Window, tap: tuple[int, int]) -> int:
    """Put what a tap saw back to where it saw it."""
    t = low.tape
    spread = stuffed(low, part, w)
    pairs = [(0, 0)]
    for axis in (0, 1):
        begin = tap[axis] - w.begins[axis]
        pairs.append((begin, w.size[axis] - begin - t.shape(spread)[axis + 1]))
    return t.pad(spread, [*pairs, (0, 0)])
