# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.quarantine import Conduct, Rules, release, says, strike
from edge_sdk.errors import ConfigError

RULES = Rules(strikes=3, window=10, rounds=5)


def after(*rounds: int, rules: Rules = RULES, before: Conduct | None = None) -> Conduct:
    conduct = before or Conduct()
    for number in rounds:
        conduct = strike(conduct, number, rules, "norm")
    return conduct


def test_three_bad_updates_within_the_window_set_a_device_aside() -> None:
    assert not after(4, 5).is_held(6)
    held = after(4, 5, 5)
    assert held.until == 11
    assert [held.is_held(n) for n in (6, 10, 11)] == [True, True, False]
    assert "until round 11" in says(held)
    assert "norm" in says(held)


def test_bad_updates_further_apart_than_the_window_do_not_add_up() -> None:
    assert after(1, 10, 11, 20, 21, 30).until == 0
    assert after(1, 10, 11, 20).strikes == (11, 20)
    assert after(1, 2, 10).until > 0


def test_each_term_is_twice_the_one_before_up_to_a_bound() -> None:
    conduct, terms = Conduct(), []
    for _ in range(9):
        start = conduct.until
        conduct = after(start, start, start, before=conduct)
        terms.append(conduct.until - start - 1)
    assert terms == [5, 10, 20, 40, 80, 160, 320, 320, 320]


def test_on_parole_one_bad_update_is_enough() -> None:
    first = after(1, 1, 1)
    again = after(first.until + 9, before=first)
    assert again.terms == 2
    assert again.until == first.until + 9 + 1 + 10
    # once the parole is over three are needed again, and the term still doubles
    later = first.until + 10
    assert after(later, later, before=first).terms == 1
    assert after(later, later, later, before=first).until == later + 1 + 10


def test_while_it_is_held_nothing_adds_to_it() -> None:
    held = after(1, 1, 1)
    assert after(2, 3, 4, before=held) == held


def test_released_is_on_parole() -> None:
    held = after(1, 1, 1)
    free = release(held, 3)
    assert not free.is_held(3)
    assert after(4, before=free).terms == 2
    assert release(Conduct(), 3) == Conduct()


def test_no_strikes_means_nobody_is_ever_set_aside() -> None:
    assert after(*range(50), rules=Rules(strikes=0)) == Conduct()
    assert after(7, rules=Rules(strikes=1, rounds=2)).until == 10


@pytest.mark.parametrize(
    "bad",
    [
        {"strikes": -1},
        {"strikes": 2.0},
        {"window": 0},
        {"rounds": 0},
        {"hours": 0},
        {"hours": True},
    ],
)
def test_settings_out_of_bounds_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"expected {next(iter(bad))}"):
        Rules(**bad)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 12), max_size=40), st.integers(1, 4), st.integers(1, 6))
def test_what_is_kept_of_a_device_stays_small_and_it_is_never_held_for_ever(
    gaps: list[int], strikes: int, window: int
) -> None:
    rules, number, conduct = Rules(strikes=strikes, window=window, rounds=2), 0, Conduct()
    for gap in gaps:
        number += gap
        changed = strike(conduct, number, rules, "x")
        assert changed.until >= conduct.until
        conduct = changed
        assert len(conduct.strikes) < strikes
        assert conduct.until <= number + 1 + 2 * 64
