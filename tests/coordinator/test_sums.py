# SPDX-License-Identifier: Apache-2.0
"""The mean is the same bits in any order and any sharding, and never overflows unseen."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator import sums
from coordinator.sums import AccumulatorFull, Sum, weight_of
from edge_sdk import codec
from edge_sdk.codec import Lattice, body
from edge_sdk.types import Shapes

SHAPES: Shapes = {"w": (30, 20), "b": (17,)}
COUNT = 617


def lattices(names: list[str] | None = None) -> list[Lattice]:
    """Updates of several devices, by each codec."""
    made = []
    for seed, name in enumerate(names or [*codec.PRESETS] * 2):
        rng = np.random.default_rng(seed)
        delta = {k: (rng.standard_t(3, s) * 1e-3).astype("f4") for k, s in SHAPES.items()}
        c = codec.preset(name)
        blob, _ = c.encode(delta, c.init(SHAPES, seed=seed))
        made.append(codec.lattice(blob, SHAPES))
    return made


UPDATES = [(u, weight_of(1 + 37 * i, 1.0 / (1 + i % 3))) for i, u in enumerate(lattices())]


def fold(updates: list[tuple[Lattice, int]]) -> Sum:
    state = sums.init(COUNT)
    for update, weight in updates:
        state = sums.add(state, update, weight)
    return state


def same(one: Sum, other: Sum) -> bool:
    return np.array_equal(one.total, other.total) and (one.mass, one.updates, one.bound) == (
        other.mass,
        other.updates,
        other.bound,
    )


@settings(max_examples=30, deadline=None, derandomize=True)
@given(order=st.permutations(UPDATES), cut=st.integers(0, len(UPDATES)))
def test_the_sum_is_the_same_bits_in_any_order_and_any_sharding(
    order: list[tuple[Lattice, int]], cut: int
) -> None:
    expected = fold(UPDATES)
    assert same(fold(order), expected)
    sharded = sums.merge(fold(order[:cut]), fold(order[cut:]))
    assert same(sharded, expected)
    np.testing.assert_array_equal(sums.mean(sharded), sums.mean(expected))


def test_the_result_is_the_weighted_mean() -> None:
    expected = np.zeros(COUNT)
    for update, weight in UPDATES:
        expected += weight * body.dense(update, COUNT).astype(np.float64)
    expected /= sum(weight for _, weight in UPDATES)
    got = sums.mean(fold(UPDATES))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["default", "lean", "stateless-lean", "exact-ish"])
def test_one_update_comes_back_bit_for_bit(name: str) -> None:
    (update,) = lattices([name])
    got = sums.mean(fold([(update, weight_of(19))]))
    np.testing.assert_array_equal(got, body.dense(update, COUNT))


def test_lattice_sums_are_exact_not_merely_repeatable() -> None:
    updates = [(u, weight_of(3 + i)) for i, u in enumerate(lattices(["default"] * 5))]
    state = fold(updates)
    at = updates[0][0].positions
    assert at is not None
    number = int(at[3])
    exact = Fraction(0)
    for update, weight in updates:
        q = dict(zip(update.positions.tolist(), update.q.tolist(), strict=True))
        exact += q.get(number, 0) * Fraction(update.step) * weight
    assert Fraction(int(state.total[number]), 2**sums.FRACTION_BITS) == exact


def test_an_update_that_is_taken_back_leaves_no_trace() -> None:
    kept, taken = UPDATES[:7], UPDATES[7:]
    state = fold(UPDATES)
    for update, weight in taken:
        state = sums.subtract(state, update, weight)
    assert same(state, fold(kept))


def test_nothing_that_was_not_added_is_taken_back() -> None:
    with pytest.raises(ValueError, match="added before"):
        sums.subtract(sums.init(COUNT), *UPDATES[0])
    small = fold([(UPDATES[0][0], 1)])
    with pytest.raises(ValueError, match="added before"):
        sums.subtract(small, UPDATES[0][0], 2)


def test_no_update_changes_nothing() -> None:
    np.testing.assert_array_equal(sums.mean(sums.init(5)), np.zeros(5, np.float32))
    empty = Lattice(np.zeros(0, np.int64), np.zeros(0, np.int32), 1.0)
    state = sums.add(sums.init(5), empty, 3)
    assert (state.mass, state.updates, state.bound) == (3, 1, 0)


def test_a_hundred_thousand_devices_of_ten_thousand_examples_fit() -> None:
    largest = Lattice(np.array([0]), np.array([31], np.int32), 1.0)
    weight = weight_of(10**9)
    assert weight == 10_000 * 256
    state = sums.init(1)
    once = sums.add(state, largest, weight)
    fleet = Sum(once.total * 99_999, once.mass * 99_999, once.bound * 99_999, 99_999)
    state = sums.add(fleet, largest, weight)
    assert sums.mean(state).tolist() == [31.0]


def test_an_update_that_could_overflow_is_refused_and_nothing_is_added() -> None:
    large = Lattice(np.array([0, 2]), np.array([1, -(2**12)], np.int32), 2.0**10)
    weight = weight_of(500)
    state = sums.init(3)
    while state.bound + 2**22 * weight * 2**sums.FRACTION_BITS < 2**63:
        state = sums.add(state, large, weight)
    with pytest.raises(AccumulatorFull, match="commit the round first"):
        sums.add(state, large, weight)
    assert state.updates > 10
    assert int(state.total[2]) == -state.bound
    with pytest.raises(AccumulatorFull, match="commit one first"):
        sums.merge(state, state)


def test_one_update_that_overflows_by_itself_is_refused() -> None:
    for step in (2.0**60, 2.0**120):
        huge = Lattice(None, np.array([5], np.int32), step)
        with pytest.raises(AccumulatorFull, match="refuse the update"):
            sums.add(sums.init(1), huge, 256)


@pytest.mark.parametrize("step", [0.1, 1e-9, 1.7e-4, 2.0**-30, 3e-12])
@pytest.mark.parametrize("top", [1, 1000, 2**30])
def test_any_step_is_folded_to_within_the_resolution(step: float, top: int) -> None:
    q = np.array([top, -top, 0, top // 3], np.int32)
    weight = weight_of(10)
    got = sums.mean(sums.add(sums.init(4), Lattice(None, q, step), weight))
    np.testing.assert_allclose(got, q * step, rtol=1e-6, atol=2.0**-21 / weight)


def test_changes_far_below_the_resolution_count_as_none() -> None:
    tiny = Lattice(None, np.array([7, -7], np.int32), 2.0**-120)
    state = sums.add(sums.init(2), tiny, 256)
    assert state.total.tolist() == [0, 0]
    assert state.mass == 256


@pytest.mark.parametrize(
    "update",
    [
        Lattice(None, np.zeros(4, np.int32), 1.0),
        Lattice(np.array([5]), np.ones(1, np.int32), 1.0),
        Lattice(np.array([-1]), np.ones(1, np.int32), 1.0),
        Lattice(np.array([1, 2]), np.ones(1, np.int32), 1.0),
    ],
)
def test_an_update_of_another_model_is_refused(update: Lattice) -> None:
    with pytest.raises(ValueError, match="expected"):
        sums.add(sums.init(5), update, 1)
    with pytest.raises(ValueError, match="positive weight"):
        sums.add(sums.init(5), update, 0)
    with pytest.raises(ValueError, match="shards of one model"):
        sums.merge(sums.init(5), sums.init(4))


def test_weights_are_whole_capped_and_never_nothing() -> None:
    assert weight_of(1) == 256
    assert weight_of(50, 0.5) == 50 * 128
    assert weight_of(50, 1e-9) == 50
    assert weight_of(99, cap=10) == 2560
    for examples, discount in ((0, 1.0), (1, 0.0), (1, 1.1), (1, float("nan"))):
        with pytest.raises(ValueError, match="at least one example"):
            weight_of(examples, discount)


def test_a_mass_of_its_own_divides_the_sum_and_work_is_summed_beside_it() -> None:
    update = Lattice(None, np.array([4, -8], np.int32), 0.5)
    state = sums.add(sums.init(2), update, 256, mass=512, work=7)
    state = sums.merge(state, sums.add(sums.init(2), update, 256, mass=512, work=3))
    assert sums.mean(state).tolist() == [1.0, -2.0]
    assert (state.mass, state.work, state.updates) == (1024, 10, 2)
    with pytest.raises(AccumulatorFull):
        sums.add(state, update, 1, mass=2**63)
