# SPDX-License-Identifier: Apache-2.0
"""Convolutions of any group, stride, dilation and padding, over one or more spatial dimensions.

Both gradients of a convolution have several formulations in standard operators, and which one is
quick depends on the shape: `choose` picks from the tables in `formulations`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from coordinator.compiler.emit import Emit
from coordinator.compiler.graph import Node
from coordinator.compiler.rules.formulations import FILTER, INPUT, SERVES
from coordinator.compiler.rules.window import Ints, Layer, Window, spatial, window_of
from coordinator.compiler.vjp import Grads, vjp
from edge_sdk.errors import CompileError


class Plan(NamedTuple):
    """Which formulations to use: keys of `FILTER` and `INPUT`."""

    filter: str
    input: str


def choose(layer: Layer) -> Plan:
    """Pick the formulations of a layer's two gradients by its shape.

    The thresholds are where onnxruntime 1.32 changes sides (x86-64, 2 threads, batch 16).
    """
    w = layer.window
    turns = w.is_flippable and (w.taps == 1 or layer.channels > 4)
    return Plan(_choose_filter(layer), "flipped" if turns else "transposed")


def _choose_filter(layer: Layer) -> str:
    w = layer.window
    area, row = math.prod(w.out), w.out[-1]
    if layer.is_depthwise:
        return "planes" if area <= 36 else "diagonals"
    if layer.group > 1:
        return "swapped"
    if layer.channels == 1:
        return "swapped"
    if w.taps == 1:
        return "rows" if area >= 64 and w.is_plain else "columns"
    if layer.channels > 4 and area >= 144 and SERVES["crossed"](layer):
        # Adding up products of examples against turning images: ns of one core for an example.
        adding = 0.55 * w.taps * layer.channels * layer.filters
        turning = 0.2 * area * (layer.channels + layer.filters)
        return "crossed_each" if adding < turning else "crossed"
    few = layer.channels <= 4 or (layer.channels <= 16 and row >= 32)
    return "rows" if few else "columns"


@vjp("Conv")
def _conv(e: Emit, n: Node, g: str) -> Grads:
    x, weights, bias = n.inputs[0], n.inputs[1], n.input(2)
    layer = layer_of(e, n)
    plan = choose(layer)
    return (
        INPUT[plan.input](e, g, weights, layer) if e.needs(x) else None,
        FILTER[plan.filter](e, x, g, layer) if e.needs(weights) else None,
        _bias(e, g) if e.needs(bias) else None,
    )


@vjp("ConvTranspose")
def _conv_transpose(e: Emit, n: Node, g: str) -> Grads:
    """A transposed convolution is the input gradient of a convolution from y to x."""
    x, weights, bias = n.inputs[0], n.inputs[1], n.input(2)
    layer = _mirrored(e, n)
    w = layer.window
    dx = None
    if e.needs(x):
        dx = e.Conv(
            g, weights, strides=w.strides, dilations=w.dilations, pads=w.pads, group=layer.group
        )
    return (
        dx,
        FILTER[choose(layer).filter](e, g, x, layer) if e.needs(weights) else None,
        _bias(e, g) if e.needs(bias) else None,
    )


def _bias(e: Emit, g: str) -> str:
    """Sum over space, then over the batch: half the time of both at once."""
    return e.ReduceSum(
        e.ReduceSum(g, e.ints(*range(2, e.rank(g))), keepdims=0), e.ints(0), keepdims=0
    )


def layer_of(e: Emit, n: Node) -> Layer:
    """Read a Conv node."""
    shape, group = _filter_shape(e, n), n.attr("group", 1)
    window = window_of(e, n, shape[2:])
    return Layer(e.dims(n.inputs[0])[0], shape[1] * group, shape[0], group, window)


def _filter_shape(e: Emit, n: Node) -> Ints:
    shape = e.static(n.inputs[1])
    if shape is None:
        raise CompileError(f"expected weights of known shape in {n.label}, got {n.inputs[1]!r}")
    return shape


def _mirrored(e: Emit, n: Node) -> Layer:
    """Read a ConvTranspose node as the convolution that leads from its output to its input."""
    shape, group = _filter_shape(e, n), n.attr("group", 1)
    size, out = spatial(e, n, n.outputs[0]), spatial(e, n, n.inputs[0])
    rank = len(size)
    zeros = (0,) * rank
    strides = tuple(n.attr("strides") or (1,) * rank)
    dilations = tuple(n.attr("dilations") or (1,) * rank)
    loose = Window(shape[2:], strides, dilations, zeros, zeros, size, out)
    begins, ends = _mirrored_pads(n, loose)
    window = loose._replace(begins=begins, ends=ends)
    return Layer(e.dims(n.inputs[0])[0], shape[1] * group, shape[0], group, window)


def _mirrored_pads(n: Node, loose: Window) -> tuple[Ints, Ints]:
    """Return the pads of a ConvTranspose, which its output's size may decide."""
    rank, mode = len(loose.size), n.attr("auto_pad", "NOTSET")
    extra = n.attr("output_padding") or (0,) * rank
    if mode == "NOTSET" and not n.attr("output_shape"):
        pads = n.attr("pads") or (0,) * 2 * rank
        return tuple(pads[:rank]), tuple(pads[rank:])
    total = [max(e - s, 0) for e, s in zip(extra, loose.spare, strict=True)]
    small, large = tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)
    return (small, large) if mode == "SAME_UPPER" else (large, small)
