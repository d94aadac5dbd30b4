# SPDX-License-Identifier: Apache-2.0
"""Turns a graph of ONNX operators into a `.tflite` file of builtin ones; one file a family.

No operator of TensorFlow's own (Flex) is used, so that stock runtimes run the result:
ai-edge-litert and tflite-runtime 2.14. The batch is free: `resize_tensor_input` sets it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import coordinator.compiler.rewrites  # noqa: F401  fills the table
from coordinator.compiler.graph import Graph
from coordinator.compiler.passes import drop_unused, simplify
from coordinator.compiler.rewrite import REWRITES, rewritten
from coordinator.compiler.tflite.lower import (
    activations,
    conv,
    elementwise,
    filters,
    folded,
    index,
    linear,
    pool,
    quantized,
    reduce,
    shapes,
    spread,
)
from coordinator.compiler.tflite.lower.forms import Lowering
from coordinator.compiler.tflite.lower.table import LOWERS, refused

__all__ = [
    "LOWERS", "Kept", "activations", "conv", "elementwise", "filters", "folded", "index", "linear",
    "lower", "lower_traced", "pool", "quantized", "reduce", "shapes", "spread",
]  # fmt: skip


def lower(graph: Graph, signature: str = "serving_default") -> bytes:
    """Return the `.tflite` file of a graph.

    Args:
        graph: nodes in topological order; inputs of known types and shapes, the first dimension
            alone may be free.
        signature: what the file calls its one entry point.

    Ports keep their names, types and order of dimensions.

    Raises: CompileError naming the node that has no form in builtin operators, and the reason.
    """
    return lower_traced(graph, (), signature)[0]


class Kept(NamedTuple):
    """Where a file keeps what training changes: by its name in the graph, the tensor's name.

    `order` says how a weight was transposed; None: it is a scale, the tensor's own.
    """

    source: str
    tensor: str
    order: tuple[int, ...] | None


def lower_traced(
    graph: Graph, traced: Iterable[str], signature: str = "serving_default"
) -> tuple[bytes, list[Kept]]:
    """Return the file, and where in it each of the `traced` initializers is kept."""
    unknown = [n for n in graph.nodes if n.kind not in LOWERS and n.kind in REWRITES]
    if unknown:
        graph = rewritten(graph, [value.name for value in graph.inputs])
        graph = drop_unused(graph) if traced else simplify(graph)  # traced ones must stay stored
    low = Lowering(graph, traced)
    inputs = [low.feed(value) for value in graph.inputs]
    for node in graph.nodes:
        if id(node) in low.done or folded.fold(low, node):
            continue
        if node.kind not in LOWERS:
            raise refused(node, "has no lowering")
        LOWERS[node.kind](low, node)
    outputs = [low.deliver(value) for value in graph.outputs]
    data = low.tape.write(inputs, outputs, signature)
    names = low.tape.tensors
    found = [Kept(o.source, names[i].name, o.order) for i, o in low.tape.origins.items()]
    scaled = [(t.quantization, t.name) for t in names]
    found += [Kept(q.source, name, None) for q, name in scaled if q is not None and q.source]
    return data, found
