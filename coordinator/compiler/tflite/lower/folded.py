# SPDX-License-Identifier: Apache-2.0
"""Arithmetic on shapes, done while lowering: sizes that depend on the batch are numbers, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coordinator.compiler.graph import Node
from coordinator.compiler.tflite.lower.forms import Lowering
from edge_sdk.errors import CompileError

_LARGEST = 64  # elements of what is taken for a shape
_TYPES = {1: "float32", 6: "int32", 7: "int64", 11: "float64"}

Array = NDArray[Any]


def _slice(_: Node, x: Array, starts: Array, ends: Array, *rest: Array) -> Array:
    axes = rest[0] if rest else np.arange(starts.size)
    steps = rest[1] if len(rest) > 1 else np.ones(starts.size, np.int64)
    cut = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        cut[int(axis)] = slice(int(start), int(end), int(step))
    return x[tuple(cut)]


def _whole(a: Array, b: Array) -> Array:
    if (a % np.where(b == 0, 1, b)).any() or (b == 0).any():
        raise CompileError(f"expected sizes that divide, got {a.tolist()} by {b.tolist()}")
    return a // b


def _cast(_: Node, x: Array) -> Array:
    return x


_FOLDS: dict[str, Callable[..., Array]] = {
    "Gather": lambda n, x, i: np.take(x, i.astype(np.int64), n.attr("axis", 0)),
    "Slice": _slice,
    "Concat": lambda n, *xs: np.concatenate(xs, n.attr("axis")),
    "Unsqueeze": lambda _, x, axes: np.expand_dims(x, tuple(int(a) for a in axes.reshape(-1))),
    "Squeeze": lambda _, x, *axes: np.squeeze(x, tuple(int(a) for a in axes[0]) if axes else None),
    "Reshape": lambda _, x, shape: x.reshape([int(d) for d in shape]),
    "Add": lambda _, a, b: a + b,
    "Sub": lambda _, a, b: a - b,
    "Mul": lambda _, a, b: a * b,
    "Div": lambda _, a, b: _whole(a, b),
    "Mod": lambda _, a, b: np.mod(a, b),
    "Equal": lambda _, a, b: (a == b).astype(np.int64),
    "Where": lambda _, by, a, b: np.asarray(np.where(by != 0, a, b)),
    "Cast": _cast,
    "Identity": _cast,
    "ReduceProd": lambda n, x, *axes: np.prod(
        x, tuple(int(a) for a in axes[0]) if axes else None, keepdims=bool(n.attr("keepdims", 1))
    ),
}


def fold(low: Lowering, n: Node) -> bool:
    """Compute a node on whole numbers that are known; False where it is something else."""
    if n.kind not in _FOLDS or len(n.outputs) != 1:
        return False
    values = [low.known(name) for name in n.inputs if name]
    if any(v is None or v.size > _LARGEST or v.dtype.kind not in "iub" for v in values):
        return False
    found = np.asarray(_FOLDS[n.kind](n, *(np.asarray(v, np.int64) for v in values)))
    dtype = _TYPES.get(n.attr("to", 7), "") if n.kind == "Cast" else "int64"
    if not dtype:
        return False
    low.know(n.outputs[0], found, dtype)
    return True
