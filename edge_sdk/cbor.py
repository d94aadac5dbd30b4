# SPDX-License-Identifier: Apache-2.0
"""The deterministic subset of CBOR (RFC 8949) that headers are written in. Pure: bytes and values.

One value has one encoding, and `decode` accepts only that one, so that a signature over bytes is a
signature over the value. Integers of 64 bits, byte strings, text, arrays, maps with integer or text
keys in bytewise order, booleans, null, and finite floats (32 bits where that loses nothing, else
64). No tags, no indefinite lengths, no half floats, no nesting deeper than `MAX_DEPTH`.
"""

from __future__ import annotations

import math
import struct
from typing import TypeAlias, cast

from edge_sdk.errors import MessageError

MAX_DEPTH = 8
MAX_UINT = 2**64 - 1

Value: TypeAlias = "int | float | bool | str | bytes | list[Value] | dict[int | str, Value] | None"

_UINT, _NEGATIVE, _BYTES, _TEXT, _ARRAY, _MAP, _TAG, _SIMPLE = range(8)
_FALSE, _TRUE, _NULL, _FLOAT32, _FLOAT64 = 0xF4, 0xF5, 0xF6, 0xFA, 0xFB
_WIDTHS = {24: 1, 25: 2, 26: 4, 27: 8}
_SHORT = [[bytes((major << 5 | size,)) for size in range(24)] for major in range(_SIMPLE)]
"""The heads of one byte."""
_MAX_FLOAT32 = 3.4028234663852886e38


def encode(value: object) -> bytes:
    """Return the one encoding of `value`; tuples are written as arrays.

    Raises: MessageError for a type, a number or a nesting outside the subset.
    """
    out = bytearray()
    _write(value, out, 1)
    return bytes(out)


def decode(data: bytes) -> Value:
    """Read one value that fills `data` exactly, refusing every encoding but the canonical one.

    Lengths are compared with what remains before anything is allocated.
    Raises: MessageError.
    """
    reader = _Reader(data)
    value = reader.value(1)
    if reader.at != len(data):
        raise MessageError(f"cbor: expected one value, got {len(data) - reader.at} bytes after it")
    return value


def _write(value: object, out: bytearray, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise MessageError(f"cbor: expected at most {MAX_DEPTH} levels of nesting, got more")
    if value is None or isinstance(value, bool):
        out.append({None: _NULL, False: _FALSE, True: _TRUE}[value])
    elif isinstance(value, int):
        _write_int(value, out)
    elif isinstance(value, float):
        out += _float(value)
    elif isinstance(value, bytes | str):
        _write_string(value, out)
    elif isinstance(value, list | tuple):
        out += _head(_ARRAY, len(value))
        for item in value:
            _write(item, out, depth + 1)
    elif isinstance(value, dict):
        _write_map(value, out, depth)
    else:
        raise MessageError(f"cbor: cannot write a {type(value).__name__}: use plain Python values")


def _write_int(value: int, out: bytearray) -> None:
    size = value if value >= 0 else -1 - value
    if size > MAX_UINT:
        raise MessageError(f"cbor: expected an integer of 64 bits, got one of {size.bit_length()}")
    out += _head(_UINT if value >= 0 else _NEGATIVE, size)


def _write_string(value: bytes | str, out: bytearray) -> None:
    if isinstance(value, bytes):
        out += _head(_BYTES, len(value)) + value
        return
    try:
        raw = value.encode()
    except UnicodeEncodeError as error:
        raise MessageError(f"cbor: text is not Unicode: {error.reason}") from error
    out += _head(_TEXT, len(raw)) + raw


def _write_map(value: dict[object, object], out: bytearray, depth: int) -> None:
    pairs = []
    for key, item in value.items():
        if isinstance(key, bool) or not isinstance(key, int | str):
            raise MessageError(f"cbor: expected integer or text keys, got {type(key).__name__}")
        pairs.append((_key(key), item))
    out += _head(_MAP, len(pairs))
    for raw, item in sorted(pairs, key=lambda pair: pair[0]):
        out += raw
        _write(item, out, depth + 1)


def _key(key: int | str) -> bytes:
    return _SHORT[_UINT][key] if isinstance(key, int) and 0 <= key < 24 else encode(key)


def _head(major: int, size: int) -> bytes:
    if size < 24:
        return _SHORT[major][size]
    for code, width in _WIDTHS.items():
        if size < 1 << (8 * width):
            return bytes((major << 5 | code,)) + size.to_bytes(width, "big")
    raise MessageError(f"cbor: expected a length of 64 bits, got {size}")


def _float(value: float) -> bytes:
    if not math.isfinite(value):
        raise MessageError(f"cbor: expected a finite float, got {value}")
    if _fits_float32(value):
        return struct.pack(">Bf", _FLOAT32, value)
    return struct.pack(">Bd", _FLOAT64, value)


def _fits_float32(value: float) -> bool:
    return abs(value) <= _MAX_FLOAT32 and struct.unpack(">f", struct.pack(">f", value))[0] == value


class _Reader:
    """A cursor over the input; every step checks what remains first."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def value(self, depth: int) -> Value:
        if depth > MAX_DEPTH:
            raise MessageError(f"cbor: expected at most {MAX_DEPTH} levels of nesting, got more")
        if self.at >= len(self.data):
            raise MessageError("cbor: expected 1 more bytes, 0 are left")
        first = self.data[self.at]
        self.at += 1
        major, low = first >> 5, first & 31
        if major == _SIMPLE:
            return self._simple(first)
        if major == _TAG:
            raise MessageError("cbor: tags are not part of this format")
        size = low if low < 24 else self._size(low)
        if major == _UINT:
            return size
        if major == _NEGATIVE:
            return -1 - size
        if major == _BYTES:
            return self._take(size)
        if major == _TEXT:
            return self._text(size)
        return self._array(size, depth) if major == _ARRAY else self._map(size, depth)

    def _take(self, size: int) -> bytes:
        left = len(self.data) - self.at
        if size > left:
            raise MessageError(f"cbor: expected {size} more bytes, {left} are left")
        self.at += size
        return self.data[self.at - size : self.at]

    def _size(self, low: int) -> int:
        if low not in _WIDTHS:
            raise MessageError("cbor: indefinite and reserved lengths are not part of this format")
        width = _WIDTHS[low]
        size = int.from_bytes(self._take(width), "big")
        if size < 24 or (width > 1 and size < 1 << (4 * width)):
            raise MessageError(f"cbor: {size} is not written in its shortest form")
        return size

    def _simple(self, first: int) -> Value:
        if first in (_FALSE, _TRUE):
            return first == _TRUE
        if first == _NULL:
            return None
        if first not in (_FLOAT32, _FLOAT64):
            raise MessageError(f"cbor: simple value or float 0x{first:02x} is not in this format")
        raw = self._take(4 if first == _FLOAT32 else 8)
        value = cast("float", struct.unpack(">f" if first == _FLOAT32 else ">d", raw)[0])
        if not math.isfinite(value):
            raise MessageError(f"cbor: expected a finite float, got {value}")
        if first == _FLOAT64 and _fits_float32(value):
            raise MessageError(f"cbor: {value} is not written in its shortest form")
        return value

    def _text(self, size: int) -> str:
        try:
            return self._take(size).decode()
        except UnicodeDecodeError as error:
            raise MessageError(f"cbor: text is not UTF-8: {error.reason}") from error

    def _room(self, items: int) -> None:
        left = len(self.data) - self.at
        if items > left:
            raise MessageError(f"cbor: expected {items} more items, {left} bytes are left")

    def _array(self, size: int, depth: int) -> list[Value]:
        self._room(size)
        return [self.value(depth + 1) for _ in range(size)]

    def _map(self, size: int, depth: int) -> dict[int | str, Value]:
        self._room(2 * size)
        out: dict[int | str, Value] = {}
        last = b""
        for _ in range(size):
            start = self.at
            key = self.value(depth + 1)
            if isinstance(key, bool) or not isinstance(key, int | str):
                raise MessageError(f"cbor: expected integer or text keys, got {key!r:.20}")
            raw = self.data[start : self.at]
            if raw <= last:
                raise MessageError(f"cbor: key {key!r:.20} is repeated or out of order")
            out[key], last = self.value(depth + 1), raw
        return out
