# SPDX-License-Identifier: Apache-2.0
"""Keeps in force who sits out, and what operators order while the coordinator runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from coordinator import quarantine
from coordinator.clock import Clock
from coordinator.desk import Desk
from coordinator.intake import Intake
from coordinator.store import Store
from coordinator.writer import ContradictionError
from edge_sdk.errors import FedgeError, StoreError

log = logging.getLogger(__name__)

HEED_S = 10.0
"""How often it is looked whether an operator changed something."""


class Warden:
    """`heed` once, then `keep` for as long as the coordinator runs."""

    def __init__(
        self, store: Store, intake: Intake, clock: Clock, fail: Callable[[FedgeError], None]
    ) -> None:
        self._store, self._intake, self._clock, self._fail = store, intake, clock, fail

    async def keep(self) -> None:
        """Heed the operators, again and again."""
        while True:
            await self._clock.wait(asyncio.Event(), self._clock.monotonic() + HEED_S)
            try:
                await self.heed()
            except ContradictionError as error:  # another file is in the place of ours
                self._fail(error)
            except StoreError:  # what has to be written will say so
                await self._store.probe()

    async def heed(self) -> None:
        """Do as operators ordered since, and parole whose hours in quarantine are over.

        Raises: StoreError when the store does not answer.
        """
        intake = self._intake
        if (orders := await self._store.orders()) is not None:
            intake.fleet.assign(orders.tags)
            for name, desk in intake.desks.items():
                desk.conducts = dict(orders.conducts.get(name, {}))
        await intake.letters.forgive()
        for name in sorted(intake.running & intake.desks.keys()):
            await self._parole(intake.desks[name])

    async def _parole(self, desk: Desk) -> None:
        task = desk.task.name
        for device in desk.paroled(self._clock.monotonic()):
            free = quarantine.release(desk.conducts[device], desk.next_round)
            await self._store.hold(task, device, free)
            desk.conducts[device] = free
            log.info("parole task=%s device=%s", task, device)
        self.hold(desk)
        desk.changed.set()

    def hold(self, desk: Desk) -> None:
        """Let who is in quarantine sit out the next round, and nobody else."""
        fleet, held = self._intake.fleet, desk.held()
        if held != fleet.held.get(desk.task.name, {}):
            fleet.hold(desk.task.name, held)
