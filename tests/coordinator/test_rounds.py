# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.rounds import (
    DeadlinePassed,
    Declined,
    Event,
    Filled,
    Invite,
    Joined,
    Left,
    Reported,
    Returned,
    Round,
    Settle,
    begin,
    standing,
    step,
)

FOUR = ("a", "b", "c", "d")
names = st.sampled_from([*FOUR, "stranger"])
events: st.SearchStrategy[Event] = st.one_of(
    names.map(Reported),
    names.map(Left),
    names.map(Returned),
    names.map(Declined),
    st.just(DeadlinePassed()),
)
open_ended_events: st.SearchStrategy[Event] = st.one_of(
    events, st.frozensets(names, max_size=3).map(Joined)
)


def after(r: Round, *happened: Event) -> Round:
    for event in happened:
        r, _ = step(r, event)
    return r


def four(quorum: int = 2, goal: int | None = None) -> Round:
    return begin(1, 0, FOUR, quorum=quorum, goal=goal)[0]


def test_beginning_a_round_invites_its_cohort_in_a_fixed_order() -> None:
    _, actions = begin(7, 3, ["b", "a"], quorum=1)
    assert actions == (Invite("a"), Invite("b"))


def test_a_round_ends_early_when_all_have_reported() -> None:
    r = after(four(), *map(Reported, "abc"))
    assert r.verdict == "waiting"
    assert after(r, Reported("d")).verdict == "commit"


def test_a_round_ends_early_when_everyone_reported_left_or_declined() -> None:
    r = after(four(), Reported("a"), Left("b"), Declined("c"))
    assert r.verdict == "waiting"
    assert after(r, Reported("d")).verdict == "commit"


def test_a_round_that_everyone_left_aborts_without_waiting_for_the_deadline() -> None:
    assert after(four(), Reported("a"), Left("b"), Declined("c"), Left("d")).verdict == "abort"


def test_the_goal_ends_an_over_selected_round() -> None:
    assert after(four(goal=2), Reported("d"), Reported("b")).verdict == "commit"


def test_the_deadline_commits_with_a_quorum_and_names_the_stragglers() -> None:
    r = after(four(), Reported("a"), Reported("b"), Left("c"), DeadlinePassed())
    assert r.verdict == "commit"
    assert r.stragglers == {"d"}


def test_the_deadline_aborts_without_a_quorum() -> None:
    assert after(four(), Reported("a"), DeadlinePassed()).verdict == "abort"


def test_a_device_that_left_and_came_back_is_invited_again_and_may_report() -> None:
    r, actions = step(after(four(), Left("a")), Returned("a"))
    assert actions == (Invite("a"),)
    assert not r.left
    assert after(four(), Left("a"), Reported("a")).reported == {"a"}


def test_a_device_that_reported_and_then_left_still_counts() -> None:
    r = after(four(), Reported("a"), Left("a"), Declined("a"))
    assert r.reported == {"a"}
    assert not r.left | r.declined


@pytest.mark.parametrize(
    ("device", "closed", "expected"),
    [
        ("b", False, "counted"),
        ("a", False, "duplicate"),
        ("stranger", False, "refused"),
        ("b", True, "late"),
        ("a", True, "duplicate"),
        ("stranger", True, "refused"),
    ],
)
def test_an_update_stands_as(device: str, closed: bool, expected: str) -> None:
    r = after(four(), Reported("a"), *([DeadlinePassed()] if closed else []))
    assert standing(r, device) == expected


@pytest.mark.parametrize(("quorum", "goal"), [(0, None), (5, None), (3, 2)])
def test_a_round_that_cannot_reach_its_quorum_is_not_begun(quorum: int, goal: int | None) -> None:
    with pytest.raises(ValueError, match="quorum"):
        begin(1, 0, FOUR, quorum=quorum, goal=goal)


@given(st.lists(events, max_size=30), st.integers(1, 4), st.integers(1, 4))
def test_any_order_of_events_keeps_the_laws_of_a_round(
    happened: list[Event], quorum: int, goal: int
) -> None:
    r = four(quorum, max(quorum, goal))
    settled = 0
    reporters: set[str] = set()
    for event in happened:
        before = r
        r, actions = step(r, event)
        settled += sum(isinstance(a, Settle) for a in actions)
        if before.verdict != "waiting":
            assert r is before
            assert not actions
        elif isinstance(event, Reported) and event.device in FOUR:
            reporters.add(event.device)
        assert r.reported == reporters
        assert r.reported | r.left | r.declined <= r.cohort
        assert not r.reported & r.left
        assert not r.reported & r.declined
        assert not r.left & r.declined
    assert settled == (r.verdict != "waiting")
    assert r.verdict != "commit" or len(r.reported) >= r.quorum
    assert r.verdict != "abort" or len(r.reported) < r.quorum


@given(st.lists(events, max_size=30), st.integers(1, 4))
def test_every_round_ends_once_its_deadline_passed(happened: list[Event], quorum: int) -> None:
    assert after(four(quorum), *happened, DeadlinePassed()).verdict != "waiting"


def buffer(size: int = 3) -> Round:
    return begin(1, 0, FOUR, quorum=0, goal=size)[0]


def test_an_open_ended_round_waits_for_its_buffer_and_for_nothing_else() -> None:
    r = after(buffer(), Reported("a"), Left("b"), Declined("c"), Left("d"), DeadlinePassed())
    assert r.verdict == "waiting"
    assert after(r, Filled()).verdict == "commit"
    assert after(r, Reported("b"), Reported("c")).verdict == "commit"


def test_devices_join_an_open_ended_round_and_are_invited_once() -> None:
    r, actions = step(buffer(), Joined(frozenset({"d", "f", "e"})))
    assert actions == (Invite("e"), Invite("f"))
    assert standing(r, "e") == "counted"
    assert standing(after(r, Filled()), "e") == "late"


@given(st.lists(open_ended_events, max_size=40))
def test_an_open_ended_round_never_aborts(happened: list[Event]) -> None:
    r = after(buffer(), *happened)
    assert r.verdict == ("commit" if len(r.reported) >= 3 else "waiting")
    assert r.reported | r.left | r.declined <= r.cohort


def test_a_round_without_a_quorum_needs_a_buffer_to_fill() -> None:
    with pytest.raises(ValueError, match="quorum"):
        begin(1, 0, FOUR, quorum=0, goal=0)
