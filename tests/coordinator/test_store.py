# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import asyncio
import hashlib
import os
import resource
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordinator import schema
from coordinator.fleet import Known
from coordinator.store import Store, StoredRound, StoredUpdate, Version
from edge_sdk.errors import ConfigError, StoreError

BUNDLE = b"b" * 32
FIRST = Version(0, 0, b"0" * 32, b"\x00" * 16, b"")
ROUND = StoredRound(1, 0, frozenset({"a", "b", "c"}), 2, 3, 60.0, 7)


def update(device: str = "a", number: int = 1, **changes: Any) -> StoredUpdate:
    digest = hashlib.sha256(f"{device}{number}".encode()).digest()[:16]
    u = StoredUpdate(number, device, digest, 0, 10, 5, 0.5, 1.5, 900, "counted", b"blob")
    return replace(u, **changes)


def second(number: int = 1) -> Version:
    return Version(number, number, b"1" * 32, b"\x01" * 16, b"opt")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "coordinator.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    opened = Store(path)
    yield opened
    opened.close()


async def begin(store: Store, number: int = 1) -> None:
    await store.resume("t", BUNDLE, FIRST)
    await store.open_round("t", replace(ROUND, number=number))


def test_a_new_task_starts_with_version_zero_and_each_start_is_a_new_call(store: Store) -> None:
    async def story() -> None:
        first = await store.resume("t", BUNDLE, FIRST)
        assert (first.call, first.version, first.rounds) == (1, FIRST, ())
        again = await store.resume("t", BUNDLE, replace(FIRST, params=b"other"))
        assert (again.call, again.version) == (2, FIRST)

    asyncio.run(story())


def test_a_task_does_not_change_its_bundle(store: Store) -> None:
    async def story() -> None:
        await store.resume("t", BUNDLE, FIRST)
        with pytest.raises(ConfigError, match="new task name"):
            await store.resume("t", b"c" * 32, FIRST)

    asyncio.run(story())


def test_an_update_counts_once_a_device_and_round(store: Store) -> None:
    async def story() -> None:
        await begin(store)
        first = update()
        assert (await store.count("t", first)).is_new
        other = await store.count("t", replace(first, hash=b"x" * 16, outcome="late"))
        assert other == (False, "counted", first.hash)
        assert (await store.count("t", update("b"))).is_new
        resumed = await store.resume("t", BUNDLE, FIRST)
        assert [u.device for u in resumed.pending] == ["a", "b"]
        assert resumed.pending[0] == first

    asyncio.run(story())


def test_an_update_of_a_round_that_never_was_is_refused_by_the_database(store: Store) -> None:
    async def story() -> None:
        await begin(store)
        with pytest.raises(StoreError, match="FOREIGN KEY"):
            await store.count("t", update(number=9))

    asyncio.run(story())


def test_commit_adds_a_version_closes_the_round_and_marks_what_it_folded(store: Store) -> None:
    async def story() -> None:
        await begin(store)
        await store.count("t", update("a"))
        await store.count("t", update("b"))
        await store.commit("t", second(), [(1, "a")], {"loss": 0.5})
        resumed = await store.resume("t", BUNDLE, FIRST)
        assert resumed.version == second()
        assert [r.state for r in resumed.rounds] == ["commit"]
        assert [u.device for u in resumed.pending] == ["b"]
        assert [u.device for u in resumed.reports] == ["a", "b"]
        assert await store.version("t", 0) == FIRST

    asyncio.run(story())


@pytest.mark.parametrize(
    ("version", "folded", "message"),
    [
        (second(2), [(1, "a")], "not the next one"),
        (replace(second(), round=5), [(1, "a")], "not open"),
        (second(), [(1, "a"), (1, "c")], "folded before"),
    ],
)
def test_a_commit_that_breaks_a_law_leaves_nothing_behind(
    store: Store, version: Version, folded: list[tuple[int, str]], message: str
) -> None:
    async def story() -> None:
        await begin(store)
        await store.count("t", update("a"))
        with pytest.raises(StoreError, match=message):
            await store.commit("t", version, folded, {})
        resumed = await store.resume("t", BUNDLE, FIRST)
        assert resumed.version.number == 0
        assert resumed.rounds[0].state == "open"
        assert len(resumed.pending) == 1

    asyncio.run(story())


def test_a_task_has_one_open_round_at_most(store: Store) -> None:
    async def story() -> None:
        await begin(store)
        with pytest.raises(StoreError, match="UNIQUE"):
            await store.open_round("t", replace(ROUND, number=2))

    asyncio.run(story())


def test_what_an_aborted_round_counted_stays_pending_unless_set_aside(store: Store) -> None:
    async def story() -> None:
        await begin(store)
        await store.count("t", update("a"))
        await store.count("t", update("b"))
        await store.abort("t", 1, {}, [(1, "b")])
        resumed = await store.resume("t", BUNDLE, FIRST)
        assert [u.device for u in resumed.pending] == ["a"]
        assert resumed.rounds[0].state == "abort"

    asyncio.run(story())


def test_old_bodies_are_dropped_and_version_zero_stays(path: Path) -> None:
    async def story(store: Store) -> None:
        await store.resume("t", BUNDLE, FIRST)
        for n in (1, 2, 3, 4):
            await store.open_round("t", replace(ROUND, number=n, version=n - 1))
            await store.count("t", update("a", n))
            await store.commit("t", second(n), [(n, "a")], {})
        assert (await store.version("t", 4)).params
        assert (await store.version("t", 0)).params
        with pytest.raises(StoreError, match="no version 1"):
            await store.version("t", 1)

    store = Store(path, keep=2)
    asyncio.run(story(store))
    store.close()
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT count(*) FROM updates WHERE blob IS NULL").fetchone() == (2,)
    db.close()


def test_devices_are_remembered_across_a_restart(path: Path) -> None:
    known = Known("d1", b"k" * 32, "barn", "0.1.0", online=True, boot=4)
    for change in ({}, {"boot": 5, "online": False}):
        store = Store(path)
        asyncio.run(store.remember(replace(known, **change)))
        store.close()
    store = Store(path)
    assert asyncio.run(store.devices()) == [replace(known, boot=5, online=False)]
    store.close()


def test_updates_that_arrive_together_share_few_transactions(store: Store) -> None:
    async def story() -> int:
        await begin(store)
        before = store.transactions
        await asyncio.gather(*(store.count("t", update(f"d{i:03d}")) for i in range(200)))
        return store.transactions - before

    assert asyncio.run(story()) <= 4


def test_one_bad_write_does_not_take_its_neighbours_along(store: Store) -> None:
    async def story() -> list[Any]:
        await begin(store)
        writes = [store.count("t", update(d, n)) for d, n in (("a", 1), ("b", 9), ("c", 1))]
        return await asyncio.gather(*writes, return_exceptions=True)

    good, bad, also_good = asyncio.run(story())
    assert good.is_new
    assert also_good.is_new
    assert isinstance(bad, StoreError)


def test_two_coordinators_do_not_share_a_store(store: Store, path: Path) -> None:
    with pytest.raises(StoreError, match="another coordinator"):
        Store(path)


def test_a_closed_store_says_so(path: Path) -> None:
    store = Store(path)
    store.close()
    store.close()
    with pytest.raises(StoreError, match="closed"):
        asyncio.run(store.devices())


@pytest.mark.parametrize("content", ["text", "sqlite", "newer"])
def test_a_file_that_is_not_ours_is_left_alone(path: Path, content: str) -> None:
    if content == "text":
        path.write_text("grocery list " * 100)
    else:
        with sqlite3.connect(path) as db:
            db.execute("CREATE TABLE groceries (item TEXT)")
            if content == "newer":
                db.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
                db.execute("PRAGMA user_version = 999")
        db.close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"store|database"):
        Store(path)
    assert path.read_bytes() == before


def test_migrations_are_applied_once_and_in_order(path: Path) -> None:
    db = sqlite3.connect(path, isolation_level=None)
    schema.migrate(db)
    extra = (*schema.MIGRATIONS, ("ALTER TABLE devices ADD COLUMN site TEXT",))
    schema.migrate(db, extra)
    schema.migrate(db, extra)
    assert db.execute("PRAGMA user_version").fetchone() == (len(extra),)
    broken = (*extra, ("CREATE TABLE new (x)", "CREATE TABLE new (x)"))
    with pytest.raises(sqlite3.OperationalError):
        schema.migrate(db, broken)
    assert db.execute("PRAGMA user_version").fetchone() == (len(extra),)
    assert db.execute("SELECT count(*) FROM sqlite_schema WHERE name = 'new'").fetchone() == (0,)
    db.close()


def test_the_disk_being_full_is_a_store_error_and_the_store_recovers(path: Path) -> None:
    """A limit on file size stands in for the full disk: the same refusal from the same call."""
    big = update("b", blob=bytes(4 << 20))
    store = Store(path)
    asyncio.run(begin(store))
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
        with pytest.raises(StoreError, match="disk"):
            asyncio.run(store.count("t", big))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert asyncio.run(store.count("t", big)).is_new
    store.close()


WRITER = """
import asyncio, sys
from test_store_child import begin, update
from coordinator.store import Store

async def write(store, i):
    counted = await store.count("t", update(f"d{i:06d}"))
    assert counted.is_new
    print(i, flush=True)

async def main(path):
    store = Store(path)
    await begin(store)
    i = 0
    while True:
        await asyncio.gather(*(write(store, i + j) for j in range(20)))
        i += 20

asyncio.run(main(sys.argv[1]))
"""


def test_every_update_that_was_acknowledged_survives_kill_9(path: Path, tmp_path: Path) -> None:
    (tmp_path / "test_store_child.py").write_text(Path(__file__).read_text())
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, env=env, text=True
    ) as child:
        assert child.stdout is not None
        seen = [child.stdout.readline() for _ in range(300)]
        child.kill()
        seen += child.stdout.readlines()
    acknowledged = {int(line) for line in seen if line.endswith("\n")}
    assert len(acknowledged) >= 300
    store = Store(path)
    resumed = asyncio.run(store.resume("t", BUNDLE, FIRST))
    store.close()
    assert acknowledged <= {int(u.device[1:]) for u in resumed.pending}
