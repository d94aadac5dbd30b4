# SPDX-License-Identifier: Apache-2.0
"""The gradient of a task's loss by its weights, on examples to calibrate on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coordinator.compiler.graph import Graph, Value
from coordinator.compiler.losses import Loss
from coordinator.compiler.optim import sgd
from coordinator.compiler.runtime import session
from coordinator.compiler.train import Open, train_graph
from coordinator.compiler.weights import Weight
from edge_sdk.errors import CompileError
from edge_sdk.types import Params

_ROWS = 32

Examples = tuple[NDArray[Any], NDArray[Any]]
"""Inputs as the training graph takes them (float32 for an int8 model), and their targets."""


def gradients(
    opened: Open, loss: Loss, target: Value, weights: Sequence[Weight], examples: Examples
) -> Params:
    """Return the gradient of the mean loss over `examples`, by name of the weight.

    Args:
        opened: the forward graph with `weights` as inputs.
        loss: what is minimized.
        target: dtype and shape of its targets.
        weights: those of `opened`, at whose values the gradient is taken.
        examples: as many as there are.

    Raises: CompileError for examples that do not fit the model.
    """
    graph, _ = train_graph(opened, loss, sgd(lr=1.0), target=target, is_proximal=False)
    x, y = _checked(graph, examples)
    runs = session(graph.to_model().SerializeToString())
    start = {f"p.{i}": w.value for i, w in enumerate(weights)}
    feed = {**start, "lr": np.array(1, np.float32)}
    total = [np.zeros(w.value.shape, np.float64) for w in weights]
    names = [f"{name}.next" for name in start]
    for at in range(0, len(x), _ROWS):
        rows = slice(at, at + _ROWS)
        moved = runs.run(names, {**feed, "x": x[rows], "y": y[rows]})
        for i, (old, new) in enumerate(zip(start.values(), moved, strict=True)):
            total[i] += (old.astype(np.float64) - new) * (len(x[rows]) / len(x))
    return {w.name: g.astype(np.float32) for w, g in zip(weights, total, strict=True)}


def _checked(graph: Graph, examples: Examples) -> Examples:
    """Give examples the types of the graph's inputs; check their shapes."""
    found = []
    for value, given in zip(graph.inputs[:2], examples, strict=True):
        array = np.ascontiguousarray(given, value.dtype)
        shape = value.shape or ()
        same = array.ndim == len(shape) and array.shape[1:] == tuple(shape[1:])
        if not same or len(array) != len(examples[0]) or not len(array):
            raise CompileError(
                f"expected {value.name} of shape [rows, ...] {list(shape)} to calibrate on, as "
                f"many rows of x as of y, got {list(array.shape)}"
            )
        found.append(array)
    return found[0], found[1]
