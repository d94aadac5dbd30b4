# SPDX-License-Identifier: Apache-2.0
"""What counts as a day: no clock that jumps opens a second one."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk import usage
from edge_sdk.usage import DAY_S, Instant, Usage

NOON = 1_790_000_000.0  # some day of 2026, by a clock that was set


def after(*moments: Instant) -> Usage:
    day = Usage()
    for moment in moments:
        day = usage.at(day, moment)
    return day


def spent(*moments: Instant) -> int:
    """Return what is left of 100 bytes that were used at the first of these moments."""
    day = usage.at(Usage(), moments[0])
    day = Usage(100, 60.0, day.elapsed_s, day.seen, day.began)
    for moment in moments[1:]:
        day = usage.at(day, moment)
    return day.bytes


def test_a_day_ends_24_hours_after_it_began() -> None:
    start = Instant("a", 50.0)
    assert spent(start, Instant("a", 50 + DAY_S - 1)) == 100
    assert spent(start, Instant("a", 50 + DAY_S)) == 0
    assert after(start, Instant("a", 60.0)).left_s == DAY_S - 10


@pytest.mark.parametrize("wall", [0.0, NOON - 9 * DAY_S, NOON + 400 * DAY_S])
def test_a_clock_that_is_set_while_the_board_is_on_changes_nothing(wall: float) -> None:
    assert spent(Instant("a", 50.0, NOON), Instant("a", 60.0, wall)) == 100


def test_a_clock_that_was_never_set_says_nothing_after_a_restart_either() -> None:
    assert spent(Instant("a", 50.0), Instant("b", 5.0, NOON)) == 100  # 1970, then the time server
    assert spent(Instant("a", 50.0, 86_400.0), Instant("b", 5.0, NOON)) == 100
    assert spent(Instant("a", 50.0, NOON), Instant("b", 5.0)) == 100


def test_time_off_counts_where_the_clock_was_right_before_and_after() -> None:
    start = Instant("a", 50.0, NOON)
    assert spent(start, Instant("b", 5.0, NOON + DAY_S - 1)) == 100
    assert spent(start, Instant("b", 5.0, NOON + DAY_S)) == 0
    late = Instant("b", 5.0), Instant("b", 90.0, NOON + DAY_S)  # the time server came later
    assert spent(start, *late) == 0


def test_a_clock_that_became_right_in_the_midst_of_a_day_counts_from_there() -> None:
    moments = [Instant("a", 50.0), Instant("a", 3650.0, NOON)]
    assert spent(*moments, Instant("b", 1.0, NOON + DAY_S - 1)) == 100
    assert spent(*moments, Instant("b", 1.0, NOON + DAY_S)) == 0


def test_without_a_clock_the_time_that_the_board_is_on_adds_up() -> None:
    boots = [Instant(str(i), DAY_S / 4) for i in range(4)]
    assert spent(Instant("x", 10.0), *boots[:3]) == 100
    assert spent(Instant("x", 10.0), *boots) == 0


JUMPS = st.lists(
    st.tuples(
        st.floats(0.0, 3600.0),  # passes
        st.sampled_from(["on", "off"]),  # meanwhile
        st.floats(-1e9, 1e9),  # and the clock is set by so much, which the kernel notices
    ),
    max_size=30,
)


@given(JUMPS)
def test_no_series_of_restarts_and_jumps_makes_a_day_shorter(
    jumps: Sequence[tuple[float, str, float]],
) -> None:
    day, boot, since_boot, true_s = Usage(), 0, 10.0, 0.0
    day = usage.at(day, Instant("0", since_boot, NOON))
    began_s = 0.0
    for passes, board, jump in jumps:
        true_s += passes
        since_boot += passes
        if board == "off":
            boot, since_boot = boot + 1, 0.0
        is_synchronized = abs(jump) < 1e8
        wall = NOON + true_s if is_synchronized else 0.0  # else `Meter` says 0
        before, day = day, usage.at(day, Instant(str(boot), since_boot, wall))
        if day.elapsed_s < before.elapsed_s:
            assert true_s - began_s >= DAY_S
            began_s = true_s
