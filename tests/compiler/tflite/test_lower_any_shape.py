# SPDX-License-Identifier: Apache-2.0
"""Windows, products and broadcasts of drawn shapes, with their gradients, against onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
from check_grads import Case
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from litert_runs import litert
from lowered_cases import expected

from coordinator.compiler.tflite.lower import lower

F = np.float32
quickly = settings(
    max_examples=40, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
seeds = st.integers(0, 2**16)
small = st.integers(1, 3)


def drawn(seed: int, *shape: int) -> np.ndarray:
    """Return values far from each other, so that no maximum is in doubt."""
    rng = np.random.default_rng(seed)
    n = int(np.prod(shape))
    return ((rng.permutation(n) - n // 2) * (4.0 / n) + 0.01).astype(F).reshape(shape)


def agrees(case: Case) -> None:
    graph, feeds, wanted = expected(case)
    made = litert(lower(graph), feeds)
    for value, want in zip(graph.outputs, wanted, strict=True):
        np.testing.assert_allclose(made[value.name], want, rtol=1e-4, atol=1e-4, err_msg=case.title)


@st.composite
def windows(draw: Any, *, dilated: bool) -> dict[str, Any]:
    """Draw kernel, strides, dilations and padding of one or two dimensions, and a size they fit."""
    rank = draw(st.integers(1, 2))
    kernel = [draw(small) for _ in range(rank)]
    strides = [draw(small) for _ in range(rank)]
    dilations = [draw(st.integers(1, 2)) if dilated else 1 for _ in range(rank)]
    reach = [(k - 1) * d for k, d in zip(kernel, dilations, strict=True)]
    most = reach if dilated else [k // 2 for k in kernel]
    pads = [draw(st.integers(0, m)) for m in (*most, *most)]
    size = [draw(st.integers(max(r + 1 - pads[i], 1), 9)) for i, r in enumerate(reach)]
    return {
        "size": size,
        "attributes": {
            "kernel_shape": kernel, "strides": strides, "pads": pads, "dilations": dilations,
        },
    }  # fmt: skip


@quickly
@given(windows(dilated=True), st.sampled_from(["dense", "wide", "grouped", "depthwise"]), seeds,
       st.booleans())  # fmt: skip
def test_convolutions_of_any_window_and_group(
    window: dict[str, Any], kind: str, seed: int, biased: bool
) -> None:
    inputs, filters, group = {
        "dense": (3, 2, 1), "wide": (9, 10, 1), "grouped": (4, 6, 2), "depthwise": (5, 5, 5),
    }[kind]  # fmt: skip
    attributes = {**window["attributes"], "group": group}
    x = drawn(seed, 3, inputs, *window["size"])
    weights = drawn(seed + 1, filters, inputs // group, *attributes["kernel_shape"])
    bias = (drawn(seed + 2, filters),) if biased else ()
    agrees(Case("Conv", (x, weights, *bias), attributes, wrt=(0, 1, 2)[: 2 + biased], batch=(0,)))


@quickly
@given(windows(dilated=False), seeds, st.booleans())
def test_transposed_convolutions_of_any_window(
    window: dict[str, Any], seed: int, biased: bool
) -> None:
    attributes = {**window["attributes"]}
    reach = zip(attributes["kernel_shape"], attributes["strides"], strict=True)
    rank = len(window["size"])
    out = [
        (d - 1) * s + k - attributes["pads"][i] - attributes["pads"][rank + i]
        for i, (d, (k, s)) in enumerate(zip(window["size"], reach, strict=True))
    ]
    assume(min(out) > 0)
    x = drawn(seed, 3, 3, *window["size"])
    weights = drawn(seed + 1, 3, 2, *attributes["kernel_shape"])
    bias = (drawn(seed + 2, 2),) if biased else ()
    agrees(
        Case("ConvTranspose", (x, weights, *bias), attributes, wrt=(0, 1, 2)[: 2 + biased],
             batch=(0,))
    )  # fmt: skip


@quickly
@given(windows(dilated=False), st.sampled_from(["MaxPool", "AveragePool"]), seeds, st.booleans())
def test_poolings_of_any_window(
    window: dict[str, Any], op: str, seed: int, rounded_up: bool
) -> None:
    attributes = {**window["attributes"]}
    del attributes["dilations"]
    if op == "AveragePool":
        attributes["count_include_pad"] = int(rounded_up)
    agrees(Case(op, (drawn(seed, 3, 4, *window["size"]),), attributes, batch=(0,)))


@quickly
@given(st.lists(small, min_size=1, max_size=4), st.data(), seeds,
       st.sampled_from(["Add", "Sub", "Mul", "Max"]))  # fmt: skip
def test_arithmetic_broadcasts_either_way(shape: list[int], data: Any, seed: int, op: str) -> None:
    other = [1 if data.draw(st.booleans()) else d for d in shape]
    other = other[data.draw(st.integers(0, len(shape) - 1)) :]
    pair = (drawn(seed, *shape), drawn(seed + 1, *other) + F(0.003))
    swapped = data.draw(st.booleans())
    agrees(Case(op, pair[::-1] if swapped else pair, wrt=(0, 1)))


@quickly
@given(st.tuples(small, small, small), st.booleans(), st.booleans(), st.booleans(), seeds)
def test_products_turned_either_way(
    sizes: tuple[int, int, int], turn_a: bool, turn_b: bool, biased: bool, seed: int
) -> None:
    m, k, n = sizes
    a = drawn(seed, *((k, m) if turn_a else (m, k)))
    b = drawn(seed + 1, *((n, k) if turn_b else (k, n)))
    bias = (drawn(seed + 2, n),) if biased else ()
    attributes = {"transA": int(turn_a), "transB": int(turn_b), "alpha": 0.5}
    agrees(Case("Gemm", (a, b, *bias), attributes, wrt=(0, 1, 2)[: 2 + biased]))


@quickly
@given(st.lists(small, min_size=2, max_size=5), st.data(), seeds,
       st.sampled_from(["ReduceSum", "ReduceMean", "ReduceMax", "ReduceL2"]))  # fmt: skip
def test_reductions_take_any_axes(shape: list[int], data: Any, seed: int, op: str) -> None:
    rank = len(shape)
    axes = data.draw(
        st.lists(st.integers(-rank, rank - 1), min_size=1, unique_by=lambda a: a % rank)
    )
    case = Case(
        op,
        (drawn(seed, *shape), np.array(axes, np.int64)),
        {"keepdims": data.draw(st.integers(0, 1))},
        fixed=(1,),
    )
    agrees(case)
