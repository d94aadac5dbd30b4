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
