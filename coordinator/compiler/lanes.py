# SPDX-License-Identifier: Apache-2.0
"""Frozen integer convolutions in whole lanes of channels: the same numbers, and zeros beside them.

onnxruntime's integer kernels compute 16 channels at a time, and windows of 3 channels are copied
byte by byte. At 4 x 96 x 96 (x86-64, one thread) a layer from 3 to 8 channels took 0.16 ms and the
depthwise one after it 0.13, from 4 to 16 channels and 16 wide they take 0.09 each. Images keep
their values: what is added is read with weights of zero alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from coordinator.compiler.graph import Graph, Node, Tensor

LANE = 16
"""Channels of an image in between."""
PIXEL = 4
"""Channels of an image that comes in with three."""

_BY_ELEMENT = frozenset({"Clip", "DequantizeLinear", "QuantizeLinear", "Relu"})


class _Layer(NamedTuple):
    """A convolution of integers, and what opens its stored weights [filters, channels, ..]."""

    conv: Node
    weight: Node
    bias: Node | None
    filters: int
    channels: int

    @property
    def is_depthwise(self) -> bool:
        group: int = self.conv.attr("group", 1)
        return group == self.filters > 1 and self.channels == 1


class _Room(NamedTuple):
    """What a layer gets: filters and channels that it did not have."""

    filters: int = 0
    channels: int = 0


def in_whole_lanes(graph: Graph) -> Graph:
    """Widen images of few channels between frozen integer convolutions, and those that come in.

    Requires: shapes inferred, integers between QuantizeLinear and DequantizeLinear. Ensures: the
    same outputs.
    """
    layers = dict(_layers(graph))
    rooms: dict[str, _Room] = {}
    for layer in layers.values():
        if layer.conv.attr("group", 1) == 1 and LANE // 2 <= layer.filters < LANE:
            for name, room in (_widened(graph, layers, layer) or {}).items():
                old = rooms.get(name, _Room())
                rooms[name] = _Room(old.filters + room.filters, old.channels + room.channels)
    padded = dict(_narrow(graph, layers))
    for name in {conv for convs in padded.values() for conv in convs}:
        rooms[name] = rooms.get(name, _Room())._replace(channels=PIXEL - layers[name].channels)
    return _rewritten(graph, layers, rooms, padded) if rooms else graph


def _layers(graph: Graph) -> Iterator[tuple[str, _Layer]]:
    """Yield the frozen integer convolutions by their output."""
    for node in graph.nodes:
        if node.kind != "Conv":
            continue
        source, weight = (graph.producers.get(name) for name in node.inputs[:2])
        bias = graph.producers.get(node.input(2))
        if source is None or source.kind != "DequantizeLinear" or not _is_stored(graph, weight):
            continue
        if weight is None or (node.input(2) and not _is_stored(graph, bias)):
            continue
        shape = graph.initializers[weight.inputs[0]].shape
        yield node.outputs[0], _Layer(node, weight, bias, shape[0], shape[1])


def _is_stored(graph: Graph, node: Node | None) -> bool:
    """Tell whether a node opens stored integers, by one scale or one for each filter."""
    if node is None or node.kind != "DequantizeLinear":
        return False
    if not all(name in graph.initializers for name in node.inputs if name):
        return False
    stored, scale = (graph.initializers[name] for name in node.inputs[:2])
    return scale.size == 1 or (node.attr("axis", 1) % stored.ndim == 0 and scale.ndim == 1)


def _widened(graph: Graph, layers: Mapping[str, _Layer], first: _Layer) -> dict[str, _Room] | None:
    """Return the room of each layer if `first` makes a whole lane; None where somebody minds.

    Windows over all channels do: the zeros would cost them more than they save.
    """
    extra = LANE - first.filters
    rooms = {first.conv.outputs[0]: _Room(filters=extra)}
    names = [first.conv.outputs[0]]
    while names:
        name = names.pop()
        if any(name == value.name for value in graph.outputs):
            return None
        for node in graph.uses.get(name, ()):
            layer = layers.get(node.outputs[0])
            if node.kind in _BY_ELEMENT and _is_even(graph, node):
                names.append(node.outputs[0])
            elif layer is None or node.inputs[0] != name:
                return None
            elif layer.is_depthwise:
                rooms[node.outputs[0]] = _Room(filters=extra)
                names.append(node.outputs[0])
            elif node.attr("group", 1) == 1 and not _looks(graph, layer):
                rooms[node.outputs[0]] = _Room(channels=extra)
            else:
                return None
    return rooms


def _is_even(graph: Graph, node: Node) -> bool:
    """Tell whether an operator does the same to every channel."""
    others = [graph.initializers.get(name) for name in node.inputs[1:] if name]
    return all(number is not None and number.size == 1 for number in others)


def _narrow(graph: Graph, layers: Mapping[str, _Layer]) -> Iterator[tuple[str, list[str]]]:
    """Yield quantized images of three channels that windows look at, with the layers that do."""
    for node in graph.nodes:
        if node.kind != "QuantizeLinear" or not _is_even(graph, node) or not node.input(2):
            continue
        shape = graph.shape(node.outputs[0]) or ()
        if len(shape) < 3 or shape[1] != PIXEL - 1:
            continue
        opened = graph.uses.get(node.outputs[0], ())
        readers = [n for o in opened for n in graph.uses.get(o.outputs[0], ())]
        found = [layers.get(n.outputs[0]) for n in readers]
        is_read = readers and all(o.kind == "DequantizeLinear" for o in opened)
        if is_read and all(layer is not None and _looks(graph, layer) for layer in found):
            yield node.outputs[0], [n.outputs[0] for n in readers]


def _looks(graph: Graph, layer: _Layer) -> bool:
    """Tell whether a layer sees several places of all channels at once."""
    taps = np.prod(graph.initializers[layer.weight.inputs[0]].shape[2:])
    return layer.conv.attr("group", 1) == 1 and bool(taps > 1)


def _rewritten(
    graph: Graph,
    layers: Mapping[str, _Layer],
    rooms: Mapping[str, _Room],
    padded: Mapping[str, list[str]],
) -> Graph:
    stored: dict[str, Tensor] = dict(graph.initializers)
    alias: dict[str, str] = {}
    nodes: list[Node] = []
    for old in graph.nodes:
        node = replace(old, inputs=tuple(alias.get(name, name) for name in old.inputs))
        out = node.outputs[0]
        if out in rooms:
            nodes += _roomy(layers[out], node, rooms[out], stored)
        else:
            nodes.append(node)
        if out in padded:
            alias[out] = f"g.lane.{out}"
            nodes.append(_pixels(graph, node, alias[out], stored))
    return replace(graph, nodes=tuple(nodes), initializers=stored).inferred()


def _pixels(graph: Graph, node: Node, out: str, stored: dict[str, Tensor]) -> Node:
    """Return what adds channels of quantized zeros to an image."""
    rank = len(graph.shape(node.outputs[0]) or ())
    pads = np.zeros(2 * rank, np.int64)
    pads[rank + 1] = 1
    stored[f"{out}.pads"] = pads
    stored[f"{out}.zero"] = stored[node.inputs[2]].reshape(())
    return Node("Pad", (node.outputs[0], f"{out}.pads", f"{out}.zero"), (out,))


def _roomy(layer: _Layer, node: Node, room: _Room, stored: dict[str, Tensor]) -> list[Node]:
    """Return a layer with more filters or channels, all of whose new weights are zero."""
    made = [_opened(layer.weight, f"g.lane.{node.outputs[0]}.w", room, stored)]
    if layer.bias is not None:
        bias = _opened(layer.bias, f"g.lane.{node.outputs[0]}.b", _Room(room.filters), stored)
        made.append(bias)
    attributes: dict[str, Any] = dict(node.attributes)
    if layer.is_depthwise:
        attributes["group"] = layer.filters + room.filters
    inputs = (node.inputs[0], *(n.outputs[0] for n in made))
    return [*made, replace(node, inputs=inputs, attributes=attributes)]


def _opened(node: Node, name: str, room: _Room, stored: dict[str, Tensor]) -> Node:
    """Return a DequantizeLinear of the same integers and zeros after them."""
    values, scale, *zero = (stored[n] for n in node.inputs if n)
    point = zero[0] if zero else np.zeros(scale.shape, values.dtype)
    each = np.broadcast_to(point.reshape(-1), (values.shape[0],))
    if room.channels:
        shape = (values.shape[0], room.channels, *values.shape[2:])
        blank = np.broadcast_to(each.reshape(-1, *[1] * (values.ndim - 1)), shape)
        values = np.concatenate([values, blank], axis=1)
    if room.filters:
        blank = np.full((room.filters, *values.shape[1:]), each[-1], values.dtype)
        values = np.concatenate([values, blank])
    parts = [values, _longer(scale, room.filters), *(_longer(z, room.filters) for z in zero)]
    names = [f"{name}.{i}" for i in range(len(parts))]
    stored.update(zip(names, parts, strict=True))
    return replace(node, inputs=tuple(names), outputs=(name,), name="")


def _longer(vector: NDArray[Any], more: int) -> NDArray[Any]:
    """Repeat the last of as many numbers as there are filters; one number for all stays."""
    if vector.size == 1 or not more:
        return vector
    return np.concatenate([vector, np.full(more, vector[-1], vector.dtype)])
