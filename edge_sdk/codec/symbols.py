# SPDX-License-Identifier: Apache-2.0
"""A list of small non-negative integers as bytes: Huffman codes, with large values in a Rice list.

This one layout carries magnitudes, the high parts of gaps, and the counts of rows.
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from edge_sdk.codec import bits
from edge_sdk.codec.bits import ESCAPE, Ints, bincount, nonzero
from edge_sdk.errors import CodecError

RAW, HUFFMAN = 0, 1
HEAD = struct.Struct("<BI")


def pack(values: Ints) -> bytes:
    """Write each value as a byte, the smaller of raw and Huffman; 255 and above escape to Rice."""
    symbols = np.minimum(values, ESCAPE).astype(np.uint8)
    raw = symbols.tobytes()
    coded = bits.deflate(raw)
    kind, body = (HUFFMAN, coded) if len(coded) < len(raw) else (RAW, raw)
    large = values[symbols == ESCAPE] - ESCAPE
    tail = bits.pack_rice(large, bits.rice_width(large)[0]) if large.size else b""
    return HEAD.pack(kind, len(body)) + body + tail


def unpack(data: bytes, count: int, limit: int) -> Ints:
    """Return `count` values, none above `limit`.

    Raises: CodecError when the section is damaged or holds a value above `limit`.
    """
    if len(data) < HEAD.size:
        raise CodecError(f"expected a list of symbols, got {len(data)} bytes")
    kind, size = HEAD.unpack_from(data)
    body, tail = data[HEAD.size : HEAD.size + size], data[HEAD.size + size :]
    if len(body) != size or kind not in (RAW, HUFFMAN) or (kind == RAW and size != count):
        raise CodecError(f"expected {count} symbols of kind 0 or 1, got kind {kind}, {size} bytes")
    raw = bits.inflate(body, count) if kind == HUFFMAN else body
    return _with_escapes(np.frombuffer(raw, np.uint8), tail, limit)


def _with_escapes(symbols: NDArray[np.uint8], tail: bytes, limit: int) -> Ints:
    values = symbols.astype(np.int64)
    at = nonzero(symbols == ESCAPE)
    if at.size:
        values[at] += bits.unpack_rice_values(tail, at.size, limit * at.size)
    elif tail:
        raise CodecError(f"expected nothing after the symbols, got {len(tail)} bytes")
    if values.size and int(values.max()) > limit:
        raise CodecError(f"expected values up to {limit}, got {int(values.max())}")
    return values


def estimate(values: Ints) -> int:
    """Return about how many bytes `pack` makes, from the entropy of the symbols."""
    symbols = np.minimum(values, ESCAPE).astype(np.uint8)
    counts = bincount(symbols, minlength=256)
    large = int(counts[ESCAPE])
    seen = counts[counts > 0]
    entropy = float(np.sum(seen * np.log2(values.size / seen))) if values.size else 0.0
    return HEAD.size + int(entropy / 8) + seen.size // 2 + 12 + large * 2
