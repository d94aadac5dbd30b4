# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from check_grads import session

from coordinator.compiler.emit import Emit
from coordinator.compiler.inplace import start_products_from_sums

Make = Callable[[Emit, str, str], str]


def product(e: Emit) -> str:
    return e.Gemm("a", "b", transA=1, alpha=0.5)


def reshaped(e: Emit) -> str:
    return e.Reshape(product(e), e.ints(2, 5, 1, 1))


def decayed(e: Emit, v: str, y: str) -> str:
    return e.Add(e.Mul(v, e.const([0.9])), y)


JOINED: list[Make] = [
    lambda e, v, y: e.Add(v, y),
    lambda e, v, y: e.Add(y, v),
    decayed,
    lambda e, v, y: e.Add(y, e.Mul(e.const([[0.9]]), v)),
    lambda e, v, y: e.Add(e.Relu(v), y),
]
LEFT: list[Make] = [
    lambda e, v, y: e.Mul(e.Add(v, y), y),  # somebody else reads the product
    lambda e, v, y: e.Sub(v, y),
    lambda e, _, y: e.Add(e.const(1.0), y),  # of another shape
    lambda e, v, y: e.Add(v, e.Neg(y)),
]


def fed(make: Make, inner: Callable[[Emit], str]) -> tuple[Emit, str]:
    e = Emit()
    e.input("a", np.float32, (None, 2))
    e.input("b", np.float32, (None, 5))
    y = inner(e)
    e.input("v", np.float32, e.shape(y))
    return e, make(e, "v", y)


@pytest.mark.parametrize("inner", [product, reshaped])
@pytest.mark.parametrize("make", JOINED)
def test_a_sum_becomes_the_start_of_its_product(make: Make, inner: Callable[[Emit], str]) -> None:
    e, out = fed(make, inner)
    before = e.graph(outputs=[out])
    after = start_products_from_sums(before)
    kinds = [node.kind for node in after.nodes]
    assert "Add" not in kinds
    assert "Mul" not in kinds
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 2), "b": (3, 5), "v": e.shape("v")}
    feeds = {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
    results = [session(Emit(g), [out]).run(None, feeds)[0] for g in (before, after)]
    np.testing.assert_allclose(*results, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", LEFT)
def test_other_sums_stay(make: Make) -> None:
    e, out = fed(make, product)
    graph = e.graph(outputs=[out])
    assert start_products_from_sums(graph).nodes == graph.nodes


def test_a_product_that_is_an_output_stays() -> None:
    e, out = fed(decayed, product)
    y = next(n.outputs[0] for n in e.nodes if n.kind == "Gemm")
    graph = e.graph(outputs=[out, y])
    assert start_products_from_sums(graph).nodes == graph.nodes


def test_a_factor_that_is_not_stored_stays() -> None:
    e, out = fed(lambda e, v, y: e.Add(e.Mul(v, e.input("c", np.float32, (1,))), y), product)
    kinds = [n.kind for n in start_products_from_sums(e.graph(outputs=[out])).nodes]
    assert kinds == ["Mul", "Gemm"]
