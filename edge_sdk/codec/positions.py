# SPDX-License-Identifier: Apache-2.0
"""Sorted positions to bytes and back; `pack` keeps the smallest of the codings below.

`ALL` says nothing: every number is meant. `RICE` codes gaps, best where positions are uniform.
`GAPS` splits a gap into a Huffman-coded part and raw low bits, best where gaps cluster. `BITMAP` is
a compressed bit per number, best from a tenth of all upwards. `ROWS` uses the tensors' shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np

from edge_sdk.codec import bits, rows, symbols
from edge_sdk.codec.bits import Ints, nonzero
from edge_sdk.errors import CodecError
from edge_sdk.types import Shapes

ALL, RICE, GAPS, BITMAP, ROWS = 0, 1, 2, 3, 4
CLOSE = 1.005
"""Codings estimated within this factor of the best are all written, and the smallest kept."""


def pack(positions: Ints, count: int, shapes: Shapes) -> tuple[int, bytes]:
    """Return the coding and its bytes for ascending `positions` below `count`.

    Costs are estimated for each coding first, and only the ones that may win are written.
    """
    if positions.size == count:
        return ALL, b""
    gaps = np.diff(positions, prepend=-1) - 1
    width, rice_size = bits.rice_width(gaps)
    ways: list[tuple[int, int, Callable[[], bytes]]] = [
        (rice_size, RICE, lambda: bits.pack_rice(gaps, width)),
        (_estimate_gaps(gaps), GAPS, lambda: _pack_gaps(gaps)),
    ]
    if positions.size >= rows.WORTHWHILE:
        table = rows.tabulate(positions, shapes)
        ways.append((table.estimate, ROWS, lambda: rows.pack(table)))
    if positions.size * 16 > count:
        flags = _bitmap(positions, count)
        cost = symbols.estimate(np.frombuffer(flags, np.uint8).astype(np.int64))
        ways.append((cost, BITMAP, lambda: bits.deflate(flags)))
    best = min(cost for cost, _, _ in ways)
    made = [(coding, write()) for cost, coding, write in ways if cost <= best * CLOSE]
    return min(made, key=lambda pair: len(pair[1]))


def unpack(coding: int, data: bytes, k: int, shapes: Shapes, count: int) -> Ints | None:
    """Return `k` ascending positions below `count`, or None where every number is meant.

    Raises: CodecError when the section is damaged, or names a position out of bounds.
    """
    if coding == ALL:
        if data or k != count:
            raise CodecError(f"expected all {count} positions, got {k} and {len(data)} bytes")
        return None
    if coding == RICE:
        ends, low, width = bits.unpack_rice(data, k, count)
        steps = np.arange(k, dtype=np.int64)
        found = (ends - steps << width) + np.cumsum(low) + steps
    elif coding == GAPS:
        found = np.cumsum(_unpack_gaps(data, k, count) + 1) - 1
    elif coding == BITMAP:
        flags = bits.unpack_flags(bits.inflate(data, bits.size_of_flags(count)), count)
        found = nonzero(flags)
    elif coding == ROWS:
        found = rows.unpack(data, k, shapes)
    else:
        raise CodecError(f"expected a position coding from 0 to 4, got {coding}; upgrade fedge")
    if found.size != k or (k and int(found[-1]) >= count):
        raise CodecError(f"expected {k} positions below {count}, got others; the body is damaged")
    return cast("Ints", found)


def _shift_for(gaps: Ints) -> int:
    mean = int(gaps.sum()) // max(1, gaps.size)
    return max(0, (mean // 32).bit_length())


def _estimate_gaps(gaps: Ints) -> int:
    shift = _shift_for(gaps)
    return 1 + bits.size_of_fixed(gaps.size, shift) + symbols.estimate(gaps >> shift)


def _pack_gaps(gaps: Ints) -> bytes:
    shift = _shift_for(gaps)
    return bytes([shift]) + bits.pack_fixed(gaps, shift) + symbols.pack(gaps >> shift)


def _unpack_gaps(data: bytes, k: int, count: int) -> Ints:
    shift = data[0] if data else 0
    low_size = bits.size_of_fixed(k, shift)
    if not data or (1 << shift) > count or len(data) < 1 + low_size:
        raise CodecError(f"expected {k} gaps within {count}, got {len(data)} bytes")
    high = symbols.unpack(data[1 + low_size :], k, count >> shift)  # first: its bytes prove k
    return cast("Ints", (high << shift) + bits.unpack_fixed(data[1 : 1 + low_size], k, shift))


def _bitmap(positions: Ints, count: int) -> bytes:
    flags = np.zeros(count, np.bool_)
    flags[positions] = True
    return bits.pack_flags(flags)
