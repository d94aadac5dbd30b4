# SPDX-License-Identifier: Apache-2.0
"""Images and windows as builtin operators want them: four dimensions, channels last.

A signal [N, C, L] is an image of one row.
"""

from __future__ import annotations

import itertools
from typing import Any

from coordinator.compiler.graph import Node
from coordinator.compiler.rules.window import Window
from coordinator.compiler.tflite.lower.forms import Lowering
from coordinator.compiler.tflite.lower.table import refused


def window_of(low: Lowering, n: Node, image: str, out: tuple[int, ...], kernel: object) -> Window:
    """Read a node's window over `image`, with explicit padding, as one of two dimensions."""
    size = low.shape(image)[2:]
    rank = len(size)
    if rank not in (1, 2):
        raise refused(n, f"works on {rank} spatial dimensions, 1 and 2 are possible")
    kernel = tuple(n.attr("kernel_shape") or kernel)  # type: ignore[arg-type]  # a tuple or None
    strides = tuple(n.attr("strides") or (1,) * rank)
    dilations = tuple(n.attr("dilations") or (1,) * rank)
    zeros = (0,) * rank
    begins, ends = zeros, zeros
    mode = n.attr("auto_pad", "NOTSET")
    loose = Window(kernel, strides, dilations, zeros, zeros, size, out)
    if mode == "NOTSET" and n.attr("pads"):
        begins, ends = tuple(n.attr("pads")[:rank]), tuple(n.attr("pads")[rank:])
    elif mode in ("SAME_UPPER", "SAME_LOWER"):
        outs = tuple(-(-d // s) for d, s in zip(size, strides, strict=True))
        loose = loose._replace(out=outs)
        total = [max(-spare, 0) for spare in loose.spare]
        small, large = tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)
        begins, ends = (small, large) if mode == "SAME_UPPER" else (large, small)
    window = loose._replace(begins=begins, ends=ends)
    if not out:
        window = window._replace(out=_outs(window, is_ceil=bool(n.attr("ceil_mode"))))
    return flat(window)


def _outs(w: Window, *, is_ceil: bool) -> tuple[int, ...]:
    outs = []
    rows = zip(w.size, w.begins, w.ends, w.extents, w.strides, strict=True)
    for size, begin, end, extent, stride in rows:
        room = size + begin + end - extent
        out = (-(-room // stride) if is_ceil else room // stride) + 1
        if is_ceil and (out - 1) * stride >= size + begin:
            out -= 1
        outs.append(out)
    return tuple(outs)


def flat(w: Window) -> Window:
    """Return a window over an image of one row where there is one dimension."""
    if len(w.kernel) == 2:
        return w
    return Window(
        (1, *w.kernel), (1, *w.strides), (1, *w.dilations), (0, *w.begins), (0, *w.ends),
        (1, *w.size), (1, *w.out),
    )  # fmt: skip


def image(low: Lowering, name: str) -> int:
    """Return an image [N, H, W, C]."""
    rank = low.rank(name)
    return as_image(low, low.get(name, (0, *range(2, rank), 1)))


def as_image(low: Lowering, tensor: int) -> int:
    """Return [N, H, W, C] of what may be [N, L, C]."""
    shape = low.tape.shape(tensor)
    return tensor if len(shape) == 4 else low.tape.reshape(tensor, (shape[0], 1, *shape[1:]))


def put_image(low: Lowering, name: str, tensor: int, rank: int) -> None:
    """Say that an image [N, H, W, C] is the ONNX tensor `name` of `rank` dimensions."""
    tensor = from_image(low, tensor, rank)
    low.put(name, tensor, (0, *range(2, rank), 1))


def from_image(low: Lowering, tensor: int, rank: int) -> int:
    """Return [N, L, C] where the model has signals."""
    shape = low.tape.shape(tensor)
    return tensor if rank == 4 else low.tape.reshape(tensor, (shape[0], *shape[2:]))


def is_same(w: Window) -> bool:
    """Tell whether TFLite's SAME padding is what the window has."""
    rows = zip(w.size, w.out, w.strides, w.extents, w.begins, w.ends, strict=True)
    for size, out, stride, extent, begin, end in rows:
        total = max((out - 1) * stride + extent - size, 0)
        if out != -(-size // stride) or begin != total // 2 or end < total - total // 2:
            return False
    return True


def reach(w: Window) -> list[tuple[int, int]]:
    """Return the padding of an image that the windows read to the last element and no further."""
    rows = zip(w.size, w.out, w.strides, w.extents, w.begins, strict=True)
    needed = [((o - 1) * s + x - size - b, b) for size, o, s, x, b in rows]
    return [(0, 0), *((b, end) for end, b in needed), (0, 0)]


def padding(low: Lowering, x: int, w: Window, value: float = 0.0) -> tuple[int, str]:
    """Return the image to work on and TFLite's name for the padding that is left to do."""
    if is_same(w):
        return x, "SAME"
    pairs = [(b, max(e, 0)) for b, e in reach(w)]
    return low.tape.pad(x, pairs, value), "VALID"


def geometry(w: Window) -> dict[str, Any]:
    """Return strides and dilations as options."""
    return {
        "stride_h": w.strides[0], "stride_w": w.strides[1],
        "dilation_h": w.dilations[0], "dilation_w": w.dilations[1],
    }  # fmt: skip


def taps(low: Lowering, x: int, w: Window) -> list[int]:
    """Record what each tap sees of the image, [N, *out, C] each, row after row."""
    t = low.tape
    padded = t.pad(x, reach(w))
    batch, channels = t.shape(x)[0], t.shape(x)[3]
    found = []
    for tap in itertools.product(*map(range, w.kernel)):
        starts = [i * d for i, d in zip(tap, w.dilations, strict=True)]
        found.append(
            t.slice(padded, (0, *starts, 0), (batch, *w.out, channels), (1, *w.strides, 1))
        )
    return found


def stuffed(low: Lowering, g: int, w: Window) -> int:
    """Record an image with strides' gaps of zeros between its elements, and after the last."""
    t = low.tape
    (sh, sw), (batch, height, width, channels) = w.strides, t.shape(g)
    if sh == sw == 1:
        return g
    if sw > 1:  # a gap in a row: more channels, seen as more columns
        g = t.reshape(g, (batch, height, width, channels))
        g = t.pad(g, [(0, 0), (0, 0), (0, 0), (0, (sw - 1) * channels)])
        g = t.reshape(g, (batch, height, width * sw, channels))
    if sh > 1:
        row = width * sw * channels
        g = t.reshape(g, (batch, height, row))
        g = t.pad(g, [(0, 0), (0, 0), (0, (sh - 1) * row)])
        g = t.reshape(g, (batch, height * sh, width * sw, channels))
    return g
