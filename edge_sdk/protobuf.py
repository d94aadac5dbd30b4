# SPDX-License-Identifier: Apache-2.0
"""Protobuf's wire format, read strictly and under bounds. Pure; copies nothing but small numbers.

What protobuf's own parsers forgive is refused here, so that no two readers can see two different
messages in the same bytes: unknown fields, a field of another wire type, a singular field that
comes twice, numbers written longer than needed, groups. A message is read one level at a time and
never by recursion; how many fields a file may have in all is fixed from the start.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from edge_sdk.errors import BundleError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
MAX_FIELDS = 200_000
MAX_REPEATED = 20_000
MAX_NAME_BYTES = 4096
_WIDTHS = {FIXED64: 8, FIXED32: 4}
_CHUNK_BYTES = 1 << 20
_DELETE_CONTINUED = bytes(range(0x80, 0x100))


class Span(NamedTuple):
    """Bytes `start` to `end` of the file."""

    start: int
    end: int


class Field(NamedTuple):
    """What a field is called, its wire type, and whether it may come more than once."""

    name: str
    wire: int = BYTES
    many: bool = False
    packs: bool = False
    """Whether several numbers may also come as one field of bytes."""


Schema = Mapping[int, Field]
Message = Mapping[str, list[Any]]
"""Values by field name, in order: numbers as integers, everything else as a Span."""


class Reader:
    """Reads messages out of one file. Raises: BundleError, one line, wherever bytes are odd."""

    def __init__(self, data: memoryview, most: int = MAX_FIELDS) -> None:
        self.data = data
        self._left = most

    def message(self, span: Span, schema: Schema, what: str) -> dict[str, list[Any]]:
        """Read one message; `what` names it in errors."""
        found: dict[str, list[Any]] = {}
        at = span.start
        while at < span.end:
            self._left -= 1
            if self._left < 0:
                raise BundleError(
                    f"{what}: expected a graph of reasonable size, got too many parts"
                )
            key, at = self._varint(at, span.end, what)
            field = schema.get(key >> 3)
            if field is None:
                raise BundleError(f"{what}: expected known fields, got number {key >> 3}")
            value, at = self._value(key & 7, field, at, span.end, what)
            values = found.setdefault(field.name, [])
            if values and not field.many:
                raise BundleError(f"{what}: expected {field.name} once, got it again")
            if len(values) >= MAX_REPEATED:
                raise BundleError(f"{what}: expected at most {MAX_REPEATED} of {field.name}")
            values.append(value)
        return found

    def text(self, span: Span, what: str) -> str:
        """Read a short string of UTF-8."""
        size = span.end - span.start
        if size > MAX_NAME_BYTES:
            raise BundleError(f"{what}: expected at most {MAX_NAME_BYTES} bytes, got {size}")
        try:
            return bytes(self.data[span.start : span.end]).decode()
        except UnicodeDecodeError as error:
            raise BundleError(f"{what}: expected UTF-8, got other bytes") from error

    def numbers(self, values: list[Any], most: int, what: str) -> list[int]:
        """Return at most `most` repeated varints, packed or not, as unsigned integers."""
        found: list[int] = []
        for value in values:
            for number in self._packed(value, what) if isinstance(value, Span) else (value,):
                if len(found) >= most:
                    raise BundleError(f"{what}: expected at most {most} numbers, got more")
                found.append(number)
        return found

    def count(self, values: list[Any], wire: int, what: str) -> int:
        """Count repeated numbers, packed or not, without reading them."""
        spans = [value for value in values if isinstance(value, Span)]
        return len(values) - len(spans) + sum(self._count(span, wire, what) for span in spans)

    def _count(self, span: Span, wire: int, what: str) -> int:
        size = span.end - span.start
        if wire != VARINT:
            if size % _WIDTHS[wire]:
                raise BundleError(f"{what}: expected whole numbers of {_WIDTHS[wire]} bytes")
            return size // _WIDTHS[wire]
        ends = 0
        for start in range(span.start, span.end, _CHUNK_BYTES):  # a byte below 0x80 ends a number
            chunk = bytes(self.data[start : min(start + _CHUNK_BYTES, span.end)])
            ends += len(chunk.translate(None, _DELETE_CONTINUED))
        return ends

    def _packed(self, span: Span, what: str) -> Iterator[int]:
        at = span.start
        while at < span.end:
            number, at = self._varint(at, span.end, what)
            yield number

    def _value(self, wire: int, field: Field, at: int, end: int, what: str) -> tuple[Any, int]:
        if wire == BYTES and (field.wire == BYTES or field.packs):
            size, at = self._varint(at, end, what)
            if size > end - at:
                raise BundleError(
                    f"{what}: expected {field.name} to end by byte {end}, it ends at {at + size}"
                )
            return Span(at, at + size), at + size
        if wire != field.wire:
            raise BundleError(
                f"{what}: expected {field.name} as wire type {field.wire}, got {wire}"
            )
        if wire == VARINT:
            return self._varint(at, end, what)
        width = _WIDTHS[wire]
        if width > end - at:
            raise BundleError(f"{what}: expected {width} bytes of {field.name}, got {end - at}")
        return int.from_bytes(self.data[at : at + width], "little"), at + width

    def _varint(self, at: int, end: int, what: str) -> tuple[int, int]:
        data, value, shift = self.data, 0, 0
        while at < end and shift < 70:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if (byte == 0 and shift) or value >> 64:
                    raise BundleError(f"{what}: expected a number in its shortest form at {at}")
                return value, at
            shift += 7
        raise BundleError(f"{what}: expected a number that ends by byte {end}")


def signed(value: int) -> int:
    """Return an int64 that protobuf carries as an unsigned number."""
    return value - (1 << 64) if value >> 63 else value
