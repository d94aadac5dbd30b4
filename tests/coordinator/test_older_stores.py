# SPDX-License-Identifier: Apache-2.0
"""A store that an earlier fedge wrote is brought up to date, and nothing in it is lost."""

from __future__ import annotations

import asyncio
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator import ledger, schema
from coordinator.cli import main
from coordinator.fleet import Known
from coordinator.store import Store, StoredRound, StoredUpdate, Version
from edge_sdk.errors import StoreError

FIRST = Version(0, 0, b"0" * 32, b"\0" * 16, b"")
DEVICES = ("db", "da", "dc")


def older(path: Path, number: int) -> None:
    """Write a store as schema `number` had it: three devices, an open round, an update."""
    path.parent.mkdir()
    db = sqlite3.connect(path, isolation_level=None)
    schema.migrate(db, schema.MIGRATIONS[:number])
    for device in DEVICES:
        db.execute(
            "INSERT INTO devices (device, key, name, sdk, boot, online) VALUES (?,?,?,?,?,?)",
            (device, device[1].encode() * 32, "n", "fedge 0.1.0", 3, 1),
        )
    if number > 2:  # which gave each a place
        for place, device in enumerate(sorted(DEVICES)):
            db.execute("UPDATE devices SET number = ? WHERE device = ?", (place, device))
    db.execute("INSERT INTO tasks (task, bundle, call) VALUES ('t', ?, 7)", (b"b" * 32,))
    db.execute(
        "INSERT INTO versions (task, version, round, digest, params, optimizer)"
        " VALUES ('t', 0, 0, ?, ?, x'')",
        (FIRST.digest, FIRST.params),
    )
    db.execute(
        "INSERT INTO rounds (task, round, version, state, cohort, quorum, goal, deadline_s, seed)"
        " VALUES ('t', 1, 0, 'open', '[\"da\", \"db\"]', 1, 2, 60.0, 5)"
    )
    db.execute(
        "INSERT INTO updates (task, round, device, hash, version, examples, steps, loss, seconds,"
        " size, outcome, blob) VALUES ('t', 1, 'da', ?, 0, 10, 5, 0.5, 1.5, 900, 'counted', x'01')",
        (b"h" * 16,),
    )
    db.close()


@pytest.mark.parametrize("number", range(1, len(schema.MIGRATIONS)))
def test_every_older_schema_becomes_the_newest_with_all_that_it_held(
    tmp_path: Path, number: int
) -> None:
    path = tmp_path / "store" / "coordinator.db"
    older(path, number)

    async def story() -> None:
        store = Store(path)
        known = await store.devices()
        assert [(k.device, k.number, k.boot, dict(k.tags)) for k in known] == [
            ("da", 0, 3, {}),
            ("db", 1, 3, {}),
            ("dc", 2, 3, {}),
        ]
        resumed = await store.resume("t", b"b" * 32, replace(FIRST, params=b"other"))
        assert (resumed.call, resumed.version.params) == (8, FIRST.params)
        assert [r.cohort for r in resumed.rounds] == [{"da", "db"}]
        (pending,) = resumed.pending
        assert (pending.device, pending.blob, pending.took_s) == ("da", b"\1", None)
        assert not resumed.conducts
        assert await store.letters() == []
        new = StoredUpdate(
            *(1, "db", b"g" * 16, 0, 10, 5, 0.5, 1.5, 900, "counted", b"x"), took_s=3.0
        )
        assert (await store.count("t", new)).is_new
        await store.remember(Known("dd", b"d" * 32, number=3, tags={"site": "north"}))
        await store.commit(
            "t", Version(1, 1, b"1" * 32, b"\1" * 16, b""), [(1, "da"), (1, "db")], {}
        )
        await store.open_round(
            "t", StoredRound(2, 1, frozenset({"dd"}), 1, 1, 60.0, 6, standings=b"\1\2\3\6")
        )
        store.close()

    asyncio.run(story())
    assert [row["id"] for row in ledger.fleet(path.parent)] == ["da", "db", "dc", "dd"]
    assert ledger.fleet(path.parent)[3]["tags"] == {"site": "north"}


def test_an_operator_is_told_to_start_the_coordinator_before_an_older_store_is_changed(
    tmp_path: Path,
) -> None:
    path = tmp_path / "store" / "coordinator.db"
    older(path, 2)
    for command in (["fleet"], ["release", "da"], ["deadletters"], ["why", "da"]):
        with pytest.raises(StoreError, match=r"this store has schema 2.*coordinator once"):
            main([*command, "--store", str(path.parent)])
