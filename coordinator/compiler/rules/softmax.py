# SPDX-License-Identifier: Apache-2.0
"""Softmax and LogSoftmax along one axis (opset 13 meaning)."""

from __future__ import annotations

from coordinator.compiler.emit import Emit
from coordinator.compiler.graph import Node
from coordinator.compiler.vjp import Grads, vjp


@vjp("Softmax")
def _softmax(e: Emit, n: Node, g: str) -> Grads:
    y, axis = n.outputs[0], e.ints(n.attr("axis", -1))
    return (e.Mul(y, e.Sub(g, e.ReduceSum(e.Mul(g, y), axis, keepdims=1))),)


@vjp("LogSoftmax")
def _log_softmax(e: Emit, n: Node, g: str) -> Grads:
    y, axis = n.outputs[0], e.ints(n.attr("axis", -1))
    return (e.Sub(g, e.Mul(e.Exp(y), e.ReduceSum(g, axis, keepdims=1))),)
