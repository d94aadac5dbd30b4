# SPDX-License-Identifier: Apache-2.0
"""RESIZE_BILINEAR and RESIZE_NEAREST_NEIGHBOR."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from coordinator.compiler.tflite.forward import Forward
from coordinator.compiler.tflite.ops.rounding import upwards
from coordinator.compiler.tflite.table import imports
from edge_sdk.tflitefile import Operator

_ONE = 2048
"""What the integer kernel's weights are parts of."""

_POWERS = (1, 2, 4, 8)
"""Factors whose weights are such parts."""


@imports("RESIZE_BILINEAR")
def _(f: Forward, op: Operator) -> None:
    x, y = op.inputs[0], op.outputs[0]
    f.share(x, y)
    before, after = f.shape(x)[1:3], f.numbers(op.inputs[1], op)
    halves = [b % a == 0 and b // a in _POWERS for a, b in zip(before, after, strict=True)]
    if f.is_quantized(y) and not (all(halves) and op.options["half_pixel_centers"]):
        f.write(y, _in_steps(f, op, before, after), "first")
        return
    value = f.e.Resize(
        f.read(x, "first"),
        None,
        f.e.const([1.0, 1.0, *map(_scale, before, after)]),
        mode="linear",
        coordinate_transformation_mode=_coordinates(op),
    )
    f.write(y, upwards(f, y, value) if f.is_quantized(y) else value, "first")


@imports("RESIZE_NEAREST_NEIGHBOR")
def _(f: Forward, op: Operator) -> None:
    x, y = op.inputs[0], op.outputs[0]
    f.share(x, y)
    before, after = f.shape(x)[1:3], f.numbers(op.inputs[1], op)
    value = f.read(x, "first")
    coordinates = _coordinates(op)
    if coordinates != "align_corners" and all(
        a % b == 0 for a, b in zip(after, before, strict=True)
    ):
        scales = f.e.const([1.0, 1.0, *(a // b for a, b in zip(after, before, strict=True))])
        value = f.e.Resize(
            value, None, scales, coordinate_transformation_mode="asymmetric", nearest_mode="floor"
        )
    else:
        for axis, (old, new) in enumerate(zip(before, after, strict=True), 2):
            value = f.e.Gather(value, f.e.ints(*_nearest(old, new, coordinates)), axis=axis)
    f.write(y, value, "first")


def _in_steps(f: Forward, op: Operator, before: Any, after: Any) -> str:
    """Interpolate with weights of 11 bits, rows and then columns, as the integer kernel does."""
    value = f.read(op.inputs[0], "first")
    rows, columns = (
        f.computed(_weights(old, new, _coordinates(op)))
        for old, new in zip(before, after, strict=True)
    )
    value = f.e.MatMul(f.e.MatMul(rows, value), f.e.Transpose(columns, perm=(1, 0)))
    return upwards(f, op.outputs[0], value, 2.0**-14)


def _weights(before: int, after: int, coordinates: str) -> NDArray[np.float32]:
    """Return the matrix [after, before] that interpolates along one dimension."""
    places = np.arange(after, dtype=np.float32)
    scale = np.float32(before) / np.float32(after)
    if coordinates == "align_corners":
        scale = np.float32(before - 1) / np.float32(max(after - 1, 1))
    at = places * scale
    if coordinates == "half_pixel":
        at = (places + np.float32(0.5)) * scale - np.float32(0.5)
    at = np.clip(at, 0, before - 1)
    first = np.floor(at).astype(np.int64)
    part = np.rint((at - first) * _ONE) / _ONE
    made = np.zeros((after, before), np.float32)
    rows = np.arange(after)
    np.add.at(made, (rows, first), 1 - part)
    np.add.at(made, (rows, np.minimum(first + 1, before - 1)), part)
    return made


def _coordinates(op: Operator) -> str:
    if op.options["align_corners"]:
        return "align_corners"
    return "half_pixel" if op.options["half_pixel_centers"] else "asymmetric"


def _scale(before: int, after: int) -> float:
    """Return a float32 scale that gives the right size, which ONNX rounds down."""
    scale = np.float32(after / before)
    while np.floor(np.float32(before) * scale) < after:
        scale = np.nextafter(scale, np.float32(np.inf))
    return float(scale)


def _nearest(before: int, after: int, coordinates: str) -> list[int]:
    """Return which number each new one is, in float32 as the kernel has it."""
    places = np.arange(after, dtype=np.float32)
    scale = np.float32(before) / np.float32(after)
    if coordinates == "align_corners":
        scale = np.float32(before - 1) / np.float32(max(after - 1, 1))
        found = np.floor(places * scale + np.float32(0.5))
    elif coordinates == "half_pixel":
        found = np.floor((places + np.float32(0.5)) * scale)
    else:
        found = np.floor(places * scale)
    return [int(n) for n in np.clip(found, 0, before - 1)]
