# SPDX-License-Identifier: Apache-2.0
"""Convolutions of any group, by constant weights or by trained ones."""

from __future__ import annotations

import numpy as np

from coordinator.compiler.graph import Node
from coordinator.compiler.rules.window import Window
from coordinator.compiler.tflite.lower.forms import Lowering
from coordinator.compiler.tflite.lower.products import (
    by_rows,
    folded,
    pays,
    pays_in_phases,
    phases_of,
    split_taps,
    taps_first,
    weights_in,
)
from coordinator.compiler.tflite.lower.quantized import integer_conv
from coordinator.compiler.tflite.lower.table import lowers
from coordinator.compiler.tflite.lower.windows import geometry, image, padding, put_image, window_of
from coordinator.compiler.tflite.tape import is_free


@lowers("Conv")
def _conv(low: Lowering, n: Node) -> None:
    x, weights = n.inputs[:2]
    w = window_of(low, n, x, (), low.shape(weights)[2:])
    if integer_conv(low, n, w):
        return
    bias = low.get(n.input(2)) if n.input(2) else -1
    made = _grouped(low, image(low, x), weights, bias, w)
    put_image(low, n.outputs[0], made, low.rank(x))


def _grouped(low: Lowering, x: int, weights: str, bias: int, w: Window) -> int:
    """Record a convolution of any group."""
    t = low.tape
    group = t.shape(x)[3] // low.shape(weights)[1]
    filters, inner = low.shape(weights)[:2]
    channels = t.shape(x)[3]
    if group == 1:
        return _dense(low, x, weights, bias, w)
    if inner == 1 and group == channels:
        kernel = taps_first(low, weights)
        return depthwise(low, x, t.reshape(kernel, (1, *w.kernel, filters)), bias, w)
    parts, outs = t.split(x, 3, group), filters // group
    whole = weights_in(low, weights, "OHWI")
    biases = [bias] * group if bias < 0 else t.split(bias, 0, group)
    made = []
    for i, (part, shift) in enumerate(zip(parts, biases, strict=True)):
        own = t.slice(whole, (i * outs, 0, 0, 0), (outs, *t.shape(whole)[1:]))
        made.append(conv_2d(low, part, own, shift, w))
    return t.concat(made, 3)


def _dense(low: Lowering, x: int, weights: str, bias: int, w: Window) -> int:
    channels, is_constant = low.shape(weights)[:2], low.constant(weights) is not None
    if not is_constant and pays(w, channels):
        made = by_rows(low, x, weights_in(low, weights, "WIHO"), w)
    elif not is_constant and pays_in_phases(w, channels):
        made = _in_phases(low, x, weights, w)
    else:
        return conv_2d(low, x, weights_in(low, weights, "OHWI"), bias, w)
    return made if bias < 0 else low.tape.plus(made, bias)


def _in_phases(low: Lowering, x: int, weights: str, w: Window) -> int:
    """Fold the s x s neighbours of a stride into channels; the filter is a stride smaller then."""
    t, step, (filters, channels) = low.tape, w.strides[0], low.shape(weights)[:2]
    phases = phases_of(w)
    kernel = split_taps(low, weights, w)
    kernel = t.transpose(kernel, (4, 3, 5, 1, 2, 0))
    rows, columns = phases.kernel
    kernel = t.reshape(kernel, (columns, step * step * channels, rows, filters))
    return by_rows(low, folded(low, x, w), kernel, phases)


def conv_2d(low: Lowering, x: int, kernel: int, bias: int, w: Window) -> int:
    """Record a CONV_2D by a kernel [K, *kernel, C]."""
    t = low.tape
    filters = t.shape(kernel)[0]
    if _is_half_constant(low, kernel, bias):
        return t.plus(conv_2d(low, x, kernel, -1, w), bias)
    x, pad = padding(low, x, w)
    if bias < 0:
        bias = t.const(np.zeros(filters))
    shape = (t.shape(x)[0], *w.out, filters)
    return t.add("CONV_2D", [x, kernel, bias], shape, padding=pad, activation="NONE", **geometry(w))


def depthwise(low: Lowering, x: int, kernel: int, bias: int, w: Window) -> int:
    """Record a depthwise convolution with a kernel [1, *kernel, C * multiplier]."""
    t = low.tape
    filters = t.shape(kernel)[3]
    if _is_half_constant(low, kernel, bias):
        return t.plus(depthwise(low, x, kernel, -1, w), bias)
    multiplier = filters // t.shape(x)[3]
    x, pad = padding(low, x, w)
    if bias < 0:
        bias = _no_bias(low, kernel)
    return t.add(
        "DEPTHWISE_CONV_2D",
        [x, kernel, bias],
        (t.shape(x)[0], *w.out, filters),
        padding=pad,
        activation="NONE",
        multiplier=multiplier,
        **geometry(w),
    )


def _is_half_constant(low: Lowering, kernel: int, bias: int) -> bool:
    """Tell whether a trained bias would keep constant weights off the runtime's quick path."""
    return bias >= 0 and low.tape.data(kernel) is not None and low.tape.data(bias) is None


def _no_bias(low: Lowering, kernel: int) -> int:
    """Return zeros, one per filter: runtimes differ in whether a bias may be absent."""
    t, filters = low.tape, low.tape.shape(kernel)[3]
    if not is_free(filters):
        return t.const(np.zeros(filters))
    first = t.slice(kernel, (0, 0, 0, 0), (1, 1, 1, filters))
    return t.reshape(t.mul(first, t.const(0.0)), (filters,))
