# SPDX-License-Identifier: Apache-2.0
"""Versions go down as patches; the coordinator and every device come to the same bits."""

from __future__ import annotations

import asyncio
import hashlib
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_fleet import BUNDLE, FakeDevice, World, play

from coordinator import pacing
from coordinator.pacing import Pace
from coordinator.publishing import Publisher
from coordinator.task import Task
from coordinator.versions import target_of
from edge_sdk import chunks, params, patches, topics
from edge_sdk.errors import ConfigError
from edge_sdk.signing import DeviceKey

HUB = DeviceKey.from_seed(b"h" * 32)


def pace(count: int) -> Pace:
    return pacing.rounds(cohort=2, deadline_s=60, count=count)


def task(**changes: object) -> Task:
    return Task("t", BUNDLE, codec="dense", **changes)  # type: ignore[arg-type]


async def train(world: World, devices: list[FakeDevice], rounds: range) -> None:
    for number in rounds:
        await world.until(
            lambda n=number: all(d.invites and d.invites[-1][1].round == n for d in devices)
        )
        for device in devices:
            device.report(number)
        await world.until(lambda n=number: world.results and world.results[-1].number == n)


def patched(device: FakeDevice, first: int, last: int) -> bytes:
    """Come from the bundle's weights to version `last` by what is retained from `first` on."""
    weights = params.flatten(BUNDLE.params(), BUNDLE.shapes)
    for version in range(first, last + 1):
        body = device.parts["t", f"patch{topics.slot(version):02}", 0].body
        weights = patches.apply(weights, body, BUNDLE.shapes)
    return weights.astype("<f4").tobytes()


def listen(world: World, index: int = 9) -> FakeDevice:
    """A device that hears every patch, also those from before it came."""
    late = FakeDevice(world.broker, index)
    late.start()
    late.checks_in = False
    late.transport.subscribe(*(topics.parts_filter("t", "patch", v) for v in range(topics.SLOTS)))
    return late


def test_patches_lead_from_the_bundles_weights_to_every_version(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        devices = world.devices(2)
        async with world.coordinator((task(), pace(4))):
            await train(world, devices, range(1, 5))
            late = listen(world)
            await world.until(lambda: late.offers and len(late.parts) >= 4)
            offer = late.offers["t"]
            assert len(offer.patches or []) == 3  # one more would cost more than the weights
            assert hashlib.sha256(patched(late, 1, 4)).digest() == offer.model
            assert sum(offer.patches or []) < offer.model_size

    play(tmp_path, story)


def test_a_restart_and_a_forgetful_broker_cost_no_patch(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        devices = world.devices(2)
        async with world.coordinator((task(), pace(2))):
            await train(world, devices, range(1, 3))
        async with world.coordinator((task(), pace(3))):
            world.broker.stop(forget=True)
            world.broker.resume()
            for device in devices:
                device.send(device.status(online=True), topics.status(device.id), retain=True)
            await train(world, devices, range(3, 4))
            late = listen(world)
            await world.until(lambda: late.offers and len(late.parts) >= 3)
            assert hashlib.sha256(patched(late, 1, 3)).digest() == late.offers["t"].model

    play(tmp_path, story)


def test_what_a_patch_loses_is_not_lost(tmp_path: Path) -> None:
    """With compression the model follows what it would be without; the gap does not grow."""

    async def story(world: World) -> None:
        devices = world.devices(2)
        async with world.coordinator((task(), pace(8))) as coordinator:
            gaps = []
            for number in range(1, 9):
                await train(world, devices, range(number, number + 1))
                desk = coordinator._intake.desks["t"]
                gaps.append(float(np.linalg.norm(target_of(desk.version) - desk.weights())))
            assert max(gaps[4:]) < 3 * max(gaps[:4])

    play(tmp_path, story)


def test_the_bundle_goes_down_as_its_zlib_stream(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        devices = world.devices(2)
        devices[0].transport.subscribe(topics.parts_filter("t", "bundle"))
        async with world.coordinator((task(), pace(1))):
            await world.until(lambda: devices[0].offers and ("t", "bundle", 0) in devices[0].parts)
            offer, part = devices[0].offers["t"], devices[0].parts["t", "bundle", 0]
            assert offer.bundle_packed == part.size < offer.bundle_size == len(BUNDLE.data)
            assert part.count == 1
            assert zlib.decompress(part.body) == BUNDLE.data

    play(tmp_path, story)


def test_what_a_shorter_patch_in_the_same_place_leaves_over_is_cleared() -> None:
    retained: dict[str, bytes] = {}

    class Broker:
        async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
            assert retain
            retained[topic] = payload
            if not payload:
                del retained[topic]

    async def publish(version: int, size: int) -> None:
        parts = chunks.parts("patch", bytes(size), bytes(32), version)
        await publisher._parts(desk, parts)

    desk = SimpleNamespace(task=SimpleNamespace(name="t"))
    publisher = Publisher(Broker(), HUB)  # type: ignore[arg-type]
    for version, size, left in ((3, 30_000, 4), (3 + topics.SLOTS, 9000, 2), (4, 10, 3)):
        asyncio.run(publish(version, size))
        assert len(retained) == left


def test_dense_sends_weights_and_no_patches(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        devices = world.devices(2)
        async with world.coordinator((task(downlink="dense"), pace(2))):
            await train(world, devices, range(1, 3))
            await world.until(lambda: devices[0].offers["t"].version == 2)
            assert devices[0].offers["t"].patches == []

    play(tmp_path, story)


def test_a_downlink_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected a stage among"):
        task(downlink=[["zip"]])
