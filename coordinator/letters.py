# SPDX-License-Identifier: Apache-2.0
"""Messages in whose handling the coordinator fails: tried three times, then set aside and kept.

A failure that is caught is noted in the store at once. One that ends the process is found at the
next start: before a message is handled its name stands in a small file, which the kernel keeps when
a process dies. Nothing is synced for it: after a power cut nobody is to blame.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import mmap
import os
import struct
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from coordinator.clock import Clock
from coordinator.docket import LETTERS_KEPT, Letter
from coordinator.store import Store
from edge_sdk.errors import StoreError

log = logging.getLogger(__name__)

HEAD_BYTES = 256
"""Of a message that is set aside, so many bytes are kept."""
RETRY_S = 1.0
MOST_WAITING = 8
"""Messages that wait for another attempt; those beyond are tried again at once."""

_FIXED = struct.Struct("<16sIHH")
_ENDS = 64
_MARKER_BYTES = 4096


class Handled(NamedTuple):
    """A message as it is remembered: its name, its topic, how large it is and how it begins."""

    name: bytes
    topic: str
    size: int
    head: bytes


def handled(stage: str, topic: str, payload: bytes) -> Handled:
    """Return what is remembered of a message, for one stage of its handling.

    Its ends name it: they hold the lengths and the signature.
    """
    ends = payload[:_ENDS], payload[-_ENDS:]
    size = len(payload).to_bytes(4, "little")
    text = b"\0".join((stage.encode(), topic.encode(), size, *ends))
    name = hashlib.sha256(text).digest()[:16]
    return Handled(name, topic[:128], len(payload), payload[:HEAD_BYTES])


class Marker(Protocol):
    """Where it stands which message is being handled, beyond the end of the process."""

    def set(self, message: Handled | None) -> None:
        """Note what is handled now."""
        ...

    def left(self) -> Handled | None:
        """Return what was being handled when the process before ended."""
        ...

    def close(self) -> None: ...


class FileMarker:
    """A `Marker` in a file. A disk that refuses it costs no more than the knowledge."""

    def __init__(self, path: Path) -> None:
        self._map: mmap.mmap | None = None
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        try:
            file = os.open(path, flags, 0o600)
            try:
                os.posix_fallocate(file, 0, _MARKER_BYTES)  # so that no write to the map can fail
                self._map = mmap.mmap(file, _MARKER_BYTES)
            finally:
                os.close(file)
        except OSError as error:
            log.warning("marker not opened reason=%s", error)

    def set(self, message: Handled | None) -> None:
        """Note what is handled now."""
        if self._map is None:
            return
        if message is None:
            self._map[: _FIXED.size] = bytes(_FIXED.size)
            return
        topic = message.topic.encode()
        record = _FIXED.pack(message.name, message.size, len(topic), len(message.head))
        record += topic + message.head
        self._map[: len(record)] = record

    def left(self) -> Handled | None:
        """Return what was being handled when the process before ended."""
        if self._map is None or not any(self._map[: _FIXED.size]):
            return None
        name, size, topic, head = _FIXED.unpack_from(self._map)
        at = _FIXED.size + topic
        text = self._map[_FIXED.size : at].decode(errors="replace")
        return Handled(name, text, size, self._map[at : at + head])

    def close(self) -> None:
        """Let go of the file."""
        if self._map is not None:
            self._map.close()
            self._map = None


class Letters:
    """Knows which messages failed, and how often. `load` first."""

    def __init__(self, store: Store, clock: Clock, marker: Marker | None = None) -> None:
        self.dead: dict[bytes, None] = {}
        """Names of those that are not handled any more."""
        self._store, self._clock, self._marker = store, clock, marker
        self._failed: dict[bytes, None] = {}
        self._survived: set[bytes] = set()
        self._waiting = 0

    async def load(self) -> None:
        """Recall what failed before, and note what the process before this one ended on.

        Raises: StoreError when the store does not answer.
        """
        for letter in await self._store.letters():
            self._note(letter)
        left = self._marker.left() if self._marker is not None else None
        if left is not None:
            log.warning("the last process ended in a message topic=%s", left.topic)
            await self._keep(left, "the process ended while it was handled")
        if self._marker is not None:
            self._marker.set(None)

    @contextlib.contextmanager
    def handling(self, message: Handled) -> Iterator[None]:
        """Mark a message as being handled, while the block runs, which awaits nothing."""
        if self._marker is not None:
            self._marker.set(message)
        try:
            yield
        finally:
            if self._marker is not None:
                self._marker.set(None)
        if message.name in self._failed:
            del self._failed[message.name]
            self._survived.add(message.name)

    async def failed(self, message: Handled, error: Exception) -> bool:
        """Note a failure; return whether it was the last attempt, else after a pause."""
        where = traceback.extract_tb(error.__traceback__)[-1:]
        line = f"{type(error).__name__}: {error}"[:300]
        place = "".join(f" ({Path(at.filename).name}:{at.lineno})" for at in where)
        try:
            is_dead = await self._keep(message, line + place)
        except StoreError as refusal:
            log.warning("failure not noted reason=%s", refusal)
            return True  # it is not kept, and comes again some day
        if not is_dead and self._waiting < MOST_WAITING:
            self._waiting += 1
            try:
                await self._clock.wait(asyncio.Event(), self._clock.monotonic() + RETRY_S)
            finally:
                self._waiting -= 1
        return is_dead

    async def forgive(self) -> None:
        """Forget those that were handled after all: a process may end for many reasons.

        Raises: StoreError when the store does not answer.
        """
        names, self._survived = self._survived, set()
        if names:
            await self._store.forgive(sorted(names))

    async def _keep(self, message: Handled, error: str) -> bool:
        letter = Letter(*message, error)
        kept = await self._store.failed_on(letter)
        self._note(kept)
        if kept.is_dead:
            log.error(
                "message set aside topic=%s attempts=%d reason=%s",
                *(kept.topic, kept.attempts, kept.error),
            )
        return kept.is_dead

    def _note(self, letter: Letter) -> None:
        kept = self.dead if letter.is_dead else self._failed
        kept[letter.name] = None
        for oldest in list(kept)[:-LETTERS_KEPT]:
            del kept[oldest]
