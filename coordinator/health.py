# SPDX-License-Identifier: Apache-2.0
"""Whether a store could be worked with now: what `fedge coordinator check` asks of it."""

from __future__ import annotations

import os
import sqlite3
import tempfile
import time
from contextlib import closing
from pathlib import Path

from coordinator.ledger import DATABASE
from coordinator.schema import check
from edge_sdk.errors import StoreError

PROBE_BYTES = 256 * 1024
"""What the disk must take, at least, to be called well."""
LOOK_S = 5.0
"""How long the database is read for damage; a large one is not read whole."""


def inspect(folder: Path) -> str:
    """Write to a store's disk, read its database for damage, and say in a few words how it is.

    A coordinator may be at work. Nothing is changed.
    Raises: StoreError of one line with the first fault.
    """
    file = folder / DATABASE
    if not folder.is_dir():
        return f"{folder} is made at the first start"
    _take(folder)
    if not file.exists():
        return f"{file} is made at the first start"
    try:
        with closing(sqlite3.connect(file, isolation_level=None, timeout=2.0)) as db:
            at, is_whole = check(db), _is_sound(db, file)
            db.execute("BEGIN IMMEDIATE")
            db.execute("ROLLBACK")
    except sqlite3.Error as error:
        raise StoreError(f"cannot use the store {file}: {error}") from error
    return f"{file} takes writes, schema {at}{', read whole' if is_whole else ''}"


def _take(folder: Path) -> None:
    """Write and sync a file on the disk of `folder`, and take it away again."""
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(os.urandom(PROBE_BYTES))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        reason = error.strerror or str(error)
        raise StoreError(f"the disk of {folder} takes no {PROBE_BYTES} bytes: {reason}") from error


def _is_sound(db: sqlite3.Connection, file: Path) -> bool:
    """Read the database for damage; False when there was no time for all of it."""
    until_s = time.monotonic() + LOOK_S
    db.set_progress_handler(lambda: int(time.monotonic() > until_s), 10_000)
    try:
        found = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    except sqlite3.OperationalError as error:
        if "interrupted" in str(error):
            return False
        raise
    finally:
        db.set_progress_handler(None, 0)
    if found != "ok":
        raise StoreError(f"the store {file} is damaged: {found}; bring back a copy of it")
    return True
