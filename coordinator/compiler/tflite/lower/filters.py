# SPDX-License-Identifier: Apache-2.0
"""The gradients of convolutions by their filters."""

from __future__ import annotations

from coordinator.compiler.graph import Node
from coordinator.compiler.rules.window import Window
from coordinator.compiler.tflite.lower.conv import conv_2d, depthwise
from coordinator.compiler.tflite.lower.forms import Lowering
from coordinator.compiler.tflite.lower.products import (
    AXES,
    folded,
    pays,
    pays_in_phases,
    phases_of,
    side,
)
from coordinator.compiler.tflite.lower.table import lowers
from coordinator.compiler.tflite.lower.windows import flat, image, reach


@lowers("fedge.ConvFilter")
def _conv_filter(low: Lowering, n: Node) -> None:
    """Sum what each tap saw times the gradient: [K, C / group, *kernel]."""
    x, g = n.inputs
    w, group, rank = own_window(n), n.attr("group", 1), low.rank(x)
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


def own_window(n: Node) -> Window:
    """Read the window of an operator of fedge's own."""
    return flat(Window(*(tuple(n.attr(name)) for name in Window._fields)))


def _put_filter(low: Lowering, n: Node, made: int, letters: str, rank: int) -> None:
    t = low.tape
    sizes = dict(zip(letters, t.shape(made), strict=True))
    if "I" not in letters:
        letters, sizes = f"{letters}I", sizes | {"I": 1}
    kept = [a for a in letters if rank == 4 or a != "H"]
    made = t.reshape(made, [sizes[a] for a in kept])
    axes = AXES if rank == 4 else {"O": 0, "I": 1, "W": 2}
    low.put(n.outputs[0], made, tuple(axes[a] for a in kept))


def _filter_dense(low: Lowering, x: int, g: int, w: Window) -> tuple[int, str]:
    t = low.tape
    channels, filters = t.shape(x)[3], t.shape(g)[3]
    if w.is_plain:
        area = t.shape(g)[0] * w.out[0] * w.out[1]
        found = t.matmul(t.reshape(g, (area, filters)), t.reshape(x, (area, channels)), adj_x=True)
        return t.reshape(found, (filters, 1, 1, channels)), "OHWI"
    if pays(w, (filters, channels)):
        return _filter_by_rows(low, x, g, w), "HOWI"
    if pays_in_phases(w, (filters, channels)):
        return _filter_in_phases(low, x, g, w), "OIHW"
    turned, kernels = t.transpose(x, (3, 1, 2, 0)), t.transpose(g, (3, 1, 2, 0))
    swapped, size = _swapped(w)
    made = conv_2d(low, t.pad(turned, reach(w)), kernels, -1, swapped)
    return t.slice(made, (0, 0, 0, 0), (channels, *size, filters)), "IHWO"


def _filter_by_rows(low: Lowering, x: int, g: int, w: Window) -> int:
    """Multiply what the columns see by the gradient as each row's tap meets it: [H, K, W, C]."""
    t, (rows, columns), filters = low.tape, w.kernel, low.tape.shape(g)[3]
    laid, more = side(low, x, w), (rows - 1) * w.dilations[0]
    met = []
    for i in range(rows):
        above = i * w.dilations[0]
        met.append(t.pad(g, [(0, 0), (above, more - above), (0, 0), (0, 0)]))
    upstream = t.concat(met, 3)
    batch, tall, width, wide = t.shape(laid)
    area = batch * tall * width
    found = t.matmul(
        t.reshape(upstream, (area, rows * filters)), t.reshape(laid, (area, wide)), adj_x=True
    )
    return t.reshape(found, (rows, filters, columns, wide // columns))


def _filter_in_phases(low: Lowering, x: int, g: int, w: Window) -> int:
    """Find the gradient of the filter over the folded image, and put its taps together."""
    t, step, phases = low.tape, w.strides[0], phases_of(w)
    rows, columns = phases.kernel
    filters, channels = t.shape(g)[3], t.shape(x)[3]
    found = _filter_by_rows(low, folded(low, x, w), g, phases)
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
