# SPDX-License-Identifier: Apache-2.0
"""Why a device was drawn for a round or not, and what became of what it sent, from the journal."""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coordinator import ledger
from coordinator.fleet import Standing, unpacked
from edge_sdk.errors import ConfigError

LATEST = 20
"""Rounds of a task that are told of, unless more are asked for."""

SAYS = {
    Standing.UNKNOWN: "not seen before",
    Standing.UNLISTED: "not in the task's list of devices",
    Standing.UNTAGGED: "its tags do not match",
    Standing.HELD: "in quarantine",
    Standing.OFFLINE: "offline",
    Standing.UNREADY: "not checked in",
    Standing.READY: "ready, not drawn",
}
INVITED, NOT_KEPT = "invited", "not kept any more"
DECLINES = {
    "conditions": "its conditions did not hold",
    "limits": "its limits of the day were reached",
    "disk": "its disk was full",
    "examples": "it had too few examples",
    "failed": "a training had failed a moment ago",
    "no-update": "its training gave no update",
    "no-model": "the task's bundle was not there yet",
    "bad-bundle": "it refuses the task's bundle",
    "bad-model": "the model did not work there",
    "version": "it had a newer version",
    "deadline": "the deadline had passed there",
    "gave-up": "its process died in it again and again",
    "leaving": "it was stopped",
}
"""What the words of a check-in mean."""


def why(
    folder: str | Path, device: str, task: str | None = None, latest: int = LATEST
) -> dict[str, Any]:
    """Return what the journal knows of a device, newest rounds first; plain JSON values.

    `device`, `name`, `online`, `first_seen`, `last_seen`, `tags`, and for each of `tasks`:
    `quarantine` (`until_round`, `terms`, `reason`; None when free), totals, and `rounds`, each with
    `round`, `opened_at`, `base`, `state`, `standing` ("invited", or why it was not), `end` (for a
    device that was invited: counted, left, declined, straggler, or open), `reason` (the word of
    `DECLINES` that a device gave which declined, or did not stand ready) and `receipts`. A receipt
    has `outcome`, `reason`, `bytes`, `took_s` (from the invitation to the update), `late_s` (beyond
    the deadline) and `version` (the one that holds the update; -1 if it was set aside).
    Raises: ConfigError when the device was never seen, StoreError when there is no store.
    """
    known = next((row for row in ledger.fleet(folder) if row["id"] == device), None)
    if known is None:
        raise ConfigError(f"no device {device} was ever seen; fedge coordinator fleet lists them")
    held = known.pop("quarantine")
    with ledger.reading(folder) as db:
        db.row_factory = sqlite3.Row
        number = db.execute("SELECT number FROM devices WHERE device = ?", (device,)).fetchone()[0]
        names = [row[0] for row in db.execute("SELECT task FROM tasks ORDER BY task")]
        tasks = [
            {
                "task": name,
                "quarantine": held.get(name),
                **dict(db.execute(_TOTALS, {"task": name, "device": device}).fetchone()),
                "rounds": list(_rounds(db, name, device, number, latest)),
            }
            for name in names
            if task in (None, name)
        ]
    if task is not None and not tasks:
        raise ConfigError(f"expected one of the tasks {', '.join(names) or 'none'}, got {task}")
    about = {key: known[key] for key in ("name", "sdk", "first_seen", "last_seen", "tags")}
    return {"device": device, "online": bool(known["online"]), **about, "tasks": tasks}


def _rounds(
    db: sqlite3.Connection, task: str, device: str, number: int, latest: int
) -> Iterator[dict[str, Any]]:
    for row in db.execute(_ROUNDS, (task, latest)).fetchall():
        where = (task, row["round"], device)
        receipts = [dict(r) for r in db.execute(_UPDATE, where)]
        receipts += [dict(r) for r in db.execute(_REFUSALS, where)]
        for receipt in receipts:
            took_s, due_s = receipt["took_s"], row["deadline_s"]
            receipt["late_s"] = None if took_s is None else max(0.0, took_s - due_s)
        cohort = json.loads(row["cohort"])
        standing, reason = _standing(row["standings"], number)
        if device in cohort:
            standing, reason = INVITED, json.loads(row["result"]).get("reasons", {}).get(device, "")
        yield {
            "round": row["round"],
            "opened_at": row["opened_at"],
            "base": row["version"],
            "state": row["state"],
            "standing": standing,
            "end": _end(row, device, cohort, receipts),
            "reason": reason,
            "receipts": receipts,
        }


def _standing(kept: bytes | None, number: int) -> tuple[str, str]:
    if kept is None:
        return NOT_KEPT, ""
    standings = zlib.decompress(kept)
    standing, reason = unpacked(standings[number] if 0 <= number < len(standings) else 0)
    return SAYS[standing], reason


def _end(
    row: sqlite3.Row, device: str, cohort: list[str], receipts: list[dict[str, Any]]
) -> str | None:
    """Return how a round ended for a device that was invited to it."""
    if device not in cohort:
        return None
    if receipts:
        return str(receipts[0]["outcome"])
    result = json.loads(row["result"])
    ends = {"left": "left", "declined": "declined", "stragglers": "straggler"}
    return next((end for key, end in ends.items() if device in result.get(key, ())), "open")


def lines(found: dict[str, Any]) -> Iterator[str]:
    """Yield what `why` found as lines for people."""
    here = "online" if found["online"] else "offline"
    yield f"{found['device']} ({found['name']}, {found['sdk']}), {here} when last heard of"
    yield f"first seen {found['first_seen']}, last status {found['last_seen']} (UTC)"
    tags = " ".join(f"{name}={value}" for name, value in sorted(found["tags"].items()))
    yield f"tags: {tags or 'none'}"
    for task in found["tasks"]:
        yield ""
        yield (
            f"task {task['task']}: {task['counted']} updates counted, {task['late']} of them late, "
            f"{task['refused']} refused, {task['bytes']} bytes, in {task['versions']} versions"
        )
        if (held := task["quarantine"]) is not None:
            yield f"  in quarantine until round {held['until_round']}: {held['reason']}"
        for row in task["rounds"]:
            yield from _told(row)


def _told(row: dict[str, Any]) -> Iterator[str]:
    end = f"; {row['end']}" if row["end"] and not row["receipts"] else ""
    if row["reason"] and not row["receipts"]:
        end += f": {DECLINES.get(row['reason'], row['reason'])}"
    yield f"  round {row['round']} ({row['opened_at']}, {row['state']}): {row['standing']}{end}"
    for receipt in row["receipts"]:
        parts = [receipt["outcome"]]
        if receipt["took_s"] is not None:
            parts.append(f"after {receipt['took_s']:.1f} s")
        if receipt["late_s"]:
            parts.append(f"{receipt['late_s']:.1f} s beyond the deadline")
        parts.append(f"{receipt['bytes']} bytes")
        if receipt["version"] is not None:
            held = f"in version {receipt['version']}"
            parts.append(held if receipt["version"] >= 0 else "set aside: its sum was not finite")
        if receipt["reason"]:
            parts.append(receipt["reason"])
        yield f"    {', '.join(parts)}"


_TOTALS = """SELECT
    (SELECT count(*) FROM updates WHERE task = :task AND device = :device) AS counted,
    (SELECT count(*) FROM updates
        WHERE task = :task AND device = :device AND outcome = 'late') AS late,
    (SELECT count(*) FROM refusals WHERE task = :task AND device = :device) AS refused,
    (SELECT coalesce(sum(size), 0) FROM updates
        WHERE task = :task AND device = :device) AS bytes,
    (SELECT count(DISTINCT folded) FROM updates
        WHERE task = :task AND device = :device AND folded > 0) AS versions"""
_ROUNDS = """SELECT round, version, state, deadline_s, cohort, result, standings,
    datetime(opened_at, 'unixepoch') AS opened_at
    FROM rounds WHERE task = ? ORDER BY round DESC LIMIT ?"""
_UPDATE = """SELECT outcome, '' AS reason, size AS bytes, took_s, folded AS version
    FROM updates WHERE task = ? AND round = ? AND device = ?"""
_REFUSALS = """SELECT outcome, reason, size AS bytes, took_s, NULL AS version
    FROM refusals WHERE task = ? AND round = ? AND device = ? ORDER BY rowid"""
