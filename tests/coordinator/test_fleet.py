# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace

from coordinator.fleet import Fleet, Known


def born(device: str, boot: int = 1, *, online: bool = True) -> Known:
    return Known(device, b"k" * 32, online=online, boot=boot)


def test_a_device_is_ready_when_online_and_checked_in_for_the_call() -> None:
    fleet = Fleet()
    for device in ("b", "a", "away"):
        fleet.status(born(device, online=device != "away"))
        fleet.check_in("t", device, 3, 10)
    assert fleet.ready("t") == {"a", "b"}
    assert not fleet.ready("other")
    fleet.recall("t")
    assert not fleet.ready("t")


def test_a_check_in_outlives_a_lost_connection_but_not_a_restart() -> None:
    fleet = Fleet()
    fleet.status(born("a"))
    fleet.check_in("t", "a", 1, 10)
    fleet.status(born("a", online=False))
    assert not fleet.ready("t")
    fleet.status(born("a"))
    assert fleet.ready("t") == {"a"}
    fleet.status(born("a", boot=2))
    assert not fleet.ready("t")


def test_the_will_of_an_old_session_does_not_take_a_new_one_away() -> None:
    fleet = Fleet()
    fleet.status(born("a", boot=5))
    assert not fleet.status(born("a", boot=4, online=False))
    assert fleet.is_online("a")


def test_numbers_follow_the_order_of_coming_and_are_never_given_twice() -> None:
    fleet = Fleet()
    fleet.remember(replace(born("b"), number=4))  # 5 was never stored: the disk refused it
    fleet.remember(replace(born("a"), number=0))
    fleet.status(born("c"))
    fleet.status(born("b", boot=2))
    assert {d: known.number for d, known in fleet.devices.items()} == {"b": 4, "a": 0, "c": 5}
    assert len(fleet.standings("t")) == 6


def test_a_device_withdraws() -> None:
    fleet = Fleet()
    fleet.status(born("a"))
    fleet.check_in("t", "a", 1, 10)
    fleet.withdraw("t", "a")
    fleet.withdraw("t", "stranger")
    assert not fleet.ready("t")


def test_a_remembered_device_has_a_key_but_is_not_online() -> None:
    fleet = Fleet()
    fleet.remember(born("a"))
    assert fleet.key("a") == b"k" * 32
    assert not fleet.is_online("a")
    assert fleet.key("stranger") is None


def test_completion_is_a_moving_average_that_starts_at_one() -> None:
    fleet = Fleet()
    assert fleet.completion_of("t") == 1.0
    fleet.completed("t", 10, 6)
    assert fleet.completion_of("t") == 0.9
    for _ in range(40):
        fleet.completed("t", 10, 6)
    assert abs(fleet.completion_of("t") - 0.6) < 1e-4


def test_a_device_that_was_not_heard_of_has_not_left() -> None:
    fleet = Fleet()
    fleet.remember(born("a"))
    assert not fleet.has_left("a")
    fleet.status(born("a", online=False))
    assert fleet.has_left("a")
    fleet.status(born("a"))
    assert not fleet.has_left("a")


def test_a_device_that_lost_count_of_its_starts_is_still_believed() -> None:
    fleet = Fleet()
    fleet.status(born("a", boot=5, online=False))
    assert fleet.status(born("a", boot=1))
    assert fleet.is_online("a")
