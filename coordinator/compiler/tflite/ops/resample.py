# SPDX-License-Identifier: Apache-2.0
"""RESIZE_BILINEAR and RESIZE_NEAREST_NEIGHBOR."""

from __future__ import annotations

from coordinator.compiler.tflite.forward import Forward
from coordinator.compiler.tflite.table import imports
from edge_sdk.tflitefile import Operator


@imports("RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR")
def _(f: Forward, op: Operator) -> None:
    x, y = op.inputs[0], op.outputs[0]
    f.share(x, y)
    is_linear = op.op == "RESIZE_BILINEAR"
    aligned, halves = op.options["align_corners"], op.options["half_pixel_centers"]
    coordinates = "align_corners" if aligned else "half_pixel" if halves else "asymmetric"
    nearest = "round_prefer_ceil" if aligned or halves else "floor"
    before, after = f.shape(x)[1:3], f.numbers(op.inputs[1], op)
    by_scale = all(a % b == 0 for a, b in zip(after, before, strict=True))
    scales = [1.0, 1.0, *(a / b for a, b in zip(after, before, strict=True))]
    where = (f.e.const(scales), None) if by_scale else (None, f.e.ints(*after))
    value = f.e.Resize(
        f.read(x, "first"),
        None,
        *where,
        mode="linear" if is_linear else "nearest",
        coordinate_transformation_mode=coordinates,
        nearest_mode=None if is_linear else nearest,
        axes=None if by_scale else [2, 3],
    )
    f.write(y, value, "first")
