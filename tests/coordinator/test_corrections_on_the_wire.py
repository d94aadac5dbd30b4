# SPDX-License-Identifier: Apache-2.0
"""FedDyn and SCAFFOLD by way of invitations, the store and the journal."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from fake_fleet import FakeDevice, World, body
from hand_bundles import mlp

from coordinator import pacing, strategy
from coordinator.replay import replay
from coordinator.strategy import Strategy
from coordinator.task import Task
from edge_sdk import codec, params
from edge_sdk.correction import unpack
from edge_sdk.types import Array

BUNDLE = mlp(proximal=True)
SIZE = params.count(BUNDLE.shapes)
STEPS = (5, 2)


def delta(number: int, device: FakeDevice) -> Array:
    blob = body(1000 * number + device.index, bundle=BUNDLE)
    return params.flatten(codec.decode(blob, BUNDLE.shapes), BUNDLE.shapes)


def two_rounds(folder: Path, how: Strategy) -> tuple[World, list[Array], list[FakeDevice], Task]:
    """Run two rounds of two devices of unequal steps; return the versions, 0 to 2."""
    task = Task("t", BUNDLE, strategy=how, codec="dense", downlink="dense")
    versions: list[Array] = []
    devices: list[FakeDevice] = []

    async def story(world: World) -> None:
        devices.extend(world.devices(2))
        async with world.coordinator(
            (task, pacing.rounds(cohort=2, deadline_s=60, count=2))
        ) as coordinator:
            for number in (1, 2):
                await world.until(lambda n=number: all(len(d.invites) == n for d in devices))
                for device, steps in zip(devices, STEPS, strict=True):
                    device.report(
                        steps=steps, body=body(1000 * number + device.index, bundle=BUNDLE)
                    )
                await world.until(lambda n=number: len(world.results) == n)
            for number in range(3):
                made = await coordinator.params(task, number)
                versions.append(params.flatten(made, BUNDLE.shapes))

    async def main() -> World:
        world = World(folder)
        await story(world)
        return world

    return asyncio.run(main()), versions, devices, task


def test_feddyn_goes_on_by_what_all_devices_ever_added(tmp_path: Path) -> None:
    how = strategy.feddyn(0.3, devices=8)
    world, versions, devices, task = two_rounds(tmp_path, how)
    means = [np.mean([delta(n, d) for d in devices], 0) for n in (1, 2)]
    one = versions[0] + means[0] * (1 + 2 / 8)
    two = one + means[1] + (means[0] + means[1]) * 2 / 8
    np.testing.assert_allclose(versions[1], one, atol=1e-5)
    np.testing.assert_allclose(versions[2], two, atol=1e-5)
    for device in devices:
        for _, invite in device.invites:
            assert (invite.correction, invite.mu, invite.body) == ("feddyn", 0.3, b"")
    assert all(r.holds and r.replayed for r in replay(world.folder, task))


def test_scaffold_tells_devices_what_a_step_of_all_of_them_moves(tmp_path: Path) -> None:
    how = strategy.scaffold(0.5, devices=8)
    world, versions, devices, task = two_rounds(tmp_path, how)
    np.testing.assert_allclose(
        versions[1], versions[0] + 0.5 * np.mean([delta(1, d) for d in devices], 0), atol=1e-5
    )
    control = sum(delta(1, d) / n for d, n in zip(devices, STEPS, strict=True)) / 8
    for device in devices:
        (_, first), (_, second) = device.invites
        assert (first.correction, first.mu, first.body) == ("scaffold", strategy.HOLD, b"")
        rms = float(np.sqrt(np.mean(control**2)))
        np.testing.assert_allclose(unpack(second.body, SIZE), control, atol=0.06 * rms)
    assert all(r.holds and r.replayed for r in replay(world.folder, task))


@pytest.mark.parametrize("how", [strategy.fedavg(), strategy.fedprox(0.1)], ids=lambda s: s.name)
def test_other_strategies_say_nothing_of_corrections(tmp_path: Path, how: Strategy) -> None:
    _, _, devices, _ = two_rounds(tmp_path, how)
    assert {(i.correction, i.body) for d in devices for _, i in d.invites} == {(None, b"")}
