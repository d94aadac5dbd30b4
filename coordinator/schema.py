# SPDX-License-Identifier: Apache-2.0
"""The coordinator's tables, as numbered migrations, forward only; user_version counts them.

A migration that has been released is never edited: append the next one.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence

from edge_sdk.errors import StoreError

APPLICATION_ID = 0x46444745  # "FDGE": tells our files from anybody else's

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE devices (
            device TEXT PRIMARY KEY,
            key BLOB NOT NULL CHECK (length(key) = 32),
            name TEXT NOT NULL,
            sdk TEXT NOT NULL,
            boot INTEGER NOT NULL,
            online INTEGER NOT NULL,
            first_seen INTEGER NOT NULL DEFAULT (CAST(strftime('%s', 'now') AS INTEGER)),
            last_seen INTEGER NOT NULL DEFAULT (CAST(strftime('%s', 'now') AS INTEGER))
        ) WITHOUT ROWID""",
        """CREATE TABLE tasks (
            task TEXT PRIMARY KEY,
            bundle BLOB NOT NULL CHECK (length(bundle) = 32),
            call INTEGER NOT NULL DEFAULT 0
        ) WITHOUT ROWID""",
        """CREATE TABLE versions (
            task TEXT NOT NULL REFERENCES tasks,
            version INTEGER NOT NULL CHECK (version >= 0),
            round INTEGER NOT NULL,
            digest BLOB NOT NULL CHECK (length(digest) = 32),
            params BLOB,
            optimizer BLOB,
            made_at INTEGER NOT NULL DEFAULT (CAST(strftime('%s', 'now') AS INTEGER)),
            UNIQUE (task, version)
        )""",
        """CREATE TABLE rounds (
            task TEXT NOT NULL REFERENCES tasks,
            round INTEGER NOT NULL CHECK (round >= 1),
            version INTEGER NOT NULL,
            state TEXT NOT NULL CHECK (state IN ('open', 'commit', 'abort')),
            cohort TEXT NOT NULL,
            quorum INTEGER NOT NULL,
            goal INTEGER NOT NULL,
            deadline_s REAL NOT NULL,
            seed INTEGER NOT NULL,
            result TEXT NOT NULL DEFAULT '{}',
            opened_at INTEGER NOT NULL DEFAULT (CAST(strftime('%s', 'now') AS INTEGER)),
            closed_at INTEGER,
            UNIQUE (task, round)
        )""",
        # One open round a task at most: the database itself says so.
        "CREATE UNIQUE INDEX one_open_round ON rounds (task) WHERE state = 'open'",
        # folded: the version that holds the update; null while pending, -1 when set aside.
        """CREATE TABLE updates (
            task TEXT NOT NULL,
            round INTEGER NOT NULL,
            device TEXT NOT NULL,
            hash BLOB NOT NULL CHECK (length(hash) = 16),
            version INTEGER NOT NULL,
            examples INTEGER NOT NULL,
            steps INTEGER NOT NULL,
            loss REAL NOT NULL,
            seconds REAL NOT NULL,
            size INTEGER NOT NULL,
            outcome TEXT NOT NULL CHECK (outcome IN ('counted', 'late')),
            folded INTEGER,
            blob BLOB,
            UNIQUE (task, round, device),
            FOREIGN KEY (task, round) REFERENCES rounds (task, round)
        )""",
        "CREATE INDEX pending_updates ON updates (task) WHERE folded IS NULL",
    ),
    (
        # target: what the version would be without compression, where patches lead to it; patch:
        # what made it of the version before.
        "ALTER TABLE versions ADD COLUMN target BLOB",
        "ALTER TABLE versions ADD COLUMN patch BLOB",
    ),
    (
        # said: tags by the device itself, as JSON; number: its place in the order of coming, by
        # which the standings of a round are laid out.
        "ALTER TABLE devices ADD COLUMN said TEXT NOT NULL DEFAULT '{}'",
        "ALTER TABLE devices ADD COLUMN number INTEGER NOT NULL DEFAULT -1",
        """UPDATE devices SET number =
            (SELECT count(*) FROM devices AS earlier WHERE earlier.device < devices.device)""",
        """CREATE TABLE tags (
            device TEXT NOT NULL,
            tag TEXT NOT NULL,
            value TEXT NOT NULL,
            UNIQUE (device, tag)
        )""",
        # standings: zlib of one byte a device, why it could be drawn or not; took_s: from the
        # invitation to the arrival of the update, null where the invitation was not seen.
        "ALTER TABLE rounds ADD COLUMN standings BLOB",
        "ALTER TABLE updates ADD COLUMN took_s REAL",
        # Updates that were answered and not counted; during: the task's newest round then.
        """CREATE TABLE refusals (
            task TEXT NOT NULL,
            device TEXT NOT NULL,
            round INTEGER NOT NULL,
            hash BLOB NOT NULL CHECK (length(hash) = 16),
            outcome TEXT NOT NULL CHECK (outcome IN ('stale', 'refused')),
            reason TEXT NOT NULL,
            is_bad INTEGER NOT NULL,
            during INTEGER NOT NULL,
            size INTEGER NOT NULL,
            took_s REAL,
            refused_at INTEGER NOT NULL DEFAULT (CAST(strftime('%s', 'now') AS INTEGER)),
            UNIQUE (task, device, hash)
        )""",
        # strikes: rounds, as a JSON list; until: the first round that it may be invited to again.
        """CREATE TABLE quarantine (
            task TEXT NOT NULL,
            device TEXT NOT NULL,
            strikes TEXT NOT NULL,
            terms INTEGER NOT NULL,
            until INTEGER NOT NULL,
            reason TEXT NOT NULL,
            changed_at INTEGER NOT NULL DEFAULT (CAST(strftime('%s', 'now') AS INTEGER)),
            UNIQUE (task, device)
        )""",
        # Messages in whose handling the coordinator failed; is_dead: not tried again.
        """CREATE TABLE letters (
            hash BLOB PRIMARY KEY CHECK (length(hash) = 16),
            topic TEXT NOT NULL,
            size INTEGER NOT NULL,
            head BLOB NOT NULL,
            error TEXT NOT NULL,
            attempts INTEGER NOT NULL,
            is_dead INTEGER NOT NULL,
            first_at INTEGER NOT NULL DEFAULT (CAST(strftime('%s', 'now') AS INTEGER)),
            last_at INTEGER NOT NULL DEFAULT (CAST(strftime('%s', 'now') AS INTEGER))
        )""",
    ),
    (
        # With boot, which connection of which start a device was last heard over: what is older
        # is not believed. Written with the rest of a status, and never for a check-in alone.
        "ALTER TABLE devices ADD COLUMN start INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE devices ADD COLUMN connection INTEGER NOT NULL DEFAULT 0",
    ),
)


def migrate(
    db: sqlite3.Connection,
    migrations: Sequence[Sequence[str]] = MIGRATIONS,
    reach: Callable[[str], None] = lambda _failpoint: None,
) -> None:
    """Bring a database (in autocommit mode) to the newest schema, each step in one transaction.

    `reach` is told of either side of each COMMIT, for drills.
    Raises: StoreError when the file is another program's, or was written by a newer fedge.
    """
    at = check(db, migrations)
    for number, statements in enumerate(migrations[at:], at + 1):
        _one(db, number, statements, reach)


def check(db: sqlite3.Connection, migrations: Sequence[Sequence[str]] = MIGRATIONS) -> int:
    """Return the schema number of a database without touching it; raises as `migrate` does."""
    at = int(db.execute("PRAGMA user_version").fetchone()[0])
    ours = int(db.execute("PRAGMA application_id").fetchone()[0])
    tables = int(db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0])
    if ours != APPLICATION_ID and (tables or ours):
        raise StoreError("expected a coordinator's database, found another program's: move it away")
    if at > len(migrations):
        raise StoreError(
            f"this store has schema {at}, this fedge knows up to {len(migrations)}: upgrade fedge"
        )
    return at


def _one(
    db: sqlite3.Connection, number: int, statements: Sequence[str], reach: Callable[[str], None]
) -> None:
    db.execute("BEGIN IMMEDIATE")
    try:
        for statement in statements:
            db.execute(statement)
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {number}")
    except BaseException:
        db.execute("ROLLBACK")
        raise
    reach("before_commit")
    db.execute("COMMIT")
    reach("after_commit")
