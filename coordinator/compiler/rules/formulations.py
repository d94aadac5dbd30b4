# SPDX-License-Identifier: Apache-2.0
"""The formulations of a convolution's gradients in standard operators, by name.

An input gradient is ``(e, g, weights, layer) -> [N, C, *size]``, a filter gradient is
``(e, x, g, layer) -> [K, C/group, *kernel]``; `SERVES` says which layers each can serve.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from coordinator.compiler.emit import Emit
from coordinator.compiler.rules import depthwise
from coordinator.compiler.rules.window import (
    Layer,
    Window,
    padded,
    seen_places,
    swapped_ends,
    swapped_out,
    tap_slices,
    transposed,
)

_MOST_PLACES = 1 << 13
"""Places that a stored table of windows may name: 32 KiB."""

_FEW_CHANNELS = 64
"""Channels up to which a product with a diagonal matrix is cheap."""


def _input_transposed(e: Emit, g: str, weights: str, layer: Layer) -> str:
    return transposed(e, g, weights, layer.window, layer.group)


def _input_flipped(e: Emit, g: str, weights: str, layer: Layer) -> str:
    """Stride 1: convolve with the kernel turned round and its two channel axes exchanged."""
    w, groups = layer.window, layer.group
    rank = len(w.kernel)
    inner, outer = layer.channels // groups, layer.filters // groups
    back = _backwards(e, weights, w)
    if groups == 1:
        turned = e.Transpose(back, perm=[1, 0, *range(2, rank + 2)])
    elif inner == outer == 1:
        turned = back
    else:
        split = e.Reshape(back, e.ints(groups, outer, inner, *w.kernel))
        swapped = e.Transpose(split, perm=[0, 2, 1, *range(3, rank + 3)])
        turned = e.Reshape(swapped, e.ints(layer.channels, outer, *w.kernel))
    begins = [x - 1 - b for x, b in zip(w.extents, w.begins, strict=True)]
    ends = [x - 1 - f for x, f in zip(w.extents, w.ends, strict=True)]
    return e.Conv(g, turned, dilations=w.dilations, pads=(*begins, *ends), group=groups)


def _backwards(e: Emit, weights: str, w: Window) -> str:
    """Turn each kernel round: a product with zeros and ones is five times quicker than Slice."""
    if w.taps == 1:
        return weights
    flat = e.Gemm(e.Reshape(weights, e.ints(-1, w.taps)), e.const(np.eye(w.taps)[::-1]))
    return e.Reshape(flat, e.ints(*(e.static(weights) or ())))


def _filter_swapped(e: Emit, x: str, g: str, layer: Layer) -> str:
    """Convolve x with g, batch and channels exchanged, stride and dilation exchanged."""
    w, groups = layer.window, layer.group
    rank = len(w.kernel)
    inner = layer.channels // groups
    rest = range(2, rank + 2)
    if groups == 1:
        image = e.Transpose(x, perm=[1, 0, *rest])
    elif inner == 1:
        image = e.Reshape(e.Transpose(x, perm=[1, 0, *rest]), e.ints(1, -1, *w.size))
    else:
        split = e.Reshape(x, e.ints(-1, groups, inner, *w.size))
        moved = e.Transpose(split, perm=[2, 1, 0, *range(3, rank + 3)])
        image = e.Reshape(moved, e.ints(inner, -1, *w.size))
    kernels = e.Transpose(g, perm=[1, 0, *rest])
    ends, size = swapped_ends(w), swapped_out(w)
    found = e.Conv(
        image,
        kernels,
        kernel_shape=w.out,
        strides=w.dilations,
        dilations=w.strides,
        pads=(*w.begins, *ends),
        group=groups,
    )
    found = e.declare(found, (inner, layer.filters, *size))
    if size != w.kernel:
        found = e.Slice(found, e.ints(*[0] * rank), e.ints(*w.kernel), e.ints(*rest))
    return e.Transpose(found, perm=[1, 0, *rest])


def _filter_columns(e: Emit, x: str, g: str, layer: Layer) -> str:
    """Lay out what each window sees as the rows of one matrix, channels last, for one Gemm."""
    w = layer.window
    flat = e.Reshape(
        _patches(e, _channels_last(e, x, layer), layer), e.ints(-1, w.taps * layer.channels)
    )
    upstream = e.Transpose(g, perm=[1, 0, *range(2, len(w.kernel) + 2)])
    return _untapped(e, e.Gemm(e.Reshape(upstream, e.ints(layer.filters, -1)), flat), layer)


def _channels_last(e: Emit, x: str, layer: Layer) -> str:
    """Return x as [N, *size, C]."""
    w = layer.window
    if layer.channels > _FEW_CHANNELS:
        return e.Transpose(x, perm=[0, *range(2, len(w.kernel) + 2), 1])
    pixels = e.Reshape(x, e.ints(-1, layer.channels, math.prod(w.size)))
    return e.Reshape(_swapped(e, pixels), e.ints(-1, *w.size, layer.channels))


def _swapped(e: Emit, x: str) -> str:
    """Exchange the last two of three dimensions by a product with ones along the diagonal.

    onnxruntime reads an operand of a product transposed as it is, all in one go. Its Transpose
    wakes the threads for each matrix: of [64, 9, 64] it takes 0.006 ms on one, 0.2 on two.
    """
    rows = e.dims(x)[1] or 0
    return e.MatMul(e.Transpose(x, perm=[0, 2, 1]), e.const(np.eye(rows)))


def _patches(e: Emit, image: str, layer: Layer) -> str:
    """Return what each window sees of [N, *size, C]: as many numbers as [N, *out, taps, C] holds.

    One Gather takes half the time of a Slice for each tap and a Concat, but its table is stored.
    """
    w = layer.window
    if w.is_plain:
        return image
    if w.taps * math.prod(w.out) > _MOST_PLACES:
        return e.Concat(*tap_slices(e, padded(e, image, w, 1), w, 1), axis=-1)
    places = seen_places(w)
    area = math.prod(w.size)
    pixels = e.Reshape(image, e.ints(-1, area, layer.channels))
    if (places == area).any():
        pixels = e.Pad(pixels, e.ints(0, 1), None, e.ints(1))  # what lies outside is one zero
    return e.Gather(pixels, e.const(places.ravel(), np.int32), axis=1)


def _filter_bands(e: Emit, x: str, g: str, layer: Layer) -> str:
    """Lay out what each tap sees of the whole batch as the rows of one matrix, for one Gemm."""
    w = layer.window
    first = [1, 0, *range(2, len(w.kernel) + 2)]
    image = padded(e, e.Transpose(x, perm=first), w)
    bands = image if w.is_plain else e.Concat(*tap_slices(e, image, w), axis=0)
    flat = e.Reshape(bands, e.ints(w.taps * layer.channels, -1))
    upstream = e.Reshape(e.Transpose(g, perm=first), e.ints(layer.filters, -1))
    return _untapped(e, e.Gemm(upstream, flat, transB=1), layer)


def _untapped(e: Emit, found: str, layer: Layer) -> str:
    """Turn [K, taps * C] into [K, C, *kernel]."""
    w = layer.window
    split = e.Reshape(found, e.ints(layer.filters, w.taps, layer.channels))
    moved = _swapped(e, split) if w.taps > 1 else split
    return e.Reshape(moved, e.ints(layer.filters, layer.channels, *w.kernel))


def _filter_rows(e: Emit, x: str, g: str, layer: Layer) -> str:
    """Lay out what each tap sees as the rows of a matrix per example, and sum the products."""
    w = layer.window
    area = math.prod(w.out)
    rows = e.Reshape(_seen(e, x, layer), e.ints(-1, w.taps * layer.channels, area))
    upstream = e.Reshape(g, e.ints(-1, layer.filters, area))
    products = e.MatMul(upstream, e.Transpose(rows, perm=[0, 2, 1]))
    return _untapped(e, e.ReduceSum(products, e.ints(0), keepdims=0), layer)


def _seen(e: Emit, x: str, layer: Layer) -> str:
    """Return what each tap sees, [N, taps * C, ..]: shifts along rows, and all of these across."""
    w = layer.window
    if w.is_plain:
        return x
    if not _is_crossable(layer):
        return e.Concat(*tap_slices(e, padded(e, x, w), w), axis=1)
    wide = w.kernel[1] * layer.channels
    along = e.Concat(*_columns_of(e, x, w), axis=1)
    flat = e.Reshape(along, e.ints(-1, wide, w.size[0] * w.out[1]))
    begins = [w.begins[0] - tap * w.dilations[0] for tap in range(w.kernel[0])]
    ends = [w.out[0] - w.size[0] - begin for begin in begins]
    rows = zip(begins, ends, strict=True)
    return e.Concat(*(_shifted(e, flat, b * w.out[1], f * w.out[1]) for b, f in rows), axis=1)


def _filter_crossed(e: Emit, x: str, g: str, layer: Layer) -> str:
    """Shift x along rows by each tap's column, g across rows by each tap's row; multiply all pairs.

    A kernel of 3 x 3 takes 3 + 3 copies of images instead of 9, and one product for the batch.
    """
    w, turned = layer.window, [1, 0, 2, 3]
    across = _columns_of(e, e.Transpose(x, perm=turned), w)
    seen = e.Reshape(e.Concat(*across, axis=0), e.ints(w.kernel[1] * layer.channels, -1))
    plane = e.Reshape(e.Transpose(g, perm=turned), e.ints(layer.filters, 1, -1, math.prod(w.out)))
    along = e.Concat(*_rows_of(e, plane, w), axis=1)
    upstream = e.Reshape(along, e.ints(layer.filters * w.kernel[0], -1))
    return _untapped(e, e.Gemm(upstream, seen, transB=1), layer)


def _filter_crossed_each(e: Emit, x: str, g: str, layer: Layer) -> str:
    """Do the same for each example, and sum the products: images need not be turned for that."""
    w = layer.window
    area = w.size[0] * w.out[1]
    seen = e.Concat(*_columns_of(e, x, w), axis=1)
    seen = e.Reshape(seen, e.ints(-1, w.kernel[1] * layer.channels, area))
    plane = e.Reshape(g, e.ints(-1, layer.filters, 1, math.prod(w.out)))
    along = e.Concat(*_rows_of(e, plane, w), axis=2)
    upstream = e.Reshape(along, e.ints(-1, layer.filters * w.kernel[0], area))
    products = e.MatMul(upstream, e.Transpose(seen, perm=[0, 2, 1]))
    return _untapped(e, e.ReduceSum(products, e.ints(0), keepdims=0), layer)


def _columns_of(e: Emit, x: str, w: Window) -> list[str]:
    """Return [.., height, out width]: what the taps of each kernel column see of [.., *size]."""
    begins = [w.begins[1] - tap * w.dilations[1] for tap in range(w.kernel[1])]
    return [_shifted(e, x, begin, w.out[1] - w.size[1] - begin) for begin in begins]


def _rows_of(e: Emit, g: str, w: Window) -> list[str]:
    """Return [.., height * out width]: g where the taps of each kernel row meet the input."""
    rows, spare = w.out[1], w.size[0] - w.out[0]
    begins = [tap * w.dilations[0] - w.begins[0] for tap in range(w.kernel[0])]
    return [_shifted(e, g, begin * rows, (spare - begin) * rows) for begin in begins]


def _shifted(e: Emit, x: str, begin: int, end: int) -> str:
    """Pad the last dimension; a negative number crops."""
    return e.Pad(x, e.ints(begin, end), None, e.ints(e.rank(x) - 1)) if begin or end else x


def _is_crossable(layer: Layer) -> bool:
    """Tell whether taps lie side by side, and no shift leaves nothing."""
    w = layer.window
    if layer.group > 1 or len(w.kernel) != 2 or set(w.strides) != {1}:
        return False
    far = [x - 1 for x in w.extents]
    return all(f < min(size, out) for f, size, out in zip(far, w.size, w.out, strict=True))


FILTER: dict[str, Callable[[Emit, str, str, Layer], str]] = {
    "crossed": _filter_crossed,
    "crossed_each": _filter_crossed_each,
    "swapped": _filter_swapped,
    "columns": _filter_columns,
    "bands": _filter_bands,
    "rows": _filter_rows,
    "diagonals": depthwise.diagonals,
    "planes": depthwise.planes,
    "taps": depthwise.taps,
    "samples": depthwise.samples,
}
"""Formulations of the filter gradient."""

INPUT: dict[str, Callable[[Emit, str, str, Layer], str]] = {
    "transposed": _input_transposed,
    "flipped": _input_flipped,
}
"""Formulations of the input gradient."""

SERVES: dict[str, Callable[[Layer], bool]] = {
    "crossed": _is_crossable,
    "crossed_each": _is_crossable,
    "swapped": lambda _: True,
    "columns": lambda layer: layer.group == 1,
    "bands": lambda layer: layer.group == 1,
    "rows": lambda layer: layer.group == 1,
    "diagonals": lambda layer: layer.is_depthwise,
    "planes": lambda layer: layer.is_depthwise,
    "taps": lambda layer: layer.is_depthwise,
    "samples": lambda layer: layer.is_depthwise and layer.batch is not None,
    "transposed": lambda _: True,
    "flipped": lambda layer: layer.window.is_flippable,
}
"""Which layers each formulation can serve."""
