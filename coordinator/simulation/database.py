# SPDX-License-Identifier: Apache-2.0
"""What a store writes through in a simulation: the same SQL, in memory, committed in virtual time.

The connection is the disk: it outlives the coordinator's process. What waits for the next group
commit dies with the process, and a COMMIT may be the last thing that a process did.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from coordinator.schema import migrate
from coordinator.simulation.process import Killed, Process
from coordinator.writer import Work, transact
from edge_sdk.errors import StoreError

T = TypeVar("T")

WINDOW_S = 0.01
_PATH = Path("simulated.db")


class Database:
    """The coordinator's disk."""

    def __init__(self, rng: random.Random, committed: Callable[[sqlite3.Connection], None]) -> None:
        self.db = sqlite3.connect(":memory:", isolation_level=None)
        self.db.execute("PRAGMA foreign_keys = ON")
        migrate(self.db)
        self.rng, self.committed = rng, committed
        self.is_full = False
        self.stall_s = 0.0
        """How much longer than usual a flush takes."""

    def writer(self, process: Process) -> GroupWriter:
        """Return what one process writes through."""
        return GroupWriter(self, process)


class GroupWriter:
    """A `Writing` in virtual time."""

    def __init__(self, disk: Database, process: Process) -> None:
        self.transactions = 0
        self._disk, self._process = disk, process
        self._batch: list[tuple[Work[Any], asyncio.Future[Any]]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False

    async def run(self, work: Work[T], *, urgent: bool = False) -> T:
        """Queue `work` for the next commit and await it. Raises: StoreError, Killed."""
        self._process.step()
        if self._is_closed:
            raise StoreError("the store is closed")
        done: asyncio.Future[Any] = self._process.loop.create_future()
        self._batch.append((work, done))
        if urgent and self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            flush_s = self._disk.rng.uniform(0.0, 0.005) + self._disk.stall_s
            wait_s = flush_s if urgent else WINDOW_S + flush_s
            self._timer = self._process.loop.call_later(wait_s, self._commit)
        result = await done
        self._process.check()
        return cast("T", result)

    def close(self) -> None:
        """Commit what waits, and refuse more."""
        self._is_closed = True
        self._commit()

    def _commit(self) -> None:
        batch, self._batch, self._timer = self._batch, [], None
        with contextlib.suppress(Killed):
            self._process.step()
            outcomes = self._outcomes([work for work, _ in batch])
            self._disk.committed(self._disk.db)
            self._process.step()
            for (_, done), outcome in zip(batch, outcomes, strict=True):
                _settle(done, outcome)

    def _outcomes(self, works: list[Work[Any]]) -> list[object]:
        if self._disk.is_full:
            return [StoreError("cannot use the store: the disk is full")] * len(works)
        try:
            outcomes = transact(self._disk.db, works, _PATH)
        except StoreError as error:
            return [error] * len(works)
        self.transactions += 1
        return outcomes


def _settle(done: asyncio.Future[Any], outcome: object) -> None:
    if done.done():
        return
    if isinstance(outcome, Exception):
        done.set_exception(outcome)
    else:
        done.set_result(outcome)
