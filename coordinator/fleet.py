# SPDX-License-Identifier: Apache-2.0
"""What is known of the devices: keys, who is online, who may take part, who checked in. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum

from coordinator.tags import Where
from edge_sdk.bounds import Tag

REPORTS = 200
"""How many reports the times that they took are remembered of."""

MEMORY = 0.25
"""Weight of the newest round in the moving average of completion."""


@dataclass(frozen=True, slots=True)
class Known:
    """One device as its signed status describes it."""

    device: str
    key: bytes
    name: str = ""
    sdk: str = ""
    online: bool = False
    boot: int = 0
    tags: Mapping[str, Tag] = field(default_factory=dict)
    """What it says of itself."""
    number: int = -1
    """Its place among all devices ever seen, in the order of their coming; -1 until it has one."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Who may take part in a task: the devices of a list, and those whose tags hold to `where`."""

    devices: frozenset[str] | None = None
    where: Where | None = None


class Standing(IntEnum):
    """What a device is to a task at a moment: why it may be drawn for a round, or why not."""

    UNKNOWN = 0
    UNLISTED = 1
    UNTAGGED = 2
    HELD = 3
    OFFLINE = 4
    UNREADY = 5
    READY = 6


@dataclass(frozen=True, slots=True)
class Ready:
    """A check-in that stands: the call it answered and how many examples the device holds."""

    call: int
    examples: int


@dataclass(slots=True)
class Fleet:
    """The devices of one coordinator. Changed in place, because it is as large as the fleet."""

    devices: dict[str, Known] = field(default_factory=dict)
    checked_in: dict[str, dict[str, Ready]] = field(default_factory=dict)
    completion: dict[str, float] = field(default_factory=dict)
    lately_s: dict[str, deque[float]] = field(default_factory=dict)
    """For each task, what its latest reports took from invitation to arrival, seconds."""
    heard: set[str] = field(default_factory=set)
    """Devices whose status came since this coordinator started."""
    assigned: dict[str, dict[str, Tag]] = field(default_factory=dict)
    """Tags that the operator gave to devices; they win over what these say of themselves."""
    entries: dict[str, Entry] = field(default_factory=dict)
    held: dict[str, dict[str, int]] = field(default_factory=dict)
    """For each task, who is in quarantine, and the first round that each may be invited to."""
    _ready: dict[str, set[str]] = field(default_factory=dict)
    _next: int = 0

    def status(self, seen: Known) -> bool:
        """Take in a status; False when it is outdated: an old session's will after a new birth.

        A device that started anew has forgotten its check-ins, so they are dropped. One that says
        it is here is believed, also when it lost count of its starts.
        """
        before = self.devices.get(seen.device)
        if before is not None and seen.boot < before.boot and not seen.online:
            return False
        self._number(seen if before is None else replace(seen, number=before.number))
        self.heard.add(seen.device)
        if before is not None and seen.boot > before.boot:
            for ready in self.checked_in.values():
                ready.pop(seen.device, None)
        for task in self.checked_in:
            self._sort_in(task, seen.device)
        return True

    def remember(self, known: Known) -> None:
        """Take in a device from the store: its key is known, whether it is online is not."""
        if known.device not in self.devices:
            self._number(replace(known, online=False))

    def _number(self, known: Known) -> None:
        """Take in a device, with the next number if it has none."""
        if known.number < 0:
            known = replace(known, number=self._next)
        self._next = max(self._next, known.number + 1)
        self.devices[known.device] = known

    def check_in(self, task: str, device: str, call: int, examples: int) -> None:
        """Note that `device` stands ready for `task`; it stays so until withdrawn or recalled."""
        self.checked_in.setdefault(task, {})[device] = Ready(call, examples)
        self._sort_in(task, device)

    def withdraw(self, task: str, device: str) -> None:
        """Note that `device` is no longer ready for `task`."""
        self.checked_in.get(task, {}).pop(device, None)
        self._sort_in(task, device)

    def recall(self, task: str) -> None:
        """Forget every check-in for `task`: a new call asks for them again."""
        self.checked_in[task] = {}
        self._ready[task] = set()

    def key(self, device: str) -> bytes | None:
        """Return the public key of a device, None for a stranger."""
        known = self.devices.get(device)
        return None if known is None else known.key

    def is_online(self, device: str) -> bool:
        """Whether the broker last said that `device` is there."""
        known = self.devices.get(device)
        return known is not None and known.online

    def has_left(self, device: str) -> bool:
        """Whether the broker said that `device` is gone, rather than nothing about it yet."""
        return device in self.heard and not self.is_online(device)

    def ready(self, task: str) -> set[str]:
        """Return who checked in for `task` and is online. Not to be changed by the caller."""
        return self._ready.setdefault(task, set())

    def admit(self, task: str, entry: Entry) -> None:
        """Say who may take part in a task."""
        self.entries[task] = entry
        self._sort_all(task)

    def assign(self, tags: Mapping[str, Mapping[str, Tag]]) -> None:
        """Take in all tags that the operator gave, for each device."""
        changed = {d for d in self.assigned.keys() | tags if self.assigned.get(d) != tags.get(d)}
        self.assigned = {device: dict(given) for device, given in tags.items()}
        for task in self.checked_in:
            for device in changed:
                self._sort_in(task, device)

    def hold(self, task: str, held: Mapping[str, int]) -> None:
        """Say who is in quarantine, until which round."""
        before, self.held[task] = self.held.get(task, {}), dict(held)
        for device in before.keys() ^ held.keys():
            self._sort_in(task, device)

    def tags_of(self, device: str) -> dict[str, Tag]:
        """Return the tags of a device: its name and version, what it says, what was assigned."""
        known = self.devices.get(device)
        said = {"name": known.name, "sdk": known.sdk, **known.tags} if known else {}
        return said | self.assigned.get(device, {})

    def standing(self, task: str, device: str) -> Standing:
        """Return what a device is to a task now."""
        if device not in self.devices:
            return Standing.UNKNOWN
        entry = self.entries.get(task)
        if entry is not None and entry.devices is not None and device not in entry.devices:
            return Standing.UNLISTED
        if entry is not None and entry.where and not entry.where.holds(self.tags_of(device)):
            return Standing.UNTAGGED
        if device in self.held.get(task, ()):
            return Standing.HELD
        if not self.is_online(device):
            return Standing.OFFLINE
        is_in = device in self.checked_in.get(task, ())
        return Standing.READY if is_in else Standing.UNREADY

    def standings(self, task: str) -> bytes:
        """Return the standing of every device as one byte each, at its number."""
        found = bytearray(self._next)
        checked_in, held = self.checked_in.get(task, {}), self.held.get(task, {})
        is_open = self.entries.get(task, Entry()) == Entry()
        for device, known in self.devices.items():
            if not is_open or device in held:
                found[known.number] = self.standing(task, device)
            elif known.online:
                found[known.number] = Standing.READY if device in checked_in else Standing.UNREADY
            else:
                found[known.number] = Standing.OFFLINE
        return bytes(found)

    def _sort_all(self, task: str) -> None:
        for device in self.checked_in.get(task, ()):
            self._sort_in(task, device)

    def _sort_in(self, task: str, device: str) -> None:
        if self.standing(task, device) is Standing.READY:
            self.ready(task).add(device)
        else:
            self.ready(task).discard(device)

    def completed(self, task: str, invited: int, reported: int) -> None:
        """Fold one settled round into the moving average of completion."""
        share = reported / max(invited, 1)
        before = self.completion.get(task, 1.0)
        self.completion[task] = (1 - MEMORY) * before + MEMORY * share

    def took(self, task: str, seconds: float) -> None:
        """Note what a report took from its invitation."""
        self.lately_s.setdefault(task, deque(maxlen=REPORTS)).append(seconds)

    def completion_of(self, task: str) -> float:
        """Return the share of invited devices that lately reported; 1.0 before the first round."""
        return self.completion.get(task, 1.0)
