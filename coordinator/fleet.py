# SPDX-License-Identifier: Apache-2.0
"""What is known of the devices: keys, who is online, who checked in, how many complete. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

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
    _ready: dict[str, set[str]] = field(default_factory=dict)

    def status(self, seen: Known) -> bool:
        """Take in a status; False when it is outdated: an old session's will after a new birth.

        A device that started anew has forgotten its check-ins, so they are dropped. One that says
        it is here is believed, also when it lost count of its starts.
        """
        before = self.devices.get(seen.device)
        if before is not None and seen.boot < before.boot and not seen.online:
            return False
        self.devices[seen.device] = seen
        self.heard.add(seen.device)
        if before is not None and seen.boot > before.boot:
            for ready in self.checked_in.values():
                ready.pop(seen.device, None)
        for task in self.checked_in:
            self._sort_in(task, seen.device)
        return True

    def remember(self, known: Known) -> None:
        """Take in a device from the store: its key is known, whether it is online is not."""
        self.devices.setdefault(known.device, replace(known, online=False))

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

    def _sort_in(self, task: str, device: str) -> None:
        if device in self.checked_in.get(task, {}) and self.is_online(device):
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
