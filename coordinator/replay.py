# SPDX-License-Identifier: Apache-2.0
"""Make every version again from the journal, and compare: proof that nothing was lost or added.

A version is a function of the one before and of the updates that the journal says it holds, in any
order. Bodies of updates older than the store keeps cannot be folded again: a replay begins at the
oldest version from which it can.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from coordinator import ledger, versions
from coordinator.store import StoredRound, StoredUpdate, Version
from coordinator.task import Task
from edge_sdk import codec, params
from edge_sdk.bundle import Bundle
from edge_sdk.errors import StoreError


@dataclass(frozen=True, slots=True)
class Replayed:
    """One version: the digest that the store has, and the one that the journal comes to.

    `replayed` is None where bodies were pruned; `updates` counts what was folded.
    """

    task: str
    version: int
    stored: str
    replayed: str | None
    updates: int

    @property
    def holds(self) -> bool:
        """Whether the two agree, or there is nothing to compare."""
        return self.replayed in (None, self.stored)


def replay(folder: str | Path, task: Task) -> Iterator[Replayed]:
    """Yield every version of a task, oldest first, made again where that can be done.

    Raises: StoreError when there is no store, or the task began with another bundle.
    """
    with ledger.reading(folder) as db:
        yield from journal(db, task)


def journal(db: sqlite3.Connection, task: Task) -> Iterator[Replayed]:
    """Do what `replay` does, of an open database. Raises: StoreError."""
    bundle = task.load()
    _check_bundle(db, task, bundle)
    before: Version | None = None
    for row in db.execute(_VERSIONS, (task.name,)).fetchall():
        stored = Version(*row)
        made, count = _made(db, task, bundle, before, stored)
        found = None if made is None else made.digest.hex()
        yield Replayed(task.name, stored.number, stored.digest.hex(), found, count)
        before = made or (stored if stored.params else None)


def _made(
    db: sqlite3.Connection, task: Task, bundle: Bundle, before: Version | None, stored: Version
) -> tuple[Version | None, int]:
    """Return a version as the journal has it, and how many updates that folded."""
    if stored.number == 0:
        return versions.first_version(task, bundle), 0
    rows = db.execute(_FOLDED, (task.name, stored.number)).fetchall()
    if before is None or any(row[-1] is None for row in rows):
        return None, len(rows)
    total = task.strategy.aggregator.init(params.count(bundle.shapes))
    rounds: dict[int, Mapping[str, int]] = {}
    for update in (StoredUpdate(*row) for row in rows):
        if update.round not in rounds:
            rounds[update.round] = versions.places(task, _round(db, task, update.round))
        lattice, bucket = codec.lattice(update.blob, bundle.shapes), rounds[update.round]
        facts = versions.report(task, update, lattice, bucket[update.device], stored.number - 1)
        total = task.strategy.aggregator.add(total, lattice, facts)
    return versions.next_version(task, bundle, before, total, stored.round), len(rows)


def _round(db: sqlite3.Connection, task: Task, number: int) -> StoredRound:
    version, cohort, quorum, seed = db.execute(_ROUND, (task.name, number)).fetchone()
    devices = frozenset(json.loads(cohort))
    return StoredRound(number, version, devices, quorum, 0, 0.0, seed)


def _check_bundle(db: sqlite3.Connection, task: Task, bundle: Bundle) -> None:
    known = db.execute("SELECT bundle FROM tasks WHERE task = ?", (task.name,)).fetchone()
    if known is None:
        raise StoreError(f"expected task {task.name} in this store, it is not there")
    if known[0].hex() != bundle.digest:
        raise StoreError(
            f"task {task.name} was begun with bundle {known[0].hex()[:12]}, the configuration "
            f"names {bundle.digest[:12]}"
        )


_VERSIONS = """SELECT version, round, digest, coalesce(params, x''), coalesce(optimizer, x''),
    coalesce(target, x''), coalesce(patch, x'') FROM versions WHERE task = ? ORDER BY version"""
_FOLDED = """SELECT
    round, device, hash, version, examples, steps, loss, seconds, size, outcome, blob
    FROM updates WHERE task = ? AND folded = ? ORDER BY round, device"""
_ROUND = "SELECT version, cohort, quorum, seed FROM rounds WHERE task = ? AND round = ?"
