# SPDX-License-Identifier: Apache-2.0
"""What the coordinator must never lose: devices, versions, rounds, updates. Async, on SQLite.

Two transactions carry the promises. `count` stores an update, and the receipt that follows is for
ever. `commit` stores the next version with its optimizer state, closes the round and marks which
updates it holds: all or nothing.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from coordinator import docket
from coordinator.docket import Letter, Orders, Refusal
from coordinator.fleet import Known
from coordinator.quarantine import Conduct, Rules
from coordinator.writer import ContradictionError, T, Work, Writer, Writing
from edge_sdk.bounds import MAX_PATCHES
from edge_sdk.errors import ConfigError, StoreError

STANDINGS_KEPT = 64
"""Rounds of a task of which it is kept why each device could be drawn or not."""
SET_ASIDE = -1
"""`folded` of an update that no version will hold: its sum was not finite."""


@dataclass(frozen=True, slots=True)
class Version:
    """One number of the global model: flat little-endian float32 masters and their sha256.

    `params` are what every device comes to. Where they come by patches, `patch` made them of the
    version before, and `target` is what they would be had it carried everything.
    """

    number: int
    round: int
    digest: bytes
    params: bytes
    optimizer: bytes
    target: bytes = b""
    patch: bytes = b""


class Patch(NamedTuple):
    """What leads from a version to the next, and the sha256 of the weights that it makes."""

    digest: bytes
    body: bytes


@dataclass(frozen=True, slots=True)
class StoredRound:
    """A round as it was opened; `state` is "open" until it is settled."""

    number: int
    version: int
    cohort: frozenset[str]
    quorum: int
    goal: int
    deadline_s: float
    seed: int
    state: str = "open"
    standings: bytes = b""
    """What every device was to the task then, see `fleet.Fleet.standings`; empty when read back."""


@dataclass(frozen=True, slots=True)
class StoredUpdate:
    """An update that counts or will: the codec's blob and what the device said about it."""

    round: int
    device: str
    hash: bytes
    version: int
    examples: int
    steps: int
    loss: float
    seconds: float
    size: int
    outcome: Literal["counted", "late"]
    blob: bytes
    took_s: float | None = None
    """From the invitation to the arrival, seconds; None where the invitation was not seen."""


class Counted(NamedTuple):
    """The store's verdict on an update: `hash` is the one that counts."""

    is_new: bool
    outcome: Literal["counted", "late"]
    hash: bytes


@dataclass(frozen=True, slots=True)
class Resumed:
    """All that a coordinator needs to go on with a task."""

    call: int
    version: Version
    rounds: tuple[StoredRound, ...]
    pending: tuple[StoredUpdate, ...]
    reports: tuple[StoredUpdate, ...]
    patches: tuple[Patch, ...] = ()
    """Those that lead to `version`, oldest first."""
    conducts: Mapping[str, Conduct] = field(default_factory=dict)
    """What is held against devices."""


class Store:
    """The coordinator's state in one SQLite file. Every method awaits the disk."""

    def __init__(
        self, path: str | Path | Writing, *, window_s: float = 0.01, keep: int = 100
    ) -> None:
        """Open or create the file at `path`.

        Args:
            path: the database, a lock file and SQLite's log stand beside it; or what writes, for
                simulation.
            window_s: how long an update may wait for others to share its fsync.
            keep: versions and folded update bodies kept per task; older bodies are dropped.

        Raises: StoreError when the file cannot be used, is newer, or another coordinator's.
        """
        self._writer: Writing
        if isinstance(path, str | Path):
            self._writer = Writer(Path(path), window_s=window_s)
        else:
            self._writer = path
        self._keep = keep
        self._ordered_at = -1
        self.trouble: str | None = None
        """Why the latest write was refused; None when it was not."""

    @property
    def transactions(self) -> int:
        """Transactions committed since the store was opened."""
        return self._writer.transactions

    async def probe(self) -> None:
        """Find out whether the store answers, and, where it was in trouble, takes writes again."""
        with contextlib.suppress(StoreError):
            if self.trouble is None:
                await self._ask(lambda db: db.execute("SELECT 1"), urgent=True)
            else:
                await self._write(_try_out)

    async def _write(self, work: Work[T], *, urgent: bool = False) -> T:
        result = await self._ask(work, urgent=urgent)
        self.trouble = None
        return result

    async def _ask(self, work: Work[T], *, urgent: bool = False) -> T:
        try:
            return await self._writer.run(work, urgent=urgent)
        except StoreError as error:
            if not isinstance(error, ContradictionError):
                self.trouble = str(error)
            raise

    def close(self) -> None:
        """Finish pending work and let go of the file."""
        self._writer.close()

    async def remember(self, known: Known) -> None:
        """Keep a device's key and its newest status. The id is derived from the key."""
        said = json.dumps(dict(known.tags), sort_keys=True)
        named = (known.device, known.key, known.name, known.sdk, known.boot, known.online)
        row = (*named, said, known.number, known.start, known.connection)
        await self._write(lambda db: db.execute(_REMEMBER, row))

    async def devices(self) -> list[Known]:
        """Return every device ever seen, in the order of their coming."""
        rows = await self._ask(lambda db: db.execute(_DEVICES).fetchall(), urgent=True)
        return [
            Known(d, key, name, sdk, bool(up), boot, json.loads(said), number, start, connection)
            for d, key, name, sdk, up, boot, said, number, start, connection in rows
        ]

    async def resume(self, task: str, bundle: bytes, first: Version, recent: int = 16) -> Resumed:
        """Create the task with version 0 or find it as it was left, and begin a new call.

        Args:
            task: its name.
            bundle: the sha256 of its bundle, which may not change in the life of a task.
            first: version 0, used when the task is new.
            recent: how many of the latest rounds to return, besides those of pending updates.

        Raises: ConfigError when the task was begun with another bundle.
        """

        def work(db: sqlite3.Connection) -> Resumed:
            _create(db, task, bundle, first)
            call = _next_call(db, task)
            version = Version(*db.execute(_NEWEST, (task,)).fetchone())
            latest = {"task": task, "recent": recent}
            rounds = tuple(_round(row) for row in db.execute(_ROUNDS, latest))
            pending = tuple(StoredUpdate(*row) for row in db.execute(_PENDING, (task,)))
            oldest = min((r.number for r in rounds), default=0)
            reports = tuple(StoredUpdate(*row) for row in db.execute(_REPORTS, (task, oldest)))
            patches = _patches(db, task, version.number)
            conducts = docket.orders(db).conducts.get(task, {})
            return Resumed(call, version, rounds, pending, reports, patches, conducts)

        return await self._write(work, urgent=True)

    async def next_call(self, task: str) -> int:
        """Begin a new call, whose number was never used before."""
        return await self._write(lambda db: _next_call(db, task), urgent=True)

    async def open_round(self, task: str, r: StoredRound) -> None:
        """Begin a round: from here on it survives a restart."""
        cohort = json.dumps(sorted(r.cohort))
        row = (task, r.number, r.version, cohort, r.quorum, r.goal, r.deadline_s, r.seed)
        standings = zlib.compress(r.standings, 1) if r.standings else None

        def work(db: sqlite3.Connection) -> None:
            db.execute(_OPEN_ROUND, (*row, standings))
            db.execute(_PRUNE_STANDINGS, (task, r.number - STANDINGS_KEPT))

        await self._write(work, urgent=True)

    async def join_round(self, task: str, number: int, cohort: Iterable[str]) -> None:
        """Store who takes part in an open round from now on.

        Raises: ContradictionError when the round is not open.
        """
        row = (json.dumps(sorted(cohort)), task, number)

        def work(db: sqlite3.Connection) -> None:
            if db.execute(_JOIN_ROUND, row).rowcount != 1:
                raise ContradictionError(f"task {task}: round {number} is not open")

        await self._write(work, urgent=True)

    async def count(self, task: str, update: StoredUpdate) -> Counted:
        """Store an update, once a device and round; the receipt may be sent after this returns."""

        def work(db: sqlite3.Connection) -> Counted:
            u = update
            row = (task, u.round, u.device, u.hash, u.version, u.examples, u.steps, u.loss)
            done = db.execute(_COUNT, (*row, u.seconds, u.size, u.outcome, u.blob, u.took_s))
            if done.rowcount == 1:
                return Counted(is_new=True, outcome=u.outcome, hash=u.hash)
            outcome, digest = db.execute(_COUNTED, (task, u.round, u.device)).fetchone()
            return Counted(is_new=False, outcome=outcome, hash=digest)

        return await self._write(work)

    async def refuse(self, task: str, refusal: Refusal, rules: Rules) -> Conduct | None:
        """Keep a refusal; return what is held against its device if that changed."""
        return await self._write(lambda db: docket.refuse(db, task, refusal, rules))

    async def hold(self, task: str, device: str, held: Conduct) -> None:
        """Keep what is held against a device."""
        await self._write(lambda db: docket.keep(db, task, device, held), urgent=True)

    async def orders(self) -> Orders | None:
        """Return what operators ordered; None if nobody else wrote since it was last asked."""

        def work(db: sqlite3.Connection) -> Orders | None:
            at = int(db.execute("PRAGMA data_version").fetchone()[0])
            if at == self._ordered_at:
                return None
            self._ordered_at = at
            return docket.orders(db)

        return await self._ask(work, urgent=True)

    async def letters(self) -> list[Letter]:
        """Return every message in whose handling a coordinator failed."""
        return await self._ask(docket.letters, urgent=True)

    async def failed_on(self, letter: Letter) -> Letter:
        """Count one more failure in the handling of a message; return what is known of it now."""
        return await self._write(lambda db: docket.fail(db, letter), urgent=True)

    async def forgive(self, names: Sequence[bytes]) -> None:
        """Forget failures in messages that were handled after all."""
        await self._write(lambda db: docket.forgive(db, names))

    async def counted(self, task: str, number: int, device: str) -> bytes | None:
        """Return the hash of the update of `device` that counts for a round; None for none."""
        where = (task, number, device)
        row = await self._ask(lambda db: db.execute(_COUNTED, where).fetchone())
        return None if row is None else cast("bytes", row[1])

    async def round_of(self, task: str, device: str, update: bytes) -> int | None:
        """Return the round that an update was counted for, by its hash; None if it was not."""
        where = (task, device, update)
        row = await self._ask(lambda db: db.execute(_ROUND_OF, where).fetchone())
        return None if row is None else int(row[0])

    async def commit(
        self,
        task: str,
        version: Version,
        folded: Iterable[tuple[int, str]],
        result: Mapping[str, Any],
    ) -> None:
        """Add the next version, close its round and mark the (round, device) pairs it holds.

        Raises: ContradictionError when the version is not the next one or the round is not open.
        """
        pairs = sorted(folded)

        def work(db: sqlite3.Connection) -> None:
            v = version
            named = (task, v.number, v.round, v.digest, v.params, v.optimizer)
            row = (*named, v.target or None, v.patch or None, task, v.number - 1)
            if db.execute(_ADD_VERSION, row).rowcount != 1:
                raise ContradictionError(f"task {task}: version {v.number} is not the next one")
            _close_round(db, task, v.round, "commit", result)
            _mark(db, task, v.number, pairs)
            self._prune(db, task, v.number)

        await self._write(work, urgent=True)

    async def abort(
        self, task: str, number: int, result: Mapping[str, Any], aside: Iterable[tuple[int, str]]
    ) -> None:
        """Close a round without a version; `aside` are updates that no version will hold."""
        pairs = sorted(aside)

        def work(db: sqlite3.Connection) -> None:
            _close_round(db, task, number, "abort", result)
            _mark(db, task, SET_ASIDE, pairs)

        await self._write(work, urgent=True)

    async def version(self, task: str, number: int) -> Version:
        """Return one version of a task.

        Raises: StoreError when there is none of that number, or it was pruned.
        """
        row = await self._ask(
            lambda db: db.execute(_VERSION, (task, number)).fetchone(), urgent=True
        )
        if row is None:
            raise StoreError(f"task {task} has no version {number}, or it is older than is kept")
        return Version(*row)

    def _prune(self, db: sqlite3.Connection, task: str, newest: int) -> None:
        limit = (task, newest - self._keep)
        # Version 0 stays: it is what every later one grew from.
        db.execute(_PRUNE_VERSIONS, limit)
        db.execute(_PRUNE_UPDATES, limit)


_REMEMBER = """INSERT INTO devices
    (device, key, name, sdk, boot, online, said, number, start, connection)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (device) DO UPDATE SET name = excluded.name, sdk = excluded.sdk,
    boot = excluded.boot, online = excluded.online, said = excluded.said,
    start = excluded.start, connection = excluded.connection,
    last_seen = CAST(strftime('%s', 'now') AS INTEGER)"""
_DEVICES = """SELECT device, key, name, sdk, online, boot, said, number,
    start, connection FROM devices
    ORDER BY number, device"""
_NEWEST = """SELECT version, round, digest, params, optimizer,
    coalesce(target, x''), coalesce(patch, x'') FROM versions
    WHERE task = ? ORDER BY version DESC LIMIT 1"""
_VERSION = """SELECT version, round, digest, params, optimizer,
    coalesce(target, x''), coalesce(patch, x'') FROM versions
    WHERE task = ? AND version = ? AND params IS NOT NULL"""
_ROUNDS = """SELECT round, version, cohort, quorum, goal, deadline_s, seed, state FROM rounds
    WHERE task = :task AND (
        round > (SELECT max(round) FROM rounds WHERE task = :task) - :recent
        OR round IN (SELECT round FROM updates WHERE task = :task AND folded IS NULL))
    ORDER BY round"""
_PENDING = """SELECT
    round, device, hash, version, examples, steps, loss, seconds, size, outcome, blob
    FROM updates WHERE task = ? AND folded IS NULL ORDER BY round, device"""
_REPORTS = """SELECT
    round, device, hash, version, examples, steps, loss, seconds, size, outcome, x''
    FROM updates WHERE task = ? AND round >= ? ORDER BY round, device"""
_OPEN_ROUND = """INSERT INTO rounds
    (task, round, version, state, cohort, quorum, goal, deadline_s, seed, standings)
    VALUES (?, ?, ?, 'open', ?, ?, ?, ?, ?, ?)"""
_PRUNE_STANDINGS = """UPDATE rounds SET standings = NULL
    WHERE task = ? AND round <= ? AND standings IS NOT NULL"""
_JOIN_ROUND = "UPDATE rounds SET cohort = ? WHERE task = ? AND round = ? AND state = 'open'"
_COUNT = """INSERT INTO updates (
    task, round, device, hash, version, examples, steps, loss, seconds, size, outcome, blob, took_s)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (task, round, device) DO NOTHING"""
_COUNTED = "SELECT outcome, hash FROM updates WHERE task = ? AND round = ? AND device = ?"
_PATCHES = """SELECT version, digest, patch FROM versions
    WHERE task = ? AND version > ? AND patch IS NOT NULL ORDER BY version DESC"""
_ROUND_OF = "SELECT round FROM updates WHERE task = ? AND device = ? AND hash = ?"
_ADD_VERSION = """INSERT INTO versions
    (task, version, round, digest, params, optimizer, target, patch)
    SELECT ?, ?, ?, ?, ?, ?, ?, ? WHERE (SELECT max(version) FROM versions WHERE task = ?) = ?"""
_CLOSE_ROUND = """UPDATE rounds SET state = ?, result = ?,
    closed_at = CAST(strftime('%s', 'now') AS INTEGER)
    WHERE task = ? AND round = ? AND state = 'open'"""
_MARK = """UPDATE updates SET folded = ?
    WHERE task = ? AND round = ? AND device = ? AND folded IS NULL"""
_PRUNE_VERSIONS = """UPDATE versions SET params = NULL, optimizer = NULL,
    target = NULL, patch = NULL
    WHERE task = ? AND version BETWEEN 1 AND ? AND params IS NOT NULL"""
_PRUNE_UPDATES = """UPDATE updates SET blob = NULL
    WHERE task = ? AND folded BETWEEN 1 AND ? AND blob IS NOT NULL"""


def _try_out(db: sqlite3.Connection) -> None:
    """Write as much as a small update, and take it away again."""
    db.execute("INSERT INTO tags (device, tag, value) VALUES ('', '', hex(randomblob(16384)))")
    db.execute("DELETE FROM tags WHERE device = ''")


def _create(db: sqlite3.Connection, task: str, bundle: bytes, first: Version) -> None:
    known = db.execute("SELECT bundle FROM tasks WHERE task = ?", (task,)).fetchone()
    if known is not None:
        if known[0] != bundle:
            raise ConfigError(
                f"task {task} was begun with bundle {known[0].hex()[:12]}, not "
                f"{bundle.hex()[:12]}: give the new bundle a new task name"
            )
        return
    db.execute("INSERT INTO tasks (task, bundle) VALUES (?, ?)", (task, bundle))
    row = (task, first.number, first.round, first.digest, first.params, first.optimizer)
    db.execute(
        "INSERT INTO versions (task, version, round, digest, params, optimizer) "
        "VALUES (?, ?, ?, ?, ?, ?)",
        row,
    )


def _next_call(db: sqlite3.Connection, task: str) -> int:
    db.execute("UPDATE tasks SET call = call + 1 WHERE task = ?", (task,))
    return int(db.execute("SELECT call FROM tasks WHERE task = ?", (task,)).fetchone()[0])


def _patches(db: sqlite3.Connection, task: str, newest: int) -> tuple[Patch, ...]:
    """Return the unbroken line of patches that leads to `newest`."""
    found: list[Patch] = []
    for version, digest, patch in db.execute(_PATCHES, (task, newest - MAX_PATCHES)):
        if version != newest - len(found):
            break
        found.append(Patch(digest, patch))
    return tuple(reversed(found))


def _round(row: tuple[Any, ...]) -> StoredRound:
    number, version, cohort, quorum, goal, deadline_s, seed, state = row
    devices = frozenset(cast("list[str]", json.loads(cohort)))
    return StoredRound(number, version, devices, quorum, goal, deadline_s, seed, state)


def _close_round(
    db: sqlite3.Connection, task: str, number: int, state: str, result: Mapping[str, Any]
) -> None:
    text = json.dumps(result, sort_keys=True)
    if db.execute(_CLOSE_ROUND, (state, text, task, number)).rowcount != 1:
        raise ContradictionError(f"task {task}: round {number} is not open")


def _mark(db: sqlite3.Connection, task: str, folded: int, pairs: list[tuple[int, str]]) -> None:
    marked = db.executemany(_MARK, [(folded, task, r, d) for r, d in pairs]).rowcount
    if pairs and marked != len(pairs):
        raise ContradictionError(f"task {task}: {len(pairs) - marked} updates were folded before")
