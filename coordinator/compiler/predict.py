# SPDX-License-Identifier: Apache-2.0
"""The model that predicts on a device, and the list of its bytes that training may change.

int8 stays int8. Every trained tensor gets a scale of its own, so that rewriting one never touches
another; the offsets recorded here let a device requantize without knowing ONNX.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from coordinator.compiler.graph import Graph, Node
from coordinator.compiler.ranges import ROLE
from coordinator.compiler.weights import Quantized, Weight, find_weights
from coordinator.compiler.wire import raw_data_places
from edge_sdk.errors import CompileError

_BIASED = frozenset({"Conv", "ConvTranspose", "Gemm"})


class _Bias(NamedTuple):
    """An int32 bias, its layer's input step by name and value, and the weight it follows."""

    weight: Weight
    input_name: str
    input_scale: float
    layer: Weight


def predict_model(
    proto: onnx.ModelProto, graph: Graph, weights: Sequence[Weight]
) -> tuple[bytes, list[dict[str, Any]]]:
    """Return the serialized predict graph and the manifest's patches.

    Args:
        proto: the loaded model, with a free batch.
        graph: the same, as a Graph.
        weights: the chosen ones, in the manifest's order.
    """
    own = onnx.ModelProto()
    own.CopyFrom(proto)
    index = {w.source: i for i, w in enumerate(weights)}
    biases = [
        b
        for b in biases_of(graph)
        if {b.weight.source, b.layer.source, b.input_name} & index.keys()
    ]
    quantized = [w for w in weights if w.quantized]
    changed = {w.source: w for w in (*quantized, *(b.weight for b in biases))}
    for weight in changed.values():
        _own_scale(own.graph, weight.source)
    data = own.SerializeToString(deterministic=True)
    places = raw_data_places(data)
    scales = {n.input[0]: n.input[1] for n in own.graph.node if n.op_type == "DequantizeLinear"}
    at = {name: place.offset for name, place in places.items()}
    patches = [patch_of(i, w, at, scales) for i, w in enumerate(weights) if not is_bias(w)]
    rows = {w.source: w.patch for w in weights}
    patches += [bias_patch(b, index, at, scales) | rows.get(b.weight.source, {}) for b in biases]
    followed = {b.weight.source for b in biases}
    lone = [(i, w) for i, w in enumerate(weights) if is_bias(w) and w.source not in followed]
    patches += [fixed_patch(i, w, at, scales) for i, w in lone]
    return data, patches


def is_bias(weight: Weight) -> bool:
    """Tell whether a weight is a bias in int32, whose scale others set."""
    return weight.quantized is not None and weight.quantized.dtype == np.int32


def patch_of(i: int, weight: Weight, at: dict[str, int], scales: dict[str, str]) -> dict[str, Any]:
    """Return the patch of a weight that is no such bias."""
    scheme = weight.quantized
    if scheme is None:
        kind = ROLE if weight.role == ROLE else "float32"
        return {"param": i, "kind": kind, "offset": at[weight.source], **weight.patch}
    points = [int(z) for z in scheme.zero_point]
    return {
        "param": i,
        "kind": "quantized",
        "dtype": str(scheme.dtype),
        "offset": at[weight.source],
        "scale_offset": at[scales[weight.source]],
        "scales": len(points) if weight.rows is None else weight.rows.of,
        "axis": scheme.axis,
        "zero_point": points[0] if len(set(points)) == 1 else points,
        **weight.patch,
    }


def bias_patch(
    bias: _Bias, index: dict[str, int], at: dict[str, int], scales: dict[str, str]
) -> dict[str, Any]:
    """Return the patch of a quantized layer's bias."""
    source = bias.weight.source
    scheme, weight = _scheme(bias.weight), _scheme(bias.layer)
    if len(scheme.scale) != len(weight.scale):
        raise CompileError(
            f"expected as many scales for bias {source!r} as for its weight, got "
            f"{len(scheme.scale)} and {len(weight.scale)}: quantize the model again"
        )
    patch: dict[str, Any] = {
        "param": index.get(source),
        "kind": "bias",
        "offset": at[source],
        "scale_offset": at[scales[source]],
        "scales": len(scheme.scale),
        "input_scale": bias.input_scale,
    }
    if bias.input_name in index:
        patch["input"] = index[bias.input_name]
    if source not in index:
        patch["shape"] = list(bias.weight.value.shape)
    if bias.layer.source in index:
        return {**patch, "weight": index[bias.layer.source]}
    return {**patch, "weight_scale": [float(s) for s in weight.scale]}


def fixed_patch(
    i: int, weight: Weight, at: dict[str, int], scales: dict[str, str]
) -> dict[str, Any]:
    """Patch an int32 tensor that no integer kernel reads: 32 bits are enough on its old scale."""
    scheme = _scheme(weight)
    return {
        "param": i,
        "kind": "bias",
        "offset": at[weight.source],
        "scale_offset": at[scales[weight.source]],
        "scales": len(scheme.scale),
        "input_scale": 1.0,
        "weight_scale": [float(s) for s in scheme.scale],
    }


def _scheme(weight: Weight) -> Quantized:
    if weight.quantized is None:
        raise CompileError(f"expected {weight.name!r} to be quantized, as its layer's bias is")
    return weight.quantized


def biases_of(graph: Graph) -> list[_Bias]:
    """Return the int32 biases of integer kernels; beside float inputs they keep their scale."""
    by_tensor = {name: w for w in find_weights(graph) for name in w.tensors}
    found = []
    for node in graph.nodes:
        if node.kind not in _BIASED:
            continue
        bias, layer = by_tensor.get(node.input(2)), by_tensor.get(node.inputs[1])
        name, scale = _scale_of(graph, node.inputs[0])
        if bias and is_bias(bias) and layer and layer.quantized and scale is not None:
            found.append(_Bias(bias, name, scale, layer))
    return found


def _scale_of(graph: Graph, name: str) -> tuple[str, float | None]:
    """Return the one scale of a dequantized tensor, by name and value."""
    node: Node | None = graph.producers.get(name)
    if node is None or node.kind != "DequantizeLinear":
        return "", None
    scale: NDArray[Any] | None = graph.initializers.get(node.inputs[1])
    is_one = scale is not None and scale.size == 1
    return node.inputs[1], float(scale.reshape(())) if scale is not None and is_one else None


def _own_scale(graph: onnx.GraphProto, source: str) -> None:
    """Give a stored tensor a scale that nothing else reads."""
    readers = [n for n in graph.node if source in n.input]
    name = readers[0].input[1]
    if all(n in readers for n in graph.node if name in n.input):
        return
    copy = graph.initializer.add()
    copy.CopyFrom(next(t for t in graph.initializer if t.name == name))
    copy.name = f"{source}.scale"
    for node in readers:
        node.input[1] = copy.name
