# SPDX-License-Identifier: Apache-2.0
"""Labelled examples in a bounded ring on disk; the newest push out the oldest.

One process appends, any number of others read at the same time. Every record carries its sequence
number and a CRC, so a record torn by a power cut, or caught half-written by a reader, is dropped
and never taught. This module has no encoder and never meets one: raw examples stay on the device.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import math
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edge_sdk import files
from edge_sdk.errors import StoreError

if TYPE_CHECKING:
    from typing import Self

_MAGIC = b"FDGESMP1"
_HEADER_BYTES = 4096
_HEAD = struct.Struct("<8sII")  # magic, length of the JSON, its CRC
_RECORD = struct.Struct("<QII")  # sequence number from 1, CRC of the rest, reserved
_BLOCK_BYTES = 256 << 10
_MAX_EXAMPLE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Layout:
    """What one example is, and how many are kept. Shapes are those of one example."""

    x_shape: tuple[int, ...]
    x_dtype: str
    y_shape: tuple[int, ...]
    y_dtype: str
    capacity: int

    @property
    def x_bytes(self) -> int:
        """Bytes of one input."""
        return math.prod(self.x_shape) * np.dtype(self.x_dtype).itemsize

    @property
    def y_bytes(self) -> int:
        """Bytes of one label."""
        return math.prod(self.y_shape) * np.dtype(self.y_dtype).itemsize

    @property
    def record_bytes(self) -> int:
        """Bytes of one record on disk, its head included."""
        return _RECORD.size + self.x_bytes + self.y_bytes


class Samples:
    """The ring at `path`, made there the first time; safe to call from several threads.

    Another capacity than the file's keeps the newest examples that fit. Raises: StoreError when the
    file holds examples of another shape or type, is not ours, or another process appends to it.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        x_shape: tuple[int, ...],
        x_dtype: str,
        y_shape: tuple[int, ...],
        y_dtype: str,
        capacity: int,
    ) -> None:
        layout = _checked(
            Layout(
                tuple(map(int, x_shape)),
                np.dtype(x_dtype).newbyteorder("<").str,
                tuple(map(int, y_shape)),
                np.dtype(y_dtype).newbyteorder("<").str,
                capacity,
            )
        )
        self.path = Path(path)
        if not self.path.exists():
            files.write(self.path, _header(layout))
        found = _layout_of(self.path)
        _expect_same(self.path, found, layout)
        self._open(found, os.O_RDWR)
        if found != layout:
            self._resize(layout)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open an existing ring to read it, while its owner goes on appending.

        Raises: StoreError when it is not there or not ours.
        """
        self = cls.__new__(cls)
        self.path = Path(path)
        self._open(_layout_of(self.path), os.O_RDONLY)
        return self

    def _open(self, layout: Layout, mode: int) -> None:
        self.layout = layout
        self._mutex = threading.Lock()
        self._writes = mode == os.O_RDWR
        try:
            self._file = os.open(self.path, mode | os.O_CLOEXEC)
        except OSError as error:
            raise StoreError(f"cannot open {self.path}: {error.strerror}") from error
        if self._writes:
            self._lock_file()
            self._drop_tail()
        self._slots = {seq % layout.capacity: seq for seq, _ in self._records()}
        self._last = max(self._slots.values(), default=0)

    def _lock_file(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise StoreError(
                f"{self.path} is being appended to by another process or was not closed; stop it"
            ) from error

    def _drop_tail(self) -> None:
        """Cut off a last record that is not all there, so that no later write completes it."""
        torn = (os.fstat(self._file).st_size - _HEADER_BYTES) % self.layout.record_bytes
        if torn:
            os.ftruncate(self._file, os.fstat(self._file).st_size - torn)

    def _resize(self, layout: Layout) -> None:
        xs, ys = (part[-layout.capacity :] for part in self.arrays())
        files.write(self.path, _header(layout), *_ring(layout, xs, ys))
        self.close()
        self._open(layout, os.O_RDWR)

    def append(self, x: ArrayLike, y: ArrayLike) -> None:
        """Store one example, durably: `x` of `x_shape`, `y` of `y_shape`.

        Raises: ValueError on another shape, StoreError when the disk refuses.
        """
        self.extend(np.asarray(x)[np.newaxis], np.asarray(y)[np.newaxis])

    def extend(self, x: ArrayLike, y: ArrayLike) -> None:
        """Store a batch, `[n, *x_shape]` and `[n, *y_shape]`, with one flush to disk.

        Raises: ValueError on another shape or on lossy numbers, StoreError when the disk refuses.
        """
        xs = _as(x, self.layout.x_shape, self.layout.x_dtype, "x")
        ys = _as(y, self.layout.y_shape, self.layout.y_dtype, "y")
        if len(xs) != len(ys):
            raise ValueError(f"expected as many labels as inputs, got {len(ys)} and {len(xs)}")
        if not self._writes:
            raise StoreError(f"{self.path} was opened to read; only its owner appends")
        with self._mutex:
            try:
                for one, label in zip(xs, ys, strict=True):
                    self._put(one.tobytes() + label.tobytes())
                os.fdatasync(self._file)
            except OSError as error:
                raise StoreError(
                    f"cannot store an example in {self.path}: {error.strerror}; free some space"
                ) from error

    def _put(self, body: bytes) -> None:
        seq = self._last + 1
        slot = seq % self.layout.capacity
        at = _HEADER_BYTES + slot * self.layout.record_bytes
        record = _record(seq, body)
        self._slots.pop(slot, None)
        if os.pwrite(self._file, record, at) != len(record):
            raise OSError(errno.ENOSPC, "no space left on the device")
        self._slots[slot] = seq
        self._last = seq

    def __len__(self) -> int:
        """Return how many whole examples there are."""
        return len(self._slots)

    @property
    def total(self) -> int:
        """How many examples were ever stored: grows by one with each, for "anything new?"."""
        return self._last

    def arrays(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return all whole examples, oldest first: `[n, *x_shape]` and `[n, *y_shape]`.

        Takes their own memory once, plus one block. A record that another process overwrites
        meanwhile comes whole, old or new, or not at all.
        """
        _, xs, ys = self.numbered()
        return xs, ys

    def numbered(
        self, last: int | None = None, most: int | None = None
    ) -> tuple[NDArray[np.uint64], NDArray[Any], NDArray[Any]]:
        """Return the examples as `arrays` does, and the number that each was stored under.

        `last`: none that was stored after that number; `most`: the newest so many of the others.
        """
        layout, until = self.layout, self._last if last is None else last
        n = sum(seq <= until for seq in self._slots.values())
        skip = 0 if most is None else max(0, n - most)
        numbers = np.empty(n - skip, np.uint64)
        xs = np.empty((n - skip, *layout.x_shape), layout.x_dtype)
        ys = np.empty((n - skip, *layout.y_shape), layout.y_dtype)
        filled = 0
        whole = (record for record in self._records(oldest=self._last + 1) if record[0] <= until)
        for seq, body in itertools.islice(whole, skip, n):
            numbers[filled] = seq
            xs[filled], ys[filled] = self._read(body)
            filled += 1
        return numbers[:filled], xs[:filled], ys[:filled]

    def newest(self, most: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the newest whole examples, at most so many, oldest first; reads no others."""
        layout, last = self.layout, self._last
        bodies = [
            body
            for seq in range(max(1, last - min(most, layout.capacity) + 1), last + 1)
            for found, body in self._block(seq % layout.capacity, 1)
            if found == seq
        ]
        xs = np.empty((len(bodies), *layout.x_shape), layout.x_dtype)
        ys = np.empty((len(bodies), *layout.y_shape), layout.y_dtype)
        for i, body in enumerate(bodies):
            xs[i], ys[i] = self._read(body)
        return xs, ys

    def _read(self, body: memoryview) -> tuple[NDArray[Any], NDArray[Any]]:
        layout = self.layout
        x, y = body[: layout.x_bytes], body[layout.x_bytes :]
        label = np.frombuffer(y, layout.y_dtype).reshape(layout.y_shape)
        return np.frombuffer(x, layout.x_dtype).reshape(layout.x_shape), label

    def close(self) -> None:
        """Let go of the file; another process may then append."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0:
            self.close()

    def _records(self, oldest: int = 0) -> Iterator[tuple[int, memoryview]]:
        """Yield whole records, number and body, from the slot of number `oldest` around."""
        capacity = self.layout.capacity
        per_block = max(1, _BLOCK_BYTES // self.layout.record_bytes)
        turn = oldest % capacity
        for start, end in ((turn, capacity), (0, turn)):
            for first in range(start, end, per_block):
                yield from self._block(first, min(per_block, end - first))

    def _block(self, first: int, rows: int) -> Iterator[tuple[int, memoryview]]:
        size = self.layout.record_bytes
        block = memoryview(os.pread(self._file, rows * size, _HEADER_BYTES + first * size))
        for i in range(len(block) // size):
            seq, crc, _ = _RECORD.unpack_from(block, i * size)
            body = block[i * size + _RECORD.size : (i + 1) * size]
            is_ours = seq > 0 and seq % self.layout.capacity == first + i
            if is_ours and _crc(seq, body) == crc:
                yield seq, body


def _crc(seq: int, body: bytes | memoryview) -> int:
    return zlib.crc32(body, zlib.crc32(seq.to_bytes(8, "little")))


def _record(seq: int, body: bytes) -> bytes:
    return _RECORD.pack(seq, _crc(seq, body), 0) + body


def _ring(layout: Layout, xs: NDArray[Any], ys: NDArray[Any]) -> list[bytes]:
    """Lay examples out as records from number 1 on, in the file's order."""
    pairs = zip(xs, ys, strict=True)
    records = [_record(i + 1, x.tobytes() + y.tobytes()) for i, (x, y) in enumerate(pairs)]
    is_full = len(records) == layout.capacity
    return [records.pop() if is_full else bytes(layout.record_bytes), *records]


def _checked(layout: Layout) -> Layout:
    if layout.capacity < 1:
        raise StoreError(f"expected room for at least 1 example, got {layout.capacity}")
    if not 0 < layout.record_bytes <= _MAX_EXAMPLE_BYTES:
        raise StoreError(
            f"expected examples of at most {_MAX_EXAMPLE_BYTES} bytes, got {layout.record_bytes}"
        )
    for dtype in (layout.x_dtype, layout.y_dtype):
        if np.dtype(dtype).kind not in "biuf":
            raise StoreError(f"expected numbers, got dtype {dtype}; convert the examples")
    return layout


def _header(layout: Layout) -> bytes:
    meta = json.dumps(asdict(layout), sort_keys=True, separators=(",", ":")).encode()
    head = _HEAD.pack(_MAGIC, len(meta), zlib.crc32(meta)) + meta
    if len(head) > _HEADER_BYTES:
        raise StoreError(f"expected shapes of a few dimensions, got {layout}")
    return head.ljust(_HEADER_BYTES, b"\0")


def _layout_of(path: Path) -> Layout:
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER_BYTES)
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}; are there examples?") from error
    try:
        magic, size, crc = _HEAD.unpack_from(head)
        meta = head[_HEAD.size : _HEAD.size + size]
        if magic != _MAGIC or len(head) < _HEADER_BYTES or zlib.crc32(meta) != crc:
            raise StoreError(
                f"{path} is not a store of examples, or its head is damaged; remove it"
            )
        fields = json.loads(meta)
        shapes = {name: tuple(fields[name]) for name in ("x_shape", "y_shape")}
        return _checked(Layout(**{**fields, **shapes}))
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is not a store of examples: {error}; remove it") from error


def _expect_same(path: Path, found: Layout, wanted: Layout) -> None:
    for name in ("x_shape", "x_dtype", "y_shape", "y_dtype"):
        if getattr(found, name) != getattr(wanted, name):
            raise StoreError(
                f"{path} holds examples of {name} {getattr(found, name)}, expected "
                f"{getattr(wanted, name)}; choose another folder or remove the file"
            )


def _as(values: ArrayLike, shape: tuple[int, ...], dtype: str, name: str) -> NDArray[Any]:
    given = np.asarray(values)
    if given.shape[1:] != shape:
        raise ValueError(f"expected {name} of shape {shape}, got {given.shape[1:]}")
    stored: NDArray[Any] = np.ascontiguousarray(given, dtype)
    if np.dtype(dtype).kind in "iu" and not np.array_equal(stored, given):
        raise ValueError(f"expected {name} to fit {dtype}, got values that do not; convert first")
    return stored
