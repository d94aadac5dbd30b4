# SPDX-License-Identifier: Apache-2.0
"""The parts of an unfinished download on disk, so that a restart does not pay for them twice.

A file holds the parts that came since the last one, each with a checksum of its own: nothing is
written twice, and nothing at all where a download ends soon. What is read back proves nothing: the
whole is checked against the offer, as ever.
"""

from __future__ import annotations

import contextlib
import logging
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from edge_sdk import files
from edge_sdk.errors import StoreError
from edge_sdk.files import SYSTEM, Disk
from edge_sdk.messages import Part, slice_of
from edge_sdk.topics import PART_KINDS

log = logging.getLogger(__name__)

_HEAD = struct.Struct("<4sB3x32sIIIII")  # magic, what, digest, version, index, count, size, crc32
_MAGIC = b"FDP1"
_KINDS = tuple(PART_KINDS)


class Partial:
    """The parts in one folder. Not for several threads at once."""

    def __init__(self, folder: Path, disk: Disk = SYSTEM) -> None:
        self._folder, self._disk = folder, disk
        self._next = 0

    def load(self) -> Iterator[Part]:
        """Read every part that still adds up, a file at a time."""
        self._sweep()
        for path in self._files():
            self._next = max(self._next, int(path.stem) + 1 if path.stem.isdigit() else 0)
            try:
                yield from _decode(self._disk.read(path))
            except (OSError, ValueError) as error:
                log.warning("parts damaged, fetched again file=%s reason=%s", path.name, error)

    def save(self, parts: Iterable[Part]) -> bool:
        """Keep parts beside those that are here; return whether they survive a power cut."""
        try:
            data = [piece for part in parts for piece in _encode(part)]
            if data:
                self._disk.make_folder(self._folder)
                path = self._folder / f"{self._next:06d}.parts"
                files.write(path, *data, disk=self._disk)
                self._next += 1
        except OSError as error:  # the download goes on in memory
            log.warning("parts not kept reason=%s", error)
            return False
        return True

    def clear(self) -> None:
        """Delete all: the download has ended, or another one is wanted."""
        try:
            for path in self._files():
                files.remove(path, self._disk)
        except StoreError as error:
            log.warning("parts not deleted reason=%s", error)
        self._next = 0

    def _sweep(self) -> None:
        with contextlib.suppress(OSError):  # there was no download yet
            files.sweep(self._folder, disk=self._disk)

    def _files(self) -> list[Path]:
        try:
            names = self._disk.names(self._folder)
        except OSError:  # there was no download yet
            return []
        return [self._folder / name for name in names if not name.startswith(".")]


def _encode(part: Part) -> tuple[bytes, bytes]:
    fixed = part.version, part.index, part.count, part.size
    head = _HEAD.pack(_MAGIC, _KINDS.index(part.what), part.digest, *fixed, 0)
    crc = zlib.crc32(part.body, zlib.crc32(head))
    return _HEAD.pack(_MAGIC, _KINDS.index(part.what), part.digest, *fixed, crc), part.body


def _decode(data: bytes) -> Iterator[Part]:
    at = 0
    while at < len(data):
        if len(data) - at < _HEAD.size:
            raise ValueError("expected the head of a part, got the end")
        magic, what, digest, version, index, count, size, crc = _HEAD.unpack_from(data, at)
        if magic != _MAGIC or what >= len(_KINDS) or not index < count <= size:
            raise ValueError("not a part of this version")
        cut = slice_of(index, count, size)
        body = data[at + _HEAD.size : at + _HEAD.size + cut.stop - cut.start]
        head = _HEAD.pack(magic, what, digest, version, index, count, size, 0)
        if zlib.crc32(body, zlib.crc32(head)) != crc:
            raise ValueError("its checksum does not hold")
        at += _HEAD.size + len(body)
        yield Part(_KINDS[what], digest, version, index, count, size, body)
