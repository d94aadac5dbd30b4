# SPDX-License-Identifier: Apache-2.0
"""Large things over small packets: cut into even slices, put together in any order. Pure.

Slice i of n holds bytes `i*size//n` to `(i+1)*size//n`, so `messages.decode` has already checked
the length of each slice. What is held here is what has arrived, never what was announced.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from edge_sdk.errors import MessageError
from edge_sdk.messages import MAX_FRAME, MAX_TRANSFER, OVERHEAD, Chunk, Part, slice_of

MIN_PACKET = 512
PART_PACKET = 8192
"""A part's packet: three seconds of a link of 20 kbit/s."""
MANY_PARTS = 256
_Key: TypeAlias = tuple[str, bytes]  # source, hash of the frame
_HEADER = 120  # no chunk or part has a longer header


def split(frame: bytes, max_packet: int = MAX_FRAME) -> list[Chunk]:
    """Cut an Update frame into chunks that, encoded, are at most `max_packet` bytes each."""
    size, digest = len(frame), hashlib.sha256(frame).digest()
    count = slices(size, max_packet)
    cuts = (slice_of(i, count, size) for i in range(count))
    return [Chunk(digest, i, count, size, body=frame[cut]) for i, cut in enumerate(cuts)]


def parts(
    what: Literal["bundle", "weights", "patch"],
    data: bytes,
    digest: bytes,
    version: int,
    max_packet: int | None = None,
) -> list[Part]:
    """Cut a bundle, weights or a patch into parts to be retained; `digest` as in `Part`.

    One packet must pass a slow link well within a keepalive, and what is lost when a connection
    is cut is a packet: so parts are small, unless there would be more of them than a broker
    queues for a client.
    """
    size = len(data)
    count = slices(size, max_packet or min(MAX_FRAME, max(PART_PACKET, -(-size // MANY_PARTS))))
    cuts = (slice_of(i, count, size) for i in range(count))
    return [Part(what, digest, version, i, count, size, data[cut]) for i, cut in enumerate(cuts)]


def slices(size: int, max_packet: int = MAX_FRAME) -> int:
    """Return how many packets of `max_packet` bytes it takes to carry `size` bytes.

    Raises: MessageError when a packet is smaller than 512 bytes.
    """
    if max_packet < MIN_PACKET:
        raise MessageError(f"expected packets of at least {MIN_PACKET} bytes, got {max_packet}")
    return max(1, -(-size // (max_packet - OVERHEAD - _HEADER)))


@dataclass(slots=True)
class _Transfer:
    count: int
    size: int
    held: dict[int, bytes] = field(default_factory=dict)
    bytes: int = 0


class Assembler:
    """Puts frames together from chunks of many sources, within hard limits.

    Each source may have `max_open` transfers of `max_bytes` in all; all sources together hold at
    most `max_total` bytes. When a limit is met the oldest transfer goes: its device sends it again
    from its outbox. Check a chunk's signature before it comes here.
    """

    def __init__(
        self,
        max_bytes: int = MAX_TRANSFER,
        max_open: int = 2,
        max_total: int = 4 * MAX_TRANSFER,
    ) -> None:
        self.max_bytes, self.max_open, self.max_total = max_bytes, max_open, max_total
        self.bytes = 0
        """Bytes held now."""
        self._open: dict[_Key, _Transfer] = {}  # oldest first
        self._of_source: dict[str, list[_Key]] = {}  # oldest first

    def add(self, source: str, chunk: Chunk) -> bytes | None:
        """Take one chunk; return the whole frame when it is complete.

        A source that cuts the same frame anew (another packet size) begins again.
        Raises: MessageError when the frame is over the limit, or does not hash to what it said.
        """
        key = (source, chunk.hash)
        transfer = self._of(key, chunk)
        if chunk.index not in transfer.held:
            transfer.held[chunk.index] = chunk.body
            transfer.bytes += len(chunk.body)
            self.bytes += len(chunk.body)
        if len(transfer.held) == transfer.count:
            return self._whole(key)
        self._make_room(source, key)
        return None

    def missing(self, source: str, digest: bytes) -> list[int] | None:
        """Return which slices of a transfer have not come, or None if it is not known."""
        transfer = self._open.get((source, digest))
        if transfer is None:
            return None
        return [i for i in range(transfer.count) if i not in transfer.held]

    def forget(self, source: str) -> None:
        """Drop all that a source has begun."""
        for key in list(self._of_source.get(source, ())):
            self._drop(key)

    def __len__(self) -> int:
        """Return how many transfers are open."""
        return len(self._open)

    def _of(self, key: _Key, chunk: Chunk) -> _Transfer:
        if chunk.size > self.max_bytes:
            raise MessageError(f"expected at most {self.max_bytes} bytes, {chunk.size} are coming")
        transfer = self._open.get(key)
        if transfer and (transfer.count, transfer.size) != (chunk.count, chunk.size):
            self._drop(key)
            transfer = None
        if transfer is None:
            transfer = self._open[key] = _Transfer(chunk.count, chunk.size)
            self._of_source.setdefault(key[0], []).append(key)
        return transfer

    def _whole(self, key: _Key) -> bytes:
        transfer = self._drop(key)
        frame = b"".join(transfer.held[i] for i in range(transfer.count))
        if hashlib.sha256(frame).digest() != key[1]:
            raise MessageError("the chunks of a transfer do not hash to what they said")
        return frame

    def _make_room(self, source: str, latest: _Key) -> None:
        mine = self._of_source[source]
        held = sum(self._open[key].bytes for key in mine)
        while len(mine) > self.max_open or held > self.max_bytes:
            held -= self._drop(mine[0]).bytes
        while self.bytes > self.max_total:
            self._drop(next((key for key in self._open if key != latest), latest))

    def _drop(self, key: _Key) -> _Transfer:
        transfer = self._open.pop(key)
        self.bytes -= transfer.bytes
        self._of_source[key[0]].remove(key)
        if not self._of_source[key[0]]:
            del self._of_source[key[0]]
        return transfer


class Parts:
    """Gathers what an offer names; memory is bounded by that offer.

    The weights are hashed here. A bundle's digest is of its manifest: `Bundle` checks it. A patch
    is known by the version that it makes; what it makes of the weights is hashed once it is done.
    """

    def __init__(
        self,
        what: Literal["bundle", "weights", "patch"],
        digest: bytes,
        size: int,
        version: int | None = None,
    ) -> None:
        self.what, self.digest, self.size, self.version = what, digest, size, version
        self._count = 0
        self._held: dict[int, bytes] = {}

    def add(self, part: Part) -> bytes | None:
        """Take one part, if it is of this offer; return the whole when it is complete.

        Raises: MessageError when the whole does not hash to the offer's digest; all is dropped.
        """
        if not self.fits(part):
            return None
        if part.count != self._count:  # the coordinator cut it anew: begin again
            self._count, self._held = part.count, {}
        self._held[part.index] = part.body
        return self._whole() if len(self._held) == self._count else None

    def fits(self, part: Part) -> bool:
        """Say whether a part is of this offer."""
        if (part.what, part.size) != (self.what, self.size):
            return False
        if self.version is not None:
            return part.version == self.version
        return part.digest == self.digest

    def is_same(self, other: Parts) -> bool:
        """Say whether both gather the same."""
        mine = self.what, self.digest, self.size, self.version
        return mine == (other.what, other.digest, other.size, other.version)

    @property
    def count(self) -> int:
        """How many slices there are; 0 until the first one tells."""
        return self._count

    @property
    def left(self) -> int:
        """How many bytes have not come."""
        return self.size - sum(map(len, self._held.values()))

    @property
    def missing(self) -> list[int] | None:
        """Which slices have not come; None until the first one tells how many there are."""
        held = self._held
        return [i for i in range(self._count) if i not in held] if self._count else None

    def _whole(self) -> bytes:
        data = b"".join(self._held[i] for i in range(self._count))
        self._count, self._held = 0, {}
        if self.what == "weights" and hashlib.sha256(data).digest() != self.digest:
            raise MessageError("the weights do not hash to what the offer says: fetch them again")
        return data
