# SPDX-License-Identifier: Apache-2.0
"""A bundle's evaluation graph in float64: finite differences so small that they miss the kinks.

ONNX's reference evaluator runs it; convolutions and poolings, slow there, are torch's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import torch
from forward_models import Tensor
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from edge_sdk.bundle import Bundle

_DOUBLE = TensorProto.DOUBLE


def _even(pads: Any) -> int | tuple[int, ...]:
    begin, end = tuple(pads or (0, 0, 0, 0))[:2], tuple(pads or (0, 0, 0, 0))[2:]
    assert begin == end, "torch pads both sides alike"
    return begin


class Conv(OpRun):  # type: ignore[misc]  # onnx has no types
    def _run(self, x: Tensor, w: Tensor, b: Tensor | None = None, **a: Any) -> tuple[Tensor]:
        made = torch.nn.functional.conv2d(
            torch.from_numpy(np.ascontiguousarray(x)),
            torch.from_numpy(np.ascontiguousarray(w)),
            None if b is None else torch.from_numpy(np.ascontiguousarray(b)),
            a["strides"] or 1,
            _even(a["pads"]),
            a["dilations"] or 1,
            a["group"],
        )
        return (made.numpy(),)


class MaxPool(OpRun):  # type: ignore[misc]  # onnx has no types
    def _run(self, x: Tensor, **a: Any) -> tuple[Tensor]:
        made = torch.nn.functional.max_pool2d(
            torch.from_numpy(np.ascontiguousarray(x)), a["kernel_shape"], a["strides"],
            _even(a["pads"]), a["dilations"] or 1,
        )  # fmt: skip
        return (made.numpy(),)


class InDouble:
    """Call it with parameters to get the loss on `x`, `y` as float64."""

    def __init__(self, bundle: Bundle, x: Tensor, y: Tensor) -> None:
        model = onnx.load_from_string(bundle.member("onnx/evaluate.onnx"))
        self.runs: Any = ReferenceEvaluator(doubled(model), new_ops=[Conv, MaxPool])
        self.feeds = {"x": _widened(x), "y": _widened(y)}

    def __call__(self, params: Mapping[str, Tensor]) -> float:
        given = {f"p.{i}": value for i, value in enumerate(params.values())}
        return float(self.runs.run(["loss"], self.feeds | given)[0])


def doubled(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with every float32 in it as float64."""
    graph = model.graph
    del graph.value_info[:]
    for tensor in graph.initializer:
        tensor.CopyFrom(
            numpy_helper.from_array(_widened(numpy_helper.to_array(tensor)), tensor.name)
        )
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = _DOUBLE
    for node in graph.node:
        for a in node.attribute:
            if node.op_type == "Cast" and a.name == "to" and a.i == TensorProto.FLOAT:
                a.i = _DOUBLE
            if a.type == onnx.AttributeProto.TENSOR:
                a.t.CopyFrom(numpy_helper.from_array(_widened(numpy_helper.to_array(a.t))))
    return model


def _widened(array: Tensor) -> Tensor:
    return array.astype(np.float64) if array.dtype == np.float32 else array
