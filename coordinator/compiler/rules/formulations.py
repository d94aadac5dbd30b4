# SPDX-License-Identifier: Apache-2.0
"""The formulations of a convolution's gradients in standard operators, by name.

An input gradient is ``(e, g, weights, layer) -> [N, C, *size]``, a filter gradient is
``(e, x, g, layer) -> [K, C/group, *kernel]``; `SERVES` says which layers each can serve.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from coordinator.compiler.emit import Emit
from coordinator.compiler.rules import depthwise
from coordinator.compiler.rules.window import (
    Layer,
    padded,
    swapped_ends,
    swapped_out,
    tap_slices,
    transposed,
)


def _input_transposed(e: Emit, g: str, weights: str, layer: Layer) -> str:
    return transposed(e, g, weights, layer.window, layer.group)


def _input_flipped(e: Emit, g: str, weights: str, layer: Layer) -> str:
    """Stride 1: convolve with the kernel turned round and its two channel axes exchanged."""
    w, groups = layer.window, layer.group
    rank = len(w.kernel)
    inner, outer = layer.channels // groups, layer.filters // groups
    if groups == 1:
        turned = e.Transpose(weights, perm=[1, 0, *range(2, rank + 2)])
    elif inner == outer == 1:
        turned = weights
    else:
        split = e.Reshape(weights, e.ints(groups, outer, inner, *w.kernel))
        swapped = e.Transpose(split, perm=[0, 2, 1, *range(3, rank + 3)])
        turned = e.Reshape(swapped, e.ints(layer.channels, outer, *w.kernel))
    if w.taps > 1:
        back = [-1] * rank
        axes = e.ints(*range(2, rank + 2))
        turned = e.Slice(turned, e.ints(*back), e.ints(*[-(2**31)] * rank), axes, e.ints(*back))
    begins = [x - 1 - b for x, b in zip(w.extents, w.begins, strict=True)]
    ends = [x - 1 - f for x, f in zip(w.extents, w.ends, strict=True)]
    return e.Conv(g, turned, dilations=w.dilations, pads=(*begins, *ends), group=groups)


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
    rank = len(w.kernel)
    last = [0, *range(2, rank + 2), 1]
    image = padded(e, e.Transpose(x, perm=last), w, 1)
    columns = image if w.is_plain else e.Concat(*tap_slices(e, image, w, 1), axis=-1)
    flat = e.Reshape(columns, e.ints(-1, w.taps * layer.channels))
    upstream = e.Reshape(e.Transpose(g, perm=last), e.ints(-1, layer.filters))
    found = e.Gemm(upstream, flat, transA=1)
    return _untapped(e, found, layer)


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
    moved = e.Transpose(split, perm=[0, 2, 1]) if w.taps > 1 else split
    return e.Reshape(moved, e.ints(layer.filters, layer.channels, *w.kernel))


def _filter_rows(e: Emit, x: str, g: str, layer: Layer) -> str:
    """Lay out what each tap sees as the rows of a matrix per example, and sum the products."""
    w = layer.window
    area = math.prod(w.out)
    seen = [x] if w.is_plain else list(tap_slices(e, padded(e, x, w), w))
    rows = seen[0] if len(seen) == 1 else e.Concat(*seen, axis=1)
    rows = e.Reshape(rows, e.ints(-1, w.taps * layer.channels, area))
    upstream = e.Reshape(g, e.ints(-1, layer.filters, area))
    products = e.MatMul(upstream, e.Transpose(rows, perm=[0, 2, 1]))
    return _untapped(e, e.ReduceSum(products, e.ints(0), keepdims=0), layer)


FILTER: dict[str, Callable[[Emit, str, str, Layer], str]] = {
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
