# SPDX-License-Identifier: Apache-2.0
"""Transposed convolutions, and the gradients of convolutions by their inputs."""

from __future__ import annotations

import numpy as np

from coordinator.compiler.graph import Node
from coordinator.compiler.rules.conv import _mirrored_pads
from coordinator.compiler.rules.window import Window
from coordinator.compiler.tflite.lower.conv import conv_2d, depthwise
from coordinator.compiler.tflite.lower.filters import own_window
from coordinator.compiler.tflite.lower.forms import Lowering
from coordinator.compiler.tflite.lower.products import (
    by_rows,
    pays,
    phases_of,
    split_taps,
    taps_first,
    weights_in,
)
from coordinator.compiler.tflite.lower.table import lowers, refused
from coordinator.compiler.tflite.lower.windows import flat, image, put_image, stuffed


@lowers("ConvTranspose")
def _conv_transpose(low: Lowering, n: Node) -> None:
    x, weights = n.inputs[:2]
    shape = low.graph.shape(n.outputs[0])
    if shape is None or None in shape[1:]:
        raise refused(n, "has an output of unknown size")
    rank, group = low.rank(x), n.attr("group", 1)
    kernel = low.shape(weights)[2:]
    size, out = tuple(d or 0 for d in shape[2:]), low.shape(x)[2:]
    w = _mirrored(n, kernel, size, out)
    made = _spread(low, image(low, x), weights, w, low.shape(weights)[1] * group)
    if n.input(2):
        made = low.tape.plus(made, low.get(n.input(2)))
    put_image(low, n.outputs[0], made, rank)


def _mirrored(n: Node, kernel: object, size: object, out: object) -> Window:
    """Read a ConvTranspose as the convolution that leads from its output to its input."""
    rank = len(size)  # type: ignore[arg-type]  # tuples all
    strides = tuple(n.attr("strides") or (1,) * rank)
    dilations = tuple(n.attr("dilations") or (1,) * rank)
    zeros = (0,) * rank
    loose = Window(kernel, strides, dilations, zeros, zeros, size, out)  # type: ignore[arg-type]  # tuples all
    begins, ends = _mirrored_pads(n, loose)
    return flat(loose._replace(begins=begins, ends=ends))


@lowers("fedge.ConvInput")
def _conv_input(low: Lowering, n: Node) -> None:
    """Take a gradient [N, K, *out] back to [N, C, *size]."""
    g, weights, x = n.inputs
    made = _spread(low, image(low, g), weights, own_window(n), low.shape(x)[1])
    put_image(low, n.outputs[0], made, low.rank(x))


def _spread(low: Lowering, g: int, weights: str, w: Window, channels: int) -> int:
    """Record the transposed convolution that takes [N, *out, K] to [N, *size, C]."""
    t, filters = low.tape, low.shape(weights)[0]
    group = channels // low.shape(weights)[1]
    if group == 1:
        return _spread_dense(low, g, weights, w)
    if group == channels:
        return _spread_depthwise(low, g, weights, w, channels)
    parts, outs = t.split(g, 3, group), filters // group
    whole = weights_in(low, weights, "IHWO")
    made = []
    for i, part in enumerate(parts):
        own = t.slice(whole, (0, 0, 0, i * outs), (*t.shape(whole)[:3], outs))
        made.append(_undo(low, part, _flipped(low, own), w))
    return t.concat(made, 3)


def _spread_dense(low: Lowering, g: int, weights: str, w: Window) -> int:
    filters, channels = low.shape(weights)[:2]
    if w.taps == 1:
        return _by_pixels(low, g, weights, w)
    is_constant = low.constant(weights) is not None
    if not is_constant and w.is_flippable and pays(w, (filters, channels)):
        return by_rows(low, g, weights_in(low, weights, "WOHI"), back(w), turned=True)
    if w.strides[0] == w.strides[1] > 1 and set(w.dilations) == {1}:
        return _by_phases(low, g, weights, w)
    return _undo(low, g, _flipped(low, weights_in(low, weights, "IHWO")), w)


def _by_phases(low: Lowering, g: int, weights: str, w: Window) -> int:
    """Make the s x s neighbours that a stride sets apart as channels, then lay them side by side.

    x[q * s + r - begin] sums g[q - m] * w[m * s + r]: a convolution at stride 1 with a filter a
    stride smaller, for all r at once. TRANSPOSE_CONV would make all that follows wait for its size.
    """
    t, step = low.tape, w.strides[0]
    batch, (filters, channels) = t.shape(g)[0], low.shape(weights)[:2]
    fewer = phases_of(w).kernel
    kernel = t.transpose(split_taps(low, weights, w), (4, 0, 2, 3, 5, 1))
    kernel = t.reshape(kernel, (fewer[1], filters, fewer[0], step * step * channels))
    out = tuple(-(-(d + b) // step) for d, b in zip(w.size, w.begins, strict=True))
    begins = tuple(m - 1 for m in fewer)
    ends = tuple(q - o for q, o in zip(out, w.out, strict=True))
    phases = Window(fewer, (1, 1), (1, 1), begins, ends, w.out, out)
    made = by_rows(low, g, kernel, phases, turned=True)
    size = (batch, out[0] * step, out[1] * step, channels)
    wide = t.add("DEPTH_TO_SPACE", [made], size, block=step)
    return t.slice(wide, (0, *w.begins, 0), (batch, *w.size, channels))


def _by_pixels(low: Lowering, g: int, weights: str, w: Window) -> int:
    """Undo a convolution of single pixels: multiply, and set the results apart."""
    t, (filters, channels) = low.tape, low.shape(weights)[:2]
    batch = t.shape(g)[0]
    flat = t.reshape(g, (batch * w.out[0] * w.out[1], filters))
    kernel = t.reshape(weights_in(low, weights, "OHWI"), (filters, channels))
    made = stuffed(low, t.reshape(t.matmul(flat, kernel), (batch, *w.out, channels)), w)
    rows = zip(w.size, w.begins, t.shape(made)[1:3], strict=True)
    pairs = [(-b, d + b - full) for d, b, full in rows]
    return t.pad(made, [(0, 0), *pairs, (0, 0)])


def _flipped(low: Lowering, kernel: int) -> int:
    """Turn the taps of a kernel [C, *kernel, K] round."""
    t = low.tape
    first, height, width, last = t.shape(kernel)
    turned = _reversed(low, t.reshape(kernel, (first, height * width, last)), 1)
    return t.reshape(turned, (first, height, width, last))


def _reversed(low: Lowering, x: int, axis: int) -> int:
    t = low.tape
    data = t.data(x)
    if t.shape(x)[axis] == 1:
        return x
    if data is not None and x not in t.origins:
        return t.const(np.flip(data, axis))
    return t.add("REVERSE_V2", [x, t.ints(axis)], t.shape(x))


def back(w: Window) -> Window:
    """Return the stride-1 window over the stuffed gradient that undoes `w`."""
    size = tuple(o * s for o, s in zip(w.out, w.strides, strict=True))
    begins = tuple(x - 1 - b for x, b in zip(w.extents, w.begins, strict=True))
    rows = zip(w.size, w.extents, begins, size, strict=True)
    ends = tuple(d + x - 1 - b - full for d, x, b, full in rows)
    return Window(w.kernel, (1, 1), w.dilations, begins, ends, size, w.size)


def _undo(low: Lowering, g: int, kernel: int, w: Window) -> int:
    """Convolve the stuffed gradient with the flipped kernel."""
    undo = back(w)
    return conv_2d(low, *_cut(low, stuffed(low, g, w), kernel, undo))


def _cut(low: Lowering, g: int, kernel: int, undo: Window) -> tuple[int, int, int, Window]:
    """Cut off what negative padding asks to, which CONV_2D does not know."""
    if min((*undo.begins, *undo.ends)) >= 0:
        return g, kernel, -1, undo
    pairs = [(min(b, 0), min(e, 0)) for b, e in zip(undo.begins, undo.ends, strict=True)]
    g = low.tape.pad(g, [(0, 0), *pairs, (0, 0)])
    begins = tuple(max(b, 0) for b in undo.begins)
    ends = tuple(max(e, 0) for e in undo.ends)
    size = low.tape.shape(g)[1:3]
    return g, kernel, -1, undo._replace(begins=begins, ends=ends, size=size)


def _spread_depthwise(low: Lowering, g: int, weights: str, w: Window, channels: int) -> int:
    t, filters = low.tape, low.shape(weights)[0]
    kernel = t.reshape(taps_first(low, weights), (w.taps, filters))
    kernel = t.reshape(_reversed(low, kernel, 0), (1, *w.kernel, filters))
    g, kernel, bias, undo = _cut(low, stuffed(low, g, w), kernel, back(w))
    made = depthwise(low, g, kernel, bias, undo)
    if filters == channels:
        return made
    many = t.reshape(made, (t.shape(made)[0], w.size[0] * w.size[1], channels, filters // channels))
    summed = t.reduce("SUM", many, (3,), keep=False)
    return t.reshape(summed, (t.shape(made)[0], *w.size, channels))
