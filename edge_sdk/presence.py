# SPDX-License-Identifier: Apache-2.0
"""What a device says of its being there, numbered so that nothing older counts once it is said.

`boot` is the count of starts on disk, and may be lost with the disk; `start` is drawn anew by each
start; connections and check-ins are counted in memory. So a number costs no write. A device whose
count was lost is told by `Heard` how far it had come, and goes on from there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

from edge_sdk import topics
from edge_sdk.messages import CheckIn, Heard
from edge_sdk.settings import Settings, hello
from edge_sdk.signing import Identity


class Presence:
    """Statuses, wills and check-ins of one start. For several threads at once.

    Args:
        key: who signs.
        settings: with what this start knows of itself.
        count_boot: keeps and returns a count of starts that is greater than the one given.
    """

    def __init__(
        self, key: Identity, settings: Settings, count_boot: Callable[[int], int] = lambda n: n + 1
    ) -> None:
        self._key, self._settings, self._count_boot = key, settings, count_boot
        self._connection = self._turn = 0
        self._lock = threading.Lock()

    @property
    def start(self) -> int:
        """What tells this start from every other."""
        return self._settings.start

    @property
    def boot(self) -> int:
        """How many starts there were, this one included, as far as is known."""
        return self._settings.boot

    def will(self) -> tuple[str, bytes]:
        """Begin a connection: return the topic and frame that the broker publishes at its end."""
        with self._lock:
            self._connection += 1
            return self._status(online=False)

    def here(self) -> tuple[str, bytes]:
        """Return the topic and frame that say that the device is here, over this connection."""
        with self._lock:
            return self._status(online=True)

    def check_in(
        self,
        call: int,
        *,
        ready: bool,
        examples: int,
        reason: str = "",
        asks: bool = False,
        number: int = 0,
    ) -> CheckIn:
        """Return the next check-in; `number` is that of the round that it declines."""
        with self._lock:
            self._turn += 1
            known, numbers = self._settings, (self._connection, self._turn)
            sitting = known.boot, known.start, *numbers
            return CheckIn(call, ready, examples, *sitting, reason, asks, number)

    def heard(self, word: Heard) -> bool:
        """Take in what the coordinator heard last; True when all is to be said once more."""
        known = self._settings
        if not known.start or word.start == known.start or word.boot < known.boot:
            return False
        boot = self._count_boot(word.boot)
        with self._lock:
            self._settings = replace(known, boot=boot)
        return True

    def _status(self, *, online: bool) -> tuple[str, bytes]:
        frame = hello(self._key, self._settings, online=online, connection=self._connection)
        return topics.status(self._key.id), frame
