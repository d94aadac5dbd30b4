# SPDX-License-Identifier: Apache-2.0
"""Turns a graph of ONNX operators into a `.tflite` file of builtin ones; one file a family.

No operator of TensorFlow's own (Flex) is used, so that stock runtimes run the result: ai-edge-litert
and tflite-runtime 2.14. The batch is free: `resize_tensor_input` sets it.
"""

from __future__ import annotations

from coordinator.compiler.graph import Graph
from coordinator.compiler.tflite.lower import (
    activations,
    conv,
    elementwise,
    folded,
    index,
    linear,
    pool,
    quantized,
    reduce,
    shapes,
)
from coordinator.compiler.tflite.lower.forms import Lowering
from coordinator.compiler.tflite.lower.table import LOWERS, refused

__all__ = [
    "LOWERS", "activations", "conv", "elementwise", "folded", "index", "linear", "lower", "pool",
    "quantized", "reduce", "shapes",
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
    low = Lowering(graph)
    inputs = [low.feed(value) for value in graph.inputs]
    for node in graph.nodes:
        if id(node) in low.done or folded.fold(low, node):
            continue
        if node.kind not in LOWERS:
            raise refused(node, "has no lowering")
        LOWERS[node.kind](low, node)
    outputs = [low.deliver(value) for value in graph.outputs]
    return low.tape.write(inputs, outputs, signature)
