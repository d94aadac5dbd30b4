# SPDX-License-Identifier: Apache-2.0
"""An upload that was cut off goes on where it was: only what is missing is sent again."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

from fake_fleet import BUNDLE, FakeDevice, World

from coordinator import pacing
from coordinator.task import Task
from edge_sdk import chunks, messages, topics
from edge_sdk.messages import Chunk, Missing


def play(tmp_path: Path, story: Callable[[World, FakeDevice], Awaitable[None]]) -> None:
    async def main() -> None:
        world = World(tmp_path / "store")
        (device,) = world.devices(1)
        pace = pacing.rounds(cohort=1, deadline_s=60, count=1)
        async with world.coordinator((Task("t", BUNDLE, codec="dense"), pace)):
            await world.until(lambda: device.invites)
            await story(world, device)

    asyncio.run(main())


def cut(device: FakeDevice, count: int = 5) -> list[Chunk]:
    frame = device.frame(device.update(), topics.up("t", device.id, "update"))
    digest, size = hashlib.sha256(frame).digest(), len(frame)
    cuts = [messages.slice_of(i, count, size) for i in range(count)]
    return [Chunk(digest, i, count, size, body=frame[c]) for i, c in enumerate(cuts)]


def send(device: FakeDevice, chunk: Chunk) -> None:
    device.send(chunk, topics.up("t", device.id, "chunk"))


def test_a_probe_is_answered_with_what_is_missing_and_those_are_enough(tmp_path: Path) -> None:
    async def story(world: World, device: FakeDevice) -> None:
        parts = cut(device)
        for chunk in parts[1:-1]:
            send(device, chunk)
        send(device, replace(parts[0], probe=True))
        await world.until(lambda: device.missing)
        last = len(parts) - 1
        assert device.missing == [Missing(parts[0].hash, len(parts), [last])]
        send(device, parts[last])
        await world.until(lambda: device.receipts)
        assert device.outcomes() == ["counted"]

    play(tmp_path, story)


def test_a_coordinator_that_knows_nothing_of_it_asks_for_all_the_rest(tmp_path: Path) -> None:
    async def story(world: World, device: FakeDevice) -> None:
        parts = cut(device)
        send(device, replace(parts[0], probe=True))
        await world.until(lambda: device.missing)
        assert device.missing[0].missing == list(range(1, len(parts)))

    play(tmp_path, story)


def test_a_probe_for_a_counted_update_is_answered_with_its_receipt(tmp_path: Path) -> None:
    async def story(world: World, device: FakeDevice) -> None:
        frame = device.report()
        await world.until(lambda: device.receipts)
        digest = hashlib.sha256(frame).digest()
        parts = chunks.split(frame, 512)
        send(device, replace(parts[0], probe=True))
        await world.until(lambda: len(device.receipts) == 2)
        again = device.receipts[1]
        assert (again.outcome, again.update, again.counted) == (
            "duplicate",
            digest[:16],
            digest[:16],
        )
        assert messages.Signed(frame, topics.up("t", device.id, "update")).id == digest[:16]
        assert not device.missing

    play(tmp_path, story)
