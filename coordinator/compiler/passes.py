# SPDX-License-Identifier: Apache-2.0
"""Graph to graph: drop what nothing needs, compute what is constant, merge what is the same.

Each pass says what it requires and what it ensures; `simplify` runs them in the order that suits
both graphs of a bundle. onnxruntime's own optimizer fuses operators later, on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from coordinator.compiler.graph import Graph, Node, Value
from coordinator.compiler.runtime import session

_FOLD_LIMIT = 1 << 16  # bytes: a larger result must not be larger than what it is made of
_NEVER_FOLDED = frozenset({"DequantizeLinear", "QuantizeLinear"})  # int8 stays int8
_RANDOM = frozenset(
    {"Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform",
     "RandomUniformLike"}
)  # fmt: skip

Pass = Callable[[Graph], Graph]


def drop_unused(graph: Graph) -> Graph:
    """Drop nodes and stored tensors that no output needs.

    Requires: nodes in topological order. Ensures: each node leads to an output; inputs stay.
    """
    needed = {value.name for value in graph.outputs}
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        if needed.intersection(node.outputs):
            kept.append(node)
            needed.update(node.inputs)
    stored = {name: array for name, array in graph.initializers.items() if name in needed}
    return replace(graph, nodes=tuple(reversed(kept)), initializers=stored)


def drop_identities(graph: Graph) -> Graph:
    """Let readers of an Identity, of a Reshape that changes nothing and their like read past it.

    Requires: nodes in topological order. Ensures: such nodes only make outputs of the graph.
    """
    outputs = {value.name for value in graph.outputs}
    alias: dict[str, str] = {}
    kept = []
    for old in graph.nodes:
        node = _reading(old, alias)
        if is_identity(graph, node) and node.outputs[0] not in outputs:
            alias[node.outputs[0]] = node.inputs[0]
        else:
            kept.append(node)
    return replace(graph, nodes=tuple(kept))


def is_identity(graph: Graph, node: Node) -> bool:
    """Tell whether a node's output is its input: by name, by shape, or for want of training."""
    if node.kind == "Identity":
        return True
    if node.kind in {"Flatten", "Reshape"}:
        before, after = (graph.shape(name) for name in (node.inputs[0], node.outputs[0]))
        return before is not None and before == after and before.count(None) <= 1
    training = graph.initializers.get(node.input(2)) if node.input(2) else np.False_
    one_output = not any(graph.uses.get(name) for name in node.outputs[1:])
    return node.kind == "Dropout" and training is not None and not training and one_output


def merge_equal(graph: Graph) -> Graph:
    """Compute once what several nodes compute, store once what is stored several times.

    A node that makes fewer outputs than its twin is widened: MaxPool, and MaxPool with indices.

    Requires: nodes in topological order. Ensures: no two nodes share operator, inputs and
    attributes, but for random ones and those that make outputs of the graph.
    """
    outputs = {value.name for value in graph.outputs}
    alias, stored = _merge_stored(graph.initializers, outputs)
    seen: dict[Any, int] = {}
    kept: list[Node] = []
    for old in graph.nodes:
        node = _reading(old, alias)
        key = (node.kind, node.inputs, _attributes(node))
        if node.kind in _RANDOM or outputs.intersection(node.outputs):
            kept.append(node)
        elif key in seen:
            first = kept[seen[key]]
            wide = (*first.outputs, *node.outputs[len(first.outputs) :])
            kept[seen[key]] = replace(first, outputs=wide)
            alias.update((a, b) for a, b in zip(node.outputs, wide, strict=False) if a and b)
        else:
            seen[key] = len(kept)
            kept.append(node)
    return replace(graph, nodes=tuple(kept), initializers=stored)


def fold_constants(graph: Graph) -> Graph:
    """Compute every node whose inputs are stored, and Shape and Size of static shapes.

    Requires: nodes in topological order; tensors that are trained are inputs, not stored. Ensures:
    no such node is left, but random ones, quantization, and results much larger than their inputs.
    """
    stored = dict(graph.initializers)
    ready = set(stored)
    folded: list[Node] = []
    kept: list[Node] = []
    for node in graph.nodes:
        static = _static_shape(graph, node)
        if static is not None:
            stored[node.outputs[0]] = static
            ready.add(node.outputs[0])
        elif _is_foldable(node) and all(name in ready for name in node.inputs if name):
            folded.append(node)
            ready.update(node.outputs)
        else:
            kept.append(node)
    if not folded:
        return replace(graph, nodes=tuple(kept), initializers=stored)
    results = _compute(graph, folded, stored)
    spare = _too_large(folded, stored, results)
    for node in folded:
        if id(node) not in spare:
            stored.update((name, results[name]) for name in node.outputs if name)
    left = spare | {id(node) for node in kept}
    nodes = tuple(node for node in graph.nodes if id(node) in left)
    return replace(graph, nodes=nodes, initializers=stored)


def simplify(graph: Graph) -> Graph:
    """Run every pass: unused, identities, constants, equal nodes, unused again."""
    passes: tuple[Pass, ...] = (
        drop_unused, drop_identities, fold_constants, merge_equal, drop_unused,
    )  # fmt: skip
    for run in passes:
        graph = run(graph)
    return graph


def rename(graph: Graph, names: Mapping[str, str]) -> Graph:
    """Give tensors new names, everywhere.

    Requires: new names that the graph does not have. Ensures: the same graph otherwise.
    """

    def new(name: str) -> str:
        return names.get(name, name)

    def value(old: Value) -> Value:
        return replace(old, name=new(old.name))

    nodes = tuple(
        replace(n, inputs=tuple(map(new, n.inputs)), outputs=tuple(map(new, n.outputs)))
        for n in graph.nodes
    )
    return replace(
        graph,
        nodes=nodes,
        initializers={new(k): v for k, v in graph.initializers.items()},
        inputs=tuple(map(value, graph.inputs)),
        outputs=tuple(map(value, graph.outputs)),
        values={new(k): value(v) for k, v in graph.values.items()},
    )


def _reading(node: Node, alias: Mapping[str, str]) -> Node:
    if not alias.keys() & set(node.inputs):
        return node
    return replace(node, inputs=tuple(alias.get(name, name) for name in node.inputs))


def _merge_stored(
    tensors: Mapping[str, Any], outputs: set[str]
) -> tuple[dict[str, str], dict[str, Any]]:
    alias: dict[str, str] = {}
    first: dict[Any, str] = {}
    kept = {}
    for name, array in tensors.items():
        key = (array.dtype.str, array.shape, array.tobytes())
        if key in first and name not in outputs:
            alias[name] = first[key]
        else:
            first.setdefault(key, name)
            kept[name] = array
    return alias, kept


def _attributes(node: Node) -> tuple[Any, ...]:
    return tuple(
        (k, (v.dtype.str, v.shape, v.tobytes()) if isinstance(v, np.ndarray) else repr(v))
        for k, v in sorted(node.attributes.items())
    )


def _static_shape(graph: Graph, node: Node) -> Any:
    """Return the value of a Shape or Size node whose input's shape is known."""
    shape = graph.shape(node.inputs[0]) if node.kind in {"Shape", "Size"} else None
    if shape is None:
        return None
    if node.kind == "Shape":
        shape = shape[node.attr("start", 0) : node.attr("end", len(shape))]
    if None in shape:
        return None
    sizes = np.array(shape, np.int64)
    return sizes if node.kind == "Shape" else np.asarray(np.prod(sizes), np.int64)


def _is_foldable(node: Node) -> bool:
    return node.kind not in _NEVER_FOLDED | _RANDOM and bool(node.outputs)


def _compute(graph: Graph, nodes: list[Node], stored: Mapping[str, Any]) -> dict[str, Any]:
    """Run the constant part of a graph once."""
    names = [name for node in nodes for name in node.outputs if name]
    used = {name for node in nodes for name in node.inputs}
    part = replace(
        graph,
        nodes=tuple(nodes),
        inputs=(),
        outputs=tuple(graph.values.get(name, Value(name)) for name in names),
        initializers={name: array for name, array in stored.items() if name in used},
    )
    runs = session(part.to_model().SerializeToString(), optimize=False)
    return dict(zip(names, runs.run(names, {}), strict=True))


def _too_large(
    nodes: list[Node], stored: Mapping[str, Any], results: Mapping[str, Any]
) -> set[int]:
    """Return the ids of nodes with results too large to store, and of their readers."""
    known = {**stored, **results}
    spare: set[int] = set()
    unstored: set[str] = set()
    for node in nodes:
        made = sum(results[name].nbytes for name in node.outputs if name)
        read = sum(known[name].nbytes for name in node.inputs if name)
        is_large = made > _FOLD_LIMIT and made > 2 * read
        if is_large or unstored.intersection(node.inputs):
            spare.add(id(node))
            unstored.update(node.outputs)
    return spare
