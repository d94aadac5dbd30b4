# SPDX-License-Identifier: Apache-2.0
"""Updates that no receipt has settled yet, one fsynced file each, with the residuals they imply.

MQTT delivers, it does not keep: an update stays here until the coordinator's receipt. What the
codec's state becomes if the update is accepted, and if it is not, lies in the same file, so that no
power cut can separate them. A file that does not add up is dropped, and said so in the log.
"""

from __future__ import annotations

import contextlib
import logging
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edge_sdk import files
from edge_sdk.errors import StoreError
from edge_sdk.files import SYSTEM, Disk
from edge_sdk.quota import Quota

log = logging.getLogger(__name__)

DEFAULT_CAP_BYTES = 64 * 2**20
STALE_ROUNDS = 256
"""So many rounds later an update is worth nothing, and no coordinator is known to count it."""
_MAGIC = b"FDOB"
_HEAD = struct.Struct("<4sHH16sQIIII")  # magic, version, 0, update, round, three lengths, crc32
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Entry:
    """One update: its signed frame, and the codec's state afterwards, either way, as bytes."""

    update: bytes
    """The first 16 bytes of the frame's sha256: what a receipt calls it."""
    round: int
    frame: bytes
    if_accepted: bytes = b""
    if_refused: bytes = b""


@dataclass(frozen=True, slots=True)
class Waiting:
    """What is remembered of an entry without reading its file."""

    update: bytes
    round: int
    path: Path
    size: int


class Outbox:
    """The queue in one folder, oldest first. Not for several threads at once.

    Raises: StoreError from any method when the disk refuses.
    """

    def __init__(
        self,
        folder: Path,
        cap_bytes: int = DEFAULT_CAP_BYTES,
        disk: Disk = SYSTEM,
        quota: Quota | None = None,
    ) -> None:
        self._folder, self._cap_bytes, self._disk, self._quota = folder, cap_bytes, disk, quota
        self._waiting: dict[bytes, Waiting] = {}
        self._next = 0
        self._open()

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(tuple(self._waiting.values()))

    @property
    def size_bytes(self) -> int:
        """How much disk the queue takes."""
        return sum(waiting.size for waiting in self._waiting.values())

    def append(self, entry: Entry) -> tuple[bytes, ...]:
        """Keep an update; on return it survives a power cut. Returns the updates dropped for it.

        Raises: StoreError when the disk refuses or the update alone is larger than the cap.
        """
        if entry.update in self._waiting:
            return ()
        parts = _encode(entry)
        size = sum(len(part) for part in parts)
        if size > self._cap_bytes:
            raise StoreError(
                f"expected an update of at most {self._cap_bytes} bytes with its residuals, got "
                f"{size}; raise outbox_bytes or choose a stronger codec"
            )
        dropped = self._make_room(size, entry.round)
        path = self._folder / f"{self._next:010d}.update"
        files.write(path, *parts, mode=0o600, disk=self._disk)
        self._next += 1
        self._waiting[entry.update] = Waiting(entry.update, entry.round, path, size)
        return dropped

    def entry(self, update: bytes) -> Entry | None:
        """Read an update back; None when it is not here, or no longer adds up."""
        if (waiting := self._waiting.get(update)) is None:
            return None
        try:
            return _decode(self._disk.read(waiting.path))
        except (OSError, ValueError) as error:
            self._give_up(waiting.path, error)
            del self._waiting[update]
            return None

    def remove(self, update: bytes) -> None:
        """Take a settled update out; one that is not here is fine."""
        if (waiting := self._waiting.get(update)) is not None:
            files.remove(waiting.path, self._disk)
            del self._waiting[update]

    def _open(self) -> None:
        with contextlib.suppress(StoreError):  # left to a start at which the disk lets us
            files.sweep(self._folder, disk=self._disk)
        names = self._disk.names(self._folder)
        for path in (self._folder / name for name in names if name.endswith(".update")):
            self._next = max(self._next, _number(path) + 1)
            try:
                data = self._disk.read(path)
                entry = _decode(data)
            except (OSError, ValueError) as error:
                self._give_up(path, error)
            else:
                self._waiting[entry.update] = Waiting(entry.update, entry.round, path, len(data))

    def _make_room(self, size: int, round_: int) -> tuple[bytes, ...]:
        """Drop what is stale for certain, then the oldest, until an update of `round_` fits."""
        stale = [w for w in self if w.round <= round_ - STALE_ROUNDS]
        dropped = []
        for waiting in (*stale, *(w for w in self if w not in stale)):
            if waiting not in stale and self.size_bytes + size <= self._cap_bytes:
                break
            why = "stale for certain" if waiting in stale else "outbox full, it is the oldest"
            log.warning("update dropped round=%d reason=%s", waiting.round, why)
            self.remove(waiting.update)
            dropped.append(waiting.update)
        if self._quota is not None:
            self._quota.make_room(size)
        return tuple(dropped)

    def _give_up(self, path: Path, error: Exception) -> None:
        log.warning("outbox entry damaged, dropped file=%s reason=%s", path.name, error)
        with contextlib.suppress(StoreError):  # a disk that refuses: it is dropped again next time
            files.remove(path, self._disk)


def _encode(entry: Entry) -> tuple[bytes, ...]:
    sections = (entry.frame, entry.if_accepted, entry.if_refused)
    sizes = tuple(len(section) for section in sections)
    crc = _crc(_HEAD.pack(_MAGIC, _VERSION, 0, entry.update, entry.round, *sizes, 0), *sections)
    head = _HEAD.pack(_MAGIC, _VERSION, 0, entry.update, entry.round, *sizes, crc)
    return (head, *sections)


def _decode(data: bytes) -> Entry:
    if len(data) < _HEAD.size:
        raise ValueError(f"expected at least {_HEAD.size} bytes, got {len(data)}")
    magic, version, _, update, round_, *sizes, crc = _HEAD.unpack_from(data)
    if (magic, version) != (_MAGIC, _VERSION):
        raise ValueError("not an update of this version")
    if _HEAD.size + sum(sizes) != len(data):
        raise ValueError(f"expected {_HEAD.size + sum(sizes)} bytes, got {len(data)}")
    head = _HEAD.pack(magic, version, 0, update, round_, *sizes, 0)
    if _crc(head, data[_HEAD.size :]) != crc:
        raise ValueError("its checksum does not hold")
    frame_end = _HEAD.size + sizes[0]
    accepted_end = frame_end + sizes[1]
    return Entry(
        update,
        round_,
        data[_HEAD.size : frame_end],
        data[frame_end:accepted_end],
        data[accepted_end:],
    )


def _crc(*parts: bytes) -> int:
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return crc


def _number(path: Path) -> int:
    return int(path.stem) if path.stem.isdigit() else 0
