# SPDX-License-Identifier: Apache-2.0
"""Matrix products.

Constant weights go to FULLY_CONNECTED, all else to BATCH_MATMUL with its right side as it lies:
x86-64, 1 thread, [1024, 576] x [576, 64]: LiteRT 2.3 takes 0.45 ms where a FULLY_CONNECTED with
weights from an input takes 1.7; tflite-runtime 2.14 takes 0.47 and 1.7, and 1.7 with the right side
turned.
"""

from __future__ import annotations

import math

from coordinator.compiler.graph import Node
from coordinator.compiler.tflite.lower.forms import Lowering
from coordinator.compiler.tflite.lower.quantized import integer_dense
from coordinator.compiler.tflite.lower.table import lowers, refused

_SWAP = (1, 0)


@lowers("Gemm")
def _gemm(low: Lowering, n: Node) -> None:
    if integer_dense(low, n):
        return
    t = low.tape
    made = product(low, *n.inputs[:2], turn_a=bool(n.attr("transA")), turn_b=bool(n.attr("transB")))
    alpha, beta = float(n.attr("alpha", 1.0)), float(n.attr("beta", 1.0))
    if alpha != 1.0:
        made = t.mul(made, t.const(alpha))
    if n.input(2):
        bias = low.get(n.input(2))
        made = t.plus(made, bias if beta == 1.0 else t.mul(bias, t.const(beta)))
    low.put(n.outputs[0], made)


def product(low: Lowering, a: str, b: str, *, turn_a: bool, turn_b: bool) -> int:
    """Record the product of two matrices, either of them turned."""
    t, constant = low.tape, low.constant(b)
    if constant is not None:
        left = low.get(a, _SWAP if turn_a else None)
        return t.dense(left, low.get(b, None if turn_b else _SWAP))
    if turn_a and not _is_at_hand(low, a, _SWAP):
        return t.matmul(low.get(a), low.get(b, _SWAP if turn_b else None), adj_x=True)
    left = low.get(a, _SWAP if turn_a else None)
    return t.matmul(left, low.get(b, _SWAP if turn_b else None))


def _is_at_hand(low: Lowering, name: str, order: tuple[int, ...]) -> bool:
    return low.constant(name) is not None or low.form(name).order == order


@lowers("MatMul")
def _matmul(low: Lowering, n: Node) -> None:
    a, b = n.inputs
    if integer_dense(low, n):
        return
    rank = max(low.rank(a), low.rank(b))
    if min(low.rank(a), low.rank(b)) < 1 or rank > 4:
        raise refused(n, f"has operands of {low.rank(a)} and {low.rank(b)} dimensions")
    if low.rank(a) == low.rank(b) == 2:
        low.put(n.outputs[0], product(low, a, b, turn_a=False, turn_b=False))
        return
    if low.rank(b) == 2 and low.rank(a) > 2:
        low.put(n.outputs[0], _rows(low, a, b))
        return
    low.put(n.outputs[0], _stacked(low, a, b))


def _rows(low: Lowering, a: str, b: str) -> int:
    """Multiply every row of `a` by one matrix."""
    t, (*lead, inner) = low.tape, low.shape(a)
    flat = t.reshape(low.get(a), (math.prod(lead), inner))
    if low.constant(b) is not None:
        made = t.dense(flat, low.get(b, _SWAP))
    else:
        made = t.matmul(flat, low.get(b))
    return t.reshape(made, (*lead, low.shape(b)[1]))


def _stacked(low: Lowering, a: str, b: str) -> int:
    """Multiply matrices pairwise; a vector is a matrix of one row or column."""
    t = low.tape
    left, turn_left = _side(low, a)
    right, turn_right = _side(low, b)
    if low.rank(a) == 1:
        left = t.reshape(left, (1, *low.shape(a)))
    if low.rank(b) == 1:
        right = t.reshape(right, (*low.shape(b), 1))
    made = t.matmul(left, right, adj_x=turn_left, adj_y=turn_right)
    shape = list(t.shape(made))
    if low.rank(a) == 1:
        del shape[-2]
    if low.rank(b) == 1:
        del shape[-1]
    return t.reshape(made, shape)


def _side(low: Lowering, name: str) -> tuple[int, bool]:
    """Return an operand, turned if that is how it is at hand."""
    rank = low.rank(name)
    if rank >= 2 and low.constant(name) is None:
        turned = (*range(rank - 2), rank - 1, rank - 2)
        tensor, order = low.form(name)
        if order == turned:
            return tensor, True
    return low.get(name), False
