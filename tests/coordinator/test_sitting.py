# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import random

import pytest

from coordinator.fleet import Fleet, Known
from coordinator.sitting import Age, Sitting, age

NOW = Sitting(5, 77, 3)


@pytest.mark.parametrize(
    ("said", "is_over", "is_will", "found"),
    [
        (NOW, False, False, Age.FRESH),
        (NOW, False, True, Age.FRESH),
        (NOW, True, False, Age.OLD),
        (NOW, True, True, Age.FRESH),
        (Sitting(5, 77, 4), True, False, Age.FRESH),
        (Sitting(5, 77, 2), False, True, Age.OLD),
        (Sitting(5, 77, 2), False, False, Age.OLD),
        (Sitting(6, 78, 1), False, False, Age.ANEW),
        (Sitting(6, 78, 1), False, True, Age.ANEW),
        (Sitting(5, 78, 9), False, False, Age.UNPROVEN),
        (Sitting(1, 78, 9), True, True, Age.UNPROVEN),
        (Sitting(2, 77, 3), False, True, Age.FRESH),  # signed before its count was put right
        (Sitting(4, 0, 0), False, False, Age.OLD),
        (Sitting(6, 0, 0), False, False, Age.ANEW),
    ],
)
def test_what_is_older_is_known_by_its_numbers(
    said: Sitting, is_over: bool, is_will: bool, found: Age
) -> None:
    assert age(NOW, said, is_over=is_over, is_will=is_will) is found


@pytest.mark.parametrize(
    ("boot", "is_will", "found"),
    [(6, False, Age.ANEW), (5, True, Age.FRESH), (4, False, Age.FRESH), (4, True, Age.OLD)],
)
def test_a_device_that_tells_no_start_is_judged_by_its_count_alone(
    boot: int, is_will: bool, found: Age
) -> None:
    assert age(Sitting(5), Sitting(boot), is_over=True, is_will=is_will) is found


def status(boot: int, start: int, connection: int, *, online: bool = True) -> Known:
    return Known("a", b"k" * 32, "", "", online, boot, start=start, connection=connection)


def life() -> list[Known]:
    """Return all that a device says of three starts of three connections each, in order."""
    numbers = itertools.product((1, 2, 3), (1, 2, 3), (True, False))
    return [status(boot, 100 - boot, c, online=online) for boot, c, online in numbers]


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_played_back_the_fleet_is_as_if_it_was_not(seed: int) -> None:
    rng, fleet, said = random.Random(seed), Fleet(), life()  # noqa: S311 - repeats by its seed
    for i, frame in enumerate(said):
        fleet.status(frame)
        expected = fleet.devices["a"]
        for old in rng.choices(said[: i + 1], k=5):
            fleet.status(old)
            assert fleet.devices["a"] == expected, f"seed {seed}: {old} after {frame}"


@pytest.mark.parametrize("seed", range(20))
def test_in_whatever_order_it_arrives_the_last_word_holds(seed: int) -> None:
    rng, fleet, said = random.Random(seed), Fleet(), life()  # noqa: S311 - repeats by its seed
    shuffled = said * 2
    rng.shuffle(shuffled)
    for frame in [said[0], *shuffled]:
        fleet.status(frame)
    assert fleet.devices["a"].sitting == said[-1].sitting, f"seed {seed}"
    assert not fleet.is_online("a")


def test_a_store_that_saw_the_will_is_not_told_otherwise_by_the_status_before_it() -> None:
    fleet = Fleet()
    fleet.remember(status(4, 9, 2, online=False))
    assert not fleet.status(status(4, 9, 2))
    assert fleet.said("t", "a", Sitting(4, 9, 2), 7) is Age.OLD
    assert fleet.said("t", "a", Sitting(4, 9, 3), 8) is Age.FRESH
    assert fleet.is_online("a")


def test_a_check_in_counts_once_and_in_order_for_each_task() -> None:
    fleet = Fleet()
    fleet.status(status(1, 9, 1))
    now = Sitting(1, 9, 1)
    said = [fleet.said(task, "a", now, turn) for task, turn in (("t", 2), ("t", 2), ("t", 1))]
    assert said == [Age.FRESH, Age.OLD, Age.OLD]
    assert fleet.said("u", "a", now, 1) is Age.FRESH
    assert fleet.said("t", "a", now, 3) is Age.FRESH


def test_a_check_in_tells_that_its_device_is_here_and_began_anew() -> None:
    fleet = Fleet()
    fleet.status(status(1, 9, 1))
    fleet.said("t", "a", Sitting(1, 9, 1), 5)
    fleet.check_in("t", "a", 1, 10)
    assert fleet.said("t", "a", Sitting(2, 8, 1), 1) is Age.ANEW
    assert (fleet.devices["a"].sitting, fleet.ready("t")) == (Sitting(2, 8, 1), set())
    assert fleet.said("t", "a", Sitting(1, 9, 1), 6) is Age.UNPROVEN
    assert not fleet.status(status(1, 9, 1, online=False))
    assert fleet.is_online("a")


def test_a_start_whose_count_was_put_right_ends_with_the_will_it_was_signed_with() -> None:
    fleet = Fleet()
    fleet.status(status(50, 7, 3))
    assert not fleet.status(status(1, 9, 1))
    assert fleet.status(status(51, 9, 1))
    assert fleet.status(status(1, 9, 1, online=False))
    assert not fleet.is_online("a")
    assert fleet.devices["a"].boot == 51
    assert not fleet.status(status(50, 7, 3))
