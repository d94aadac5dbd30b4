# SPDX-License-Identifier: Apache-2.0
"""FlatBuffers' binary form, read strictly and under bounds. Pure; copies nothing but small numbers.

What a runtime would follow blindly is checked here: every offset lies in the file and is aligned,
every count fits into the bytes that are left, fields that a schema does not know are refused. Parts
of a file may be shared whole, as writers do, and may not overlap otherwise: `check_apart` proves
it, so that writing over one array can change nothing else. How much is read in all is limited by
the size of the file, however often its offsets point at the same place.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_sdk.errors import BundleError

TABLE, STRING = "table", "string"
WIDTHS = {
    "?": 1, "b": 1, "B": 1, "h": 2, "H": 2, "i": 4, "I": 4, "f": 4, "q": 8, "Q": 8, "d": 8,
}  # fmt: skip
"""Bytes of a number, by its letter in `struct`."""
MAX_NAME_BYTES = 1 << 14
_OFFSET = 4  # bytes of an offset, of a count
_LEAST_TABLE = 32  # what a table counts at the least against the budget
_MOST_SLOTS = 4 + 2 * 64  # bytes; no table of a schema here has half as many fields
_BUDGET, _BUDGET_SLACK = 4, 4096  # bytes that may be read for each byte of the file, and on top
_UNSIGNED32, _SIGNED32, _UNSIGNED16 = struct.Struct("<I"), struct.Struct("<i"), struct.Struct("<H")
_UNPACK = {code: struct.Struct(f"<{code}").unpack_from for code in WIDTHS}


class Field(NamedTuple):
    """A field of a table: `kind` is a number's letter, ``table``, ``string``, or ``[`` and such."""

    name: str
    kind: str
    default: int | float = 0


Schema = Sequence[Field | None]
"""Fields of a table by their slot. None: a field of old, skipped where a file has it."""


class Vector(NamedTuple):
    """Elements in the file: `start` is the first one's byte, `kind` as in a field."""

    start: int
    length: int
    kind: str

    @property
    def nbytes(self) -> int:
        """How many bytes the elements take."""
        return self.length * WIDTHS.get(self.kind, _OFFSET)


class Reader:
    """Reads tables out of one file. Raises: BundleError, one line, wherever bytes are odd."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self._left = _BUDGET * len(data) + _BUDGET_SLACK
        self._spans = array("Q")  # start, end, kind of each part that was read

    def root(self, identifier: bytes, what: str) -> int:
        """Return the place of the root table of a file of that kind."""
        if len(self.data) < 2 * _OFFSET:
            raise BundleError(f"{what}: expected at least 8 bytes, got {len(self.data)}")
        found = bytes(self.data[_OFFSET : 2 * _OFFSET])
        if found != identifier:
            raise BundleError(f"{what}: expected the identifier {identifier!r}, got {found!r}")
        self._spans.extend((0, 2 * _OFFSET, 0))
        return self._follow(0, what)

    def table(self, at: int, schema: Schema, what: str) -> dict[str, Any]:
        """Read the table at a place; `what` names it in errors.

        Returns: by name, numbers with their defaults filled in; a vector, also for a string; the
            place of a table. Without a vector, string or table its name is missing.
        """
        data = self.data
        self._inside(at, _OFFSET, _OFFSET, what)
        slots_at = at - int(_SIGNED32.unpack_from(data, at)[0])
        self._inside(slots_at, 4, 2, what)
        slots_size = int(_UNSIGNED16.unpack_from(data, slots_at)[0])
        if not 4 <= slots_size <= _MOST_SLOTS or slots_size % 2:
            raise BundleError(f"{what}: expected a table, got slots of {slots_size} bytes")
        self._inside(slots_at, slots_size, 2, what)
        self._take(_LEAST_TABLE + slots_size, what)
        slots = struct.unpack_from(f"<{slots_size // 2 - 2}H", data, slots_at + 4)
        if any(slots[len(schema) :]):
            number = next(i for i in range(len(schema), len(slots)) if slots[i])
            raise BundleError(f"{what}: expected known fields, got number {number}")
        found: dict[str, Any] = {f.name: f.default for f in schema if f and f.kind in WIDTHS}
        end = at + _OFFSET
        for field, slot in zip(schema, slots, strict=False):
            if not slot or field is None:
                continue
            width = WIDTHS.get(field.kind, _OFFSET)
            if slot < _OFFSET or (at + slot) % width or at + slot + width > len(data):
                raise BundleError(f"{what}: expected {field.name} inside its table, aligned")
            found[field.name] = self._value(field, at + slot, what)
            end = max(end, at + slot + width)
        # a table ends with its last field: the size in its slots is another's where writers share
        self._spans.extend((at, end, 1, slots_at, slots_at + slots_size, 2))
        return found

    def tables(self, message: Mapping[str, Any], name: str, most: int, what: str) -> Iterator[int]:
        """Yield the places of the tables in a vector of them, none if the field is absent."""
        vector = message.get(name)
        if vector is None:
            return
        if vector.length > most:
            raise BundleError(f"{what}: expected at most {most} of {name}, got {vector.length}")
        ends = range(vector.start, vector.start + vector.nbytes, _OFFSET)
        for at in ends:
            yield self._follow(at, what)

    def numbers(
        self, message: Mapping[str, Any], name: str, most: int, what: str
    ) -> tuple[Any, ...]:
        """Return the numbers of a vector, none if the field is absent."""
        vector = message.get(name)
        if vector is None or not vector.length:
            return ()
        if vector.length > most:
            raise BundleError(f"{what}: expected at most {most} of {name}, got {vector.length}")
        self._take(8 * vector.length, what)
        return struct.unpack_from(f"<{vector.length}{vector.kind}", self.data, vector.start)

    def array(self, vector: Vector) -> NDArray[Any]:
        """Return a view on the numbers of a vector."""
        dtype = f"<{np.dtype(vector.kind).str[1:]}"
        return np.frombuffer(self.data, dtype, count=vector.length, offset=vector.start)

    def text(self, message: Mapping[str, Any], name: str, what: str) -> str:
        """Read a short string of UTF-8, empty if the field is absent."""
        vector = message.get(name)
        if vector is None:
            return ""
        if vector.length > MAX_NAME_BYTES:
            raise BundleError(
                f"{what}: expected at most {MAX_NAME_BYTES} bytes of {name}, got {vector.length}"
            )
        self._take(vector.length, what)
        try:
            return bytes(self.data[vector.start : vector.start + vector.length]).decode()
        except UnicodeDecodeError as error:
            raise BundleError(f"{what}: expected {name} in UTF-8, got other bytes") from error

    def outside(self, start: int, size: int, what: str) -> Vector:
        """Return bytes that lie anywhere in the file, beside its tables."""
        if start + size > len(self.data):
            raise BundleError(
                f"{what}: expected its bytes to end by {len(self.data)}, they end at {start + size}"
            )
        self._spans.extend((start, start + size, 3))
        return Vector(start, size, "B")

    def check_apart(self, what: str) -> None:
        """Check that no two parts of the file overlap, but those that are the same part."""
        spans = np.unique(np.frombuffer(self._spans, np.uint64).reshape(-1, 3), axis=0)
        overlaps = np.flatnonzero(spans[1:, 0] < spans[:-1, 1])
        if len(overlaps):
            at = int(spans[overlaps[0] + 1, 0])
            raise BundleError(f"{what}: expected parts that are apart, two overlap at byte {at}")

    def _value(self, field: Field, at: int, what: str) -> Any:
        kind = field.kind
        if kind in WIDTHS:
            if kind == "?" and self.data[at] > 1:
                raise BundleError(f"{what}: expected {field.name} to be 0 or 1")
            value = _UNPACK[kind](self.data, at)[0]
            if kind in "fd" and not math.isfinite(value):
                raise BundleError(f"{what}: expected a finite {field.name}, got {value}")
            return value
        target = self._follow(at, what)
        if kind == TABLE:
            return target
        count = int(_UNSIGNED32.unpack_from(self.data, target)[0])
        element = "B" if kind == STRING else kind[1:]
        ends = kind == STRING  # a string is followed by a zero
        vector = Vector(target + _OFFSET, count, element)
        end = vector.start + vector.nbytes + ends
        if end > len(self.data):
            raise BundleError(
                f"{what}: expected {field.name} to end by byte {len(self.data)}, it ends at {end}"
            )
        if ends and self.data[end - 1]:
            raise BundleError(f"{what}: expected {field.name} to end with a zero byte")
        if element == TABLE:
            self._take(vector.nbytes, what)
        self._spans.extend((target, end, 4 + ord(element[0])))
        return vector

    def _follow(self, at: int, what: str) -> int:
        offset = int(_UNSIGNED32.unpack_from(self.data, at)[0])
        if not 0 < offset < 1 << 31:
            raise BundleError(f"{what}: expected an offset at byte {at}, got {offset}")
        self._inside(at + offset, _OFFSET, _OFFSET, what)
        return at + offset

    def _inside(self, at: int, size: int, alignment: int, what: str) -> None:
        if at < 0 or at + size > len(self.data) or at % alignment:
            raise BundleError(
                f"{what}: expected {size} bytes, aligned to {alignment}, inside the file's "
                f"{len(self.data)}, they are at {at}"
            )

    def _take(self, size: int, what: str) -> None:
        self._left -= size
        if self._left < 0:
            raise BundleError(f"{what}: expected each part about once, got too much of the same")
