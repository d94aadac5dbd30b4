# SPDX-License-Identifier: Apache-2.0
"""What is known of the devices: keys, who is online, who may take part, who checked in. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum

from coordinator.sitting import Age, Sitting, age
from coordinator.tags import Where
from edge_sdk.bounds import Tag
from edge_sdk.messages import REASONS

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
    start: int = 0
    connection: int = 0

    @property
    def sitting(self) -> Sitting:
        """Which of its connections this is about."""
        return Sitting(self.boot, self.start, self.connection)


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


_REASON = 3
"""Bits of a standing as it is kept; above them is why a device is not ready."""


def unpacked(kept: int) -> tuple[Standing, str]:
    """Return a standing as `Fleet.standings` has it, and why not ready where that is known."""
    place = kept >> _REASON
    reason = REASONS[place - 1] if 0 < place <= len(REASONS) else ""
    return Standing(kept & ((1 << _REASON) - 1)), reason


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
    reasons: dict[str, dict[str, str]] = field(default_factory=dict)
    """For each task, why devices are not ready, of those that said."""
    _ready: dict[str, set[str]] = field(default_factory=dict)
    _next: int = 0
    _over: set[str] = field(default_factory=set)
    """Devices whose newest connection has ended, as their will said."""
    _turns: dict[str, dict[str, int]] = field(default_factory=dict)
    """For each task, the number of each device's latest check-in."""

    def status(self, seen: Known) -> bool:
        """Take in a status; False when it is outdated: an old session's will after a new birth.

        A device that started anew has forgotten its check-ins, so they are dropped. One that does
        not number its connections is believed when it says that it is here.
        """
        found = self.age(seen.device, seen.sitting, is_will=not seen.online)
        if found in (Age.OLD, Age.UNPROVEN):
            return False
        self._take(seen, found)
        return True

    def said(self, task: str, device: str, said: Sitting, turn: int) -> Age:
        """Take in the numbers of a check-in; what is older or not proven changes nothing.

        A newer one tells that its device is here, whatever became of the status.
        """
        known, turns = self.devices[device], self._turns.setdefault(task, {})
        found = self.age(device, said)
        if found in (Age.OLD, Age.UNPROVEN) or not said.start:
            return found
        if found is Age.FRESH and turn <= turns.get(device, -1):
            return Age.OLD
        if found is Age.ANEW or said != known.sitting or not known.online:
            boot, start, connection = said
            here = replace(known, online=True, boot=boot, start=start, connection=connection)
            self._take(here, found)
        turns[device] = turn
        return found

    def age(self, device: str, said: Sitting, *, is_will: bool = False) -> Age:
        """Return what a frame of a device is beside the newest that was heard of it."""
        known = self.devices.get(device)
        if known is None:
            return Age.ANEW
        return age(known.sitting, said, is_over=device in self._over, is_will=is_will)

    def _take(self, seen: Known, found: Age) -> None:
        device, before = seen.device, self.devices.get(seen.device)
        if before is not None:
            boot = max(seen.boot, before.boot) if seen.start else seen.boot
            seen = replace(seen, number=before.number, boot=boot)
        self._number(seen)
        self.heard.add(device)
        (self._over.discard if seen.online else self._over.add)(device)
        if before is not None and found is Age.ANEW:
            for task, ready in self.checked_in.items():
                ready.pop(device, None)
                self._turns.get(task, {}).pop(device, None)
                self.reasons.get(task, {}).pop(device, None)
        for task in self.checked_in:
            self._sort_in(task, device)

    def remember(self, known: Known) -> None:
        """Take in a device from the store: its key is known, whether it is online is not."""
        if known.device not in self.devices:
            self._number(replace(known, online=False))
            if not known.online:
                self._over.add(known.device)

    def _number(self, known: Known) -> None:
        """Take in a device, with the next number if it has none."""
        if known.number < 0:
            known = replace(known, number=self._next)
        self._next = max(self._next, known.number + 1)
        self.devices[known.device] = known

    def check_in(self, task: str, device: str, call: int, examples: int) -> None:
        """Note that `device` stands ready for `task`; it stays so until withdrawn or recalled."""
        self.checked_in.setdefault(task, {})[device] = Ready(call, examples)
        self.reasons.get(task, {}).pop(device, None)
        self._sort_in(task, device)

    def withdraw(self, task: str, device: str, reason: str = "") -> None:
        """Note that `device` is no longer ready for `task`, and why."""
        self.checked_in.get(task, {}).pop(device, None)
        self.reasons.setdefault(task, {})[device] = reason
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
        """Return the standing of every device as one byte each, at its number; see `unpacked`."""
        found = bytearray(self._next)
        reasons = self.reasons.get(task, {})
        checked_in, held = self.checked_in.get(task, {}), self.held.get(task, {})
        is_open = self.entries.get(task, Entry()) == Entry()
        for device, known in self.devices.items():
            if not is_open or device in held:
                found[known.number] = self.standing(task, device)
            elif known.online:
                found[known.number] = Standing.READY if device in checked_in else Standing.UNREADY
            else:
                found[known.number] = Standing.OFFLINE
        for device, reason in reasons.items():
            if reason in REASONS and found[at := self.devices[device].number] == Standing.UNREADY:
                found[at] |= (REASONS.index(reason) + 1) << _REASON
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
