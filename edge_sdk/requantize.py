# SPDX-License-Identifier: Apache-2.0
"""Trained float32 masters back into the inference model, as bytes at recorded offsets. Pure numpy.

The scale of a quantized tensor follows its master: max(max(W)/(qmax-zp), max(-W)/(zp-qmin), TINY),
with int8's qmin at -127; then q = clip(rint(W/scale) + zp). A scale kept from before training costs
most of what was learned. int32 biases follow the scales of their weight and of their layer's input.
A learned range is a parameter that says how far an activation's step is above what it was. Where a
parameter is some rows of a tensor, the others keep their values. A tensor whose master is bit-equal
to its initial value keeps its original bytes, so an untrained model comes out as it came.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_sdk.bundle import Bundle
from edge_sdk.errors import BundleError
from edge_sdk.manifest import whole_shape
from edge_sdk.params import flatten
from edge_sdk.types import Array, Params

TINY = np.finfo(np.float32).tiny
OCTAVES = 4.0
"""How many octaves a learned range moves when its parameter grows by 1."""

MOST_OCTAVES = 16.0
"""How far a learned range may move: from 2**-16 to 2**16 of where it was."""

_FLOATS = {"float16": "<f2", "float32": "<f4"}
_INT32 = np.iinfo(np.int32)
Patch = Mapping[str, Any]


def requantize(bundle: Bundle, params: Params, format: str = "onnx") -> bytes:  # noqa: A002 - the field's word
    """Return the bundle's predict model in a format, with `params` (float32, by name) written in.

    Raises: ValueError when a tensor is missing or of another shape; BundleError when one is not
    finite.
    """
    shapes = bundle.shapes
    if not np.isfinite(flatten(params, shapes)).all():
        bad = [n for n in shapes if not np.isfinite(params[n]).all()]
        raise BundleError(f"expected finite weights, got NaN or infinity in {bad}; keep the last")
    initial = bundle.params()
    values = [np.ascontiguousarray(params[name], np.float32) for name in shapes]
    changed = [values[i].tobytes() != initial[n].tobytes() for i, n in enumerate(shapes)]
    model = bytearray(bundle.graph(format, "predict"))
    patches: list[Patch] = bundle.manifest["patches"][format]
    by_param = {p["param"]: p for p in patches if p["kind"] in {"quantized", "range"}}
    for patch in patches:
        if patch["kind"] in _FLOATS and changed[patch["param"]]:
            dtype = np.dtype(_FLOATS[patch["kind"]])
            most = np.finfo(dtype).max
            _write(model, patch, np.clip(values[patch["param"]], -most, most).astype(dtype))
        elif patch["kind"] == "quantized" and changed[patch["param"]]:
            _quantized(model, patch, values[patch["param"]])
        elif patch["kind"] == "range" and changed[patch["param"]]:
            start = np.frombuffer(model, "<f4", 1, patch["offset"])[0]
            _put(model, patch["offset"], step_of(values[patch["param"]], start).astype("<f4"))
    for patch in patches:  # after the weights and ranges, whose new scales they take
        follows = any(changed[patch[key]] for key in ("weight", "input") if key in patch)
        if patch["kind"] == "bias" and (follows or _is_changed(patch, changed)):
            _bias(model, patch, _bias_values(model, patch, values), by_param)
    return bytes(model)


def scale_of(weight: Array, dtype: str, axis: int | None, zero_point: NDArray[Any]) -> Array:
    """Return the scale(s) that a quantized master takes: float32, `[]` or `[weight.shape[axis]]`.

    Where a zero point leaves no room on one side (uint8 with 0), that side sets no scale: its
    values are clipped.
    """
    low, high = limits(dtype)
    over = None if axis is None else tuple(i for i in range(weight.ndim) if i != axis)
    zero = np.asarray(zero_point, np.float32)
    most = np.asarray(np.max(weight, over, initial=0), np.float32)
    least = np.asarray(np.max(-weight, over, initial=0), np.float32)
    above, below = _ratio(most, np.float32(high) - zero), _ratio(least, zero - np.float32(low))
    return np.asarray(np.maximum(np.maximum(above, below), TINY), np.float32)


def step_of(value: Array, start: np.float32) -> Array:
    """Return an activation's step: ``start * 2**floor(t) * (1 + t - floor(t))``, float32.

    t is `OCTAVES` times the parameter's value. A straight line between whole octaves, so that every
    machine gets the same bits.
    """
    most = np.float32(MOST_OCTAVES / OCTAVES)  # clipped first: a huge value must not overflow
    t = np.clip(np.asarray(value, np.float32), -most, most) * np.float32(OCTAVES)
    whole = np.floor(t)
    octave = start * np.ldexp(np.float32(1), whole.astype(np.int32))
    return np.asarray(np.maximum(octave * ((t - whole) + np.float32(1)), TINY), np.float32)


def limits(dtype: str) -> tuple[int, int]:
    """Return the least and the greatest integer that weights of `dtype` take."""
    info = np.iinfo(dtype)
    return (-127 if dtype == "int8" else int(info.min)), int(info.max)


def quantize(
    weight: Array, scale: Array, dtype: str, axis: int | None, zero_point: NDArray[Any]
) -> NDArray[Any]:
    """Return clip(rint(weight/scale) + zero_point) in `dtype`, of the weight's shape."""
    low, high = limits(dtype)
    levels = np.rint(weight / along(scale, axis, weight.ndim)).astype(np.float64)
    shifted = levels + along(np.asarray(zero_point), axis, weight.ndim)
    return np.asarray(np.clip(shifted, low, high), dtype)


def along(values: NDArray[Any], axis: int | None, ndim: int) -> NDArray[Any]:
    """Shape one value per index of `axis` so that it broadcasts over a tensor of `ndim` axes."""
    if axis is None or values.ndim == 0:
        return values
    return values.reshape([-1 if i == axis else 1 for i in range(ndim)])


def _ratio(size: Array, room: Array) -> Array:
    has_room = room > 0
    return np.where(has_room, size / np.where(has_room, room, np.float32(1)), np.float32(0))


def _laid_out(patch: Patch, values: NDArray[Any]) -> NDArray[Any]:
    """Return values in the layout of the model's format: OIHW in ONNX is OHWI in TFLite."""
    return (
        np.ascontiguousarray(np.transpose(values, patch["order"])) if "order" in patch else values
    )


def _quantized(model: bytearray, patch: Patch, weight: Array) -> None:
    axis, dtype = patch["axis"], patch["dtype"]
    zero = np.asarray(patch["zero_point"])
    if axis is None:
        zero = zero.reshape(())
    scale = scale_of(weight, dtype, axis, zero)
    _write(model, patch, quantize(weight, scale, dtype, axis, zero))
    scales = np.frombuffer(model, "<f4", patch["scales"], patch["scale_offset"])
    scales[patch["rows"]["at"] if "rows" in patch else slice(None)] = scale


def _is_changed(patch: Patch, changed: list[bool]) -> bool:
    return patch["param"] is not None and changed[patch["param"]]


def _bias_values(model: bytearray, patch: Patch, values: list[Array]) -> NDArray[np.float64]:
    """Return a trained bias's master; what is frozen of it, as the model holds it."""
    i, rows = patch["param"], patch.get("rows")
    if i is not None and rows is None:
        return values[i].astype(np.float64).ravel()
    size = rows["of"] if rows else int(np.prod(patch["shape"], dtype=np.int64))
    levels = np.frombuffer(model, "<i4", size, patch["offset"]).astype(np.float64)
    scale = np.frombuffer(model, "<f4", patch["scales"], patch["scale_offset"])
    bias = np.asarray(levels * scale, np.float64)
    if i is not None and rows:
        bias[rows["at"]] = values[i]
    return bias


def _bias(
    model: bytearray, patch: Patch, bias: NDArray[np.float64], by_param: Mapping[int, Patch]
) -> None:
    scale = np.broadcast_to(_bias_scale(model, patch, by_param), patch["scales"])
    levels = np.clip(np.rint(bias / scale), _INT32.min, _INT32.max)
    _put(model, patch["offset"], levels.astype("<i4"))
    _put(model, patch["scale_offset"], scale.astype("<f4"))


def _bias_scale(model: bytearray, patch: Patch, by_param: Mapping[int, Patch]) -> Array:
    input_scale = np.float32(patch["input_scale"])
    if "input" in patch:
        input_scale = np.frombuffer(model, "<f4", 1, by_param[patch["input"]]["offset"])[0]
    if "weight_scale" in patch:
        weight_scale = np.asarray(patch["weight_scale"], np.float32)
    else:
        weight = by_param[patch["weight"]]
        at, n = weight["scale_offset"], weight["scales"]
        weight_scale = np.frombuffer(model, "<f4", n, at).astype(np.float32)
    return np.asarray(np.maximum(input_scale * weight_scale, TINY))


def _write(model: bytearray, patch: Patch, values: NDArray[Any]) -> None:
    """Write a parameter's numbers; where it is rows of a tensor, the others keep theirs."""
    laid_out, rows = _laid_out(patch, values), patch.get("rows")
    if rows is None:
        return _put(model, patch["offset"], laid_out)
    order = patch.get("order", range(values.ndim))
    full = whole_shape(patch, values.shape)
    shape = [full[i] for i in order]
    whole = np.frombuffer(model, values.dtype, math.prod(shape), patch["offset"]).reshape(shape)
    axis = list(order).index(rows["axis"])
    np.moveaxis(whole, axis, 0)[rows["at"]] = np.moveaxis(laid_out, axis, 0)
    return None


def _put(model: bytearray, offset: int, values: NDArray[Any]) -> None:
    data = values.tobytes()
    model[offset : offset + len(data)] = data
