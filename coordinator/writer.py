# SPDX-License-Identifier: Apache-2.0
"""One SQLite connection in one thread, and group commit: many waiting writers, one fsync.

WAL with synchronous=FULL: what a future has promised survives a power cut. Work that arrives within
a short window shares one transaction, each piece in a savepoint of its own, and no future resolves
before the COMMIT that holds it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar, cast

from coordinator.schema import check, migrate
from edge_sdk.errors import StoreError
from edge_sdk.failpoints import Failpoints

T = TypeVar("T")


class ContradictionError(StoreError):
    """What was asked contradicts what is stored: unlike a full disk, this does not pass."""


Work = Callable[[sqlite3.Connection], T]
Place = tuple[int, int] | None
"""Device and inode of a file, None where there is none."""


class Writing(Protocol):
    """The port through which a store writes: `Writer`, but in simulations."""

    @property
    def transactions(self) -> int:
        """Transactions committed since it was opened."""
        ...

    async def run(self, work: Work[T], *, urgent: bool = False) -> T:
        """Run `work` inside a transaction; return its result once that is on disk.

        Raises: StoreError when the disk refuses, and whatever `work` raised; nothing is kept then.
        """
        ...

    def close(self) -> None:
        """Finish what was asked for, and let go."""
        ...


@dataclass(frozen=True, slots=True)
class _Job:
    work: Work[Any]
    done: Future[Any]
    is_urgent: bool


class Writer:
    """The one thread that touches the database; `run` hands it work and awaits the commit."""

    def __init__(self, path: Path, *, window_s: float = 0.01, most: int = 256) -> None:
        self.path = path
        self.transactions = 0
        self._window_s = window_s
        self._most = most
        self._failpoints = Failpoints.from_environment()
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._opened: Future[None] = Future()
        self._lock = _lock(path)
        self._is_closed = False
        self._places: tuple[Place, Place] = (None, None)
        self._thread = threading.Thread(target=self._main, name="fedge-store", daemon=True)
        self._thread.start()
        try:
            self._opened.result()
        except BaseException:
            self.close()
            raise

    async def run(self, work: Work[T], *, urgent: bool = False) -> T:
        """Run `work` inside a transaction; return its result once that is on disk.

        `urgent` closes the window at once instead of waiting for others to share the commit.
        Raises: StoreError when the disk refuses, and whatever `work` raised; nothing is kept then.
        """
        if self._is_closed:
            raise StoreError(f"the store {self.path} is closed")
        job = _Job(work, Future(), urgent)
        self._queue.put(job)
        return cast("T", await asyncio.wrap_future(job.done))

    def close(self) -> None:
        """Finish what was asked for, close the file and let others open it. Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            self._queue.put(None)
        self._thread.join()
        self._lock.close()

    def _main(self) -> None:
        try:
            db = _open(self.path, self._failpoints)
        except (sqlite3.Error, StoreError) as error:
            self._opened.set_exception(_store_error(self.path, error))
            return
        self._places = _places(self.path)
        self._opened.set_result(None)
        try:
            while (first := self._queue.get()) is not None:
                batch, is_last = self._gather(first)
                self._commit(db, batch)
                if is_last:
                    break
        finally:
            with contextlib.suppress(sqlite3.Error):  # closing truncates the log at best
                db.close()

    def _gather(self, first: _Job) -> tuple[list[_Job], bool]:
        """Collect what arrives within the window; the flag says that the writer is closing."""
        batch, until_s = [first], time.monotonic() + self._window_s
        while len(batch) < self._most:
            wait_s = 0.0 if any(job.is_urgent for job in batch) else until_s - time.monotonic()
            try:
                job = self._queue.get(timeout=max(wait_s, 0.0))
            except queue.Empty:
                return batch, False
            if job is None:
                return batch, True
            batch.append(job)
        return batch, False

    def _commit(self, db: sqlite3.Connection, batch: list[_Job]) -> None:
        works = [job.work for job in batch]
        try:
            self._check_place()
            outcomes = transact(db, works, self.path, self._failpoints.reach)
            self._check_place()  # what was written to a file that is gone is no promise
        except StoreError as error:
            for job in batch:
                _settle(job.done, error)
            return
        self.transactions += 1
        for job, outcome in zip(batch, outcomes, strict=True):
            _settle(job.done, outcome)

    def _check_place(self) -> None:
        """Refuse to go on in a file that no longer is where the next start looks for it.

        Raises: StoreError while it is gone, ContradictionError once another is in its place.
        """
        found = _places(self.path)
        if self._places[1] is None:  # the log comes with the first transaction
            self._places = (self._places[0], found[1])
        if found == self._places:
            return
        if found[0] is None:
            raise StoreError(f"the store {self.path} is gone: put it back where it was")
        raise ContradictionError(
            f"the store {self.path} or its log was replaced while in use: start again with it"
        )


def _places(path: Path) -> tuple[Place, Place]:
    """Return what stands at the path of a database, and at that of its log: device and inode."""
    found: list[Place] = []
    for file in (path, path.with_name(path.name + "-wal")):
        try:
            at = file.stat()
        except OSError:
            found.append(None)
        else:
            found.append((at.st_dev, at.st_ino))
    return found[0], found[1]


def transact(
    db: sqlite3.Connection,
    works: Sequence[Work[Any]],
    path: Path,
    reach: Callable[[str], None] = lambda _failpoint: None,
) -> list[object]:
    """Do some work in one transaction; return what came of each piece, a result or its exception.

    `reach` is told of either side of a COMMIT that keeps something, for drills.
    Raises: StoreError when nothing is kept.
    """
    before = db.total_changes
    try:
        db.execute("BEGIN IMMEDIATE")
        outcomes = [_attempt(db, work, path) for work in works]
        if is_record := db.total_changes != before:
            reach("before_commit")
        db.execute("COMMIT")
    except sqlite3.Error as error:
        with contextlib.suppress(sqlite3.Error):  # the disk may refuse this as well
            db.execute("ROLLBACK")
        raise _store_error(path, error) from error
    if is_record:
        reach("after_commit")
    return outcomes


def _attempt(db: sqlite3.Connection, work: Work[Any], path: Path) -> object:
    """Run one piece of work in its savepoint: its failure undoes itself alone."""
    db.execute("SAVEPOINT job")
    try:
        result = work(db)
    except sqlite3.Error as error:
        outcome: object = _store_error(path, error)
    except Exception as error:  # noqa: BLE001  # handed to whoever awaits the work
        outcome = error
    else:
        db.execute("RELEASE job")
        return result
    db.execute("ROLLBACK TO job")  # fails when the disk error undid everything: so does the batch
    db.execute("RELEASE job")
    return outcome


def _settle(done: Future[Any], outcome: object) -> None:
    if not done.set_running_or_notify_cancel():
        return
    if isinstance(outcome, Exception):
        done.set_exception(outcome)
    else:
        done.set_result(outcome)


def _open(path: Path, failpoints: Failpoints) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None, timeout=5.0)
    try:
        check(db)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("PRAGMA trusted_schema = OFF")
        migrate(db, reach=failpoints.reach)
    except BaseException:
        db.close()
        raise
    return db


def _lock(path: Path) -> BinaryIO:
    """Hold the file beside the database: two coordinators on one store would disagree."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = path.with_name(path.name + ".lock").open("a+b")
    except OSError as error:
        raise _store_error(path, error) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise StoreError(f"{path} is in use by another coordinator: stop that one first") from error
    return lock


def _store_error(path: Path, error: Exception) -> StoreError:
    if isinstance(error, StoreError):
        return error
    if isinstance(error, sqlite3.IntegrityError):
        return ContradictionError(f"the store {path} does not allow it: {error}")
    reason = getattr(error, "strerror", None) or str(error)
    return StoreError(f"cannot use the store {path}: {reason}; check the disk and its permissions")
