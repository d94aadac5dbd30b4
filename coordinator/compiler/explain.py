# SPDX-License-Identifier: Apache-2.0
"""What a bundle costs: operators, the share that is trained, rough flops, bytes of an update."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from coordinator.compiler.body import bodies
from coordinator.compiler.graph import Graph, Node, Shape, nested
from coordinator.compiler.lifetimes import at_batch
from coordinator.compiler.weights import Weight

UPDATE_RATIO = 34
"""How many times smaller than float32 the default codec makes an update of a typical round."""

_FRAME_BYTES = 250  # prelude, header, signature
_FREE = frozenset(
    {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Shape", "Size", "Cast", "Transpose",
     "Slice", "Concat", "Split", "Gather", "Pad", "Expand"}
)  # fmt: skip


def cost(forward: Graph, train: Graph, weights: Sequence[Weight], total: int) -> dict[str, Any]:
    """Return the manifest's cost table; flops are those of one example, rough.

    Args:
        forward: the predict graph.
        train: the graph of a whole step.
        weights: the trained ones.
        total: how many numbers the model's weights hold together.
    """
    trainable = sum(w.value.size for w in weights)
    return {
        "params": total,
        "trainable": trainable,
        "trainable_share": round(trainable / max(total, 1), 6),
        "operators": operators(forward),
        "train_operators": operators(train),
        "flops_forward": flops(forward),
        "flops_step": flops(train),
        "bytes_dense": 4 * trainable,
        "bytes_update": _FRAME_BYTES + math.ceil(4 * trainable / UPDATE_RATIO),
    }


def operators(graph: Graph) -> dict[str, int]:
    """Count nodes by operator."""
    nodes = [node for part in (graph, *bodies(graph)) for node in part.nodes]
    return dict(sorted(Counter(node.kind for node in nodes).items()))


def flops(graph: Graph) -> int:
    """Estimate the floating-point operations of a graph for a batch of one.

    A multiply and an add count as two; an operator whose shapes are unknown counts as nothing.
    """
    sized = [at_batch(part, 1) for part in (graph, *bodies(graph))]
    return sum(_flops(part, node) for part in sized for node in part.nodes if not nested(node))


def _flops(graph: Graph, node: Node) -> int:
    size = _size(graph.shape(node.outputs[0]))
    if node.kind in {"Conv", "ConvTranspose"}:
        kernel = graph.shape(node.inputs[1]) or ()
        moved = size if node.kind == "Conv" else _size(graph.shape(node.inputs[0]))
        return 2 * moved * _size(kernel[1:])
    if node.kind in {"Gemm", "MatMul"}:
        left = graph.shape(node.inputs[0]) or (0,)
        inner = left[0 if node.attr("transA", 0) else -1] or 0
        return 2 * size * inner
    if node.kind in _FREE:
        return 0
    return max(size, *(_size(graph.shape(name)) for name in node.inputs if name), 0)


def _size(shape: Shape | None) -> int:
    if shape is None or None in shape:
        return 0
    return math.prod(d or 0 for d in shape)
