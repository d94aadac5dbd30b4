# SPDX-License-Identifier: Apache-2.0
"""Bugs planted in the production code: the simulation finds each within 200 seeds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator import desk, intake, rounds, sums
from coordinator.desk import Desk
from coordinator.simulation import Outcome, Setup, simulate
from coordinator.store import Counted, Store, StoredUpdate
from edge_sdk import files, uploads
from edge_sdk.codec import Lattice
from edge_sdk.errors import StoreError
from edge_sdk.store import Residual

MOST = 200
Plant = Callable[[pytest.MonkeyPatch], None]


def caught() -> Outcome | None:
    """Return the first run in which an invariant breaks."""
    return next((o for o in map(simulate, map(Setup, range(MOST))) if not o.holds), None)


def receipt_before_commit(patch: pytest.MonkeyPatch) -> None:
    count = Store.count

    async def at_once(self: Store, task: str, update: StoredUpdate) -> Counted:
        task_ = asyncio.ensure_future(count(self, task, update))
        task_.add_done_callback(lambda done: done.cancelled() or done.exception())
        return Counted(is_new=True, outcome=update.outcome, hash=update.hash)

    patch.setattr(Store, "count", at_once)


def dedupe_off(patch: pytest.MonkeyPatch) -> None:
    count, standing = Store.count, rounds.standing

    async def always_new(self: Store, task: str, update: StoredUpdate) -> Counted:
        return (await count(self, task, update))._replace(is_new=True)

    def never_known(r: rounds.Round, device: str) -> str:
        found = standing(r, device)
        return "late" if found == "duplicate" else found

    patch.setattr(Store, "count", always_new)
    patch.setattr(desk, "standing", never_known)


def residual_committed_on_send(patch: pytest.MonkeyPatch) -> None:
    submit = uploads.Uploads.submit

    def at_once(self: uploads.Uploads, *args: Any) -> bytes:
        update = submit(self, *args)
        if (entry := self._outbox.entry(update)) is not None:
            self._store.set_residual(Residual.from_bytes(entry.if_accepted))
        return update

    patch.setattr(uploads.Uploads, "submit", at_once)


def float_accumulator(patch: pytest.MonkeyPatch) -> None:
    add = sums.add

    def in_float(state: sums.Sum, update: Lattice, weight: int, **options: Any) -> sums.Sum:
        before = state.total.astype(np.float32)
        alone = add(sums.init(state.total.size), update, weight).total.astype(np.float32)
        exact = add(state, update, weight, **options)
        exact.total[:] = before + alone
        return exact

    patch.setattr(sums, "add", in_float)


def deadline_off_by_one(patch: pytest.MonkeyPatch) -> None:
    expire, called = Desk.expire, dict[int, int]()

    def second_time(self: Desk) -> tuple[rounds.Action, ...]:
        number = 0 if self.current is None else self.current.number
        called[number] = called.get(number, 0) + 1
        return expire(self) if called[number] % 2 == 0 else ()

    patch.setattr(Desk, "expire", second_time)


def names_not_flushed(patch: pytest.MonkeyPatch) -> None:
    def write(path: Path, *parts: files.Part, mode: int = 0o600, disk: files.Disk) -> None:
        try:
            disk.put(beside := path.with_name(f".{path.name}.1-1.tmp"), parts, mode)
            disk.rename(beside, path)
        except OSError as error:
            raise StoreError(str(error)) from error

    patch.setattr(files, "write", write)


def outbox_emptied_on_send(patch: pytest.MonkeyPatch) -> None:
    submit = uploads.Uploads.submit

    def and_forget(self: uploads.Uploads, *args: Any) -> bytes:
        update = submit(self, *args)
        self._outbox.remove(update)
        return update

    patch.setattr(uploads.Uploads, "submit", and_forget)


def late_counted_is_stale(patch: pytest.MonkeyPatch) -> None:
    """What the simulation found the first time it ran: counted, then called stale."""

    async def forgotten(*_: object) -> None:
        return None

    patch.setattr(intake.Store, "counted", forgotten)


PLANTED: dict[Plant, set[str]] = {
    receipt_before_commit: {"I3"},
    dedupe_off: {"I2", "I3", "I8"},
    residual_committed_on_send: {"I8"},
    float_accumulator: {"I8"},
    deadline_off_by_one: {"I5"},
    names_not_flushed: {"I3", "I8"},  # an update is gone, or the residual beside it
    outbox_emptied_on_send: {"I3"},
    late_counted_is_stale: {"I3"},
}


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_found(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    outcome = caught()
    assert outcome is not None, f"{MOST} seeds did not find it"
    assert outcome.broken is not None
    assert outcome.broken.invariant in PLANTED[plant], outcome.broken
