# SPDX-License-Identifier: Apache-2.0
"""What no device runs, whatever is trained: refused by the node's name, with the reason.

Which operators a device runs is its own table (`edge_sdk.operators`); here is why others are not
among them, and what else makes a model unfit to learn: training mode, another float than float32.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto, numpy_helper

from edge_sdk.errors import CompileError
from edge_sdk.operators import ALLOWED

_ML = "ai.onnx.ml"
_EVAL = "export the model for inference (model.eval() in torch)"
_FLOATS = frozenset({TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE})
_SPELLED = frozenset({"If", "Loop", "Scan"})
_REASONS = (
    (("String", "Regex", "TfIdf"), "it works on strings: do that before the model"),
    (("Sequence", "Optional"), "its values are not tensors: export without lists and optionals"),
    (("Random", "Bernoulli", "Multinomial"), f"it draws random numbers: {_EVAL}"),
    (("Image",), "it reads encoded images: decode them before the model"),
)


def refuse_domains(proto: onnx.ModelProto) -> None:
    """Raise CompileError for the first node of a domain that no device knows."""
    for node in proto.graph.node:
        if node.domain == _ML:
            raise _refusal(node, "trees and other classical models have no gradient: use a network")
        if node.domain not in ALLOWED:
            raise _refusal(node, f"export with ONNX's own operators instead of {node.domain}'s")


def refuse_operators(proto: onnx.ModelProto) -> None:
    """Raise CompileError for the first node, input or output that a device would not run.

    Requires: Constant nodes as initializers.
    """
    refuse_domains(proto)
    _refuse_floats(proto.graph)
    flags = {t.name for t in proto.graph.initializer if t.data_type == TensorProto.BOOL}
    stored = {t.name: t for t in proto.graph.initializer if t.name in flags}
    for node in proto.graph.node:
        if node.op_type not in ALLOWED[node.domain] and node.op_type not in _SPELLED:
            raise _refusal(node, _reason(node))
        mode = stored.get(node.input[2]) if len(node.input) > 2 else None
        is_dropping = mode is not None and bool(numpy_helper.to_array(mode).any())
        if _normalizes_batches(node) or (node.op_type == "Dropout" and is_dropping):
            raise CompileError(
                f"expected a model for inference, {_label(node)} is in training mode: {_EVAL}"
            )


def _refuse_floats(graph: onnx.GraphProto) -> None:
    for value in (*graph.input, *graph.output):
        kind = value.type.tensor_type.elem_type
        if kind in _FLOATS:
            raise CompileError(
                f"expected float32 or int8 tensors, {value.name!r} is "
                f"{TensorProto.DataType.Name(kind).lower()}: export the model in float32"
            )


def _normalizes_batches(node: onnx.NodeProto) -> bool:
    """Tell whether a BatchNormalization uses the batch's statistics; before opset 14 by outputs."""
    mode = next((a.i for a in node.attribute if a.name == "training_mode"), 0)
    return node.op_type == "BatchNormalization" and bool(mode or any(node.output[1:]))


def _reason(node: onnx.NodeProto) -> str:
    for words, reason in _REASONS:
        if any(word in node.op_type for word in words):
            return reason
    if node.domain:
        return "onnxruntime's optimizer made it: start from the model as it was exported"
    return "export the model with other operators"


def _label(node: onnx.NodeProto) -> str:
    kind = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    return f"{kind} node {node.name or node.output[0]!r}"


def _refusal(node: onnx.NodeProto, reason: str) -> CompileError:
    return CompileError(f"expected operators that a device runs, {_label(node)} is none: {reason}")
