# SPDX-License-Identifier: Apache-2.0
"""`fedge coordinator why` tells of each round what happened, and what happened alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_fleet import BUNDLE, FakeDevice, World, body, invited, play

from coordinator import pacing
from coordinator.cli import main
from coordinator.docket import REFUSALS_KEPT
from coordinator.quarantine import Rules
from coordinator.task import Task
from coordinator.why import why
from edge_sdk.errors import ConfigError, StoreError

PACE = pacing.rounds(cohort=2, quorum=2, deadline_s=60)
RULES = Rules(strikes=1, window=2, rounds=2)
TASK = Task("t", BUNDLE, codec="dense", downlink="dense", quarantine=RULES)


def rounds_of(world: World, device: FakeDevice, **options: Any) -> dict[int, dict[str, Any]]:
    (task,) = why(world.folder, device.id, **options)["tasks"]
    return {row["round"]: row for row in task["rounds"]}


def test_each_way_of_not_being_drawn_is_told(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        one, two, idle, away, stranger = world.devices(5)
        idle.checks_in = False
        world.broker.cut(away.id)
        listed = [d.id for d in (one, two, idle, away)]
        task = Task("t", BUNDLE, codec="dense", downlink="dense", devices=listed)
        async with world.coordinator((task, PACE)) as coordinator:
            await world.until(invited([one, two], 1))
            await world.until(lambda: len(coordinator.fleet.devices) == 5)
            one.report(1)
            two.report(1)
            await world.until(invited([one, two], 2))
            late = FakeDevice(world.broker, 9)
            late.start()
            await world.until(lambda: len(coordinator.fleet.devices) == 6)
        assert rounds_of(world, one)[2]["standing"] == "invited"
        assert rounds_of(world, one)[2]["end"] == "open"
        assert rounds_of(world, idle)[2]["standing"] == "not checked in"
        assert rounds_of(world, away)[2]["standing"] == "offline"
        assert rounds_of(world, stranger)[2]["standing"] == "not in the task's list of devices"
        assert rounds_of(world, late)[2]["standing"] == "not seen before"
        assert rounds_of(world, idle)[2]["end"] is None

    play(tmp_path, story)


def test_who_was_ready_and_not_drawn_is_told_so(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        devices = world.devices(3)
        async with world.coordinator((TASK, PACE)) as coordinator:
            await world.until(lambda: len(coordinator.fleet.ready("t")) >= 2)
            drawn: list[FakeDevice] = []
            for number in (1, 2, 3):
                await world.until(
                    lambda n=number: (
                        sum(invited([d], n)() for d in devices) == 2
                        and len(coordinator.fleet.ready("t")) == 3
                    )
                )
                drawn = [d for d in devices if invited([d], number)()]
                for device in drawn:
                    device.report(number)
                await world.until(lambda n=number: len(world.results) == n)
            left_out = next(d for d in devices if d not in drawn)
        assert rounds_of(world, left_out)[3]["standing"] == "ready, not drawn"
        assert [rounds_of(world, d)[3]["standing"] for d in drawn] == ["invited", "invited"]

    play(tmp_path, story)


def test_what_became_of_each_update_is_told_with_seconds_bytes_and_version(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def story(world: World) -> None:
        devices = world.devices(3)
        pace = pacing.rounds(cohort=3, quorum=2, deadline_s=60)
        async with world.coordinator((TASK, pace)) as coordinator:
            await world.until(invited(devices, 1))
            world.clock.advance(7.5)
            sizes = [len(d.report(1)) for d in devices[:2]]
            await world.until(lambda: all(d.receipts for d in devices[:2]))
            world.clock.advance(60)
            await world.until(lambda: world.results)
            world.clock.advance(20)
            devices[2].report(1)  # 27.5 s beyond the deadline
            await world.until(lambda: devices[2].outcomes() == ["late"])
            await world.until(invited(devices, 2))
            devices[0].report(2, body=body(1, scale=1e6))
            await world.until(lambda: devices[0].outcomes(2) == ["refused"])
            devices[1].report(2)
            world.broker.cut(devices[2].id)
            await world.until(lambda: len(world.results) == 2)
            world.clock.advance(6)
            await world.until(lambda: coordinator.counters["quarantined"] == 1)
        rows = rounds_of(world, devices[0])
        assert rows[1]["receipts"] == [
            {
                "outcome": "counted",
                "reason": "",
                "bytes": sizes[0],
                "took_s": 7.5,
                "version": 1,
                "late_s": 0.0,
            }
        ]
        assert rows[2]["end"] == "refused"
        (refused,) = rows[2]["receipts"]
        assert "norm" in refused["reason"]
        assert refused["version"] is None
        late = rounds_of(world, devices[2])
        (receipt,) = late[1]["receipts"]
        assert (receipt["outcome"], receipt["late_s"], receipt["took_s"]) == ("late", 27.5, 87.5)
        assert late[2]["end"] == "left"
        assert late[2]["receipts"] == []
        found = why(world.folder, devices[0].id)
        assert found["tasks"][0]["quarantine"]["until_round"] == 5
        assert {k: found["tasks"][0][k] for k in ("counted", "late", "refused", "versions")} == {
            "counted": 1,
            "late": 0,
            "refused": 1,
            "versions": 1,
        }
        store = ["--store", str(world.folder)]
        assert main(["why", devices[0].id, *store]) == 0
        told = capsys.readouterr().out
        assert f"counted, after 7.5 s, {sizes[0]} bytes, in version 1" in told
        assert "in quarantine until round 5" in told
        main(["why", devices[2].id, *store, "--task", "t"])
        assert "late, after 87.5 s, 27.5 s beyond the deadline" in capsys.readouterr().out
        main(["why", devices[0].id, *store, "--json"])
        assert json.loads(capsys.readouterr().out) == found

    play(tmp_path, story)


def test_an_aborted_round_tells_of_stragglers_and_an_older_one_no_standing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.store.STANDINGS_KEPT", 1)

    async def story(world: World) -> None:
        devices = world.devices(3)
        async with world.coordinator((TASK, PACE)) as coordinator:
            for number in (1, 2):
                await world.until(lambda n=number: sum(invited([d], n)() for d in devices) == 2)
                world.clock.advance(61)
                await world.until(lambda n=number: len(world.results) == n)
                world.clock.advance(6)
            assert coordinator.counters["counted"] == 0
            await world.until(lambda: sum(invited([d], 3)() for d in devices) == 2)
        ends = {rounds_of(world, d)[1]["end"] for d in devices}
        assert ends <= {"straggler", None}
        assert "straggler" in ends
        left_out = [d for d in devices if not invited([d], 1)()]
        assert all(rounds_of(world, d)[1]["standing"] == "not kept any more" for d in left_out)
        assert list(rounds_of(world, devices[0], latest=2)) == [3, 2]

    play(tmp_path, story)


def test_what_is_kept_of_refusals_is_bounded(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        devices = world.devices(3)
        async with world.coordinator((TASK, PACE)) as coordinator:
            await world.until(lambda: sum(invited([d], 1)() for d in devices) == 2)
            device = next(d for d in devices if d.invites)
            for steps in range(REFUSALS_KEPT + 15):
                device.report(1, steps=steps, body=b"nonsense")
            await world.until(lambda: len(device.receipts) == REFUSALS_KEPT + 15)
            assert coordinator.counters["quarantined"] == 1
        (task,) = why(world.folder, device.id)["tasks"]
        assert task["refused"] == REFUSALS_KEPT

    play(tmp_path, story)


def test_a_device_or_task_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is none"):
        why(tmp_path, "d0123456789abcde")

    async def story(world: World) -> None:
        devices = world.devices(2)
        async with world.coordinator((TASK, PACE)):
            await world.until(invited(devices, 1))
        with pytest.raises(ConfigError, match="was ever seen"):
            why(world.folder, "d0123456789abcde")
        with pytest.raises(ConfigError, match="expected one of the tasks t, got x"):
            why(world.folder, devices[0].id, "x")

    play(tmp_path, story)
