# SPDX-License-Identifier: Apache-2.0
"""Convolutions and their gradients.

Weights that are constant go to CONV_2D and DEPTHWISE_CONV_2D, which the runtime then packs once.
Weights that are trained come from an input, and such a CONV_2D is slow. Instead an image is laid
out by the columns of the window alone, multiplied by all rows of the filter at once, and the
products are shifted and summed: copies and products are few, and both are large. The neighbours of
a stride are folded into channels first. Milliseconds of one x86-64 core, 3 x 3, batch 16, CONV_2D
against that, LiteRT 2.3 and tflite-runtime 2.14: 16 to 16 channels of 32 x 32: 2.7 and 1.2, 2.9 and
1.1; 64 to 64 of 8 x 8: 1.7 and 0.5, 1.8 and 0.6. Where channels are few, CONV_2D is quicker.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from coordinator.compiler.graph import Node
from coordinator.compiler.rules.window import Window
from coordinator.compiler.tflite.lower.forms import Lowering
from coordinator.compiler.tflite.lower.quantized import integer_conv
from coordinator.compiler.tflite.lower.table import lowers, refused
from coordinator.compiler.tflite.lower.windows import (
    geometry,
    image,
    padding,
    put_image,
    reach,
    stuffed,
    window_of,
)
from coordinator.compiler.tflite.tape import is_free

MANY = 8
"""Channels on both sides from which on products pay."""


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
    whole = _filter(low, weights, "OHWI")
    biases = [bias] * group if bias < 0 else t.split(bias, 0, group)
    made = []
    for i, (part, shift) in enumerate(zip(parts, biases, strict=True)):
        own = t.slice(whole, (i * outs, 0, 0, 0), (outs, *t.shape(whole)[1:]))
        made.append(_conv_2d(low, part, own, shift, w))
    return t.concat(made, 3)


def _dense(low: Lowering, x: int, weights: str, bias: int, w: Window) -> int:
    channels, is_constant = low.shape(weights)[:2], low.constant(weights) is not None
    if not is_constant and _pays(w, channels):
        made = _by_rows(low, x, _filter(low, weights, "WIHO"), w)
    elif not is_constant and _pays_in_phases(w, channels):
        made = _in_phases(low, x, weights, w)
    else:
        return _conv_2d(low, x, _filter(low, weights, "OHWI"), bias, w)
    return made if bias < 0 else low.tape.plus(made, bias)


def _in_phases(low: Lowering, x: int, weights: str, w: Window) -> int:
    """Fold the s x s neighbours of a stride into channels; the filter is a stride smaller then."""
    t, step, (filters, channels) = low.tape, w.strides[0], low.shape(weights)[:2]
    phases = _phases(w)
    kernel = _split_taps(low, weights, w)
    kernel = t.transpose(kernel, (4, 3, 5, 1, 2, 0))
    rows, columns = phases.kernel
    kernel = t.reshape(kernel, (columns, step * step * channels, rows, filters))
    return _by_rows(low, _folded(low, x, w), kernel, phases)


def _phases(w: Window) -> Window:
    """Return the window over the folded image."""
    step = w.strides[0]
    kernel = tuple(-(-k // step) for k in w.kernel)
    size = tuple(o + k - 1 for o, k in zip(w.out, kernel, strict=True))
    return Window(kernel, (1, 1), (1, 1), (0, 0), (0, 0), size, w.out)


def _folded(low: Lowering, x: int, w: Window) -> int:
    """Pad an image and fold the neighbours of a stride into channels: [N, .., s * s * C]."""
    t, step, size = low.tape, w.strides[0], _phases(w).size
    rows = zip(size, w.size, w.begins, strict=True)
    pairs = [(b, q * step - d - b) for q, d, b in rows]
    padded = t.pad(x, [(0, 0), *pairs, (0, 0)])
    shape = (t.shape(x)[0], *size, step * step * t.shape(x)[3])
    return t.add("SPACE_TO_DEPTH", [padded], shape, block=step)


def _split_taps(low: Lowering, weights: str, w: Window) -> int:
    """Return weights whose taps t = m * s + r are split: [K, C, m, r, m, r]."""
    t, step, (filters, channels) = low.tape, w.strides[0], low.shape(weights)[:2]
    fewer = _phases(w).kernel
    spare = [(0, m * step - k) for m, k in zip(fewer, w.kernel, strict=True)]
    kernel = t.pad(_filter(low, weights, "OIHW"), [(0, 0), (0, 0), *spare])
    return t.reshape(kernel, (filters, channels, fewer[0], step, fewer[1], step))


def _pays_in_phases(w: Window, channels: Sequence[int]) -> bool:
    is_even = w.strides[0] == w.strides[1] > 1 and set(w.dilations) == {1} and w.taps > 1
    return is_even and min(channels) >= MANY


def _pays(w: Window, channels: Sequence[int]) -> bool:
    return w.is_plain or (set(w.strides) == {1} and min(channels) >= MANY)


def _by_rows(low: Lowering, x: int, kernel: int, w: Window, *, turned: bool = False) -> int:
    """Convolve at stride 1 by a kernel [W, C, H, K]; `turned` exchanges first and last taps."""
    t = low.tape
    columns, channels, rows, filters = t.shape(kernel)
    batch, (height, width) = t.shape(x)[0], w.out
    side = _side(low, x, w, turned=turned)
    tall = t.shape(side)[1]
    flat = t.reshape(side, (batch * tall * width, columns * channels))
    matrix = t.reshape(kernel, (columns * channels, rows * filters))
    wide = t.reshape(t.matmul(flat, matrix), (batch, tall, width, rows * filters))
    total = -1
    for i in range(rows):
        first = (rows - 1 - i if turned else i) * w.dilations[0]
        part = t.slice(wide, (0, first, 0, i * filters), (batch, height, width, filters))
        total = part if total < 0 else t.plus(total, part)
    return total


def _side(low: Lowering, x: int, w: Window, *, turned: bool = False) -> int:
    """Lay out what the columns of a window see: [N, H + more, W, columns * C]."""
    t, padded = low.tape, low.tape.pad(x, reach(w))
    batch, tall, _, channels = t.shape(padded)
    seen = []
    for j in range(w.kernel[1]):
        first = (w.kernel[1] - 1 - j if turned else j) * w.dilations[1]
        seen.append(t.slice(padded, (0, 0, first, 0), (batch, tall, w.out[1], channels)))
    return t.concat(seen, 3)


def _conv_2d(low: Lowering, x: int, kernel: int, bias: int, w: Window) -> int:
    t = low.tape
    filters = t.shape(kernel)[0]
    if _is_half_constant(low, kernel, bias):
        return t.plus(_conv_2d(low, x, kernel, -1, w), bias)
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


_AXES = {"O": 0, "I": 1, "H": 2, "W": 3}


def _filter(low: Lowering, name: str, letters: str) -> int:
    """Return weights [O, I, *kernel] in an order such as OHWI, of four dimensions."""
    rank = low.rank(name)
    if rank == 4:
        return low.get(name, tuple(_AXES[a] for a in letters))
    kept = [a for a in letters if a != "H"]
    tensor = low.get(name, tuple({"O": 0, "I": 1, "W": 2}[a] for a in kept))
    shape = dict(zip(kept, low.tape.shape(tensor), strict=True)) | {"H": 1}
    return low.tape.reshape(tensor, [shape[a] for a in letters])


def taps_first(low: Lowering, weights: str) -> int:
    """Return depthwise weights [C, 1, *kernel] as [*kernel, 1, C]."""
    return _filter(low, weights, "HWIO")


# -- transposed ---------------------------------------------------------------------------------


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
    from coordinator.compiler.rules.conv import _mirrored_pads
    from coordinator.compiler.tflite.lower.windows import flat

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
    made = _spread(low, image(low, g), weights, _own_window(n), low.shape(x)[1])
    put_image(low, n.outputs[0], made, low.rank(x))


def _own_window(n: Node) -> Window:
    from coordinator.compiler.tflite.lower.windows import flat

    return flat(Window(*(tuple(n.attr(name)) for name in Window._fields)))


def _spread(low: Lowering, g: int, weights: str, w: Window, channels: int) -> int:
    """Record the transposed convolution that takes [N, *out, K] to [N, *size, C]."""
    t, filters = low.tape, low.shape(weights)[0]
    group = channels // low.shape(weights)[1]
    if group == 1:
        return _spread_dense(low, g, weights, w)
    if group == channels:
        return _spread_depthwise(low, g, weights, w, channels)
    parts, outs = t.split(g, 3, group), filters // group
    whole = _filter(low, weights, "IHWO")
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
    if not is_constant and w.is_flippable and _pays(w, (filters, channels)):
        return _by_rows(low, g, _filter(low, weights, "WOHI"), back(w), turned=True)
    if w.strides[0] == w.strides[1] > 1 and set(w.dilations) == {1}:
        return _by_phases(low, g, weights, w)
    return _undo(low, g, _flipped(low, _filter(low, weights, "IHWO")), w)


def _by_phases(low: Lowering, g: int, weights: str, w: Window) -> int:
    """Make the s x s neighbours that a stride sets apart as channels, then lay them side by side.

    x[q * s + r - begin] sums g[q - m] * w[m * s + r]: a convolution at stride 1 with a filter a
    stride smaller, for all r at once. TRANSPOSE_CONV would make all that follows wait for its size.
    """
    t, step = low.tape, w.strides[0]
    batch, (filters, channels) = t.shape(g)[0], low.shape(weights)[:2]
    fewer = _phases(w).kernel
    kernel = t.transpose(_split_taps(low, weights, w), (4, 0, 2, 3, 5, 1))
    kernel = t.reshape(kernel, (fewer[1], filters, fewer[0], step * step * channels))
    out = tuple(-(-(d + b) // step) for d, b in zip(w.size, w.begins, strict=True))
    begins = tuple(m - 1 for m in fewer)
    ends = tuple(q - o for q, o in zip(out, w.out, strict=True))
    phases = Window(fewer, (1, 1), (1, 1), begins, ends, w.out, out)
    made = _by_rows(low, g, kernel, phases, turned=True)
    size = (batch, out[0] * step, out[1] * step, channels)
    wide = t.add("DEPTH_TO_SPACE", [made], size, block=step)
    return t.slice(wide, (0, *w.begins, 0), (batch, *w.size, channels))


def _by_pixels(low: Lowering, g: int, weights: str, w: Window) -> int:
    """Undo a convolution of single pixels: multiply, and set the results apart."""
    t, (filters, channels) = low.tape, low.shape(weights)[:2]
    batch = t.shape(g)[0]
    flat = t.reshape(g, (batch * w.out[0] * w.out[1], filters))
    kernel = t.reshape(_filter(low, weights, "OHWI"), (filters, channels))
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
    return _conv_2d(low, *_cut(low, stuffed(low, g, w), kernel, undo))


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


# -- by the filter ------------------------------------------------------------------------------


@lowers("fedge.ConvFilter")
def _conv_filter(low: Lowering, n: Node) -> None:
    """Sum what each tap saw times the gradient: [K, C / group, *kernel]."""
    x, g = n.inputs
    w, group, rank = _own_window(n), n.attr("group", 1), low.rank(x)
    t, seen, upstream = low.tape, image(low, x), image(low, g)
    channels, filters = t.shape(seen)[3], t.shape(upstream)[3]
    if group == channels == filters and group > 1:
        _put_filter(low, n, _filter_depthwise(low, seen, upstream, w), "HWO", rank)
        return
    if group == 1:
        made, letters = _filter_dense(low, seen, upstream, w)
        _put_filter(low, n, made, letters, rank)
        return
    parts = zip(t.split(seen, 3, group), t.split(upstream, 3, group), strict=True)
    found = [_filter_dense(low, a, b, w) for a, b in parts]
    letters = found[0][1]
    _put_filter(low, n, t.concat([f for f, _ in found], letters.index("O")), letters, rank)


def _put_filter(low: Lowering, n: Node, made: int, letters: str, rank: int) -> None:
    t = low.tape
    sizes = dict(zip(letters, t.shape(made), strict=True))
    if "I" not in letters:
        letters, sizes = f"{letters}I", sizes | {"I": 1}
    kept = [a for a in letters if rank == 4 or a != "H"]
    made = t.reshape(made, [sizes[a] for a in kept])
    axes = _AXES if rank == 4 else {"O": 0, "I": 1, "W": 2}
    low.put(n.outputs[0], made, tuple(axes[a] for a in kept))


def _filter_dense(low: Lowering, x: int, g: int, w: Window) -> tuple[int, str]:
    t = low.tape
    channels, filters = t.shape(x)[3], t.shape(g)[3]
    if w.is_plain:
        area = t.shape(g)[0] * w.out[0] * w.out[1]
        found = t.matmul(t.reshape(g, (area, filters)), t.reshape(x, (area, channels)), adj_x=True)
        return t.reshape(found, (filters, 1, 1, channels)), "OHWI"
    if _pays(w, (filters, channels)):
        return _filter_by_rows(low, x, g, w), "HOWI"
    if _pays_in_phases(w, (filters, channels)):
        return _filter_in_phases(low, x, g, w), "OIHW"
    turned, kernels = t.transpose(x, (3, 1, 2, 0)), t.transpose(g, (3, 1, 2, 0))
    swapped, size = _swapped(w)
    made = _conv_2d(low, t.pad(turned, reach(w)), kernels, -1, swapped)
    return t.slice(made, (0, 0, 0, 0), (channels, *size, filters)), "IHWO"


def _filter_by_rows(low: Lowering, x: int, g: int, w: Window) -> int:
    """Multiply what the columns see by the gradient as each row's tap meets it: [H, K, W, C]."""
    t, (rows, columns), filters = low.tape, w.kernel, low.tape.shape(g)[3]
    side, more = _side(low, x, w), (rows - 1) * w.dilations[0]
    met = []
    for i in range(rows):
        above = i * w.dilations[0]
        met.append(t.pad(g, [(0, 0), (above, more - above), (0, 0), (0, 0)]))
    upstream = t.concat(met, 3)
    batch, tall, width, wide = t.shape(side)
    area = batch * tall * width
    found = t.matmul(
        t.reshape(upstream, (area, rows * filters)), t.reshape(side, (area, wide)), adj_x=True
    )
    return t.reshape(found, (rows, filters, columns, wide // columns))


def _filter_in_phases(low: Lowering, x: int, g: int, w: Window) -> int:
    """Find the gradient of the filter over the folded image, and put its taps together."""
    t, step, phases = low.tape, w.strides[0], _phases(w)
    rows, columns = phases.kernel
    filters, channels = t.shape(g)[3], t.shape(x)[3]
    found = _filter_by_rows(low, _folded(low, x, w), g, phases)
    split = t.reshape(found, (rows, filters, columns, step, step, channels))
    joined = t.transpose(split, (1, 5, 0, 3, 2, 4))
    joined = t.reshape(joined, (filters, channels, rows * step, columns * step))
    return t.slice(joined, (0, 0, 0, 0), (filters, channels, *w.kernel))


def _swapped(w: Window) -> tuple[Window, tuple[int, ...]]:
    """Return the window of the gradient over the padded image, and the size of the filter."""
    zeros = (0, 0)
    full = tuple((o - 1) * s + x for o, s, x in zip(w.out, w.strides, w.extents, strict=True))
    swapped = Window(w.out, w.dilations, w.strides, zeros, zeros, full, w.kernel)
    return swapped, w.kernel


def _filter_depthwise(low: Lowering, x: int, g: int, w: Window) -> int:
    """Let each channel of each example be a channel; then sum over the examples."""
    t = low.tape
    batch, channels = t.shape(x)[0], t.shape(x)[3]
    padded = t.transpose(t.pad(x, reach(w)), (1, 2, 0, 3))
    pictures = t.reshape(padded, (1, *t.shape(padded)[:2], batch * channels))
    kernels = t.reshape(t.transpose(g, (1, 2, 0, 3)), (1, *w.out, batch * channels))
    swapped, _ = _swapped(w)
    found = depthwise(low, pictures, kernels, -1, swapped)
    split = t.reshape(found, (w.taps, batch, channels))
    return t.reshape(t.reduce("SUM", split, (1,), keep=False), (*w.kernel, channels))
