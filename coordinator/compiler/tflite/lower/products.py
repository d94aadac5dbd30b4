# SPDX-License-Identifier: Apache-2.0
"""Convolutions as products of matrices, for weights that come from an input.

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

from coordinator.compiler.rules.window import Window
from coordinator.compiler.tflite.lower.forms import Lowering
from coordinator.compiler.tflite.lower.windows import reach

MANY = 8
"""Channels on both sides from which on products pay."""

AXES = {"O": 0, "I": 1, "H": 2, "W": 3}
"""Dimensions of a filter in ONNX's order."""


def pays(w: Window, channels: Sequence[int]) -> bool:
    """Tell whether products are quicker than CONV_2D at stride 1."""
    return w.is_plain or (set(w.strides) == {1} and min(channels) >= MANY)


def pays_in_phases(w: Window, channels: Sequence[int]) -> bool:
    """Tell whether they are with the neighbours of a stride folded into channels."""
    is_even = w.strides[0] == w.strides[1] > 1 and set(w.dilations) == {1} and w.taps > 1
    return is_even and min(channels) >= MANY


def by_rows(low: Lowering, x: int, kernel: int, w: Window, *, turned: bool = False) -> int:
    """Convolve at stride 1 by a kernel [W, C, H, K]; `turned` exchanges first and last taps."""
    t = low.tape
    columns, channels, rows, filters = t.shape(kernel)
    batch, (height, width) = t.shape(x)[0], w.out
    laid = side(low, x, w, turned=turned)
    tall = t.shape(laid)[1]
    flat = t.reshape(laid, (batch * tall * width, columns * channels))
    matrix = t.reshape(kernel, (columns * channels, rows * filters))
    wide = t.reshape(t.matmul(flat, matrix), (batch, tall, width, rows * filters))
    total = -1
    for i in range(rows):
        first = (rows - 1 - i if turned else i) * w.dilations[0]
        part = t.slice(wide, (0, first, 0, i * filters), (batch, height, width, filters))
        total = part if total < 0 else t.plus(total, part)
    return total


def side(low: Lowering, x: int, w: Window, *, turned: bool = False) -> int:
    """Lay out what the columns of a window see: [N, H + more, W, columns * C]."""
    t, padded = low.tape, low.tape.pad(x, reach(w))
    batch, tall, _, channels = t.shape(padded)
    seen = []
    for j in range(w.kernel[1]):
        first = (w.kernel[1] - 1 - j if turned else j) * w.dilations[1]
        seen.append(t.slice(padded, (0, 0, first, 0), (batch, tall, w.out[1], channels)))
    return t.concat(seen, 3)


def phases_of(w: Window) -> Window:
    """Return the window over the folded image."""
    step = w.strides[0]
    kernel = tuple(-(-k // step) for k in w.kernel)
    size = tuple(o + k - 1 for o, k in zip(w.out, kernel, strict=True))
    return Window(kernel, (1, 1), (1, 1), (0, 0), (0, 0), size, w.out)


def folded(low: Lowering, x: int, w: Window) -> int:
    """Pad an image and fold the neighbours of a stride into channels: [N, .., s * s * C]."""
    t, step, size = low.tape, w.strides[0], phases_of(w).size
    rows = zip(size, w.size, w.begins, strict=True)
    pairs = [(b, q * step - d - b) for q, d, b in rows]
    padded = t.pad(x, [(0, 0), *pairs, (0, 0)])
    shape = (t.shape(x)[0], *size, step * step * t.shape(x)[3])
    return t.add("SPACE_TO_DEPTH", [padded], shape, block=step)


def split_taps(low: Lowering, weights: str, w: Window) -> int:
    """Return weights whose taps t = m * s + r are split: [K, C, m, r, m, r]."""
    t, step, (filters, channels) = low.tape, w.strides[0], low.shape(weights)[:2]
    fewer = phases_of(w).kernel
    spare = [(0, m * step - k) for m, k in zip(fewer, w.kernel, strict=True)]
    kernel = t.pad(weights_in(low, weights, "OIHW"), [(0, 0), (0, 0), *spare])
    return t.reshape(kernel, (filters, channels, fewer[0], step, fewer[1], step))


def weights_in(low: Lowering, name: str, letters: str) -> int:
    """Return weights [O, I, *kernel] in an order such as OHWI, of four dimensions."""
    rank = low.rank(name)
    if rank == 4:
        return low.get(name, tuple(AXES[a] for a in letters))
    kept = [a for a in letters if a != "H"]
    tensor = low.get(name, tuple({"O": 0, "I": 1, "W": 2}[a] for a in kept))
    shape = dict(zip(kept, low.tape.shape(tensor), strict=True)) | {"H": 1}
    return low.tape.reshape(tensor, [shape[a] for a in letters])


def taps_first(low: Lowering, weights: str) -> int:
    """Return depthwise weights [C, 1, *kernel] as [*kernel, 1, C]."""
    return weights_in(low, weights, "HWIO")
