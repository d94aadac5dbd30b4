# SPDX-License-Identifier: Apache-2.0
"""Rows of a gradient are computed from rows, whatever the gradient is made by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import pytest
from forward_models import Net

from coordinator.compiler import build
from coordinator.compiler.emit import Emit
from coordinator.compiler.narrow import narrow
from coordinator.compiler.passes import drop_unused

ROWS = np.array([[1], [4], [5]])
Maker = Callable[[Emit], str]

MAKERS: dict[str, Maker] = {
    "gemm": lambda e: e.Gemm("w", "h"),
    "gemm of a transposed": lambda e: e.Gemm("h", "w", transA=1),
    "gemm of both transposed": lambda e: e.Gemm("h", "t", transA=1, transB=1, alpha=0.5),
    "reshaped": lambda e: e.Reshape(e.Gemm("w", "h"), e.ints(6, 2, 3)),
    "reshaped, one size left open": lambda e: e.Reshape(e.Gemm("w", "h"), e.ints(6, -1)),
    "transposed": lambda e: e.Transpose(e.Gemm("t", "w", transB=1), perm=[1, 0]),
    "matmul": lambda e: e.MatMul("w", "h"),
    "matmul, its right": lambda e: e.Transpose(e.MatMul("t", "h"), perm=[1, 0]),
    "one for each channel": lambda e: e.MatMul("c", "d"),
    "sum": lambda e: e.ReduceSum("c", e.ints(1), keepdims=0),
    "sum that keeps": lambda e: e.ReduceSum("c", e.ints(-1, 1), keepdims=1),
    "a chain": lambda e: e.Reshape(e.ReduceSum(e.MatMul("c", "d"), e.ints(2), keepdims=0),
                                   e.ints(6, 2, -1)),
    "no product": lambda e: e.Exp("h"),
    "what adds": lambda e: e.Gemm("w", "h", "b"),
    "reshaped across rows": lambda e: e.Reshape(e.Gemm("t", "h"), e.ints(4, 9)),
    "sum over the rows": lambda e: e.ReduceSum(e.Reshape("c", e.ints(1, 6, 8)), e.ints(0)),
}  # fmt: skip
SHAPES = {"w": (6, 6), "h": (6, 6), "t": (6, 6), "b": (6,), "c": (6, 4, 2), "d": (6, 2, 3)}


@pytest.mark.parametrize("maker", MAKERS)
def test_rows_are_those_of_the_whole(maker: str) -> None:
    e = Emit()
    for name, shape in SHAPES.items():
        e.input(name, np.float32, shape)
    whole = MAKERS[maker](e)
    if e.dims(whole)[0] != 6:
        whole = e.Reshape(whole, e.ints(6, -1))
    rows = e.GatherND(whole, e.const(ROWS, np.int64))
    (narrowed,) = narrow(e, [rows])
    graph = e.graph(outputs=[whole, rows, narrowed] if narrowed != rows else [whole, rows, rows])
    feed: dict[str, Any] = {
        name: np.random.default_rng(i).standard_normal(shape).astype(np.float32)
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    outputs = list(dict.fromkeys(v.name for v in graph.outputs))
    session = onnxruntime.InferenceSession(e.graph(outputs=outputs).to_model().SerializeToString())
    found = dict(zip(outputs, session.run(None, feed), strict=True))
    np.testing.assert_allclose(found[narrowed], found[whole][ROWS.ravel()], rtol=1e-5, atol=1e-6)
    stays = {"no product", "what adds", "reshaped across rows", "sum over the rows"}
    assert (narrowed == rows) == (maker in stays)
    if narrowed != rows:
        left = drop_unused(e.graph(outputs=[narrowed]))
        assert not any(node.kind == "GatherND" for node in left.nodes)


def test_what_is_not_rows_stays() -> None:
    e = Emit()
    e.input("c", np.float32, (6, 4, 2))
    e.input("at", np.int64, (3, 1))
    product = e.ReduceSum("c", e.ints(1), keepdims=0)
    asked = [
        "c",
        e.Exp("c"),
        e.GatherND(product, "at"),
        e.GatherND(product, e.const([[0, 1], [2, 0]], np.int64)),
        e.Transpose(e.Exp("c"), perm=[1, 0, 2]),
    ]
    assert narrow(e, asked) == asked


def test_fewer_channels_take_fewer_operations() -> None:
    net = Net(("N", 3, 16, 16)).conv("stem", 3, 16, 3, pads=[1, 1, 1, 1]).add("Relu")
    net.conv("depth", 16, 16, 3, group=16, pads=[1, 1, 1, 1]).add("Relu")
    net.conv("point", 16, 32, 1).add("Relu").add("GlobalAveragePool").add("Flatten")
    proto = net.dense("head", 32, 4).model()
    flops = [
        build(proto, loss="cross_entropy", train=train).manifest["cost"]["flops_step"]
        for train in ("all", "sparse:0.5", "sparse:0.3")
    ]
    assert flops[0] > flops[1] > flops[2]
