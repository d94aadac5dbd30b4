# SPDX-License-Identifier: Apache-2.0
"""Gradients that TFLite spells in its own way: convolutions and poolings with windows.

Standard ONNX operators would fix a formulation that suits onnxruntime. These rules emit operators
of fedge's own domain, which say what is wanted; `lower` says how:

    ConvFilter(x, g) -> the filter's gradient [K, C / group, *kernel]
    ConvInput(g, weights, x) -> the input's gradient, of x's shape
    MaxPoolInput(x, y, g) -> the input's gradient; of equal maxima the first takes it
"""

from __future__ import annotations

from typing import Any

import numpy as np

import coordinator.compiler.rules  # noqa: F401  fills the table
from coordinator.compiler.emit import Emit
from coordinator.compiler.graph import Node
from coordinator.compiler.rules.conv import _bias, _mirrored, layer_of
from coordinator.compiler.rules.pool import _enlarged, _max_tiles, _uncropped
from coordinator.compiler.rules.window import Layer, Window, counts, window_of
from coordinator.compiler.vjp import RULES, Grads, SeveralRule, single

DOMAIN = "fedge"


def _own(e: Emit, op: str, inputs: list[str], shape: Any, w: Window, **attributes: Any) -> str:
    (name,) = e.op(op, inputs, domain=DOMAIN, **w._asdict(), **attributes)
    return e.declare(name, shape, np.dtype(np.float32))


def _input(e: Emit, g: str, weights: str, x: str, layer: Layer) -> str:
    return _own(e, "ConvInput", [g, weights, x], e.dims(x), layer.window, group=layer.group)


def _filter(e: Emit, x: str, g: str, layer: Layer) -> str:
    w = layer.window
    shape = (layer.filters, layer.channels // layer.group, *w.kernel)
    return _own(e, "ConvFilter", [x, g], shape, w, group=layer.group)


def _conv(e: Emit, n: Node, g: str) -> Grads:
    x, weights, bias = n.inputs[0], n.inputs[1], n.input(2)
    layer = layer_of(e, n)
    return (
        _input(e, g, weights, x, layer) if e.needs(x) else None,
        _filter(e, x, g, layer) if e.needs(weights) else None,
        _bias(e, g) if e.needs(bias) else None,
    )


def _conv_transpose(e: Emit, n: Node, g: str) -> Grads:
    x, weights, bias = n.inputs[0], n.inputs[1], n.input(2)
    layer = _mirrored(e, n)
    w, dx = layer.window, None
    if e.needs(x):
        dx = e.Conv(
            g, weights, strides=w.strides, dilations=w.dilations, pads=w.pads, group=layer.group
        )
    return (
        dx,
        _filter(e, g, x, layer) if e.needs(weights) else None,
        _bias(e, g) if e.needs(bias) else None,
    )


def _average(e: Emit, n: Node, g: str) -> Grads:
    """Spread over the window: the input gradient of a depthwise convolution by ones."""
    x, w = n.inputs[0], window_of(e, n, tuple(n.attr("kernel_shape")))
    sizes = counts(w, include_pad=bool(n.attr("count_include_pad", 0)))
    g = e.Mul(g, e.const(1.0 / (sizes.flat[0] if np.all(sizes == sizes.flat[0]) else sizes)))
    if w.is_tiling:
        return (_uncropped(e, _enlarged(e, g, w), w),)
    channels = e.dims(x)[1] or 0
    ones = e.const(np.ones((channels, 1, *w.kernel)))
    layer = Layer(e.dims(x)[0], channels, channels, channels, w)
    return (_input(e, g, ones, x, layer),)


def _max(e: Emit, n: Node, g: str) -> Grads:
    x, w = n.inputs[0], window_of(e, n, tuple(n.attr("kernel_shape")))
    if w.is_tiling:
        return (_max_tiles(e, n, g, w),)
    return (_own(e, "MaxPoolInput", [x, n.outputs[0], g], e.dims(x), w),)


TFLITE_RULES: dict[str, SeveralRule] = {
    **RULES,
    "Conv": single(_conv),
    "ConvTranspose": single(_conv_transpose),
    "AveragePool": single(_average),
    "MaxPool": single(_max),
}
"""Gradient rules for graphs that become `.tflite` files."""
