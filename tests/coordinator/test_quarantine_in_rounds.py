# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_fleet import BUNDLE, FakeDevice, World, body, invited, play

from coordinator import ledger, pacing
from coordinator.cli import main
from coordinator.pacing import Pace
from coordinator.quarantine import Rules
from coordinator.task import Task
from edge_sdk import topics
from edge_sdk.errors import ConfigError
from edge_sdk.signing import DeviceKey

RULES = Rules(strikes=2, window=10, rounds=3, hours=5)


def pace(cohort: int = 3, quorum: int = 2) -> Pace:
    return pacing.rounds(cohort=cohort, quorum=quorum, deadline_s=60)


def task(**changes: Any) -> Task:
    options: dict[str, Any] = {"codec": "dense", "downlink": "dense", "quarantine": RULES}
    return Task("t", BUNDLE, **(options | changes))


def was_invited(device: FakeDevice) -> list[int]:
    return sorted({i.round for _, i in device.invites})


BAD: dict[str, dict[str, Any]] = {
    "too large": {"body": body(1, scale=1e6)},
    "not a body": {"body": b"nonsense"},
    "of another shape": {"body": body(1)[:-40]},
    "from no examples": {"examples": 0},
}


async def round_with_a_bad_device(
    world: World, devices: list[FakeDevice], number: int, **bad: Any
) -> None:
    """All of `devices` are invited; the first sends something bad, the others report."""
    await world.until(invited(devices, number))
    devices[0].report(number, **(bad or BAD["too large"]))
    for device in devices[1:]:
        device.report(number)
    await world.until(lambda: len(world.results) == number)
    await world.until(lambda: len(devices[0].outcomes(number)) == 1)


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_device_with_bad_updates_sits_out_and_comes_back(
    tmp_path: Path, bad: dict[str, Any]
) -> None:
    async def story(world: World) -> None:
        devices = world.devices(3)
        async with world.coordinator((task(), pace())) as coordinator:
            await round_with_a_bad_device(world, devices, 1, **bad)
            assert world.clock.monotonic() == 0, "a round does not wait for who was refused"
            world.clock.advance(6)  # two of three ready for a full cohort of three: select_s
            await round_with_a_bad_device(world, devices, 2, **bad)
            assert coordinator.counters["quarantined"] == 1
            for number in (3, 4, 5):
                await world.until(lambda: coordinator.fleet.ready("t") == ids(devices[1:]))
                world.clock.advance(6)
                await world.until(invited(devices[1:], number))
                for device in devices[1:]:
                    device.report(number)
                await world.until(lambda n=number: len(world.results) == n)
            await world.until(invited(devices, 6))
        assert was_invited(devices[0]) == [1, 2, 6]
        refused = [r.reason for r in devices[0].receipts]
        assert len(refused) == 2
        row = ledger.fleet(world.folder)[sorted(ids(devices)).index(devices[0].id)]
        assert row["quarantine"] == {}, "its term is over"

    play(tmp_path, story)


def ids(devices: list[FakeDevice]) -> set[str]:
    return {d.id for d in devices}


async def set_aside(world: World, devices: list[FakeDevice]) -> None:
    await round_with_a_bad_device(world, devices, 1)
    world.clock.advance(6)
    await round_with_a_bad_device(world, devices, 2)


def test_it_is_told_until_when_also_after_a_restart(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        devices = world.devices(3)
        async with world.coordinator((task(), pace(3, 2))):
            await set_aside(world, devices)
        async with world.coordinator((task(), pace(3, 2))) as again:
            await world.until(lambda: again.fleet.ready("t") == ids(devices[1:]))
            devices[0].report(2, body=body(5))  # a good one, but too late for that
            await world.until(lambda: len(devices[0].outcomes(2)) == 2)
            answer = devices[0].receipts[-1]
            assert answer.outcome == "refused"
            assert answer.reason.startswith("in quarantine until round 6 of this task")
            assert "norm" in answer.reason
        assert was_invited(devices[0]) == [1, 2]
        held = {row["id"]: row["quarantine"] for row in ledger.fleet(world.folder)}
        assert held[devices[0].id]["t"]["until_round"] == 6
        assert held[devices[1].id] == {}

    play(tmp_path, story)


def test_the_same_bad_update_is_one_strike_however_often_it_comes(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        devices = world.devices(3)
        async with world.coordinator((task(), pace())) as coordinator:
            await world.until(invited(devices, 1))
            frame = devices[0].report(1, **BAD["too large"])
            topic = topics.up("t", devices[0].id, "update")
            await world.until(lambda: len(devices[0].receipts) == 1)
            for _ in range(5):
                devices[0].transport.publish(topic, frame)
            await world.until(lambda: len(devices[0].receipts) == 6)
            assert len({(r.outcome, r.reason) for r in devices[0].receipts}) == 1
            assert coordinator.counters["quarantined"] == 0

    play(tmp_path, story)


def test_who_was_refused_is_not_invited_to_the_same_round_again(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        devices = world.devices(3)
        async with world.coordinator((task(), pace(3, 2))):
            await world.until(invited(devices, 1))
            devices[0].report(1, **BAD["too large"])
            await world.until(lambda: devices[0].receipts)
            devices[0].check_in()  # as after a reconnect
            devices[1].report(1)
            devices[2].report(1)
            await world.until(lambda: world.results)
            assert world.clock.monotonic() == 0, "the round did not wait for it"
            assert len(devices[0].invites) == 1
            world.clock.advance(6)
            await world.until(invited(devices, 2))  # but to the next

    play(tmp_path, story)


def test_what_others_send_in_its_name_is_not_held_against_a_device(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        devices = world.devices(3)
        thief = DeviceKey.from_seed(b"\x77" * 32)
        async with world.coordinator((task(), pace())) as coordinator:
            await world.until(invited(devices, 1))
            topic = topics.up("t", devices[0].id, "update")
            for i in range(6):
                update = devices[0].update(1, steps=i, **BAD["too large"])
                devices[1].transport.publish(topic, devices[0].frame(update, topic, thief))
                devices[1].transport.publish(topic, devices[0].frame(update, topic)[:-9])
                devices[1].transport.publish(topic, bytes(40))
            await world.until(lambda: coordinator.counters["forged"] == 6)
            await world.until(lambda: coordinator.counters["malformed"] == 12)
            devices[0].report(1)
            await world.until(lambda: devices[0].outcomes() == ["counted"])
            assert coordinator.counters["quarantined"] == 0

    play(tmp_path, story)


def test_an_update_to_a_round_that_one_was_not_invited_to_is_no_strike(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        devices = world.devices(3)
        async with world.coordinator((task(), pace())) as coordinator:
            await world.until(invited(devices, 1))
            stranger = FakeDevice(world.broker, 9)
            stranger.start()
            await world.until(lambda: len(coordinator.fleet.devices) == 4 and stranger.offers)
            stranger.invites = [*devices[0].invites]
            for steps in range(4):
                stranger.report(1, steps=steps)
            await world.until(lambda: stranger.outcomes() == ["refused"] * 4)
            assert coordinator.counters["quarantined"] == 0

    play(tmp_path, story)


def test_an_operator_lets_a_device_out_of_a_running_coordinator(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def story(world: World) -> None:
        devices = world.devices(3)
        store = ["--store", str(world.folder)]
        async with world.coordinator((task(), pace(3, 3))) as coordinator:
            await set_aside(world, devices)
            assert main(["fleet", *store]) == 0
            assert "t:until-round-6" in capsys.readouterr().out
            assert main(["release", devices[0].id, *store, "--json"]) == 0
            assert json.loads(capsys.readouterr().out)["tasks"] == ["t"]
            assert coordinator.fleet.ready("t") == ids(devices[1:])
            world.clock.advance(11)
            await world.until(invited(devices, 3))
        with pytest.raises(ConfigError, match="nothing is held against"):
            main(["release", devices[0].id, *store])

    play(tmp_path, story)


def test_a_task_whose_devices_are_all_held_goes_on_after_hours(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        devices = world.devices(3)
        async with world.coordinator((task(), pace(3, 3))) as coordinator:
            await set_aside(world, devices)  # a quorum of three: no round can begin without it
            desk = coordinator._intake.desks["t"]
            world.clock.advance(11)
            await world.until(lambda: desk.held_since)
            world.clock.advance(5 * 3600 - 1)
            await coordinator._warden.heed()
            assert coordinator.fleet.ready("t") == ids(devices[1:])
            world.clock.advance(11)
            await world.until(invited(devices, 3))

    play(tmp_path, story)


def test_without_strikes_nobody_is_set_aside(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        devices = world.devices(3)
        async with world.coordinator((task(quarantine=Rules(strikes=0)), pace())) as coordinator:
            for number in range(1, 5):
                await round_with_a_bad_device(world, devices, number)
                world.clock.advance(6)
            assert coordinator.counters["quarantined"] == 0

    play(tmp_path, story)
