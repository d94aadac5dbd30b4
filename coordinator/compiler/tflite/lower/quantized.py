# SPDX-License-Identifier: Apache-2.0
"""Integers: quantizing, and the layers that frozen int8 weights run on integer kernels.

An ONNX model quantized in QDQ form says DequantizeLinear, Conv, QuantizeLinear and means an integer
kernel. Where nothing but the quantizer reads a layer, and its weights are constants, one operator
is recorded for the three, with per-channel scales as they are. uint8 becomes int8, its zero point
128 lower: the same numbers in the only type that TFLite's kernels take.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from coordinator.compiler.graph import Node
from coordinator.compiler.rules.window import Window
from coordinator.compiler.tflite.lower.forms import Lowering, Stored
from coordinator.compiler.tflite.lower.table import lowers, refused
from coordinator.compiler.tflite.lower.windows import (
    as_image,
    from_image,
    geometry,
    is_same,
    reach,
)
from coordinator.compiler.tflite.write import Quantization

_SHIFT = 128
_LEVELS = (np.dtype(np.int8), np.dtype(np.uint8))


class Result(NamedTuple):
    """Where an integer layer's output goes: the quantizer, its scale, and the activation before."""

    quantizer: Node
    quantization: Quantization
    activation: str


@lowers("QuantizeLinear")
def _quantize(low: Lowering, n: Node) -> None:
    scheme = quantization_of(low, n)
    if scheme is None:
        _rounded(low, n)
        return
    t = low.tape
    if low.has_levels(n.inputs[0]):
        tensor, order = low.level_form(n.inputs[0])
        if t.tensors[tensor].quantization == scheme:
            low.put_levels(n.outputs[0], tensor, order)
            return
    else:
        tensor, order = low.form(n.inputs[0])
    made = t.add("QUANTIZE", [tensor], t.shape(tensor), "int8", quantization=scheme)
    low.put_levels(n.outputs[0], made, order)


@lowers("DequantizeLinear")
def _dequantize(low: Lowering, n: Node) -> None:
    """Say what integers stand for; readers decide whether they want floats."""
    levels = low.known(n.inputs[0])
    if levels is not None:
        scale, zero = low.constant(n.inputs[1]), _zero(low, n)
        if scale is None or zero is None or n.attr("block_size", 0):
            raise refused(n, "has a scale that is not one constant, or one per channel")
        axis = n.attr("axis", 1) % max(levels.ndim, 1)
        low.store(n.outputs[0], Stored(levels, scale, zero, axis, n.inputs[0]))
        return
    if not low.has_levels(n.inputs[0]):
        _spread(low, n)
        return
    tensor, order = low.level_form(n.inputs[0])
    low.put_levels(n.outputs[0], tensor, order)


def _zero(low: Lowering, n: Node) -> NDArray[np.generic] | None:
    return low.constant(n.input(2)) if n.input(2) else np.zeros((), np.uint8)


def quantization_of(low: Lowering, n: Node) -> Quantization | None:
    """Return the scale of a quantizer as int8's, None where it is learned."""
    scale, zero = low.constant(n.inputs[1]), _zero(low, n)
    if scale is None or zero is None:
        return None
    if scale.size != 1 or zero.size != 1:
        raise refused(n, "quantizes what runs by one scale per channel")
    if zero.dtype not in _LEVELS:
        raise refused(n, f"quantizes to {zero.dtype}, int8 and uint8 are possible")
    shift = _SHIFT if zero.dtype == np.uint8 else 0
    source = n.inputs[1] if n.inputs[1] in low.traced else ""
    return Quantization((float(scale.reshape(())),), (int(zero.reshape(())) - shift,), 0, source)


def _rounded(low: Lowering, n: Node) -> None:
    """Quantize by a learned scale: whole numbers, kept as floats."""
    t, zero = low.tape, _zero(low, n)
    if zero is None or zero.size != 1:
        raise refused(n, "has a zero point that is not one constant")
    tensor, order = low.form(n.inputs[0])
    limits = np.iinfo(np.int8 if zero.dtype == np.int8 else np.uint8)
    low_end, high_end = limits.min, limits.max
    centre = int(zero.reshape(()))
    steps = t.unary("ROUND", t.over(tensor, low.get(n.inputs[1])))
    steps = t.binary("MAXIMUM", steps, t.const(float(low_end - centre)))
    steps = t.binary("MINIMUM", steps, t.const(float(high_end - centre)))
    low.put(n.outputs[0], steps, order)


def _spread(low: Lowering, n: Node) -> None:
    """Give whole numbers that are kept as floats their scale again."""
    tensor, order = low.form(n.inputs[0])
    low.put(n.outputs[0], low.tape.mul(tensor, low.get(n.inputs[1])), order)


# -- layers on integer kernels ------------------------------------------------------------------


def result_of(low: Lowering, n: Node) -> Result | None:
    """Return where a layer's output goes if a quantizer alone reads it, an activation between."""
    outputs = {value.name for value in low.graph.outputs}
    name, activation, between = n.outputs[0], "NONE", list[Node]()
    for _ in range(2):
        readers = low.graph.uses.get(name, ())
        if len(readers) != 1 or name in outputs or readers[0].inputs[0] != name:
            return None
        reader = readers[0]
        if reader.kind == "QuantizeLinear":
            scheme = quantization_of(low, reader)
            if scheme is None:
                return None
            low.done.update(map(id, (*between, reader)))
            return Result(reader, scheme, activation)
        activation = _activation(low, reader)
        if not activation:
            return None
        between.append(reader)
        name = reader.outputs[0]
    return None


def _activation(low: Lowering, n: Node) -> str:
    if n.kind == "Relu":
        return "RELU"
    if n.kind == "Clip" and n.input(1) and n.input(2):
        edges = [low.constant(name) for name in n.inputs[1:3]]
        if [None if e is None else float(e.reshape(())) for e in edges] == [0.0, 6.0]:
            return "RELU6"
    return ""


def _scale_of(low: Lowering, tensor: int) -> Quantization:
    scheme = low.tape.tensors[tensor].quantization
    if scheme is None:
        raise AssertionError("integers without a scale")
    return scheme


def _weights(low: Lowering, name: str, axis: int) -> Stored | None:
    """Return int8 weights around zero, with one scale or one along `axis`."""
    found = low.stored(name)
    if found is None or found.levels.dtype not in _LEVELS:
        return None
    shift = _SHIFT if found.levels.dtype == np.uint8 else 0
    if shift and found.source in low.traced:
        return None  # its bytes are to be written as uint8
    if (found.zero_point.astype(np.int64) != shift).any():
        return None
    if found.scale.size > 1 and found.axis != axis:
        return None
    levels = (found.levels.astype(np.int16) - shift).astype(np.int8)
    zero = np.zeros_like(found.zero_point, np.int8)
    return replace(found, levels=levels, zero_point=zero, axis=axis)


def _integer_weights(
    low: Lowering, stored: Stored, order: tuple[int, ...], shape: tuple[int, ...], axis: int
) -> int:
    """Store weights of a layer: transposed, then in the shape that the operator takes."""
    scales = tuple(float(s) for s in stored.scale.reshape(-1))
    scheme = Quantization(scales, (0,) * len(scales), axis)
    if stored.source in low.traced:
        kept = low.tape.weight(stored.source, stored.levels, order, scheme)
        return low.tape.reshape(kept, shape)
    return low.tape.const(stored.levels.transpose(order).reshape(shape), np.int8, scheme)


def _integer_bias(low: Lowering, name: str, x: Quantization, weights: Stored) -> int | None:
    """Return an int32 bias by the scale of input and weights."""
    step = np.float32(x.scale[0]) * weights.scale.reshape(-1).astype(np.float32)
    size = max(weights.levels.shape[0] if weights.axis == 0 else weights.levels.shape[-1], 1)
    values = np.zeros(size) if not name else low.constant(name)
    if values is None or (values.size != size):
        return None
    bias = low.stored(name)
    if bias is not None and bias.levels.dtype == np.int32 and bias.source in low.traced:
        scales = tuple(float(s) for s in bias.scale.reshape(-1))
        scheme = Quantization(scales, (0,) * len(scales), 0)
        return low.tape.weight(bias.source, bias.levels, (0,), scheme)
    if {name, weights.source} & low.traced:
        return None  # a float bias cannot follow its weights' scale
    whole = np.rint(values.reshape(-1).astype(np.float64) / step.astype(np.float64))
    whole = np.clip(whole, -(2**31) + 1, 2**31 - 1).astype(np.int32)
    scheme = Quantization(tuple(map(float, step)), (0,) * step.size, 0)
    return low.tape.const(whole, np.int32, scheme)


def integer_conv(low: Lowering, n: Node, w: Window) -> bool:
    """Record a convolution of integers by frozen ones; False where it is none."""
    x, group = n.inputs[0], n.attr("group", 1)
    weights = _weights(low, n.inputs[1], 0)
    if weights is None or not low.has_levels(x):
        return False
    filters, inner = weights.levels.shape[:2]
    is_depthwise = inner == 1 and group == low.shape(x)[1] and group > 1
    if not is_depthwise and group != 1:
        return False
    rank, t = low.rank(x), low.tape
    seen = as_image(low, low.levels(x, (0, *range(2, rank), 1)))
    bias = _integer_bias(low, n.input(2), _scale_of(low, seen), weights)
    result = None if bias is None else result_of(low, n)
    if bias is None or result is None:
        return False
    rest, pad = tuple(range(2, rank)), "SAME"
    if not is_same(w):
        scheme = _scale_of(low, seen)
        seen = t.pad(seen, [(b, max(e, 0)) for b, e in reach(w)], scheme.zero_point[0])
        pad = "VALID"
    options: dict[str, Any] = {"padding": pad, "activation": result.activation, **geometry(w)}
    if is_depthwise:
        kernel = _integer_weights(low, weights, (1, *rest, 0), (1, *w.kernel, filters), 3)
        options["multiplier"] = filters // group
        op = "DEPTHWISE_CONV_2D"
    else:
        kernel = _integer_weights(low, weights, (0, *rest, 1), (filters, *w.kernel, inner), 0)
        op = "CONV_2D"
    made = t.add(
        op,
        [seen, kernel, bias],
        (t.shape(seen)[0], *w.out, filters),
        "int8",
        quantization=result.quantization,
        **options,
    )
    order = (0, *range(2, rank), 1)
    low.put_levels(result.quantizer.outputs[0], from_image(low, made, rank), order)
    return True


def integer_dense(low: Lowering, n: Node) -> bool:
    """Record a product of integers by frozen ones; False where it is none.

    It is a convolution of one pixel: that takes a scale per channel on every runtime.
    """
    x, name = n.inputs[:2]
    turned = bool(n.attr("transB", 0))
    weights = _weights(low, name, 0 if turned else 1)
    plain = not n.attr("transA", 0) and {n.attr("alpha", 1.0), n.attr("beta", 1.0)} == {1.0}
    if weights is None or not low.has_levels(x) or not plain or low.rank(x) != 2:
        return False
    t, seen = low.tape, low.levels(x)
    outs = weights.levels.shape[0 if turned else 1]
    bias = _integer_bias(low, n.input(2), _scale_of(low, seen), weights)
    result = None if bias is None else result_of(low, n)
    if bias is None or result is None:
        return False
    rows, inner = t.shape(seen)
    pixels = t.reshape(seen, (rows, 1, 1, inner))
    order = (0, 1) if turned else (1, 0)
    kernel = _integer_weights(low, weights, order, (outs, 1, 1, inner), 0)
    made = t.add(
        "CONV_2D", [pixels, kernel, bias], (rows, 1, 1, outs), "int8",
        quantization=result.quantization, activation=result.activation, padding="VALID",
        stride_h=1, stride_w=1, dilation_h=1, dilation_w=1,
    )  # fmt: skip
    low.put_levels(result.quantizer.outputs[0], t.reshape(made, (rows, outs)))
    return True


def integer_pool(low: Lowering, n: Node, w: Window | None) -> bool:
    """Pool integers where a quantizer alone reads the result; `w` None: the whole image."""
    x = n.inputs[0]
    if not low.has_levels(x) or (w is not None and not (is_same(w) or not any(w.pads))):
        return False
    include = bool(n.attr("count_include_pad", 0)) and w is not None and any(w.pads)
    result = None if include else result_of(low, n)
    if result is None or result.activation != "NONE":
        return False
    t, rank = low.tape, low.rank(x)
    seen = as_image(low, low.levels(x, (0, *range(2, rank), 1)))
    scheme = _scale_of(low, seen)
    if w is None:
        batch, _, _, channels = t.shape(seen)
        made = t.add(
            "MEAN", [seen, t.ints(1, 2)], (batch, 1, 1, channels),
            quantization=result.quantization, keep_dims=True,
        )  # fmt: skip
    else:
        op = "MAX_POOL_2D" if n.kind == "MaxPool" else "AVERAGE_POOL_2D"
        made = t.add(
            op, [seen], (t.shape(seen)[0], *w.out, t.shape(seen)[3]), quantization=scheme,
            padding="SAME" if is_same(w) else "VALID", activation="NONE",
            stride_h=w.strides[0], stride_w=w.strides[1],
            filter_h=w.kernel[0], filter_w=w.kernel[1],
        )  # fmt: skip
        if scheme != result.quantization:
            made = t.add(
                "QUANTIZE", [made], t.shape(made), "int8", quantization=result.quantization
            )
    order = (0, *range(2, rank), 1)
    low.put_levels(result.quantizer.outputs[0], from_image(low, made, rank), order)
    return True


def integer_add(low: Lowering, n: Node) -> bool:
    """Add two tensors of integers; False where they are not."""
    a, b = n.inputs[:2]
    if len(n.inputs) != 2 or not (low.has_levels(a) and low.has_levels(b)):
        return False
    if low.shape(a) != low.shape(b) or low.rank(a) > 4:
        return False
    result = result_of(low, n)
    if result is None:
        return False
    tensor, order = low.level_form(a)
    t = low.tape
    made = t.add(
        "ADD", [tensor, low.levels(b, order)], t.shape(tensor),
        quantization=result.quantization, activation=result.activation,
    )  # fmt: skip
    low.put_levels(result.quantizer.outputs[0], made, order)
    return True
