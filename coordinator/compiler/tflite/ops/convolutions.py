# SPDX-License-Identifier: Apache-2.0
"""CONV_2D, DEPTHWISE_CONV_2D, TRANSPOSE_CONV: filters stored as ONNX wants them, explicit pads."""

from __future__ import annotations

from typing import Any

import numpy as np

from coordinator.compiler.tflite.forward import Forward, Spread, refusal
from coordinator.compiler.tflite.ops.fused import activation
from coordinator.compiler.tflite.ops.rounding import twice
from coordinator.compiler.tflite.table import imports
from edge_sdk.tflitefile import Operator

_DENSE = (0, 3, 1, 2)  # [out, h, w, in] to [out, in, h, w]
_DEPTHWISE = (3, 0, 1, 2)  # [1, h, w, out] to [out, 1, h, w]
_BACKWARD = (3, 0, 1, 2)  # [out, h, w, in] to [in, out, h, w]


@imports("CONV_2D")
def _(f: Forward, op: Operator) -> None:
    x, w = op.inputs[:2]
    height, width, depth = f.shape(w)[1:]
    group = max(f.shape(x)[3] // max(depth, 1), 1)
    _convolve(f, op, f.weight(w, _DENSE), (height, width), group)


@imports("DEPTHWISE_CONV_2D")
def _(f: Forward, op: Operator) -> None:
    x, w = op.inputs[:2]
    _, height, width, _ = f.shape(w)
    _convolve(f, op, f.weight(w, _DEPTHWISE), (height, width), f.shape(x)[3])


@imports("SPACE_TO_BATCH_ND")
def _(f: Forward, op: Operator) -> None:
    x, y = op.inputs[0], op.outputs[0]
    later = f.graph.operators[f.graph.operators.index(op) :] if op in f.graph.operators else ()
    back = next((o for o in later if o.op == "BATCH_TO_SPACE_ND"), None)
    if back is None:
        raise refusal(op, f, "no BATCH_TO_SPACE_ND undoes it: convert without it")
    blocks, added = f.numbers(op.inputs[1], op), f.numbers(op.inputs[2], op)
    taken = f.numbers(back.inputs[2], back)
    pads = [a - b for a, b in zip(added, taken, strict=False)]
    if f.numbers(back.inputs[1], back) != blocks or min(pads) < 0:
        raise refusal(op, f, "the next BATCH_TO_SPACE_ND does not undo it: convert without it")
    f.share(x, y)
    layout = f.layout(x, rank=f.rank(x))
    f.write(y, f.e.Identity(f.read(x, layout)), layout)
    f.spread[y] = Spread(blocks, tuple(zip(pads[::2], pads[1::2], strict=True)))


@imports("BATCH_TO_SPACE_ND")
def _(f: Forward, op: Operator) -> None:
    x, y = op.inputs[0], op.outputs[0]
    if x not in f.spread or any(map(any, f.spread[x].pads)):
        raise refusal(op, f, "no convolution stands between it and SPACE_TO_BATCH_ND")
    f.share(x, y)
    layout = f.layout(x, rank=f.rank(x))
    f.write(y, f.e.Identity(f.read(x, layout)), layout)


@imports("TRANSPOSE_CONV")
def _(f: Forward, op: Operator) -> None:
    w, x, y = op.inputs[1], op.inputs[2], op.outputs[0]
    _, height, width, depth = f.shape(w)
    if depth != f.shape(x)[3]:
        raise refusal(op, f, "it has groups: convert without groups")
    strides = _pair(op, "stride")
    target = f.known(op.inputs[0])
    shape = f.shape(y) if target is None else tuple(int(n) for n in target)
    sizes = zip(f.shape(x)[1:3], shape[1:3], (height, width), strides, strict=True)
    pads: list[tuple[int, int]] = []
    rest: list[int] = []
    for before, after, kernel, stride in sizes:
        full = (before - 1) * stride + kernel
        spare = max(full - after, 0) if op.options["padding"] == "SAME" else 0
        pads.append((spare // 2, spare - spare // 2))
        rest.append(after - (full - spare))
    value = f.e.ConvTranspose(
        f.read(x, "first"),
        f.weight(w, _BACKWARD),
        _bias(f, op, 3),
        strides=strides,
        kernel_shape=(height, width),
        pads=_flat(pads),
        output_padding=rest if any(rest) else None,
    )
    if f.is_quantized(y) and not f.is_stored(op.inputs[0]):
        value = twice(f, y, value, _multipliers(f, x, w, y))
    _finish(f, op, value)


def same(size: int, kernel: int, stride: int, dilation: int = 1) -> tuple[int, int]:
    """Return TFLite's SAME padding before and after: the odd one comes after."""
    out = -(-size // stride)
    total = max((out - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


def _multipliers(f: Forward, x: int, w: int, y: int) -> Any:
    """Return what LiteRT's own kernel multiplies each channel's sum by.

    It runs where the size of the output is computed; elsewhere one that rounds once does.
    """
    scales = f.tensor(w).scale.astype(np.float64)
    real = float(f.tensor(x).scale[0]) * scales / float(f.tensor(y).scale[0])
    return real.reshape(-1, 1, 1) if len(real) > 1 else real[0]


def _convolve(f: Forward, op: Operator, weight: str, kernel: tuple[int, int], group: int) -> None:
    x = op.inputs[0]
    strides, dilations = _pair(op, "stride"), _pair(op, "dilation")
    source, outer = f.padded.get(x, (x, ((0, 0),) * 4))
    is_spatial = outer[0] == outer[3] == (0, 0) and op.options["padding"] == "VALID"
    if not is_spatial:
        source, outer = x, ((0, 0),) * 4
    pads = list(outer[1:3])
    if x in f.spread:
        if op.options["padding"] != "VALID" or (*strides, *dilations) != (1, 1, 1, 1):
            raise refusal(op, f, "its space is kept in the batch, and it has strides: convert anew")
        height, width = f.spread[x].dilations
        dilations, pads = (height, width), list(f.spread[x].pads)
        f.spread[op.outputs[0]] = Spread(dilations, ((0, 0), (0, 0)))
    elif op.options["padding"] == "SAME":
        sizes = zip(f.shape(x)[1:3], kernel, strides, dilations, strict=True)
        pads = [same(*size) for size in sizes]
    if source != x:
        f.share(x, source)
    value = f.e.Conv(
        f.read(source, "first"),
        weight,
        _bias(f, op, 2),
        strides=strides,
        dilations=dilations,
        kernel_shape=kernel,
        pads=_flat(pads),
        group=group,
    )
    _finish(f, op, value)


def _finish(f: Forward, op: Operator, value: str) -> None:
    y = op.outputs[0]
    word = op.options.get("fused_activation_function", "NONE")
    f.write(y, activation(f, word, value, y, op), "first")


def _bias(f: Forward, op: Operator, at: int) -> str | None:
    if len(op.inputs) <= at or op.inputs[at] < 0:
        return None
    return f.weight(op.inputs[at])


def _pair(op: Operator, word: str) -> tuple[int, int]:
    """Return an option's height and width."""
    options: Any = op.options
    if word == "dilation":
        return options["dilation_h_factor"], options["dilation_w_factor"]
    return options[f"{word}_h"], options[f"{word}_w"]


def _flat(pads: Any) -> list[int]:
    return [*(before for before, _ in pads), *(after for _, after in pads)]
