# SPDX-License-Identifier: Apache-2.0
"""Robust rules follow their papers on small cases, and bear what they promise to bear."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from coordinator import robust

ROWS = np.array([[1.0, 10.0], [2.0, 20.0], [3.0, 0.0], [4.0, 40.0], [100.0, -90.0]], np.float32)


def test_the_median_is_that_of_each_column() -> None:
    assert robust.median(ROWS).tolist() == [3.0, 10.0]


def test_the_trimmed_mean_leaves_the_extremes_of_each_column_out() -> None:
    assert robust.trimmed_mean(ROWS, 1).tolist() == [3.0, 10.0]
    assert robust.trimmed_mean(ROWS, 0).tolist() == pytest.approx([22.0, -4.0])
    with pytest.raises(ValueError, match="cut fewer than half of 5"):
        robust.trimmed_mean(ROWS, 3)


def by_hand(rows: np.ndarray, attackers: int, keep: int) -> np.ndarray:
    """Blanchard et al. 2017, section 4: the sum over the m - f - 2 nearest others."""
    scores = []
    for i, row in enumerate(rows):
        others = [float(((row - o) ** 2).sum()) for j, o in enumerate(rows) if j != i]
        scores.append(sum(sorted(others)[: len(rows) - attackers - 2]))
    return rows[np.argsort(scores, kind="stable")[:keep]].mean(0)


@pytest.mark.parametrize(("attackers", "keep"), [(0, 1), (1, 1), (1, 3), (2, 1), (2, 4)])
def test_krum_takes_the_rows_nearest_to_their_neighbours(attackers: int, keep: int) -> None:
    rows = np.random.default_rng(attackers).standard_normal((8, 30)).astype(np.float32)
    rows[:attackers] += 50
    expected = by_hand(rows.astype(np.float64), attackers, keep)
    np.testing.assert_allclose(robust.krum(rows, attackers, keep), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("attackers", "keep"), [(2, 1), (-1, 1), (1, 3), (1, 0)])
def test_krum_refuses_what_it_promises_nothing_for(attackers: int, keep: int) -> None:
    with pytest.raises(ValueError, match="2 f \\+ 2 below the 5 rows"):
        robust.krum(ROWS, attackers, keep)


def test_the_geometric_median_has_the_least_sum_of_distances() -> None:
    rows = np.random.default_rng(3).standard_normal((7, 4)).astype(np.float32)
    found = robust.geometric_median(rows)

    def far(point: np.ndarray) -> float:
        return float(np.linalg.norm(rows - point, axis=1).sum())

    for axis, move in itertools.product(range(4), (-0.05, 0.05)):
        moved = found.copy()
        moved[axis] += move
        assert far(moved) > far(found) - 1e-4


def test_the_geometric_median_of_points_on_a_line_is_the_middle_one() -> None:
    rows = np.array([[0.0], [1.0], [1000.0]], np.float32)
    assert robust.geometric_median(rows)[0] == pytest.approx(1.0, abs=0.01)
    heavy = robust.geometric_median(rows, np.array([1.0, 1.0, 5.0]))
    assert heavy[0] == pytest.approx(1000.0, abs=1)


def test_equal_rows_come_back_as_they_are() -> None:
    rows = np.repeat(ROWS[:1], 9, axis=0)
    for rule in RULES.values():
        np.testing.assert_allclose(rule(rows), rows[0], rtol=1e-6)


RULES = {
    "median": robust.median,
    "trimmed_mean": lambda rows: robust.trimmed_mean(rows, 2),
    "krum": lambda rows: robust.krum(rows, 2),
    "multi_krum": lambda rows: robust.krum(rows, 2, 3),
    "geometric_median": robust.geometric_median,
}


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    poison=arrays.arrays(np.float32, (2, 12), elements=st.floats(-1e6, 1e6, width=32)),
    at=st.permutations(range(9)),
)
def test_two_poisoned_rows_of_nine_move_the_outcome_no_further_than_the_honest_ones_spread(
    name: str, poison: np.ndarray, at: list[int]
) -> None:
    honest = np.random.default_rng(0).standard_normal((7, 12)).astype(np.float32)
    rows = np.concatenate([honest, poison])[at]
    centre = honest.mean(0)
    spread = np.linalg.norm(honest - centre, axis=1).max()
    assert np.linalg.norm(RULES[name](rows) - centre) <= 3 * spread


def test_the_mean_would_have_been_dragged_away() -> None:
    honest = np.random.default_rng(0).standard_normal((7, 12)).astype(np.float32)
    rows = np.concatenate([honest, np.full((2, 12), 1e6, np.float32)])
    assert np.linalg.norm(rows.mean(0) - honest.mean(0)) > 1e5


def test_columns_are_dealt_with_in_blocks_and_none_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(1).standard_normal((5, 1001)).astype(np.float32)
    whole = robust.median(rows)
    monkeypatch.setattr(robust, "BLOCK", 100)
    np.testing.assert_array_equal(robust.median(rows), whole)
    assert robust.median(rows[:, :0]).shape == (0,)
