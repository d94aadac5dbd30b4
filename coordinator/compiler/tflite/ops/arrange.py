# SPDX-License-Identifier: Apache-2.0
"""Cutting, joining, padding and repeating: numbers move, none changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from coordinator.compiler.tflite.forward import Forward, refusal
from coordinator.compiler.tflite.layout import Layout, moved, place
from coordinator.compiler.tflite.ops.fused import activation
from coordinator.compiler.tflite.table import imports
from edge_sdk.tflitefile import Operator


@imports("CONCATENATION")
def _(f: Forward, op: Operator) -> None:
    y = op.outputs[0]
    rank = f.rank(op.inputs[0])
    f.share(y, *op.inputs)
    layout = f.layout(*op.inputs, rank=rank)
    axis = place(op.options["axis"] % rank, rank, layout)
    value = f.e.Concat(*(f.operand(i, layout, rank) for i in op.inputs), axis=axis)
    word = op.options.get("fused_activation_function", "NONE")
    f.write(y, activation(f, word, value, y, op), layout)


@imports("SPLIT", "SPLIT_V")
def _(f: Forward, op: Operator) -> None:
    x, axis_input = (op.inputs[1], op.inputs[0]) if op.op == "SPLIT" else op.inputs[::2]
    rank = f.rank(x)
    (axis,) = f.axes(axis_input, op, rank)
    f.share(x, *op.outputs)
    layout = f.layout(x, rank=rank)
    cuts = [f.shape(x)[axis] // len(op.outputs)] * len(op.outputs)
    if op.op == "SPLIT_V":
        cuts = list(f.numbers(op.inputs[1], op))
        if -1 in cuts:
            cuts[cuts.index(-1)] = f.shape(x)[axis] - sum(cuts) - 1
    sizes = f.e.ints(*cuts)
    parts = f.e.Split(
        f.read(x, layout), sizes, outputs=len(op.outputs), axis=place(axis, rank, layout)
    )
    for i, part in zip(op.outputs, parts, strict=True):
        f.write(i, part, layout)


@imports("SLICE")
def _(f: Forward, op: Operator) -> None:
    x, y = op.inputs[0], op.outputs[0]
    begins, sizes = f.numbers(op.inputs[1], op), f.numbers(op.inputs[2], op)
    ends = [
        dim if size == -1 else begin + size
        for dim, begin, size in zip(f.shape(x), begins, sizes, strict=True)
    ]
    _cut(f, x, y, _Cut(begins, ends, [1] * len(ends)))


@imports("STRIDED_SLICE")
def _(f: Forward, op: Operator) -> None:
    x, y = op.inputs[0], op.outputs[0]
    o = op.options
    if o["new_axis_mask"] or o["ellipsis_mask"]:
        raise refusal(op, f, "it adds axes or has an ellipsis: write the slice without them")
    begins, ends, strides = (list(f.numbers(i, op)) for i in op.inputs[1:4])
    if o.get("offset"):
        ends = [b + e for b, e in zip(begins, ends, strict=True)]
    shape = f.shape(x)
    for n in range(len(begins)):
        is_back, bit = strides[n] < 0, 1 << n
        if o["begin_mask"] & bit:
            begins[n] = shape[n] - 1 if is_back else 0
        if o["shrink_axis_mask"] & bit:
            begins[n] %= shape[n]
            ends[n], strides[n] = begins[n] + 1, 1
        elif o["end_mask"] & bit:
            ends[n] = -shape[n] - 1 if is_back else shape[n]
    missing = range(len(begins), len(shape))
    begins += [0 for _ in missing]
    ends += [shape[n] for n in missing]
    strides += [1 for _ in missing]
    shrunk = [n for n in range(len(shape)) if o["shrink_axis_mask"] >> n & 1]
    _cut(f, x, y, _Cut(begins, ends, strides), shrunk)


@imports("PACK")
def _(f: Forward, op: Operator) -> None:
    y = op.outputs[0]
    axis = op.options["axis"] % (f.rank(op.inputs[0]) + 1)
    f.share(y, *op.inputs)
    parts = [f.e.Unsqueeze(f.read(i), f.e.ints(axis)) for i in op.inputs]
    f.write(y, f.e.Concat(*parts, axis=axis))


@imports("UNPACK")
def _(f: Forward, op: Operator) -> None:
    x = op.inputs[0]
    rank = f.rank(x)
    axis = op.options["axis"] % rank
    f.share(x, *op.outputs)
    sizes = f.e.ints(*(1 for _ in op.outputs))
    parts = f.e.Split(f.read(x), sizes, outputs=len(op.outputs), axis=axis)
    for i, part in zip(op.outputs, parts, strict=True):
        f.write(i, f.e.Squeeze(part, f.e.ints(axis)))


@imports("PAD")
def _(f: Forward, op: Operator) -> None:
    amounts = _amounts(f, op)
    f.padded[op.outputs[0]] = (op.inputs[0], amounts)
    if op.outputs[0] in f.graph.outputs or f.rank(op.inputs[0]) != 4:
        f.read(op.outputs[0])


@imports("PADV2")
def _(f: Forward, op: Operator) -> None:
    x, filler, y = op.inputs[0], op.inputs[2], op.outputs[0]
    f.share(x, y)
    layout = f.layout(x, rank=f.rank(x))
    pads = _flat(f, op, layout)
    value = f.e.Reshape(f.read(filler), f.e.ints()) if f.rank(filler) else f.read(filler)
    f.write(y, f.e.Pad(f.read(x, layout), pads, value), layout)


@imports("MIRROR_PAD")
def _(f: Forward, op: Operator) -> None:
    x, y = op.inputs[0], op.outputs[0]
    f.share(x, y)
    layout = f.layout(x, rank=f.rank(x))
    mode = "reflect"
    if op.options["mode"] == "SYMMETRIC":
        if max(max(pair) for pair in _amounts(f, op)) > 1:
            raise refusal(op, f, "ONNX has no symmetric padding: use REFLECT")
        mode = "edge"  # of one number it is the same
    f.write(y, f.e.Pad(f.read(x, layout), _flat(f, op, layout), mode=mode), layout)


@imports("TILE")
def _(f: Forward, op: Operator) -> None:
    x, y = op.inputs[0], op.outputs[0]
    f.share(x, y)
    f.write(y, f.e.Tile(f.read(x), f.e.ints(*f.numbers(op.inputs[1], op))))


@imports("BROADCAST_TO")
def _(f: Forward, op: Operator) -> None:
    x, y = op.inputs[0], op.outputs[0]
    f.share(x, y)
    f.write(y, f.e.Expand(f.read(x), f.e.ints(*f.numbers(op.inputs[1], op))))


@imports("FILL")
def _(f: Forward, op: Operator) -> None:
    value, y = f.known(op.inputs[1]), op.outputs[0]
    if value is None:
        sizes = f.e.ints(*f.numbers(op.inputs[0], op))
        f.write(y, f.e.Expand(f.read(op.inputs[1]), sizes))
        return
    f.numbers(op.inputs[0], op)
    once, twice = f.known(op.inputs[0]), f.doubled(op.inputs[0])
    f.know(y, *(np.full(sizes, value) for sizes in (once, twice) if sizes is not None))


@imports("RANGE")
def _(f: Forward, op: Operator) -> None:
    f.write(op.outputs[0], f.e.Range(*(f.read(i) for i in op.inputs)))


@imports("REVERSE_V2")
def _(f: Forward, op: Operator) -> None:
    x, y = op.inputs[0], op.outputs[0]
    axes = f.axes(op.inputs[1], op, f.rank(x))
    shape = f.shape(x)
    begins = [shape[n] - 1 if n in axes else 0 for n in range(len(shape))]
    ends = [-shape[n] - 1 if n in axes else shape[n] for n in range(len(shape))]
    strides = [-1 if n in axes else 1 for n in range(len(shape))]
    _cut(f, x, y, _Cut(begins, ends, strides))


class _Cut(NamedTuple):
    """Where to cut each dimension: from, to, every how many."""

    begins: Sequence[int]
    ends: Sequence[int]
    strides: Sequence[int]


def _cut(f: Forward, x: int, y: int, cut: _Cut, shrunk: Sequence[int] = ()) -> None:
    """Emit a Slice along the axes that it changes, then drop the axes of `shrunk`."""
    shape, rank = f.shape(x), f.rank(x)
    f.share(x, y)
    layout = "last" if shrunk else f.layout(x, rank=rank)
    cuts = [
        (place(n, rank, layout), b, e, s)
        for n, (b, e, s) in enumerate(zip(*cut, strict=True))
        if (b, s) != (0, 1) or e < shape[n]
    ]
    value = f.read(x, layout)
    if cuts:
        axes, first, last, steps = (f.e.ints(*part) for part in zip(*sorted(cuts), strict=True))
        value = f.e.Slice(value, first, last, axes, steps)
    if shrunk:
        value = f.e.Squeeze(value, f.e.ints(*shrunk))
    f.write(y, value if cuts or shrunk else f.e.Identity(value), layout)


def _amounts(f: Forward, op: Operator) -> tuple[tuple[int, int], ...]:
    flat = f.numbers(op.inputs[1], op)
    return tuple(zip(flat[::2], flat[1::2], strict=True))


def _flat(f: Forward, op: Operator, layout: Layout) -> str:
    amounts = moved(_amounts(f, op), layout)
    return f.e.ints(*(a for a, _ in amounts), *(b for _, b in amounts))
