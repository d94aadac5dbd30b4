# SPDX-License-Identifier: Apache-2.0
"""What the broker held for a dead coordinator comes before its tasks are open, and is not lost."""

from __future__ import annotations

import asyncio
from pathlib import Path

from fake_fleet import BUNDLE, World

from coordinator import intake, pacing
from coordinator.task import Task
from edge_sdk import topics

PACE = pacing.rounds(cohort=2, quorum=2, deadline_s=60, count=1)
TASK = Task("t", BUNDLE, codec="dense")


def test_an_update_that_came_while_the_coordinator_was_dead_need_not_be_sent_again(
    tmp_path: Path,
) -> None:
    async def story() -> list[list[str]]:
        world = World(tmp_path)
        devices = world.devices(2)
        async with world.coordinator((TASK, PACE)):
            await world.until(lambda: all(d.invites for d in devices))
        frames = {d.id: d.report() for d in devices}
        for device in devices:
            device.outbox.clear()  # nothing is sent again
        async with world.coordinator() as coordinator:
            for device, frame in frames.items():
                coordinator._intake.take(topics.up("t", device, "update"), frame)
            assert coordinator.counters["unknown_task"] == 2
            loop = asyncio.create_task(world._train(coordinator, TASK, PACE))
            await world.until(loop.done)
            await world.until(lambda: all(d.receipts for d in devices))
        return [d.outcomes() for d in devices]

    assert asyncio.run(story()) == [["counted"], ["counted"]]


def test_what_is_kept_of_tasks_that_are_not_there_is_bounded(tmp_path: Path) -> None:
    async def story() -> int:
        world = World(tmp_path)
        [device] = world.devices(1)
        async with world.coordinator((TASK, PACE)) as coordinator:
            await world.until(lambda: device.id in coordinator.fleet.ready("t"))
            kept = coordinator._intake
            for number in range(2 * intake.MOST_EARLY):
                kept.take(topics.up("other", device.id, "update"), bytes([number]))
            assert len(kept._early["other"]) == intake.MOST_EARLY
            world.clock.advance(intake.EARLY_S)
            kept._early.clear()
            kept.take(topics.up("other", device.id, "update"), b"late")
            assert not kept._early
            return coordinator.counters["unknown_task"]

    assert asyncio.run(story()) == 2 * intake.MOST_EARLY + 1
