# SPDX-License-Identifier: Apache-2.0
"""Shapes that an export spelled out for one batch size, rewritten for any.

Exports of a fixed batch hold it in the targets of Reshape nodes, wherever the batch stands by then,
alone or multiplied into another dimension (the heads of an attention), and in the zeros that an
LSTM starts from. Which dimension carries the batch is found by inferring shapes for a second batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper, shape_inference

from coordinator.compiler.graph import from_type
from coordinator.compiler.runtime import session
from edge_sdk.errors import CompileError

ADVICE = "export it with a dynamic batch dimension (dynamic_axes or dynamic_shapes in torch)"
_FACTOR = 101  # a prime that no layer's width has
_LARGE = 1024  # bytes: a stored tensor above is no shape
_STATES = {"LSTM": (5, 6), "GRU": (5,), "RNN": (5,)}
_COPIES = frozenset({"Expand", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})

_Known = dict[str, tuple[int | None, ...] | None]


def free_shapes(proto: onnx.ModelProto, batch: int, kept: frozenset[str] = frozenset()) -> None:
    """Rewrite, in place, what holds on to the batch size that the model was exported for.

    Nodes that make a tensor of `kept` already hold for any batch.

    Requires: one input whose first dimension is `batch`, nodes in topological order.
    Raises: CompileError naming a Reshape that mixes the batch with what else it holds.
    """
    _drop_zero_states(proto.graph)
    model = _skeleton(proto)
    before = _shapes(model)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = batch * _FACTOR
    _forget_output(model.graph)
    todo, inner = _spelled_out(model.graph, kept), dict[str, int]()
    is_moving = bool(todo)
    while is_moving:
        after, is_moving = _shapes(model), False
        for at, node in enumerate(model.graph.node):
            axes = {name: _batch_axes(before, after, name) for name in node.input}
            carriers = [name for name in node.input if axes[name]]
            if not carriers or node.output[0] in inner:
                continue
            is_moving, ahead = True, inner.get(carriers[0], 1)
            if at in todo:
                target, ahead = _freed(node, before, axes[node.input[0]], ahead, batch)
                _aim(model.graph, node, target)
                _aim(proto.graph, proto.graph.node[at], target)
            inner.update(dict.fromkeys(node.output, ahead))


def _drop_zero_states(graph: onnx.GraphProto) -> None:
    """Let recurrent nodes start from their default, zeros, where they are given zeros."""
    zeros = {t.name for t in graph.initializer if not numpy_helper.to_array(t).any()}
    found = False
    for node in graph.node:
        if node.op_type in _COPIES and node.input[0] in zeros:
            zeros.update(node.output)
        for at in _STATES.get(node.op_type, ()):
            if at < len(node.input) and node.input[at] in zeros:
                node.input[at], found = "", True
    if found:
        _drop_unused(graph)


def _drop_unused(graph: onnx.GraphProto) -> None:
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))


def _skeleton(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return the same nodes, with weights as inputs and shape arithmetic computed."""
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    graph = model.graph
    kept = [t for t in graph.initializer if len(t.raw_data) <= _LARGE]
    for tensor in graph.initializer:
        if len(tensor.raw_data) > _LARGE:
            graph.input.append(
                helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    del graph.initializer[:], graph.value_info[:]
    graph.initializer.extend(kept)
    graph.initializer.extend(_computed(model))
    return model


def _computed(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Compute what depends on stored numbers alone."""
    ready = {t.name for t in model.graph.initializer}
    nodes, names = [], []
    for node in model.graph.node:
        if node.input and ready.issuperset(name for name in node.input if name):
            nodes.append(node)
            names += [name for name in node.output if name]
            ready.update(names)
    if not nodes:
        return []
    part = onnx.ModelProto()
    part.CopyFrom(model)
    del part.graph.node[:], part.graph.input[:], part.graph.output[:]
    part.graph.node.extend(nodes)
    part.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    values = session(part.SerializeToString(), optimize=False).run(names, {})
    return [numpy_helper.from_array(v, n) for n, v in zip(names, values, strict=True)]


def _forget_output(graph: onnx.GraphProto) -> None:
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")


def _shapes(model: onnx.ModelProto) -> _Known:
    """Return every shape that inference finds."""
    try:
        model = shape_inference.infer_shapes(model, data_prop=True)
    except shape_inference.InferenceError:  # a shape we cannot learn is a shape we do not know
        model = shape_inference.infer_shapes(model)
    graph = model.graph
    values = (*graph.input, *graph.output, *graph.value_info)
    return {value.name: from_type(value.name, value.type).shape for value in values}


def _spelled_out(graph: onnx.GraphProto, kept: frozenset[str]) -> list[int]:
    """Return the places of the Reshape nodes whose targets are stored or computed from such."""
    stored = {t.name for t in graph.initializer}
    return [
        at
        for at, node in enumerate(graph.node)
        if node.op_type == "Reshape"
        and node.input[1] in stored
        and node.input[0] not in stored
        and node.output[0] not in kept
    ]


def _batch_axes(before: _Known, after: _Known, name: str) -> list[int]:
    """Return the dimensions of a tensor that grow with the batch."""
    a, b = before.get(name), after.get(name)
    if a is None or b is None or len(a) != len(b):
        return []
    return [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x and y == x * _FACTOR]


def _freed(
    node: onnx.NodeProto, before: _Known, axes: list[int], ahead: int, batch: int
) -> tuple[list[int], int]:
    """Return a Reshape's target for any batch: -1 where the batch is, all else as it was.

    `axes` are the dimensions of the source that hold the batch: there must be one. `ahead` is the
    factor that stands before the batch in it; the same for the target is returned second.
    """
    source, target = before[node.input[0]], before.get(node.output[0])
    if source and target and len(axes) == 1 and None not in (*source, *target):
        first = _count(source[: axes[0]]) * ahead
        for at in _places(target, first, batch):
            factor = first // _count(target[:at])
            return [-1 if i == at else int(d or 0) for i, d in enumerate(target)], factor
    raise CompileError(
        f"expected a Reshape that keeps the batch, node {node.name or node.output[0]!r} makes "
        f"the fixed shape {list(target or ())} of {list(source or ())}: {ADVICE}"
    )


def _places(target: Sequence[int | None], first: int, batch: int) -> list[int]:
    """Return the dimensions that can hold the batch after `first` others, the likeliest first.

    That is one of the batch's own size, then one that begins with it (heads), then one that ends
    with it (rows); the last dimension, the features, comes last.
    """
    found = []
    for at, size in enumerate(target):
        factor, rest = divmod(first, _count(target[:at]))
        if factor and not rest and (size or 0) % (factor * batch) == 0:
            is_last = at == len(target) - 1
            found.append((size != batch, is_last, factor, at))
    return [at for *_, at in sorted(found)]


def _count(dims: Sequence[int | None]) -> int:
    return prod(d or 0 for d in dims)


def _aim(graph: Any, node: onnx.NodeProto, target: list[int]) -> None:
    name = f"{node.output[0]}.free"
    graph.initializer.append(numpy_helper.from_array(np.array(target, np.int64), name))
    node.input[1] = name
