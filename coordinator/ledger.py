# SPDX-License-Identifier: Apache-2.0
"""The store as a reader sees it: fleet, rounds and models, also while a coordinator is at work."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from coordinator import docket
from coordinator.schema import MIGRATIONS, check
from edge_sdk.errors import StoreError
from edge_sdk.types import Array

DATABASE = "coordinator.db"
DECLINES_OF = 64
"""Rounds of a task that are looked at for who declined."""


def fleet(folder: str | Path) -> list[dict[str, Any]]:
    """Return every device ever seen: id, name, sdk, online, counted updates, when last seen (UTC).

    `tags` are those in force, `quarantine` has the tasks in which the device sits out: the first
    round that it may be invited to again, how often it was set aside, and why.
    `declined` has the tasks in which it lately declined a round: which, and the word that it gave.
    Raises: StoreError when there is no store, or it is not ours.
    """
    rows = _rows(
        folder,
        """SELECT device AS id, name, sdk, online,
        (SELECT count(*) FROM updates u WHERE u.device = d.device) AS updates,
        datetime(first_seen, 'unixepoch') AS first_seen,
        datetime(last_seen, 'unixepoch') AS last_seen, said
        FROM devices d ORDER BY device""",
    )
    with reading(folder) as db:
        orders, newest = docket.orders(db), dict(db.execute(_NEWEST).fetchall())
        declined = _declined(db)
    for row in rows:
        row["tags"] = json.loads(row.pop("said")) | orders.tags.get(row["id"], {})
        row["quarantine"] = {
            task: {"until_round": held.until, "terms": held.terms, "reason": held.reason}
            for task, devices in orders.conducts.items()
            if (held := devices.get(row["id"])) and held.is_held(newest.get(task, 0) + 1)
        }
        row["declined"] = declined.get(row["id"], {})
    return rows


def _declined(db: sqlite3.Connection) -> dict[str, dict[str, dict[str, Any]]]:
    """Return, by device and task, the latest round that it declined of those looked at, and why."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for task, number, result in db.execute(_RESULTS, (DECLINES_OF,)):
        for device, reason in json.loads(result).get("reasons", {}).items():
            found.setdefault(device, {})[task] = {"round": number, "reason": reason}
    return found


def rounds(folder: str | Path, task: str | None = None) -> list[dict[str, Any]]:
    """Return every round of a task, or of all: the stored result beside what it was opened with.

    Raises: StoreError when there is no store, or it is not ours.
    """
    found = _rows(
        folder,
        """SELECT task, round AS number, version AS base, state AS outcome, quorum, goal, cohort,
        result, datetime(opened_at, 'unixepoch') AS opened_at,
        datetime(closed_at, 'unixepoch') AS closed_at
        FROM rounds WHERE ?1 IS NULL OR task = ?1 ORDER BY task, round""",
        task,
    )
    return [_opened(row) for row in found]


def models(folder: str | Path, task: str | None = None) -> list[dict[str, Any]]:
    """Return every version of a task, or of all: number, round, digest, when made (UTC).

    Raises: StoreError when there is no store, or it is not ours.
    """
    return _rows(
        folder,
        """SELECT v.task, v.version, v.round, lower(hex(v.digest)) AS digest,
        lower(hex(t.bundle)) AS bundle, v.params IS NOT NULL AS kept,
        datetime(v.made_at, 'unixepoch') AS made_at
        FROM versions v JOIN tasks t ON t.task = v.task
        WHERE ?1 IS NULL OR v.task = ?1 ORDER BY v.task, v.version""",
        task,
    )


def updates(folder: str | Path, task: str | None = None) -> list[dict[str, Any]]:
    """Return every counted update: task, round, device, outcome, examples, bytes, and `folded`.

    `folded` is the version that holds it, None while none does, -1 when it was set aside.
    Raises: StoreError when there is no store, or it is not ours.
    """
    return _rows(
        folder,
        """SELECT task, round, device, lower(hex(hash)) AS hash, outcome, examples, steps, size,
        folded FROM updates WHERE ?1 IS NULL OR task = ?1 ORDER BY task, round, device""",
        task,
    )


def letters(folder: str | Path) -> list[dict[str, Any]]:
    """Return every message in whose handling a coordinator failed, the latest last.

    `dead` ones are not handled any more; `head` is how the message begins, in hex.
    Raises: StoreError when there is no store, or it is not ours.
    """
    rows = _rows(
        folder,
        """SELECT lower(hex(hash)) AS id, topic, size, lower(hex(head)) AS head, error, attempts,
        is_dead AS dead, datetime(first_at, 'unixepoch') AS first_at,
        datetime(last_at, 'unixepoch') AS last_at FROM letters ORDER BY letters.last_at, hash""",
    )
    return [row | {"dead": bool(row["dead"])} for row in rows]


def weights(folder: str | Path, task: str, version: int) -> Array:
    """Return one version's masters: float32, flat, in the order of the bundle's parameters.

    Raises: StoreError when there is none of that number, or it is older than is kept.
    """
    with reading(folder) as db:
        row = db.execute(
            "SELECT params FROM versions WHERE task = ? AND version = ? AND params IS NOT NULL",
            (task, version),
        ).fetchone()
    if row is None:
        raise StoreError(f"task {task} has no version {version}, or it is older than is kept")
    return np.frombuffer(row[0], "<f4").astype(np.float32)


_RESULTS = """SELECT r.task, r.round, r.result FROM rounds r
    WHERE r.round > (SELECT max(round) FROM rounds WHERE task = r.task) - ? ORDER BY r.round"""
_NEWEST = "SELECT task, max(round) FROM rounds GROUP BY task"


def _opened(row: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(row["result"])
    kept = {name: value for name, value in row.items() if name != "result"}
    return kept | {"cohort": json.loads(row["cohort"])} | result


def _rows(folder: str | Path, query: str, *values: object) -> list[dict[str, Any]]:
    with reading(folder) as db:
        cursor = db.execute(query, values)
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor]


@contextmanager
def ordering(folder: str | Path) -> Iterator[sqlite3.Connection]:
    """Open a store's database for one change by its operator, kept if the block ends well.

    A coordinator may be at work: it heeds the change within seconds.
    Raises: StoreError when there is no store, it is not ours, or it cannot be written.
    """
    file = _existing(folder)
    try:
        with closing(sqlite3.connect(file, isolation_level=None, timeout=10.0)) as db:
            _require_newest(check(db))
            db.execute("PRAGMA synchronous = FULL")
            db.execute("BEGIN IMMEDIATE")
            yield db
            db.execute("COMMIT")
    except sqlite3.Error as error:
        raise StoreError(f"cannot write {file}: {error}") from error


def _require_newest(at: int) -> None:
    if at < len(MIGRATIONS):
        raise StoreError(
            f"this store has schema {at}, this fedge reads {len(MIGRATIONS)}: start this fedge's "
            "coordinator once, which brings it up to date"
        )


def _existing(folder: str | Path) -> Path:
    file = Path(folder) / DATABASE
    if not file.exists():
        raise StoreError(f"expected a coordinator's store at {file}, there is none")
    return file


@contextmanager
def reading(folder: str | Path) -> Iterator[sqlite3.Connection]:
    """Open a store's database for reading.

    Raises: StoreError when there is no store, or it is not ours.
    """
    file = _existing(folder)
    try:
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as db:
            _require_newest(check(db))
            yield db
    except sqlite3.Error as error:
        raise StoreError(f"cannot read {file}: {error}") from error
