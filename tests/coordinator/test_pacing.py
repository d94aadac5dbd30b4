# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator import pacing
from edge_sdk.errors import ConfigError


def test_a_full_cohort_is_invited_at_once() -> None:
    pace = pacing.rounds(cohort=4, quorum=2, deadline_s=60)
    assert pace.invite(9, 0.0, 1.0) == 4
    assert pace.invite(3, 0.0, 1.0) == 0


def test_a_quorum_is_invited_after_select_s() -> None:
    pace = pacing.rounds(cohort=4, quorum=2, deadline_s=60, select_s=5)
    assert pace.invite(3, 4.9, 1.0) == 0
    assert pace.invite(3, 5.0, 1.0) == 3
    assert pace.invite(1, 99.0, 1.0) == 0


def test_over_selection_invites_more_than_the_cohort() -> None:
    pace = pacing.rounds(cohort=10, quorum=5, deadline_s=60, overselect=1.3)
    assert pace.invite(20, 0.0, 1.0) == 13


@pytest.mark.parametrize(("completion", "invited"), [(1.0, 10), (0.8, 13), (0.5, 20), (0.01, 30)])
def test_automatic_over_selection_follows_completion_up_to_three_times(
    completion: float, invited: int
) -> None:
    pace = pacing.rounds(cohort=10, deadline_s=60, overselect="auto")
    assert pace.invite(100, 0.0, completion) == invited


@given(st.integers(1, 50), st.integers(0, 200), st.floats(0, 100), st.floats(0, 1))
def test_no_pace_invites_more_than_are_ready_or_fewer_than_a_quorum(
    cohort: int, ready: int, waited_s: float, completion: float
) -> None:
    pace = pacing.rounds(cohort=cohort, deadline_s=1, overselect="auto")
    invited = pace.invite(ready, waited_s, completion)
    assert invited == 0 or pace.quorum <= invited <= ready


def test_the_quorum_is_half_the_cohort_unless_given() -> None:
    assert pacing.rounds(cohort=5, deadline_s=1).quorum == 3


def test_a_pace_is_spelled_the_same_in_toml() -> None:
    pace = pacing.rounds(cohort=20, quorum=12, deadline_s=600, count=50)
    assert pacing.from_spec(pace.spec).spec == pace.spec


@pytest.mark.parametrize(
    "settings",
    [
        {"cohort": 0},
        {"cohort": 2, "quorum": 3},
        {"quorum": 0},
        {"deadline_s": 0},
        {"deadline_s": float("inf")},
        {"deadline_s": "soon"},
        {"count": 0},
        {"cohort": 2.5},
        {"overselect": 0.5},
        {"overselect": 4},
        {"select_s": -1},
        {"patience": 3},
    ],
)
def test_settings_that_make_no_sense_are_configuration_errors(settings: dict[str, Any]) -> None:
    good: dict[str, Any] = {"cohort": 4, "deadline_s": 60}
    with pytest.raises(ConfigError):
        pacing.from_spec(["rounds", good | settings])


@pytest.mark.parametrize("spec", ["rounds", ["rounds"], ["hurry", {}], ["rounds", 3], 7])
def test_a_malformed_pace_is_a_configuration_error(spec: object) -> None:
    with pytest.raises(ConfigError, match="pace"):
        pacing.from_spec(spec)


def test_a_buffer_keeps_its_concurrency_at_work_and_has_no_quorum() -> None:
    pace = pacing.buffered(size=5, concurrency=20, deadline_s=600, max_staleness=4, count=9)
    assert (pace.size, pace.quorum, pace.cohort, pace.max_staleness) == (5, 0, 20, 4)
    assert [pace.invite(n, 0.0, 1.0) for n in (0, 3, 50)] == [0, 3, 20]
    assert pacing.from_spec(pace.spec).spec == pace.spec


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"concurrency": 4}, "at least size 5"),
        ({"max_staleness": -1}, "max_staleness from 0"),
        ({"max_staleness": 101}, "max_staleness from 0 to 100"),
        ({"size": 0}, "quorum"),
        ({"quorum": 3}, "it takes size, concurrency, deadline_s, max_staleness, count"),
    ],
)
def test_a_buffer_that_makes_no_sense_is_refused(settings: dict[str, Any], says: str) -> None:
    good: dict[str, Any] = {"size": 5, "concurrency": 20, "deadline_s": 60}
    with pytest.raises(ConfigError, match=says):
        pacing.from_spec(["buffered", good | settings])


def test_the_deadline_follows_what_nine_of_ten_devices_need() -> None:
    pace = pacing.rounds(cohort=4, deadline_s=600, adapt=2.0)
    assert pace.time_for([5.0] * 19) == 600
    assert pace.time_for([5.0] * 18 + [50.0, 50.0]) == 10
    assert pace.time_for([5.0] * 17 + [50.0] * 3) == 100
    assert pace.time_for([0.1] * 20) == 1.0
    assert pace.time_for([900.0] * 20) == 600
    assert pacing.rounds(cohort=4, deadline_s=600).time_for([1.0] * 99) == 600


@pytest.mark.parametrize("settings", [{"extend": -1}, {"extend": 1.5}, {"adapt": 0.5}])
def test_a_patience_that_makes_no_sense_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"expected (extend|adapt)"):
        pacing.rounds(cohort=4, deadline_s=60, **settings)
