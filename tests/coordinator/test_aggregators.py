# SPDX-License-Identifier: Apache-2.0
"""Each aggregator follows its paper's equation, in any order of updates the same bits."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from coordinator import aggregators
from coordinator.aggregators import Aggregator, Report
from coordinator.sampling import buckets
from coordinator.sums import AccumulatorFull
from edge_sdk.codec import Lattice
from edge_sdk.errors import ConfigError

DELTAS = [np.array(d, np.int32) for d in ([4, -8, 2], [1, 1, 1], [-3, 5, 0], [90, -90, 90])]
STEP = 0.25
REPORTS = [
    Report(10, 5, 2.0, bucket=0),
    Report(30, 10, 0.5, discount=0.5, bucket=1),
    Report(20, 1, 1.0, bucket=2),
    Report(1, 2, 4.0, bucket=3),
]


def facts(i: int) -> tuple[Lattice, Report]:
    update = Lattice(None, DELTAS[i], STEP)
    norm = float(np.linalg.norm(DELTAS[i] * STEP))
    return update, REPORTS[i]._replace(norm=norm)


def folded(aggregator: Aggregator, order: tuple[int, ...] = (0, 1, 2)) -> np.ndarray:
    state = aggregator.init(3)
    for i in order:
        state = aggregator.add(state, *facts(i))
    return aggregator.result(state)


def values(order: tuple[int, ...] = (0, 1, 2)) -> np.ndarray:
    return np.stack([DELTAS[i] * STEP for i in order])


ALL = [
    aggregators.weighted_mean(),
    aggregators.plain_mean(),
    aggregators.stepwise_mean(0.9),
    aggregators.normalized_mean(),
    aggregators.normalized_mean(0.9),
    aggregators.fair_mean(0.7, 0.1),
    aggregators.median(),
    aggregators.trimmed_mean(0.3, 5),
    aggregators.krum(1, 5),
    aggregators.krum(1, 6, keep=2),
    aggregators.geometric_median(),
    aggregators.clipped(aggregators.weighted_mean(), 0.5),
]
IDS = [str(a.spec) for a in ALL]


@pytest.mark.parametrize("aggregator", ALL, ids=IDS)
def test_the_outcome_is_the_same_bits_in_any_order(aggregator: Aggregator) -> None:
    expected = folded(aggregator, (0, 1, 2, 3))
    assert expected.dtype == np.float32
    for order in permutations(range(4)):
        np.testing.assert_array_equal(folded(aggregator, order), expected)


@pytest.mark.parametrize("aggregator", ALL, ids=IDS)
def test_a_spec_makes_the_aggregator_that_spells_it(aggregator: Aggregator) -> None:
    again = aggregators.from_spec(aggregator.spec)
    assert (again.spec, again.buckets) == (aggregator.spec, aggregator.buckets)
    np.testing.assert_array_equal(folded(again), folded(aggregator))


@pytest.mark.parametrize("aggregator", ALL, ids=IDS)
def test_nothing_added_is_no_change(aggregator: Aggregator) -> None:
    assert aggregator.result(aggregator.init(3)).tolist() == [0, 0, 0]


def test_the_weighted_mean_weighs_by_examples_and_discount() -> None:
    expected = np.average(values(), axis=0, weights=[10, 15, 20])
    np.testing.assert_allclose(folded(aggregators.weighted_mean()), expected, rtol=1e-6)


def test_the_plain_mean_divides_by_the_number_of_updates_not_by_their_discounts() -> None:
    """FedBuff, algorithm 1: the sum of s(t) * delta over K."""
    v = values()
    expected = (v[0] + 0.5 * v[1] + v[2]) / 3
    np.testing.assert_allclose(folded(aggregators.plain_mean()), expected, rtol=1e-6)


def test_the_stepwise_mean_has_what_a_step_moves_beside_the_mean() -> None:
    """SCAFFOLD, algorithm 1: the mean of y_i - x, and that of (y_i - x) / K."""
    made = aggregators.stepwise_mean()
    state = made.init(3)
    for i in range(3):
        state = made.add(state, *facts(i))
    discounts = np.array([1, 0.5, 1])
    np.testing.assert_allclose(made.result(state), discounts @ values() / 3, rtol=1e-6)
    steps = np.array([5, 10, 1])
    assert made.beside is not None
    np.testing.assert_allclose(made.beside(state), (discounts / steps) @ values() / 3, rtol=1e-5)
    assert made.count(state) == 3
    with pytest.raises(ConfigError, match="stepwise_mean: expected decay from 0 to below 1"):
        aggregators.stepwise_mean(1.0)


def test_an_update_that_does_not_fit_leaves_both_sums_of_the_stepwise_mean_as_they_were() -> None:
    made = aggregators.stepwise_mean()
    update, report = facts(0)
    state = made.add(made.init(3), update, report)
    before = [state[i].total.copy() for i in (0, 1)]
    with pytest.raises(AccumulatorFull):
        made.add(state, update._replace(step=2.0**45), report)
    for i in (0, 1):
        np.testing.assert_array_equal(state[i].total, before[i])


def test_the_normalized_mean_is_fednovas() -> None:
    """Wang et al. 2020, eq. 6: tau_eff * sum p_i delta_i / a_i, tau_eff = sum p_i a_i."""
    p, a = np.array([10, 15, 20]) / 45, np.array([5, 10, 1])
    expected = (p @ a) * (p / a) @ values()
    np.testing.assert_allclose(folded(aggregators.normalized_mean()), expected, rtol=1e-5)


def test_the_normalized_mean_knows_how_far_momentum_goes() -> None:
    """a_i is the sum over steps of what momentum makes of a gradient of 1."""
    p = np.array([10, 15, 20]) / 45
    velocity, a = np.zeros(3), np.zeros(3)
    for step in range(10):
        going = np.array([5, 10, 1]) > step
        velocity = np.where(going, 0.9 * velocity + 1, velocity)
        a += np.where(going, velocity, 0)
    expected = (p @ a) * (p / a) @ values()
    np.testing.assert_allclose(folded(aggregators.normalized_mean(0.9)), expected, rtol=1e-4)


def test_equal_work_makes_the_normalized_mean_the_weighted_mean() -> None:
    state = aggregators.normalized_mean().init(3)
    for i in range(3):
        update, report = facts(i)
        state = aggregators.normalized_mean().add(state, update, report._replace(steps=7))
    got = aggregators.normalized_mean().result(state)
    np.testing.assert_allclose(got, folded(aggregators.weighted_mean()), rtol=1e-6)


def test_the_fair_mean_is_q_fedavgs() -> None:
    """Li et al. 2020, algorithm 2, with w - w_k = -delta and L = 1 / lr."""
    q, lr, v = 0.7, 0.1, values()
    loss, kept = np.array([2.0, 0.5, 1.0]), np.array([1, 0.5, 1])
    h = loss**q + q * loss ** (q - 1) * (v**2).sum(1) / lr
    expected = (loss**q * kept) @ v / h.sum()
    np.testing.assert_allclose(folded(aggregators.fair_mean(q, lr)), expected, rtol=1e-4)
    plain = folded(aggregators.fair_mean(0.0, lr))
    np.testing.assert_allclose(plain, folded(aggregators.plain_mean()), rtol=1e-4)


def test_a_loss_of_nothing_and_a_loss_beyond_all_measure_are_weighed_all_the_same() -> None:
    fair = aggregators.fair_mean(2.0, 0.1)
    for loss in (0.0, 1e30, -1.0):
        update, report = facts(0)
        state = fair.add(fair.init(3), update, report._replace(loss=loss))
        assert np.isfinite(fair.result(state)).all()


def test_a_robust_rule_compares_the_weighted_means_of_buckets() -> None:
    rule = aggregators.median(3)
    state = rule.init(3)
    for i in range(4):
        update, report = facts(i)
        state = rule.add(state, update, report._replace(bucket=min(i, 2)))
    v = values((0, 1, 2, 3))
    shared = np.average(v[2:], axis=0, weights=[20, 1])
    expected = np.median(np.stack([v[0], v[1], shared]), axis=0)
    np.testing.assert_allclose(rule.result(state), expected, rtol=1e-6)


def test_too_few_buckets_for_krum_are_answered_by_their_median() -> None:
    got = folded(aggregators.krum(1, 8))
    np.testing.assert_array_equal(got, folded(aggregators.median(8)))


def test_clipping_scales_the_whole_update_down_to_the_norm() -> None:
    v = values()
    norms = np.linalg.norm(v, axis=1)
    cut = v * np.minimum(1, 0.5 / norms)[:, None]
    expected = np.average(cut, axis=0, weights=[10, 15, 20])
    got = folded(aggregators.clipped(aggregators.weighted_mean(), 0.5))
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("mode", "expected an aggregator among weighted_mean"),
        ([], "expected an aggregator"),
        (["median", 3], "expected an aggregator"),
        (["median", {"bucket": 3}], "median: .*bucket"),
        (["median", {"buckets": 2}], "expected 3 to 256 buckets, or 0"),
        (["trimmed_mean", {"cut": 0.5}], "expected a cut from 0 to below 0.5"),
        (["krum", {"attackers": 1, "buckets": 4}], "at least 5 buckets"),
        (["krum", {"attackers": 1, "buckets": 6, "keep": 4}], "keep 1 to"),
        (["normalized_mean", {"decay": 1.0}], "expected decay"),
        (["fair_mean", {"q": -1}], "expected q from 0"),
        (["clipped", ["weighted_mean"], 0], "expected a clip above 0"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(spec: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        aggregators.from_spec(spec)


def test_buckets_hold_equally_many_devices_and_nobody_without_the_seed_knows_which() -> None:
    cohort = [f"d{i:03}" for i in range(50)]
    placed = buckets(cohort, 7, 8)
    assert sorted(np.bincount(list(placed.values()))) == [6] * 6 + [7] * 2
    assert placed == buckets(reversed(cohort), 7, 8)
    assert placed != buckets(cohort, 8, 8)
    assert set(buckets(cohort, 7, 1).values()) == {0}
    assert sorted(buckets(cohort, 7, 0).values()) == list(range(50))
