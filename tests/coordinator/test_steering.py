# SPDX-License-Identifier: Apache-2.0
"""When a fleet is asked to answer, when devices are told to come back, and what waits meanwhile."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from pathlib import Path

import pytest
from fake_fleet import BUNDLE, World, invited, play

from coordinator import pacing, service
from coordinator.fleet import Known
from coordinator.pacing import Pace
from coordinator.task import Task
from coordinator.writer import Writer
from edge_sdk.errors import ConfigError

TASK = Task("t", BUNDLE, codec="dense", downlink="dense")


def pace(rest_s: float = 0.0, cohort: int = 3, count: int | None = None) -> Pace:
    return pacing.rounds(cohort=cohort, quorum=2, deadline_s=60, rest_s=rest_s, count=count)


@pytest.mark.parametrize(
    ("devices", "spread_s"),
    [(0, None), (3, None), (1000, None), (2000, 2.0), (10_000, 10.0), (1_000_000, 300.0)],
)
def test_a_roll_call_is_spread_by_the_size_of_the_fleet(
    devices: int, spread_s: float | None
) -> None:
    assert pacing.spread_s(devices) == spread_s


def test_the_offer_of_a_large_fleet_carries_its_spread(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        devices = world.devices(3)
        async with world.coordinator((TASK, pace())) as coordinator:
            await world.until(invited(devices, 1))
            assert devices[0].offers["t"].spread_s is None
            more = [Known(f"d{i:015x}", b"k" * 32) for i in range(1997)]
            await asyncio.gather(*map(coordinator._store.remember, more))
        async with world.coordinator((TASK, pace())):
            await world.until(lambda: devices[0].offers["t"].call == 2)
            assert devices[0].offers["t"].spread_s == 2.0

    play(tmp_path, story)


def test_a_pace_with_a_rest_says_so_in_receipts_and_keeps_to_it(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        devices = world.devices(3)
        async with world.coordinator((TASK, pace(rest_s=100.0))):
            await world.until(invited(devices, 1))
            for device in devices:
                device.report(1)
            await world.until(lambda: len(world.results) == 1)
            await world.until(lambda: all(d.receipts for d in devices))
            assert [d.receipts[0].rest_s for d in devices] == [100.0] * 3
            world.clock.advance(60)
            devices[0].report(1)  # sent again while all rest: what is left of it
            await world.until(lambda: len(devices[0].receipts) == 2)
            assert devices[0].receipts[1].rest_s == 40.0
            assert not invited(devices, 2)()
            world.clock.advance(39.9)
            devices[1].report(1)
            await world.until(lambda: len(devices[1].receipts) == 2)
            assert not invited(devices, 2)()
            world.clock.advance(0.2)
            await world.until(invited(devices, 2))

    play(tmp_path, story)


def test_without_a_rest_receipts_are_as_they_were(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        devices = world.devices(3)
        async with world.coordinator((TASK, pace())):
            await world.until(invited(devices, 1))
            devices[0].report(1)
            await world.until(lambda: devices[0].receipts)
            assert devices[0].receipts[0].rest_s is None

    play(tmp_path, story)


@pytest.mark.parametrize("bad", [-1, 1e9, "x", True])
def test_a_rest_is_a_number_of_seconds(bad: float) -> None:
    with pytest.raises(ConfigError, match="rest_s"):
        pace(rest_s=bad)


def test_while_the_disk_stalls_messages_wait_at_the_broker_and_not_in_memory(
    tmp_path: Path,
) -> None:
    sent, stalled = 900, threading.Event()

    async def story(world: World) -> None:
        devices = world.devices(3)
        async with world.coordinator((TASK, pace())) as coordinator:
            await world.until(invited(devices, 1))
            writer = coordinator._store._writer
            assert isinstance(writer, Writer)

            def stall(_db: sqlite3.Connection) -> None:
                assert stalled.wait(30)

            stalling = asyncio.create_task(writer.run(stall, urgent=True))
            before = coordinator.counters["messages"]
            for loss in range(sent // 3):
                for device in devices:
                    device.report(1, loss=float(loss))
            world.broker.pump()
            slots = coordinator._slots
            await world.until(slots.locked)
            for _ in range(50):
                await asyncio.sleep(0)
            taken = coordinator.counters["messages"] - before
            assert taken == service.IN_FLIGHT + 1, "one more is read and waits for a place"
            assert len(coordinator._work) <= service.IN_FLIGHT + 1
            assert writer._queue.qsize() <= service.IN_FLIGHT
            assert not any(d.receipts for d in devices), "no receipt without a commit"
            stalled.set()
            await stalling
            await world.until(lambda: sum(len(d.receipts) for d in devices) == sent)
            outcomes = [outcome for d in devices for outcome in d.outcomes()]
            assert outcomes.count("counted") == 3
            assert outcomes.count("duplicate") == sent - 3

    play(tmp_path, story)
