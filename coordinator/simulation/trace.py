# SPDX-License-Identifier: Apache-2.0
"""What happened in a run: a hash of every event, counts of faults, the latest events as text."""

from __future__ import annotations

import hashlib
import struct
from collections import Counter, deque

from coordinator.simulation.loop import VirtualLoop

LATEST = 60
_TIME = struct.Struct("<d")


class Trace:
    """The story of one run. Two runs that tell the same story have the same `digest`."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self._hash = hashlib.blake2b(digest_size=16)
        self._latest: deque[tuple[float, str, str, str]] = deque(maxlen=LATEST)
        self.faults: Counter[str] = Counter()
        self.events = 0

    def event(self, what: str, who: str, about: str = "", payload: bytes = b"") -> None:
        """Take note of an event."""
        now_s = self._loop.now_s
        self.events += 1
        self._hash.update(_TIME.pack(now_s) + f"{what}\0{who}\0{about}\0".encode() + payload)
        self._latest.append((now_s, what, who, about))

    def fault(self, what: str, who: str, about: str = "") -> None:
        """Take note of something that went wrong on purpose."""
        self.faults[what] += 1
        self.event("! " + what, who, about)

    @property
    def now_s(self) -> float:
        """The virtual time."""
        return self._loop.now_s

    @property
    def digest(self) -> str:
        """The hash of all so far."""
        return self._hash.hexdigest()

    def latest(self) -> list[str]:
        """Return the latest events, oldest first, a line each."""
        return [
            f"{at:10.3f} s  {what:12} {who:18} {about}".rstrip()
            for at, what, who, about in self._latest
        ]
