# SPDX-License-Identifier: Apache-2.0
"""Seeded trouble: messages lost and doubled, devices that leave, a coordinator that keeps dying.

Whatever happens, what was receipted is in exactly one version, versions go up by one, and the
journal, replayed by a plain reading of the rules, gives the same bytes.
"""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from fake_fleet import BUNDLE, FakeDevice, World

from coordinator import pacing
from coordinator.aggregators import Report
from coordinator.strategy import Strategy, fedadam
from coordinator.task import Task
from coordinator.versions import first_version
from edge_sdk import codec, params, patches, topics

ROUNDS = 4
PACE = pacing.rounds(cohort=5, quorum=3, deadline_s=60, count=ROUNDS)


def replayed(folder: Path, strategy: Strategy) -> list[bytes]:
    """Rebuild every version from the updates that the journal says it holds."""
    size = params.count(BUNDLE.shapes)
    weights = params.flatten(BUNDLE.params(), BUNDLE.shapes)
    target, down = weights, codec.preset("downlink")
    state = strategy.server.init(size)
    digests = []
    with sqlite3.connect(folder / "coordinator.db") as db:
        for version in range(1, ROUNDS + 1):
            total = strategy.aggregator.init(size)
            for base, examples, blob in db.execute(
                "SELECT version, examples, blob FROM updates WHERE folded = ?", (version,)
            ):
                report = Report(examples, discount=strategy.discount(version - 1 - base))
                total = strategy.aggregator.add(total, codec.lattice(blob, BUNDLE.shapes), report)
            mean = strategy.aggregator.result(total)
            target, state = strategy.server.step(target, mean, state)
            delta = params.unflatten(target - weights, BUNDLE.shapes)
            patch, _ = down.encode(delta, down.init(BUNDLE.shapes, seed=version))
            weights = patches.apply(weights, patch, BUNDLE.shapes)
            digests.append(hashlib.sha256(weights.astype("<f4").tobytes()).digest())
    db.close()
    return digests


class Trouble:
    """A world in which a seeded generator decides what goes wrong next."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.world = World(folder)
        self.world.broker._fate = self.fate
        self.calm = False
        self.devices: list[FakeDevice] = []
        self.reported: dict[str, int] = {}

    def fate(self, _client: str, topic: str, _payload: bytes) -> int:
        if self.calm or "/up/" not in topic:
            return 1
        return int(self.rng.choice([0, 1, 1, 1, 1, 2]))

    def anything(self) -> None:
        """Let one device do something: report, stay away, come back, send again."""
        device = self.devices[self.rng.integers(len(self.devices))]
        match int(self.rng.integers(8)):
            case 0:
                self.world.broker.cut(device.id)
            case 1 | 2:
                self.back(device)
            case 3:
                self.world.clock.advance(float(self.rng.integers(1, 30)))
            case _:
                self.answer(device)

    def answer(self, device: FakeDevice) -> None:
        if not device.transport.is_up or not device.invites:
            return
        number = device.invites[-1][1].round
        if self.reported.get(device.id) != number:
            self.reported[device.id] = number
            device.report(number)
        for waiting in list(device.outbox.values()):
            device.transport.publish(*waiting)

    def back(self, device: FakeDevice) -> None:
        if device.transport.is_up:
            return
        self.world.broker.restore(device.id)
        device.send(device.status(online=True), topics.status(device.id), retain=True)
        if "t" in device.offers:
            device.check_in()

    async def play(self, task: Task) -> None:
        self.devices = self.world.devices(6)
        for _ in range(4):  # four lives, each cut short somewhere
            async with self.world.coordinator((task, PACE)):
                for _ in range(int(self.rng.integers(5, 60))):
                    self.anything()
                    self.world.broker.pump()
                    await asyncio.sleep(0 if self.rng.random() < 0.5 else 0.002)
        self.calm = True
        async with self.world.coordinator((task, PACE)) as coordinator:
            for device in self.devices:
                self.back(device)

            def over() -> bool:
                for device in self.devices:
                    self.answer(device)
                self.world.clock.advance(0.2)
                return coordinator._intake.desks["t"].version.number == ROUNDS

            await self.world.until(lambda: "t" in coordinator._intake.desks)
            await self.world.until(over, 30)
            await self.world.until(lambda: not any(self._owed(d) for d in self.devices))

    def _owed(self, device: FakeDevice) -> bool:
        for waiting in list(device.outbox.values()):
            device.transport.publish(*waiting)
        return bool(device.outbox)


@pytest.mark.parametrize("seed", range(12))
def test_nothing_receipted_is_lost_and_the_journal_replays_to_the_bit(
    tmp_path: Path, seed: int
) -> None:
    strategy = fedadam(lr=0.05)
    task = Task("t", BUNDLE, strategy=strategy, codec="dense")
    trouble = Trouble(tmp_path / "store", seed)
    asyncio.run(trouble.play(task))

    with sqlite3.connect(tmp_path / "store" / "coordinator.db") as db:
        versions = db.execute("SELECT version, digest FROM versions ORDER BY version").fetchall()
        counted = db.execute("SELECT hash FROM updates").fetchall()
        lost = db.execute("SELECT count(*) FROM updates WHERE folded IS NULL OR folded < 0")
        pending = lost.fetchone()[0]
        still_open = db.execute("SELECT count(*) FROM rounds WHERE state = 'open'").fetchone()[0]
        late = db.execute("SELECT count(*) FROM updates WHERE outcome = 'late'").fetchone()[0]
        last = db.execute("SELECT max(round) FROM versions").fetchone()[0]
        after = db.execute(
            "SELECT count(*) FROM updates WHERE folded IS NULL AND round >= ?", (last,)
        ).fetchone()[0]
    db.close()
    assert [v for v, _ in versions] == list(range(ROUNDS + 1))
    assert versions[0][1] == first_version(task, BUNDLE).digest
    assert [d for _, d in versions[1:]] == replayed(tmp_path / "store", strategy)
    assert still_open == 0
    receipts = [r for d in trouble.devices for r in d.receipts]
    receipted = {r.update for r in receipts if r.outcome in {"counted", "late"}}
    receipted |= {r.counted for r in receipts if r.outcome == "duplicate" and r.counted}
    assert receipted <= {h for (h,) in counted}
    assert pending <= after + late  # what came after the last round waits for a next version
