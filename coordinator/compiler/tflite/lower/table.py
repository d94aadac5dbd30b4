# SPDX-License-Identifier: Apache-2.0
"""The table of lowerings: ONNX operator to the function that records it in builtin operators.

@lowers("Sigmoid")
def _sigmoid(low: Lowering, n: Node) -> None:
    low.each("LOGISTIC", n)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from coordinator.compiler.graph import Node
from edge_sdk.errors import CompileError

if TYPE_CHECKING:
    from coordinator.compiler.tflite.lower.forms import Lowering

Lower: TypeAlias = Callable[["Lowering", Node], None]

LOWERS: dict[str, Lower] = {}
"""Operator (``Conv``, ``fedge.ConvFilter``) to its lowering."""


def lowers(*ops: str) -> Callable[[Lower], Lower]:
    """Register a lowering."""

    def register(lower: Lower) -> Lower:
        LOWERS.update(dict.fromkeys(ops, lower))
        return lower

    return register


def refused(node: Node, reason: str) -> CompileError:
    """Return the error that says why a node has no form in builtin TFLite operators."""
    return CompileError(
        f"expected a graph that builtin TFLite operators can spell, {node.label} {reason}: "
        "build with engines=('onnx',)"
    )
