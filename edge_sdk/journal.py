# SPDX-License-Identifier: Apache-2.0
"""The device's journal on disk: what `fedge device why` reads. Bounded, and written seldom.

Lines of JSON in a few small files, the oldest of which makes room. What happens is gathered in
memory and written some time later, so a power cut costs the last half minute of explanations and
nothing else.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edge_sdk import events as ev
from edge_sdk import files
from edge_sdk.files import SYSTEM, Disk
from edge_sdk.session import Session
from edge_sdk.transport import Counters
from edge_sdk.types import Clock
from edge_sdk.usage import SANE_FROM_S
from edge_sdk.why import Entry, entries

log = logging.getLogger(__name__)

FILE_BYTES, MOST_FILES = 8192, 16
MOST_PENDING = 200
ROUNDS_KEPT = 4


class Journal:
    """Writes down what happens to one device. Not for several threads at once."""

    def __init__(
        self, folder: Path, clock: Clock, counters: Counters, boot: int, disk: Disk = SYSTEM
    ) -> None:
        self._folder, self._clock, self._counters, self._boot = folder, clock, counters, boot
        self._disk = disk
        self._pending = deque[bytes](maxlen=MOST_PENDING)
        self._at_invite: dict[int, tuple[int, int]] = {}
        self._names: list[str] | None = None
        self._open = b""
        self.add({"what": "started"})

    def note(
        self, before: Session, event: ev.Event, after: Session, actions: tuple[ev.Action, ...]
    ) -> None:
        """Write down one step of the session, if there is anything to say of it."""
        if isinstance(event, ev.Tick) and not actions and before.is_ready == after.is_ready:
            return
        for entry in entries(before, event, after, actions):
            self.add(entry)

    def add(self, entry: Entry) -> None:
        """Write down a fact."""
        wall = getattr(self._clock, "time", None)
        now = float(wall()) if wall is not None else 0.0
        at = round(now) if now >= SANE_FROM_S else None
        stamp = {"at": at, "boot": self._boot, "up_s": round(self._clock.monotonic(), 1)}
        self._count(entry)
        self._pending.append(json.dumps({**stamp, **entry}).encode() + b"\n")

    def flush(self) -> None:
        """Write what is pending to disk, if anything is."""
        if not self._pending:
            return
        data = b"".join(self._pending)
        try:
            if self._names is None:
                self._disk.make_folder(self._folder)
                files.sweep(self._folder, disk=self._disk)
                names = _names(self._folder, self._disk)
                self._open = self._disk.read(self._folder / names[-1]) if names else b""
                self._names = names
            if not self._names or len(self._open) + len(data) > FILE_BYTES:
                self._turn_over(self._names)
            files.write(self._folder / self._names[-1], self._open + data, disk=self._disk)
        except OSError as error:  # StoreError is one
            log.warning("journal not written reason=%s", error)
            return
        self._open += data
        self._pending.clear()

    def _turn_over(self, names: list[str]) -> None:
        last = int(names[-1].partition(".")[0]) if names else 0
        names.append(f"{last + 1:08d}.jsonl")
        self._open = b""
        while len(names) > MOST_FILES:
            files.remove(self._folder / names[0], self._disk)
            del names[0]

    def _count(self, entry: Entry) -> None:
        """Put the bytes since a round's invitation beside its receipt."""
        here, counters = entry.get("round"), self._counters
        if entry["what"] == "invited":
            self._at_invite[entry["round"]] = counters.bytes_up, counters.bytes_down
            for old in sorted(self._at_invite)[:-ROUNDS_KEPT]:
                del self._at_invite[old]
        elif entry["what"] == "receipt" and here in self._at_invite:
            up, down = self._at_invite[here]
            entry["bytes_up"] = counters.bytes_up - up
            entry["bytes_down"] = counters.bytes_down - down


def read(folder: Path, disk: Disk = SYSTEM) -> Iterator[dict[str, Any]]:
    """Read a journal, oldest first; what is damaged is left out."""
    try:
        names = _names(folder, disk)
    except OSError:
        return
    for name in names:
        try:
            lines = disk.read(folder / name, 4 * FILE_BYTES).splitlines()
        except OSError:  # it made room meanwhile
            continue
        for one in lines:
            try:
                entry = json.loads(one)
            except ValueError:
                continue
            if isinstance(entry, dict) and "what" in entry:
                yield entry


def _names(folder: Path, disk: Disk) -> list[str]:
    found = [name for name in disk.names(folder) if name.endswith(".jsonl")]
    return [name for name in found if name.partition(".")[0].isdigit()]
