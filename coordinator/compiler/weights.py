# SPDX-License-Identifier: Apache-2.0
"""What a model can learn: its weights and biases by name, grouped into layers in topological order.

A weight is a stored tensor that reaches a layer's weight or bias input, directly, through reshapes,
cut and joined (an LSTM's gates), or through DequantizeLinear. The last of these keeps its integers
in the model; here it is seen as the float32 values they stand for. Elementwise constants
(``x * gamma + beta``) count only after a first layer: before it they normalize the input.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from coordinator.compiler.graph import Graph, Node
from edge_sdk.errors import CompileError
from edge_sdk.types import Array

LAYERS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "BatchNormalization": ((1,), (2,)),
    "Conv": ((1,), (2,)),
    "ConvTranspose": ((1,), (2,)),
    "Einsum": ((0, 1), ()),
    "GRU": ((1, 2), (3,)),
    "Gather": ((0,), ()),
    "Gemm": ((0, 1), (2,)),
    "GroupNormalization": ((1,), (2,)),
    "InstanceNormalization": ((1,), (2,)),
    "LSTM": ((1, 2), (3,)),
    "LayerNormalization": ((1,), (2,)),
    "MatMul": ((0, 1), ()),
    "PRelu": ((1,), ()),
    "RNN": ((1, 2), (3,)),
}
"""Operators that hold weights: which inputs are weights, which are biases."""

_ELEMENTWISE = {"Add": "bias", "Sub": "bias", "Mul": "weight", "Div": "weight"}
_THROUGH = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
_JOINTS = frozenset({"Concat", "Slice", "Unsqueeze"})
_TRAINABLE = (np.dtype(np.int8), np.dtype(np.uint8), np.dtype(np.int32))


@dataclass(frozen=True)
class Quantized:
    """How a stored tensor's integers stand for real numbers: ``(q - zero_point) * scale``."""

    dtype: np.dtype[Any]
    scale: Array  # [] or [channels]
    zero_point: NDArray[np.int64]  # as scale
    axis: int | None  # of the stored tensor; None: one scale for all

    def spread(self, values: NDArray[Any], rank: int) -> NDArray[Any]:
        """Return per-channel values shaped so that they broadcast over a tensor of that rank."""
        if self.axis is None:
            return values.reshape(())
        return values.reshape([-1 if i == self.axis else 1 for i in range(rank)])


class Rows(NamedTuple):
    """Which output channels of a tensor learn: `at`, rising, of `of` along `axis`."""

    axis: int
    of: int
    at: tuple[int, ...]


@dataclass(frozen=True)
class Weight:
    """One trainable tensor.

    Attributes:
        name: what people call it; a quantizer's ``_quantized`` is dropped from the stored name.
        source: the stored tensor.
        tensors: what the layers read: the stored tensor, or its dequantized values.
        value: float32, what it stands for at the start.
        role: "weight" or "bias"; layer: its layer's place in topological order.
        reader: the layer's node.
        quantized: None for a float weight.
        rows: None where the whole tensor is trained; otherwise `value` and `quantized` are of these
            rows alone.
    """

    name: str
    source: str
    tensors: tuple[str, ...]
    value: Array
    role: str
    layer: int
    reader: Node
    quantized: Quantized | None = None
    rows: Rows | None = None

    @property
    def patch(self) -> dict[str, Any]:
        """Return what a manifest's patch says of the rows."""
        if self.rows is None:
            return {}
        return {"rows": {"axis": self.rows.axis, "of": self.rows.of, "at": list(self.rows.at)}}

    def narrowed(self, rows: Rows) -> Weight:
        """Return these rows of the weight.

        Requires: one scale for each row, where it is quantized.
        """
        scheme, at = self.quantized, list(rows.at)
        if scheme is not None:
            scheme = replace(scheme, scale=scheme.scale[at], zero_point=scheme.zero_point[at])
        value = np.ascontiguousarray(np.take(self.value, at, rows.axis))
        return replace(self, value=value, quantized=scheme, rows=rows)


def find_weights(graph: Graph) -> list[Weight]:
    """Return every weight in topological order, each once; a tied one at its first use."""
    found: dict[str, Weight] = {}
    layer_of: dict[str, int] = {}
    layers = 0
    for node in graph.nodes:
        here = max((layer_of[name] for name in node.inputs if name in layer_of), default=-1)
        new = [(r, s) for r, s in _stored_inputs(graph, node, here >= 0) if s not in found]
        if any(role == "weight" for role, _ in new):
            here, layers = layers, layers + 1
        for role, source in new:
            found[source] = _weight(graph, source, role, max(here, 0), node)
        if here >= 0:
            layer_of.update(dict.fromkeys(node.outputs, here))
    return _named(list(found.values()))


def any_weight(graph: Graph, name: str) -> Weight | None:
    """Return a float32 tensor of the model by its exact name, whatever reads it."""
    array = graph.initializers.get(name)
    if array is None or array.dtype != np.float32 or name not in graph.uses:
        return None
    return _weight(graph, name, "weight", 0, graph.uses[name][0])


def _stored_inputs(graph: Graph, node: Node, after_a_layer: bool) -> Iterator[tuple[str, str]]:
    """Yield (role, stored tensor) of a node's trainable inputs."""
    if node.kind in _ELEMENTWISE and after_a_layer:
        roles = [_ELEMENTWISE[node.kind]] * 2
        at = [0, 1]
    else:
        weights, biases = LAYERS.get(node.kind, ((), ()))
        roles = ["weight"] * len(weights) + ["bias"] * len(biases)
        at = [*weights, *biases]
    for role, index in zip(roles, at, strict=True):
        for source in _sources(graph, node.input(index)):
            if not (node.kind in _ELEMENTWISE and _is_scalar(graph, source)):
                yield role, source


def _is_scalar(graph: Graph, name: str) -> bool:
    return graph.initializers[name].size == 1


def _sources(graph: Graph, name: str) -> list[str]:
    """Return what a weight is stored as: one tensor, or parts that are cut and joined."""
    node = graph.producers.get(name)
    if node is None or node.kind not in _JOINTS:
        source = _source(graph, name)
        return [] if source is None else [source]
    parts = node.inputs if node.kind == "Concat" else node.inputs[:1]
    found = [_sources(graph, part) for part in parts]
    return list(dict.fromkeys(source for part in found for source in part)) if all(found) else []


def _source(graph: Graph, name: str) -> str | None:
    """Follow a tensor back to the float or quantized one that is stored, if one is."""
    while name not in graph.initializers:
        node = graph.producers.get(name)
        if node is None or node.kind not in _THROUGH | {"DequantizeLinear"}:
            return None
        name = node.inputs[0]
        if node.kind == "DequantizeLinear" and name not in graph.initializers:
            return None
    array = graph.initializers[name]
    if array.dtype == np.float32 or (array.dtype in _TRAINABLE and _readers(graph, name)):
        return name
    return None


def _readers(graph: Graph, name: str) -> list[Node]:
    return [node for node in graph.uses.get(name, ()) if node.kind == "DequantizeLinear"]


def _weight(graph: Graph, source: str, role: str, layer: int, reader: Node) -> Weight:
    stored = graph.initializers[source]
    if stored.dtype == np.float32:
        return Weight(source, source, (source,), stored, role, layer, reader)
    nodes = _readers(graph, source)
    if len(nodes) != len(graph.uses[source]):
        raise CompileError(
            f"expected only DequantizeLinear to read the integers of {source!r}, "
            f"{graph.uses[source][0].label} does, too: quantize in QDQ format"
        )
    scheme = _scheme(graph, nodes[0])
    if any(node.inputs[1:] != nodes[0].inputs[1:] for node in nodes):
        raise CompileError(f"expected one scale for {source!r}, its readers have several")
    steps = stored.astype(np.int64) - scheme.spread(scheme.zero_point, stored.ndim)
    value = steps.astype(np.float32) * scheme.spread(scheme.scale, stored.ndim)
    tensors = tuple(node.outputs[0] for node in nodes)
    name = source.removesuffix("_quantized")
    return Weight(name, source, tensors, value, role, layer, reader, scheme)


def _scheme(graph: Graph, node: Node) -> Quantized:
    """Read scale, zero point and axis of the DequantizeLinear that reads a stored tensor."""
    stored = graph.initializers[node.inputs[0]]
    scale = graph.initializers.get(node.inputs[1])
    if scale is None or scale.dtype != np.float32 or scale.ndim > 1 or node.attr("block_size"):
        raise CompileError(
            f"expected stored float32 scales, one or one per channel, for {node.label}: "
            "quantize per tensor or per channel"
        )
    zero = graph.initializers.get(node.input(2), np.zeros(1, np.int64)).astype(np.int64)
    axis = node.attr("axis", 1) % max(stored.ndim, 1) if scale.size > 1 else None
    zero = np.broadcast_to(zero.reshape(-1), (scale.size,))
    return Quantized(stored.dtype, scale.reshape(-1), zero, axis)


def _named(weights: list[Weight]) -> list[Weight]:
    """Keep short names unique: where two would meet, the stored names stay."""
    names = [weight.name for weight in weights]
    return [
        replace(weight, name=weight.source) if names.count(weight.name) > 1 else weight
        for weight in weights
    ]
