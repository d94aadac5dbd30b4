# SPDX-License-Identifier: Apache-2.0
"""What is held against whom, and what the operator ordered: rows of the coordinator's database.

Each function works on a connection, inside the caller's transaction: the daemon's writer calls
them, and so do the operator's commands, from another process while the daemon runs.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from coordinator.quarantine import Conduct, Rules, strike
from edge_sdk.bounds import MAX_TAGS, Tag, are_tags
from edge_sdk.errors import ConfigError

MOST_ATTEMPTS = 3
"""After so many failures a message is not handled any more."""
LETTERS_KEPT = 256
"""Messages that failed, of which it is remembered."""
REFUSALS_KEPT = 32
"""Refusals that are remembered of a device in a task: enough to say why."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """An update that was answered and will never count; `during` was the task's newest round."""

    round: int
    device: str
    hash: bytes
    outcome: Literal["stale", "refused"]
    reason: str
    is_bad: bool
    during: int
    size: int
    took_s: float | None = None


class Letter(NamedTuple):
    """A message in whose handling the coordinator failed; a dead one is not handled any more."""

    name: bytes
    topic: str
    size: int
    head: bytes
    error: str
    attempts: int = 0
    is_dead: bool = False


class Orders(NamedTuple):
    """What operators may change while a coordinator runs."""

    tags: dict[str, dict[str, Tag]]
    conducts: dict[str, dict[str, Conduct]]
    """For each task, what is held against devices."""


def refuse(db: sqlite3.Connection, task: str, r: Refusal, rules: Rules) -> Conduct | None:
    """Keep a refusal; return what is held against the device if that changed.

    The same frame sent again is the same refusal: it is held against nobody twice.
    """
    row = (task, r.device, r.round, r.hash, r.outcome, r.reason, r.is_bad, r.during)
    if db.execute(_REFUSE, (*row, r.size, r.took_s)).rowcount != 1:
        return None
    db.execute(_PRUNE_REFUSALS, (task, r.device, task, r.device, REFUSALS_KEPT))
    if not r.is_bad:
        return None
    before = conduct(db, task, r.device)
    after = strike(before, r.during, rules, r.reason)
    if after == before:
        return None
    keep(db, task, r.device, after)
    return after


def conduct(db: sqlite3.Connection, task: str, device: str) -> Conduct:
    """Return what is held against a device in a task."""
    row = db.execute(_CONDUCT, (task, device)).fetchone()
    return Conduct() if row is None else _conduct(*row)


def keep(db: sqlite3.Connection, task: str, device: str, held: Conduct) -> None:
    """Store what is held against a device in a task."""
    strikes = json.dumps(held.strikes)
    db.execute(_KEEP, (task, device, strikes, held.terms, held.until, held.reason))


def pardon(db: sqlite3.Connection, device: str, task: str | None = None) -> list[str]:
    """Forget what is held against a device, in one task or in all; return in which."""
    rows = db.execute(_PARDON, (device, task)).fetchall()
    return sorted(row[0] for row in rows)


def orders(db: sqlite3.Connection) -> Orders:
    """Return every tag that was assigned, and all that is held against devices."""
    tags: dict[str, dict[str, Tag]] = {}
    for device, tag, value in db.execute("SELECT device, tag, value FROM tags"):
        tags.setdefault(device, {})[tag] = json.loads(value)
    conducts: dict[str, dict[str, Conduct]] = {}
    for task, device, *row in db.execute(_CONDUCTS):
        conducts.setdefault(task, {})[device] = _conduct(*row)
    return Orders(tags, conducts)


def tag(db: sqlite3.Connection, device: str, name: str, value: Tag | None) -> None:
    """Assign a tag to a device; None takes it away.

    Raises: ConfigError when that makes too many.
    """
    if value is None:
        db.execute("DELETE FROM tags WHERE device = ? AND tag = ?", (device, name))
        return
    db.execute(_TAG, (device, name, json.dumps(value)))
    rows = db.execute("SELECT tag, value FROM tags WHERE device = ?", (device,))
    if not are_tags({at: json.loads(given) for at, given in rows}):
        raise ConfigError(f"expected up to {MAX_TAGS} short tags for {device}; take some away")


def letters(db: sqlite3.Connection) -> list[Letter]:
    """Return every message that failed, the latest last."""
    return [Letter._make(row)._replace(is_dead=bool(row[-1])) for row in db.execute(_LETTERS)]


def fail(db: sqlite3.Connection, letter: Letter) -> Letter:
    """Count one more failure in the handling of a message; return what is known of it now."""
    attempts, first_at = db.execute(_FAILED_BEFORE, (letter.name,)).fetchone() or (0, None)
    is_dead = attempts + 1 >= MOST_ATTEMPTS
    failed = letter._replace(attempts=attempts + 1, is_dead=is_dead)
    db.execute(_FAIL, (*failed, first_at))
    db.execute(_PRUNE_LETTERS, (LETTERS_KEPT,))
    return failed


def forgive(db: sqlite3.Connection, names: Iterable[bytes]) -> None:
    """Forget failures in messages that were handled after all."""
    db.executemany("DELETE FROM letters WHERE hash = ? AND NOT is_dead", [(n,) for n in names])


def _conduct(strikes: str, terms: int, until: int, reason: str) -> Conduct:
    return Conduct(tuple(json.loads(strikes)), terms, until, reason)


_REFUSE = """INSERT INTO refusals
    (task, device, round, hash, outcome, reason, is_bad, during, size, took_s)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (task, device, hash) DO NOTHING"""
_PRUNE_REFUSALS = """DELETE FROM refusals WHERE task = ? AND device = ? AND rowid NOT IN
    (SELECT rowid FROM refusals WHERE task = ? AND device = ? ORDER BY rowid DESC LIMIT ?)"""
_CONDUCT = "SELECT strikes, terms, until, reason FROM quarantine WHERE task = ? AND device = ?"
_CONDUCTS = "SELECT task, device, strikes, terms, until, reason FROM quarantine"
_KEEP = """INSERT INTO quarantine (task, device, strikes, terms, until, reason)
    VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (task, device) DO UPDATE SET
    strikes = excluded.strikes, terms = excluded.terms, until = excluded.until,
    reason = excluded.reason, changed_at = CAST(strftime('%s', 'now') AS INTEGER)"""
_PARDON = "DELETE FROM quarantine WHERE device = ?1 AND (?2 IS NULL OR task = ?2) RETURNING task"
_TAG = """INSERT INTO tags (device, tag, value) VALUES (?, ?, ?)
    ON CONFLICT (device, tag) DO UPDATE SET value = excluded.value"""
_LETTERS = "SELECT hash, topic, size, head, error, attempts, is_dead FROM letters ORDER BY rowid"
_FAILED_BEFORE = "DELETE FROM letters WHERE hash = ? RETURNING attempts, first_at"
_FAIL = """INSERT INTO letters (hash, topic, size, head, error, attempts, is_dead, first_at)
    VALUES (?, ?, ?, ?, ?, ?, ?, coalesce(?, CAST(strftime('%s', 'now') AS INTEGER)))"""
_PRUNE_LETTERS = """DELETE FROM letters WHERE rowid IN
    (SELECT rowid FROM letters ORDER BY rowid DESC LIMIT -1 OFFSET ?)"""
