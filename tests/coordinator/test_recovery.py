# SPDX-License-Identifier: Apache-2.0
"""A store in trouble: no receipt is sent, no round begins, and afterwards all goes on alone."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import re
import resource
import socket
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import hand_bundles
import pytest
from fake_fleet import BUNDLE, World, invited

from coordinator import daemon, docket, health, ledger, pacing, replay, schema, store, writer
from coordinator.cli import main
from coordinator.service import Coordinator
from coordinator.store import Store
from coordinator.task import Task
from coordinator.writer import ContradictionError
from edge_sdk.errors import StoreError

ROOT = Path(__file__).parents[2]
TASK = Task("t", BUNDLE, codec="dense", downlink="dense")
PACE = pacing.rounds(cohort=3, quorum=2, deadline_s=60, rest_s=50)


class Ailment(Protocol):
    """Something that befalls the store of a running coordinator while the block lasts."""

    def __call__(self, at: Coordinator, folder: Path) -> Any: ...


async def on_writer(at: Coordinator, statement: str) -> Any:
    """Run a statement on the writer's connection, outside any check of its place."""
    return await at._store._writer.run(lambda db: db.execute(statement).fetchone())


@contextmanager
def full(_at: Coordinator, _folder: Path) -> Iterator[None]:
    """No file takes a byte beyond its first page: as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def locked(_at: Coordinator, folder: Path) -> Iterator[None]:
    """Somebody else writes, and does not come to an end."""
    other = sqlite3.connect(folder / "coordinator.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        other.execute("ROLLBACK")
        other.close()


@contextmanager
def gone(_at: Coordinator, folder: Path) -> Iterator[None]:
    """The file is moved away, and comes back."""
    file, away = folder / "coordinator.db", folder / "away.db"
    file.rename(away)
    try:
        yield
    finally:
        away.rename(file)


@contextmanager
def read_only(at: Coordinator, _folder: Path) -> Iterator[None]:
    """SQLite refuses every write, as on a disk that the kernel has made read-only."""
    w = at._store._writer
    assert isinstance(w, writer.Writer)
    whole = writer.transact

    def refusing(db: sqlite3.Connection, *args: Any) -> list[object]:
        db.execute("PRAGMA query_only = 1")
        try:
            return whole(db, *args)
        finally:
            db.execute("PRAGMA query_only = 0")

    writer.transact = refusing
    try:
        yield
    finally:
        writer.transact = whole


@contextmanager
def corrupt(_at: Coordinator, folder: Path) -> Iterator[None]:
    """Pages of the database come back as something else, and later as they were."""
    file = folder / "coordinator.db"
    whole = writer.transact

    def forgetful(db: sqlite3.Connection, *args: Any) -> list[object]:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        db.execute("PRAGMA cache_size = 1")
        db.execute("PRAGMA shrink_memory")
        with file.open("r+b") as raw:
            raw.seek(4096)
            kept = raw.read()
            raw.seek(4096)
            raw.write(b"\xa5" * len(kept))
        try:
            return whole(db, *args)
        finally:
            with file.open("r+b") as raw:
                raw.seek(4096)
                raw.write(kept)
            db.execute("PRAGMA shrink_memory")

    writer.transact = forgetful
    try:
        yield
    finally:
        writer.transact = whole


async def settle(world: World) -> None:
    """Let all that can happen now happen."""
    for _ in range(20):
        world.broker.pump()
        await asyncio.sleep(0.002)


@pytest.mark.parametrize("ailment", [full, locked, gone, read_only, corrupt])
def test_in_trouble_no_receipt_is_sent_and_no_round_begins_and_then_all_goes_on(
    tmp_path: Path, ailment: Ailment
) -> None:
    folder = tmp_path / "store"

    async def story(world: World) -> None:
        devices = world.devices(3)
        async with world.coordinator((TASK, PACE)) as coordinator:
            await on_writer(coordinator, "PRAGMA busy_timeout = 20")
            await world.until(invited(devices, 1))
            devices[0].report(1)
            await world.until(lambda: devices[0].receipts)
            with ailment(coordinator, folder):
                before = len(devices[1].receipts)
                devices[1].report(1)
                await world.until(lambda: coordinator.counters["store"] >= 1)
                await settle(world)
                assert len(devices[1].receipts) == before, "no receipt without a commit"
                assert "store" in str(await coordinator.check_alive())
                world.clock.advance(61)  # the deadline: with no quorum the round would abort
                await settle(world)
                assert not world.results, "nothing is settled that cannot be kept"
            world.clock.advance(2)
            await world.until(lambda: world.results)
            assert world.results[0].outcome == "abort"
            assert await coordinator.check_alive() is None
            devices[1].report(1)  # from its outbox, once more
            await world.until(lambda: devices[1].receipts)
            assert devices[1].outcomes() == ["late"]
            world.clock.advance(6)
            await world.until(invited(devices, 2))
            for device in devices:
                device.report(2)
            await world.until(lambda: len(world.results) == 2)
            with ailment(coordinator, folder):
                world.clock.advance(51)
                await world.until(lambda: coordinator._store.trouble is not None, within_s=20)
                await settle(world)
                assert not invited(devices, 3)(), "no round begins that cannot be kept"
            world.clock.advance(2)
            await world.until(invited(devices, 3))
        assert world.results[1].version == 1
        assert len(world.results[1].late) == 2

    asyncio.run(story(World(folder)))
    assert [r.holds for r in replay.replay(folder, TASK)] == [True, True]
    counted = [(u["round"], u["device"]) for u in ledger.updates(folder)]
    assert len(counted) == len(set(counted)) == 5


def test_on_a_disk_that_is_really_full_work_goes_on_once_there_is_room(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("a small disk can be mounted by root alone")
    try:
        asyncio.run(_fills_up(World(folder)))
        updates = ledger.updates(folder)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
    assert len(updates) == 3


async def _fills_up(world: World) -> None:
    devices = world.devices(3)
    ballast = world.folder / "ballast"
    async with world.coordinator((TASK, PACE)) as coordinator:
        await world.until(invited(devices, 1))
        with contextlib.suppress(OSError), ballast.open("wb", 0) as out:
            while True:
                out.write(bytes(4096))
        for loss in range(40):  # what the log has room for may still be taken
            devices[0].report(1, loss=float(loss))
            devices[1].report(1, loss=float(loss))
        await world.until(lambda: not coordinator._work)
        while coordinator._store.trouble is None:
            with contextlib.suppress(StoreError):
                await coordinator._store.remember(coordinator.fleet.devices[devices[2].id])
        ballast.unlink()
        for device in devices:
            device.report(1)
        await world.until(lambda: all(d.receipts for d in devices))
        assert await coordinator.check_alive() is None


@pytest.mark.parametrize("place", ["coordinator.db", "coordinator.db-wal"])
def test_a_store_that_is_replaced_in_use_ends_the_coordinator_and_the_next_goes_on(
    tmp_path: Path, place: str
) -> None:
    folder = tmp_path / "store"

    async def story(world: Any) -> None:
        devices = world.devices(3)
        async with world.coordinator((TASK, PACE)) as coordinator:
            await world.until(invited(devices, 1))
            devices[0].report(1)
            await world.until(lambda: devices[0].receipts)
            file = folder / place
            file.rename(tmp_path / "old")
            if place == "coordinator.db":
                file.write_bytes((tmp_path / "old").read_bytes())  # as a backup brought back is
            devices[1].report(1)
            await world.until(lambda: coordinator.counters["store"] == 1)
            await settle(world)
            assert not devices[1].receipts
            world.clock.advance(11)
            await world.until(lambda: coordinator._failed is not None)
            assert isinstance(coordinator._failed, ContradictionError)
            await world.until(lambda: world.ended)
        async with world.coordinator((TASK, PACE)):
            await world.until(lambda: devices[1].outcomes() == ["counted"])
            await world.until(lambda: len(devices[0].receipts) == 1)

    async def tolerant(world: World) -> None:
        # the loop of the first coordinator ends with the error, and is expected to
        try:
            await story(world)
        except ContradictionError:
            pytest.fail("only the loops end with it")

    class Quiet(World):
        ended = False

        async def _train(self, *args: Any) -> None:
            try:
                await super()._train(*args)
            except ContradictionError:
                self.ended = True

    async def main_() -> None:
        await tolerant(Quiet(folder))

    asyncio.run(main_())


def test_writes_to_a_file_that_is_gone_are_no_promise(tmp_path: Path) -> None:
    path = tmp_path / "coordinator.db"

    async def story() -> None:
        opened = Store(path)
        path.rename(tmp_path / "away")
        with pytest.raises(StoreError, match="is gone: put it back"):
            await opened.next_call("t")
        assert "is gone" in str(opened.trouble)
        (tmp_path / "away").rename(path)
        await opened.probe()
        assert opened.trouble is None
        opened.close()

    asyncio.run(story())


def test_systemd_is_told_of_trouble_and_of_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    troubles = iter([None, "the disk is full", "the disk is full", None, None])

    class Ill:
        async def check_alive(self) -> str | None:
            try:
                return next(troubles)
            except StopIteration:
                raise StoreError("enough") from None

    monkeypatch.setattr(daemon, "LOOK_S", 0.001)
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        with pytest.raises(StoreError, match="enough"):
            asyncio.run(daemon._watch(Ill(), "training t"))  # type: ignore[arg-type]  # enough of one
        manager.settimeout(0.0)
        said = list[str]()
        with contextlib.suppress(BlockingIOError):
            while True:
                said.append(manager.recv(1000).decode())
    assert said.count("WATCHDOG=1") == 5
    assert [s for s in said if s.startswith("STATUS")] == [
        "STATUS=no receipts, no rounds: the disk is full",
        "STATUS=training t",
    ]


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    hand_bundles.mlp().save(tmp_path / "x.fedge")
    path = tmp_path / "coordinator.toml"
    path.write_text(
        '[task.t]\nbundle = "x.fedge"\npace = ["rounds", { cohort = 2, deadline_s = 9 }]\n'
    )
    return path


def test_check_tries_the_store(toml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, check = toml.parent / "coordinator", ["check", "--config", str(toml)]
    assert main(check) == 0
    assert "is made at the first start" in capsys.readouterr().out
    Store(folder / "coordinator.db").close()
    assert main(check) == 0
    assert f"takes writes, schema {len(schema.MIGRATIONS)}, read whole" in capsys.readouterr().out
    opened = Store(folder / "coordinator.db")  # a coordinator is at work
    assert main(check) == 0
    opened.close()


def test_check_fails_on_a_locked_a_damaged_and_a_full_store(
    toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, check = toml.parent / "coordinator", ["check", "--config", str(toml)]
    Store(folder / "coordinator.db").close()
    monkeypatch.setattr(health, "LOOK_S", 0.0)
    assert main(check) == 0, "a large database is not read whole"
    monkeypatch.undo()
    size = health.PROBE_BYTES // 2
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with pytest.raises(StoreError, match="takes no 262144 bytes"):
            main(check)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    connect = sqlite3.connect

    def impatient(*args: Any, **options: Any) -> sqlite3.Connection:
        return connect(*args, **(options | {"timeout": 0.01}))

    other = connect(folder / "coordinator.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    monkeypatch.setattr(sqlite3, "connect", impatient)
    with pytest.raises(StoreError, match="locked"):
        main(check)
    other.close()
    raw = bytearray((folder / "coordinator.db").read_bytes())
    raw[4096 * 3 : 4096 * 5] = b"\xa5" * 8192
    (folder / "coordinator.db").write_bytes(raw)
    with pytest.raises(StoreError, match=r"damaged|malformed"):
        main(check)


WALL_CLOCKS = {
    ("time", "time"),
    ("time", "time_ns"),
    ("time", "localtime"),
    ("time", "gmtime"),
    ("datetime", "now"),
    ("datetime", "utcnow"),
    ("datetime", "today"),
    ("date", "today"),
}


def test_nothing_in_the_coordinator_asks_the_wall_clock() -> None:
    """Deadlines and rests are monotonic, terms in rounds: a jump of the clock changes nothing."""
    found = []
    for file in sorted((ROOT / "coordinator").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute):
                owner = getattr(node.value, "id", getattr(node.value, "attr", ""))
                if (owner, node.attr) in WALL_CLOCKS:
                    found.append(f"{file.name}:{node.lineno}")
    dated = ("certificates.py", "broker_cli.py")  # certificates carry dates by their nature
    assert [at for at in found if not at.startswith(dated)] == []


def test_what_the_database_knows_of_the_wall_clock_decides_nothing() -> None:
    """The columns with the time of day are written, and read by those who show them."""
    for module in (store, schema, writer, docket):
        text = Path(str(module.__file__)).read_text()
        assert not re.search(r"(_at|_seen)\b\s*([<>]|=\s*\?|BETWEEN|IN\b)", text)
        assert not re.search(r"ORDER BY[^\"]*(_at|_seen)\b", text)
