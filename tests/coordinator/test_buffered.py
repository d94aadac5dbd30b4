# SPDX-License-Identifier: Apache-2.0
"""The buffered pace: a version for every few updates, and nobody waits for the slowest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fake_fleet import BUNDLE, FakeDevice, World, body, play

from coordinator import ledger, pacing, strategy
from coordinator.pacing import Pace
from coordinator.task import Task
from edge_sdk import codec, params, topics
from edge_sdk.errors import ConfigError


def buffer(size: int = 2, concurrency: int = 4, count: int | None = 3, stale: int = 10) -> Pace:
    return pacing.buffered(
        size=size, concurrency=concurrency, deadline_s=60, count=count, max_staleness=stale
    )


def task(**changes: object) -> Task:
    return Task("t", BUNDLE, codec="dense", downlink="dense", **changes)  # type: ignore[arg-type]


def working(devices: list[FakeDevice], count: int) -> Callable[[], bool]:
    """Whether `count` invitations are out that were not answered."""

    def holds() -> bool:
        asked = [{i.round for _, i in d.invites} for d in devices]
        done = [{r.round for r in d.receipts} for d in devices]
        return sum(len(a - b) for a, b in zip(asked, done, strict=True)) == count

    return holds


def test_a_version_is_made_for_every_full_buffer_while_the_slow_ones_work_on(
    tmp_path: Path,
) -> None:
    async def story(world: World) -> None:
        devices = world.devices(4)
        slow, quick = devices[:2], devices[2:]
        async with world.coordinator((task(), buffer())) as coordinator:
            await world.until(working(devices, 4))
            for number in (1, 2, 3):
                for device in quick:
                    await world.until(lambda d=device, n=number: d.invites[-1][1].round >= n)
                    device.report()
                await world.until(lambda n=number: len(world.results) == n)
            assert coordinator.fleet.lately_s["t"]
        assert [(r.version, r.outcome) for r in world.results] == [(i, "commit") for i in (1, 2, 3)]
        assert all(len(d.invites) == 1 for d in slow)
        assert world.clock.monotonic() == 0

    play(tmp_path, story)


def test_a_stale_update_fills_the_buffer_with_less_weight(tmp_path: Path) -> None:
    strategy_ = strategy.fedbuff(staleness=1.0)

    async def story(world: World) -> None:
        devices = world.devices(3)
        async with world.coordinator((task(strategy=strategy_), buffer(2, 3, 2))) as coordinator:
            await world.until(working(devices, 3))
            devices[1].report()
            devices[2].report()
            await world.until(lambda: len(world.results) == 1)
            await world.until(lambda: len(devices[1].invites) == 2)
            devices[0].report(1)
            await world.until(lambda: devices[0].outcomes() == ["late"])
            devices[1].report()
            await world.until(lambda: len(world.results) == 2)
            one, two = [await coordinator.params(task(), v) for v in (1, 2)]
        deltas = [
            params.flatten(codec.decode(body(s), BUNDLE.shapes), BUNDLE.shapes)
            for s in (1001, 2002)
        ]
        got = params.flatten(two, BUNDLE.shapes) - params.flatten(one, BUNDLE.shapes)
        np.testing.assert_allclose(got, (0.5 * deltas[0] + deltas[1]) / 2, atol=1e-5)
        assert world.results[1].late == (devices[0].id,)

    play(tmp_path, story)


def test_who_reports_is_replaced_at_once(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        devices = world.devices(6)
        async with world.coordinator((task(), buffer(4, 4, 1))):
            await world.until(working(devices, 4))
            first = [d for d in devices if d.invites]
            first[0].report()
            first[1].report()
            await world.until(lambda: all(d.invites for d in devices))
            assert all(i.round == 1 for d in devices for _, i in d.invites)
            assert not world.results
            rows = ledger.rounds(world.folder, "t")
            assert len(rows[0]["cohort"]) == 6

    play(tmp_path, story)


def test_an_update_too_far_behind_is_answered_stale(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        devices = world.devices(3)
        async with world.coordinator((task(), buffer(2, 3, 4, stale=1))):
            await world.until(working(devices, 3))
            for number in (1, 2):
                for device in devices[1:]:
                    await world.until(lambda d=device, n=number: d.invites[-1][1].round >= n)
                    device.report()
                await world.until(lambda n=number: len(world.results) == n)
            devices[0].report(1)
            await world.until(lambda: devices[0].receipts)
            (receipt,) = devices[0].receipts
            assert receipt.outcome == "stale"
            assert receipt.reason == "2 versions behind, this task takes up to 1"
            await world.until(lambda: len(devices[0].invites) == 2)

    play(tmp_path, story)


def test_what_was_counted_is_never_called_stale_afterwards(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        devices = world.devices(3)
        async with world.coordinator((task(), buffer(2, 3, 4, stale=1))):
            await world.until(working(devices, 3))
            for device in devices[1:]:
                device.report()
            await world.until(lambda: len(world.results) == 1)
            frame = devices[0].report(1)
            await world.until(lambda: devices[0].outcomes() == ["late"])
            for number in (2, 3):
                for device in devices[1:]:
                    await world.until(lambda d=device, n=number: d.invites[-1][1].round >= n)
                    device.report()
                await world.until(lambda n=number: len(world.results) >= n)
            devices[0].transport.publish(topics.up("t", devices[0].id, "update"), frame)
            await world.until(lambda: len(devices[0].receipts) == 2)
            late, again = devices[0].receipts
            assert (again.outcome, again.counted) == ("duplicate", late.update)

    play(tmp_path, story)


def test_a_silent_device_is_given_up_after_its_time_and_another_is_invited(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        devices = world.devices(3)
        async with world.coordinator((task(), buffer(2, 2, 1))):
            await world.until(working(devices, 2))
            (idle,) = [d for d in devices if not d.invites]
            world.clock.advance(61)
            await world.until(lambda: idle.invites)
            assert not world.results

    play(tmp_path, story)


def test_who_leaves_makes_room(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        devices = world.devices(3)
        async with world.coordinator((task(), buffer(2, 2, 1))):
            await world.until(working(devices, 2))
            (idle,) = [d for d in devices if not d.invites]
            gone = next(d for d in devices if d.invites)
            world.broker.cut(gone.id)
            await world.until(lambda: idle.invites)

    play(tmp_path, story)


def test_a_restart_goes_on_with_the_same_buffer(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        devices = world.devices(5)
        async with world.coordinator((task(), buffer(4, 4, 1))):
            await world.until(working(devices, 4))
            first = [d for d in devices if d.invites]
            for device in first[:3]:
                device.report()
            await world.until(lambda: sum(len(d.receipts) for d in devices) == 3)
        async with world.coordinator((task(), buffer(4, 4, 1))):
            await world.until(lambda: all(d.offers["t"].call == 2 for d in devices))
            first[3].report()
            await world.until(lambda: world.results)
        assert len(world.results[0].reported) == 4
        assert [len(d.receipts) for d in first] == [1] * 4

    play(tmp_path, story)


def test_a_buffer_needs_late_updates(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        async with world.coordinator() as coordinator:
            with pytest.raises(ConfigError, match="a buffered pace lives on late updates"):
                await anext(coordinator.train(task(late="refuse"), buffer()))

    play(tmp_path, story)


def test_a_round_without_a_quorum_is_given_its_time_again_as_often_as_asked(
    tmp_path: Path,
) -> None:
    pace = pacing.rounds(cohort=3, quorum=2, deadline_s=60, count=1, extend=1)

    async def story(world: World) -> None:
        devices = world.devices(3)
        async with world.coordinator((task(), pace)) as coordinator:
            await world.until(lambda: all(d.invites for d in devices))
            devices[0].report()
            await world.until(lambda: coordinator.counters["counted"] == 1)
            world.clock.advance(61)
            await world.until(lambda: coordinator._intake.desks["t"].current is not None)
            devices[1].report()
            await world.until(lambda: coordinator.counters["counted"] == 2)
            assert not world.results
            world.clock.advance(60)
            await world.until(lambda: world.results)
        assert (world.results[0].outcome, len(world.results[0].reported)) == ("commit", 2)

    play(tmp_path, story)


def test_the_deadline_of_later_rounds_follows_what_the_fleet_needs(tmp_path: Path) -> None:
    pace = pacing.rounds(cohort=20, deadline_s=600, count=2, adapt=2.0)

    async def story(world: World) -> None:
        devices = world.devices(20)
        async with world.coordinator((task(), pace)):
            await world.until(lambda: all(d.invites for d in devices))
            world.clock.advance(7)
            for device in devices:
                device.report()
            await world.until(lambda: all(len(d.invites) == 2 for d in devices))
        assert [i.deadline_s for _, i in devices[0].invites] == [600.0, 14.0]

    play(tmp_path, story)
