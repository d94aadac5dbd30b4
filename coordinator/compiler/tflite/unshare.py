# SPDX-License-Identifier: Apache-2.0
"""Constants that several tensors share, told apart: copy on write for a .tflite file.

Converters store equal constants once. Before one of the tensors may change, it needs bytes of its
own. Offsets in such a file only point forward, relative to where they stand: a block put in right
behind the header can refer to all that follows it, and nothing that follows needs to be moved or
rewritten. The block holds a new root, a longer list of buffers and the copies; the tensors' buffer
numbers are changed in place. It also notes how to undo all this, so that `restored` gives back the
file as it was, to the byte.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from edge_sdk.errors import CompileError
from edge_sdk.tflitefile import read

_HEADER = 8  # bytes: the root's offset and the identifier
_NOTE = b"fedge unshared\0\0"
_ALIGN = 64  # at least what any buffer of such a file is aligned to
_U16, _I32 = struct.Struct("<H"), struct.Struct("<i")
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")

_VERSION, _SUBGRAPHS, _BUFFERS, _FIELDS = 0, 2, 4, 8  # slots of the model's table, and how many
_TENSORS, _BUFFER = 0, 2  # slots of a subgraph and of a tensor


class _Change(NamedTuple):
    """Four bytes of the file as it was, and the number that goes there."""

    at: int
    value: int


def unshared(data: bytes, tensors: Sequence[tuple[int, int]]) -> bytes:
    """Return the file with a copy of its constant for each of these tensors, (subgraph, tensor).

    Without tensors it is the file itself.
    Raises: CompileError when the file's tables cannot be told apart either.
    """
    if not tensors:
        return data
    file, root = read(data), _follow(data, 0)
    _check(data, root)
    first = len(file.buffers)
    changes = [_Change(_buffer_at(data, root, *t), first + i) for i, t in enumerate(tensors)]
    copies = [bytes(file.data(file.subgraphs[s].tensors[t].buffer)) for s, t in tensors]
    block = _Block(data, root, changes, copies).write()
    whole = bytearray(data[:_HEADER] + block + data[_HEADER:])
    for at, value in changes:
        _U32.pack_into(whole, at + len(block), value)
    _U32.pack_into(whole, 0, _HEADER + _U32.unpack_from(block, len(_NOTE) + 4)[0])
    made = bytes(whole)
    _check_apart(made, tensors)
    return made


def restored(data: bytes) -> bytes:
    """Return the file as it was before `unshared`; any other file as it is."""
    if not data.startswith(_NOTE, _HEADER):
        return data
    size, _, count = struct.unpack_from("<3I", data, _HEADER + len(_NOTE))
    notes = struct.unpack_from(f"<{2 * count}I", data, _HEADER + len(_NOTE) + 12)
    whole = bytearray(data[:_HEADER] + data[_HEADER + size :])
    for at, value in zip(notes[::2], notes[1::2], strict=True):
        _U32.pack_into(whole, at, value)
    return bytes(whole)


class _Block:
    """The bytes between the header and what followed it; places are counted from the block."""

    def __init__(
        self, data: bytes, root: int, changes: Sequence[_Change], copies: Sequence[bytes]
    ) -> None:
        self.data, self.root, self.copies = data, root, copies
        was = [_Change(at, _U32.unpack_from(data, at)[0]) for at in (0, *(c.at for c in changes))]
        self.notes = [number for change in was for number in change]
        self.forward: list[tuple[int, int]] = []  # places of offsets, and where in `data` they lead
        self.out = bytearray()

    def write(self) -> bytes:
        count = len(self.notes) // 2
        self.out += _NOTE + struct.pack(f"<3I{len(self.notes)}I", 0, 0, count, *self.notes)
        table, buffers_at = self._model()
        self._point(buffers_at)
        self._buffers()
        self.out += bytes(-len(self.out) % _ALIGN)
        struct.pack_into("<2I", self.out, len(_NOTE), len(self.out), table)
        for at, target in self.forward:
            _U32.pack_into(self.out, at, len(self.out) + target - _HEADER - at)
        return bytes(self.out)

    def _model(self) -> tuple[int, int]:
        """Write a root with the old one's fields; return its place and that of its buffers."""
        fields = {slot: _field(self.data, self.root, slot) for slot in range(_FIELDS)}
        present = [slot for slot, at in fields.items() if at]
        offsets = {slot: 4 + 4 * i for i, slot in enumerate(present)}
        size = 4 + 2 * _FIELDS
        slots = [offsets.get(slot, 0) for slot in range(_FIELDS)]
        self._pad_to(4, size)
        self.out += struct.pack(f"<2H{_FIELDS}H", size, 4 + 4 * len(present), *slots)
        table = len(self.out)
        self.out += _I32.pack(size) + bytes(4 * len(present))
        for slot in present:
            at = table + offsets[slot]
            if slot == _VERSION:
                self.out[at : at + 4] = self.data[fields[slot] : fields[slot] + 4]
            elif slot != _BUFFERS:
                self.forward.append((at, _follow(self.data, fields[slot])))
        return table, table + offsets[_BUFFERS]

    def _buffers(self) -> None:
        old = _entries(self.data, _follow(self.data, _field(self.data, self.root, _BUFFERS)))
        self.out += _U32.pack(len(old) + len(self.copies))
        self.forward += [(len(self.out) + 4 * i, target) for i, target in enumerate(old)]
        new_at = len(self.out) + 4 * len(old)
        self.out += bytes(4 * (len(old) + len(self.copies)))
        self._pad_to(4, 6)
        self.out += struct.pack("<3H", 6, 8, 4)
        slots = len(self.out) - 6
        tables = []
        for i in range(len(self.copies)):
            _U32.pack_into(self.out, new_at + 4 * i, len(self.out) - new_at - 4 * i)
            tables.append(len(self.out))
            self.out += _I32.pack(len(self.out) - slots) + bytes(4)
        for table, copy in zip(tables, self.copies, strict=True):
            self._pad_to(_ALIGN, 4)
            self._point(table + 4)
            self.out += _U32.pack(len(copy)) + copy

    def _point(self, at: int) -> None:
        """Make the offset at a place lead to what is written next, aligned to 4."""
        self._pad_to(4, 0)
        _U32.pack_into(self.out, at, len(self.out) - at)

    def _pad_to(self, alignment: int, before: int) -> None:
        """Pad so that what comes `before` bytes from here is aligned in the file."""
        self.out += bytes(-(_HEADER + len(self.out) + before) % alignment)


def _buffer_at(data: bytes, root: int, subgraph: int, tensor: int) -> int:
    """Return the byte at which a tensor's buffer number stands."""
    subgraphs = _entries(data, _follow(data, _field(data, root, _SUBGRAPHS)))
    tensors = _entries(data, _follow(data, _field(data, subgraphs[subgraph], _TENSORS)))
    return _field(data, tensors[tensor], _BUFFER)


def _check(data: bytes, root: int) -> None:
    slots = root - _I32.unpack_from(data, root)[0]
    if any(
        _field(data, root, i) for i in range(_FIELDS, (_U16.unpack_from(data, slots)[0] - 4) // 2)
    ):
        raise CompileError("expected a model with its constants inside: convert it again")
    for table in _entries(data, _follow(data, _field(data, root, _BUFFERS))):
        places = [_field(data, table, slot) for slot in (1, 2)]
        if all(at and _U64.unpack_from(data, at)[0] > 1 for at in places):
            raise CompileError(
                "expected constants in the file's tables, some lie behind them, and tensors to "
                "train share one: convert the model again, smaller than 2 GiB"
            )


def _check_apart(data: bytes, tensors: Sequence[tuple[int, int]]) -> None:
    file = read(data)
    for s, t in tensors:
        tensor = file.subgraphs[s].tensors[t]
        if file.users(tensor.buffer) != ((s, t),):
            raise CompileError(
                f"expected tensor {tensor.name!r} to be listed once, it is several tensors at "
                "once: convert the model again"
            )


def _field(data: bytes, table: int, slot: int) -> int:
    """Return the place of a table's field, 0 where it is absent."""
    slots = table - int(_I32.unpack_from(data, table)[0])
    if 4 + 2 * slot >= _U16.unpack_from(data, slots)[0]:
        return 0
    offset = int(_U16.unpack_from(data, slots + 4 + 2 * slot)[0])
    return table + offset if offset else 0


def _follow(data: bytes, at: int) -> int:
    return at + int(_U32.unpack_from(data, at)[0])


def _entries(data: bytes, vector: int) -> list[int]:
    """Return the places of the tables in a vector of them."""
    count = int(_U32.unpack_from(data, vector)[0])
    return [_follow(data, vector + 4 + 4 * i) for i in range(count)]
