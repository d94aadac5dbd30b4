# SPDX-License-Identifier: Apache-2.0
"""The main families on drawn shapes, axes and broadcasts.

A gradient is checked along one random direction of all inputs at once: one difference in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from check_grads import Case, Gradient, forward, upstream_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

F = np.float32
quickly = settings(
    max_examples=60, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
seeds = st.integers(0, 2**16)
sizes = st.integers(1, 4)


def drawn(seed: int, *shape: int, low: float | None = None) -> np.ndarray:
    """Return values far from each other and from zero: no kink lies near."""
    rng = np.random.default_rng(seed)
    if low is not None:
        return rng.uniform(low, 2.0, shape).astype(F)
    n = int(np.prod(shape))
    return ((rng.permutation(n) - n // 2) * 0.37 + 0.11).astype(F).reshape(shape)


def agrees(case: Case, *, tolerance: float = 2e-3) -> None:
    """Compare the derivative along a random direction with its central difference."""
    upstream = upstream_for(case)
    grads = Gradient(case, dynamic=True)(case.inputs, upstream)
    rng = np.random.default_rng(11)
    ahead = {i: rng.standard_normal(case.inputs[i].shape) for i in case.wrt}
    run, eps = forward(case), case.eps

    def loss(step: float) -> float:
        moved = [
            x.astype(np.float64) + step * ahead[i] if i in ahead
            else x.astype(np.float64) if x is not None and x.dtype == F else x
            for i, x in enumerate(case.inputs)
        ]  # fmt: skip
        outs = run(moved)
        return sum(float(np.sum(g * outs[i])) for i, g in upstream.items())

    told = sum(float(np.vdot(g, ahead[i])) for g, i in zip(grads, case.wrt, strict=True))
    found = (loss(eps) - loss(-eps)) / (2 * eps)
    size = 0.1 + sum(float(np.linalg.norm(g) * np.linalg.norm(ahead[i]))
                   for g, i in zip(grads, case.wrt, strict=True))  # fmt: skip
    assert abs(told - found) <= tolerance * size


@st.composite
def broadcasts(draw: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Draw two shapes of which the first is the result's."""
    shape = tuple(draw(st.lists(sizes, min_size=1, max_size=4)))
    other = [1 if draw(st.booleans()) else d for d in shape]
    return shape, tuple(other[draw(st.integers(0, len(shape) - 1)) :])


@quickly
@given(st.sampled_from(["Add", "Sub", "Mul", "Div", "Max", "Min", "Mean"]), broadcasts(), seeds,
       st.booleans())  # fmt: skip
def test_arithmetic_broadcasts_either_way(
    op: str, shapes: tuple[tuple[int, ...], tuple[int, ...]], seed: int, swapped: bool
) -> None:
    a, b = drawn(seed, *shapes[0]), drawn(seed + 1, *shapes[1], low=0.5) + F(0.017)
    pair = (b, a) if swapped and op not in {"Div", "Mean"} else (a, b)
    agrees(Case(op, pair, wrt=(0, 1)))


REDUCED = ["ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2",
           "ReduceProd", "ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp"]  # fmt: skip


@quickly
@given(st.sampled_from(REDUCED), st.lists(sizes, min_size=1, max_size=4), st.data(), seeds)
def test_reductions_take_any_axes(op: str, shape: list[int], data: Any, seed: int) -> None:
    rank = len(shape)
    axes = data.draw(st.lists(st.integers(-rank, rank - 1), unique_by=lambda a: a % rank))
    keep = data.draw(st.integers(0, 1))
    x = (
        drawn(seed, *shape, low=0.5)
        if op in {"ReduceLogSum", "ReduceProd"}
        else drawn(seed, *shape)
    )
    if not axes:
        agrees(Case(op, (x,), {"keepdims": keep}))
        return
    batch = (0,) if keep or 0 not in [a % rank for a in axes] else ()
    agrees(Case(op, (x, np.array(axes)), {"keepdims": keep}, fixed=(1,), batch=batch))


@quickly
@given(st.lists(sizes, min_size=2, max_size=4), st.data(), seeds)
def test_shapes_are_moved_and_moved_back(shape: list[int], data: Any, seed: int) -> None:
    rank, x = len(shape), drawn(seed, *shape)
    perm = data.draw(st.permutations(range(rank)))
    agrees(Case("Transpose", (x,), {"perm": list(perm)}))
    agrees(Case("Flatten", (x,), {"axis": data.draw(st.integers(-rank, rank))}))
    axis = data.draw(st.integers(-rank, rank - 1))
    step = data.draw(st.sampled_from([1, 2, -1, -2]))
    part = [np.array([v]) for v in ((0, 9, axis, step) if step > 0 else (-1, -9, axis, step))]
    agrees(Case("Slice", (x, *part), fixed=(1, 2, 3, 4)))
    pads = data.draw(st.lists(st.integers(0, 2), min_size=2 * rank, max_size=2 * rank))
    mode = {"mode": data.draw(st.sampled_from(["constant", "edge"]))}
    agrees(Case("Pad", (x, np.array(pads)), mode, fixed=(1,)))


@quickly
@given(st.lists(sizes, min_size=1, max_size=4), st.data(), seeds)
def test_indices_along_any_axis(shape: list[int], data: Any, seed: int) -> None:
    rank, x = len(shape), drawn(seed, *shape)
    rng = np.random.default_rng(seed)
    axis = data.draw(st.integers(-rank, rank - 1))
    size = shape[axis]
    rows = rng.integers(-size, size, tuple(data.draw(st.lists(sizes, max_size=2))))
    agrees(Case("Gather", (x, rows), {"axis": axis}, fixed=(1,)))
    like = [d if i != axis % rank else 3 for i, d in enumerate(shape)]
    where = rng.integers(0, size, like)
    agrees(Case("GatherElements", (x, where), {"axis": axis % rank}, fixed=(1,)))
    count = data.draw(st.integers(1, size))
    agrees(Case("TopK", (x, np.array([count])), {"axis": axis}, fixed=(1,), outputs=2))
    agrees(Case("Softmax", (x,), {"axis": axis}))
    agrees(Case("LogSoftmax", (x,), {"axis": axis}))


@quickly
@given(st.lists(sizes, max_size=2), st.tuples(sizes, sizes, sizes), st.data(), seeds)
def test_products_broadcast_their_batches(
    batch: list[int], matrices: tuple[int, int, int], data: Any, seed: int
) -> None:
    rows, inner, columns = matrices
    other = [1 if data.draw(st.booleans()) else d for d in batch][data.draw(st.integers(0, 2)) :]
    a = drawn(seed, *batch, rows, inner)
    b = drawn(seed + 1, *other, inner, columns)
    agrees(Case("MatMul", (a, b), wrt=(0, 1)))
    flags = {"transA": data.draw(st.integers(0, 1)), "transB": data.draw(st.integers(0, 1))}
    left = drawn(seed, *((inner, rows) if flags["transA"] else (rows, inner)))
    right = drawn(seed + 1, *((columns, inner) if flags["transB"] else (inner, columns)))
    bias = drawn(seed + 2, *data.draw(st.sampled_from([(), (columns,), (rows, 1), (1, columns)])))
    agrees(Case("Gemm", (left, right, bias), flags, wrt=(0, 1, 2)))


LETTERS = "abcd"


@quickly
@given(st.lists(st.lists(st.sampled_from(LETTERS), min_size=1, max_size=3, unique=True),
                min_size=1, max_size=3), st.data(), seeds)  # fmt: skip
def test_einsum_takes_any_terms(terms: list[list[str]], data: Any, seed: int) -> None:
    dims = dict(zip(LETTERS, (2, 3, 1, 4), strict=True))
    present = sorted({c for term in terms for c in term})
    result = data.draw(st.lists(st.sampled_from(present), unique=True))
    equation = ",".join("".join(t) for t in terms) + "->" + "".join(result)
    inputs = tuple(drawn(seed + i, *(dims[c] for c in t)) for i, t in enumerate(terms))
    agrees(Case("Einsum", inputs, {"equation": equation}, wrt=tuple(range(len(terms)))))


@quickly
@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.data(), seeds)
def test_convolutions_of_any_window(
    n: int, inputs: int, filters: int, data: Any, seed: int
) -> None:
    spatial = data.draw(st.integers(1, 2))
    pick = [data.draw(st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 2)))
            for _ in range(spatial)]  # fmt: skip
    kernel, strides, dilations = zip(*pick, strict=True)
    size = [(k - 1) * d + 1 + data.draw(st.integers(0, 3)) for k, _, d in pick]
    pads = data.draw(st.lists(st.integers(0, 1), min_size=2 * spatial, max_size=2 * spatial))
    window = {"strides": strides, "dilations": dilations, "pads": pads}
    group = data.draw(st.sampled_from([1, 2]))
    x = drawn(seed, n, inputs * group, *size)
    w = drawn(seed + 1, filters * group, inputs, *kernel)
    b = drawn(seed + 2, filters * group)
    agrees(Case("Conv", (x, w, b), {**window, "group": group}, wrt=(0, 1, 2), batch=(0,)))
