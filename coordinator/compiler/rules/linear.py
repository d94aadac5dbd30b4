# SPDX-License-Identifier: Apache-2.0
"""Gemm and MatMul."""

from __future__ import annotations

from coordinator.compiler.emit import Emit
from coordinator.compiler.graph import Node
from coordinator.compiler.vjp import Grads, reshape_like, unbroadcast, vjp


@vjp("Gemm")
def _gemm(e: Emit, n: Node, g: str) -> Grads:
    """Y = alpha op(A) op(B) + beta C: each gradient is one Gemm with the transposes folded in."""
    a, b, c = n.inputs[0], n.inputs[1], n.input(2)
    ta, tb = n.attr("transA", 0), n.attr("transB", 0)
    alpha, beta = n.attr("alpha", 1.0), n.attr("beta", 1.0)
    da = db = dc = None
    if e.needs(a):
        da = (
            e.Gemm(b, g, alpha=alpha, transA=tb, transB=1)
            if ta
            else e.Gemm(g, b, alpha=alpha, transB=1 - tb)
        )
    if e.needs(b):
        db = (
            e.Gemm(g, a, alpha=alpha, transA=1, transB=ta)
            if tb
            else e.Gemm(a, g, alpha=alpha, transA=1 - ta)
        )
    if e.needs(c):
        dc = unbroadcast(e, g, c)
        dc = dc if beta == 1.0 else e.Mul(dc, e.const(beta))
    return da, db, dc


@vjp("MatMul")
def _matmul(e: Emit, n: Node, g: str) -> Grads:
    """Y = A B over broadcast batches; a 1-D operand counts as a row (A) or a column (B)."""
    a, b = n.inputs
    rows, columns = e.rank(a), e.rank(b)
    if rows == 1 and columns == 1:
        return (e.Mul(g, b) if e.needs(a) else None, e.Mul(g, a) if e.needs(b) else None)
    if columns == 1:  # Y[..., m] = A[..., m, k] b[k]
        g = e.Unsqueeze(g, e.ints(-1))
        matrix = e.Unsqueeze(b, e.ints(1))
        return _sides(e, n, a, matrix, g)
    if rows == 1:  # Y[..., n] = a[k] B[..., k, n]
        g = e.Unsqueeze(g, e.ints(-2))
        return _sides(e, n, e.Unsqueeze(a, e.ints(0)), b, g)
    return _sides(e, n, a, b, g)


def _sides(e: Emit, n: Node, left: str, right: str, g: str) -> Grads:
    """Return the gradients of both inputs, given as the matrices `left` and `right`."""
    a, b = n.inputs
    da = db = None
    if e.needs(a):
        da = unbroadcast(e, e.MatMul(g, swapped(e, right)), left)
        da = da if left == a else reshape_like(e, da, a)
    if e.needs(b):
        db = _right(e, left, right, g)
        db = db if right == b else reshape_like(e, db, b)
    return da, db


def _right(e: Emit, left: str, right: str, g: str) -> str:
    """Return dB = A^T G; where a matrix B meets a batch, the batch folds into one Gemm."""
    if e.rank(right) == 2 and e.rank(left) > 2:
        wide, tall = e.dims(left)[-1], e.dims(g)[-1]
        if wide is not None and tall is not None:
            return e.Gemm(
                e.Reshape(left, e.ints(-1, wide)), e.Reshape(g, e.ints(-1, tall)), transA=1
            )
    if e.rank(right) == 2 and e.rank(left) == 2:
        return e.Gemm(left, g, transA=1)
    return unbroadcast(e, e.MatMul(swapped(e, left), g), right)


def swapped(e: Emit, x: str) -> str:
    """Transpose the last two dimensions."""
    rank = e.rank(x)
    return e.Transpose(x, perm=[*range(rank - 2), rank - 1, rank - 2])
