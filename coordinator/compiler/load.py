# SPDX-License-Identifier: Apache-2.0
"""A forward model from a path, bytes or a ModelProto, refused by name where it cannot be trained.

What comes back is the model as it will predict on a device, same names and numbers, one spelling:
local functions inlined, Constant nodes as initializers, weights in ``raw_data``, int8 ones stored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from numpy.typing import NDArray
from onnx import numpy_helper

from coordinator.compiler.graph import IR_VERSION, OPSET_CEILING, converted, opset_of
from coordinator.compiler.qoperator import to_qdq
from coordinator.compiler.refuse import refuse_domains, refuse_operators
from coordinator.compiler.unroll import unrolled
from edge_sdk.errors import CompileError

OLDEST = 11
"""The oldest operator set that is read."""

_LAST_SOUND = 20


def load(model: str | Path | bytes | onnx.ModelProto) -> onnx.ModelProto:
    """Read a model and bring it to the form above; the argument is never changed.

    Raises: CompileError, naming what is not supported and what to do.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(model if isinstance(model, onnx.ModelProto) else _parse(model))
    if proto.functions:
        proto = onnx.inliner.inline_local_functions(proto)
    refuse_domains(proto)
    _refuse(proto)
    proto = _lowered(unrolled(_without_newest(proto)))
    _constants_to_initializers(proto.graph)
    proto = to_qdq(proto)
    refuse_operators(proto)
    _store_raw(proto.graph)
    _quantize_stored(proto.graph)
    _drop_initializer_inputs(proto.graph)
    del proto.metadata_props[:], proto.graph.value_info[:]
    proto.doc_string = proto.graph.doc_string = ""
    return proto


def for_training(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model at the operator set that its training graph is written in.

    From opset 21 on, onnxruntime's optimizer on x86 gives int8 pairs that it moves past a Transpose
    of the backward pass a dtype that no longer fits them, and the graph does not load: int8 models
    train at 20, the last before.
    """
    quantized = any(node.op_type == "QuantizeLinear" for node in proto.graph.node)
    if not quantized or opset_of(proto) <= _LAST_SOUND:
        return proto
    return converted(proto, _LAST_SOUND)


def _parse(model: str | Path | bytes) -> onnx.ModelProto:
    name = "these bytes"
    if not isinstance(model, bytes):
        path = Path(model)
        name = path.name
        try:
            model = path.read_bytes()
        except OSError as error:
            raise CompileError(
                f"expected a model at {path}: {error.strerror}; correct the path"
            ) from error
    try:
        proto = onnx.ModelProto.FromString(model)
    except Exception as error:  # protobuf's DecodeError, from a package without types
        raise CompileError(
            f"expected an ONNX model, {name} is not one, or is cut short: export it again"
        ) from error
    if not proto.graph.node:
        raise CompileError(
            f"expected an ONNX model, {name} holds a graph without nodes: export it again"
        )
    return proto


def _refuse(proto: onnx.ModelProto) -> None:
    """Raise for what no later step can put right."""
    version = opset_of(proto)
    if version < OLDEST:
        raise CompileError(
            f"expected opset {OLDEST} or newer, got {version}: export the model again, or bring it "
            "up (onnx.version_converter.convert_version)"
        )
    tensors = [*proto.graph.initializer, *(t for n in proto.graph.node for t in _tensors(n))]
    for tensor in tensors:
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            raise CompileError(
                f"expected weights inside the model file, {tensor.name!r} lies outside it: "
                "save the model as one file (onnx.save with save_as_external_data=False)"
            )
    if proto.graph.sparse_initializer:
        raise CompileError("expected dense weights, the model has sparse initializers")


def _tensors(node: onnx.NodeProto) -> list[onnx.TensorProto]:
    return [a.t for a in node.attribute if a.type == onnx.AttributeProto.TENSOR]


def _without_newest(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Spell out, as ONNX itself does, the operators that the newest supported set lacks."""
    if opset_of(proto) <= OPSET_CEILING:
        return proto
    present = {node.op_type for node in proto.graph.node if node.domain in {"", "ai.onnx"}}
    newest = sorted(op for op in present if _is_newest(op))
    if not newest:
        return proto
    typed = onnx.ModelProto()
    typed.CopyFrom(proto)
    known = {value.name for value in typed.graph.input}
    typed.graph.value_info.extend(  # the inliner asks for the types of stored tensors, too
        onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims)
        for t in typed.graph.initializer
        if t.name not in known
    )
    ids = [("", op) for op in newest]
    return onnx.inliner.inline_selected_functions(typed, ids, inline_schema_functions=True)


def _is_newest(op: str) -> bool:
    """Tell whether an operator came after the ceiling, and is defined by simpler ones."""
    if not onnx.defs.has(op):
        return False
    schema = onnx.defs.get_schema(op)
    spelled = schema.has_function or schema.has_context_dependent_function
    return spelled and not _is_known(op)


def _is_known(op: str) -> bool:
    try:
        onnx.defs.get_schema(op, OPSET_CEILING)
    except onnx.defs.SchemaError:
        return False
    return True


def _lowered(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Bring a model that is too new for the oldest supported onnxruntime down to what it runs."""
    if opset_of(proto) > OPSET_CEILING:
        proto = converted(proto, OPSET_CEILING)
    proto.ir_version = min(proto.ir_version, IR_VERSION)
    return proto


def _constants_to_initializers(graph: onnx.GraphProto) -> None:
    kept = []
    for node in graph.node:
        if node.op_type == "Constant" and node.domain in {"", "ai.onnx"}:
            graph.initializer.append(numpy_helper.from_array(_constant(node), node.output[0]))
        else:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)


def _constant(node: onnx.NodeProto) -> NDArray[Any]:
    attribute = node.attribute[0]
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, onnx.TensorProto):
        array: NDArray[Any] = numpy_helper.to_array(value)
        return array
    if attribute.name in {"value_int", "value_ints"}:
        return np.array(value, np.int64)
    if attribute.name in {"value_float", "value_floats"}:
        return np.array(value, np.float32)
    raise CompileError(
        f"expected numbers in Constant node {node.name!r}, it holds {attribute.name}"
    )


def _store_raw(graph: onnx.GraphProto) -> None:
    """Keep every weight in ``raw_data``, where its bytes have one place."""
    tensors = [
        t if t.HasField("raw_data") else numpy_helper.from_array(numpy_helper.to_array(t), t.name)
        for t in graph.initializer
    ]
    del graph.initializer[:]
    graph.initializer.extend(tensors)


def _quantize_stored(graph: onnx.GraphProto) -> None:
    """Store a float weight that enters a QuantizeLinear as the integers it always becomes."""
    stored = {t.name: t for t in graph.initializer}
    kept = []
    for node in graph.node:
        ready = node.op_type == "QuantizeLinear" and all(name in stored for name in node.input)
        if not ready or len(node.input) < 3:
            kept.append(node)
            continue
        x, scale, zero = (numpy_helper.to_array(stored[name]) for name in node.input)
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        tensor = numpy_helper.from_array(_quantized(x, scale, zero, axis), node.output[0])
        graph.initializer.append(tensor)
    del graph.node[:]
    graph.node.extend(kept)


def _quantized(x: NDArray[Any], scale: NDArray[Any], zero: NDArray[Any], axis: int) -> NDArray[Any]:
    if scale.size > 1:
        shape = [-1 if i == axis % x.ndim else 1 for i in range(x.ndim)]
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    ends = np.iinfo(zero.dtype)
    steps = np.rint(x / scale) + zero.astype(np.float32)
    stored: NDArray[Any] = np.clip(steps, ends.min, ends.max).astype(zero.dtype)
    return stored


def _drop_initializer_inputs(graph: onnx.GraphProto) -> None:
    """Old exports list weights as inputs, too: an input is what a caller feeds."""
    stored = {t.name for t in graph.initializer}
    inputs = [value for value in graph.input if value.name not in stored]
    del graph.input[:]
    graph.input.extend(inputs)
    used = {name for node in graph.node for name in node.input}
    kept = [t for t in graph.initializer if t.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
