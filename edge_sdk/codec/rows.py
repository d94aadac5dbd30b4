# SPDX-License-Identifier: Apache-2.0
"""Positions by the rows and columns of their tensors: dead inputs and dead units cost nothing.

Each tensor is read as a matrix, `[first, rest]` or its transpose, whichever is cheaper. Columns
that nothing touches are dropped, rows that nothing touches are skipped, and each row's gaps are
Rice-coded with a width that follows from how full the row is, so no width is sent.
"""

from __future__ import annotations

import math
import struct
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from edge_sdk.codec import bits, symbols
from edge_sdk.codec.bits import Ints, bincount, nonzero, repeat
from edge_sdk.errors import CodecError
from edge_sdk.types import Shapes

WORTHWHILE = 256
"""Fewer positions than this never pay for the side information."""

HEAD = struct.Struct("<III")


class Side(NamedTuple):
    """One tensor seen as a matrix: which columns live, how many positions each row holds."""

    local: Ints  # [k] ascending positions inside the tensor
    height: int
    width: int
    turned: bool
    live: NDArray[np.bool_]  # [width]
    counts: Ints  # [height]
    cost_bits: int


class Table(NamedTuple):
    """All tensors of an update as sides, with the bytes they are expected to take."""

    sides: list[Side]
    estimate: int


def tabulate(positions: Ints, shapes: Shapes) -> Table:
    """Lay ascending flat `positions` out by tensor, each in its cheaper direction."""
    sides, at, first = [], 0, 0
    for shape in shapes.values():
        height, width = _matrix(shape)
        end = at + height * width
        last = first + int(np.searchsorted(positions[first:], end))
        sides.append(_cheaper(positions[first:last] - at, height, width))
        at, first = end, last
    return Table(sides, HEAD.size + sum(s.cost_bits for s in sides) // 8)


def pack(table: Table) -> bytes:
    """Write turns, live columns, row counts, then the gaps of all rows in one Rice stream."""
    sides = table.sides
    turns = bits.pack_flags(np.array([s.turned for s in sides], np.bool_))
    live = bits.deflate(bits.pack_flags(np.concatenate([s.live for s in sides])), matches=True)
    counts = symbols.pack(np.concatenate([s.counts for s in sides]))
    parts = [_gaps_of(side) for side in sides]
    gaps, widths = (np.concatenate(part) for part in zip(*parts, strict=True))
    low = b"".join(bits.pack_fixed(gaps[widths == w], w) for w in _distinct(widths))
    head = HEAD.pack(len(live), len(counts), len(low))
    return b"".join([head, turns, live, counts, low, bits.pack_ends(gaps >> widths)])


def unpack(data: bytes, k: int, shapes: Shapes) -> Ints:
    """Return `k` ascending positions.

    Raises: CodecError when a length, a count or a gap does not fit the shapes.
    """
    turns_size = bits.size_of_flags(len(shapes))
    if not k or len(data) < HEAD.size + turns_size:
        raise CodecError(f"expected a table of rows, got {k} positions in {len(data)} bytes")
    live_size, counts_size, low_size = HEAD.unpack_from(data)
    cuts = np.cumsum([HEAD.size, turns_size, live_size, counts_size, low_size]).tolist()
    if cuts[-1] > len(data):
        raise CodecError(f"expected {cuts[-1]} bytes of rows, got {len(data)}; the body is cut off")
    turns = bits.unpack_flags(data[cuts[0] : cuts[1]], len(shapes))
    sizes = [_sides(shape, bool(t)) for shape, t in zip(shapes.values(), turns, strict=True)]
    columns, heights = sum(w for _, w in sizes), sum(h for h, _ in sizes)
    live = bits.inflate(data[cuts[1] : cuts[2]], bits.size_of_flags(columns))
    alive = bits.unpack_flags(live, columns)
    counts = symbols.unpack(data[cuts[2] : cuts[3]], heights, max(w for _, w in sizes))
    if int(counts.sum()) != k:
        raise CodecError(f"expected {k} positions in rows, got {int(counts.sum())}")
    return _rebuild(_Layout(sizes, turns, alive, counts), data[cuts[3] : cuts[4]], data[cuts[4] :])


class _Layout(NamedTuple):
    sizes: list[tuple[int, int]]  # rows, columns of each tensor as coded
    turns: NDArray[np.bool_]
    alive: NDArray[np.bool_]
    counts: Ints


def _rebuild(layout: _Layout, low: bytes, unary: bytes) -> Ints:
    k = int(layout.counts.sum())
    heights = np.array([h for h, _ in layout.sizes])
    column_at = np.concatenate([[0], np.cumsum([w for _, w in layout.sizes])])
    living = np.concatenate([[0], np.cumsum(layout.alive)])[column_at]
    row_width = repeat(np.diff(living), heights)
    if np.any(layout.counts > row_width):
        raise CodecError("expected rows no fuller than their live columns; the body is damaged")
    widths = repeat(_widths(row_width, layout.counts), layout.counts)
    values = _gaps(unary, low, widths)
    columns = _running(values + 1, layout.counts) - 1
    if k and np.any(columns >= repeat(row_width, layout.counts)):
        raise CodecError("expected gaps that stay inside their row; the body is damaged")
    row_base = repeat(living[:-1], heights)
    column = nonzero(layout.alive)[columns + repeat(row_base, layout.counts)]
    return _flat(layout, column, column_at, heights)


def _flat(layout: _Layout, column: Ints, column_at: Ints, heights: Ints) -> Ints:
    """Turn (row, column) of each tensor back into ascending flat positions."""
    row_at = np.concatenate([[0], np.cumsum(heights, dtype=np.int64)])
    tensor = repeat(np.arange(heights.size, dtype=np.int64), heights)
    row = repeat(np.arange(tensor.size, dtype=np.int64) - row_at[tensor], layout.counts)
    tensor = repeat(tensor, layout.counts)
    widths = np.diff(column_at)
    tensor_at = np.concatenate([[0], np.cumsum(heights * widths, dtype=np.int64)])
    column = column - column_at[tensor]
    turned = layout.turns[tensor]
    local = np.where(turned, column * heights[tensor] + row, row * widths[tensor] + column)
    found = local + tensor_at[tensor]
    return cast("Ints", np.sort(found) if layout.turns.any() else found)


def _gaps(unary: bytes, low: bytes, widths: Ints) -> Ints:
    # what follows is bounded by the bytes at hand; the quotients of a row of k sum to below 7 * k
    if len(unary) > widths.size + 8:
        raise CodecError("expected fewer unary bits than the rows can need; the body is damaged")
    values = np.diff(bits.unpack_ends(unary, widths.size), prepend=-1) - 1 << widths
    at = 0
    for width in _distinct(widths):
        mine = nonzero(widths == width)
        size = bits.size_of_fixed(mine.size, width)
        values[mine] += bits.unpack_fixed(low[at : at + size], mine.size, width)
        at += size
    if at != len(low):
        raise CodecError(f"expected {at} bytes of low bits, got {len(low)}")
    return cast("Ints", values)


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def _sides(shape: tuple[int, ...], turned: bool) -> tuple[int, int]:
    height, width = _matrix(shape)
    return (width, height) if turned else (height, width)


def _cheaper(local: Ints, height: int, width: int) -> Side:
    row, column = np.divmod(local, max(1, width))
    by_row = bincount(row, minlength=height)
    live = np.zeros(width, np.bool_)
    live[column] = True
    straight = _side(local, by_row, live, turned=False)
    if min(height, width) < 2 or not local.size:
        return straight
    turned = _side(local, bincount(column, minlength=width), by_row > 0, turned=True)
    return turned if turned.cost_bits < straight.cost_bits else straight


def _side(local: Ints, counts: Ints, live: NDArray[np.bool_], *, turned: bool) -> Side:
    """Cost one direction from its counts alone; nothing is sorted yet."""
    columns = int(np.count_nonzero(live))
    full = counts[counts > 0]
    widths = _widths(np.full(full.size, columns), full)
    mean = (columns - full) / (full + 1)  # of the gaps, the one after the last left out
    floors = mean / (1 << widths) - 0.5 * (1 - 1.0 / (1 << widths))
    gap_bits = float((full * (1 + widths + np.maximum(floors, 0))).sum())
    scarce = min(columns, live.size - columns)
    cost = gap_bits + 8 * symbols.estimate(counts) + min(live.size, 12 * scarce)
    return Side(local, counts.size, live.size, turned, live, counts, int(cost))


def _gaps_of(side: Side) -> tuple[Ints, Ints]:
    """Return the gaps inside the rows, and the Rice width of each."""
    if side.turned:
        column, row = np.divmod(side.local, side.height)
        short = row.astype(np.uint16) if side.height <= 1 << 16 else row  # 16 bits sort by radix
        order = np.argsort(short, kind="stable")
        row, column = row[order], column[order]
    else:
        row, column = np.divmod(side.local, max(1, side.width))
    compact = (np.cumsum(side.live) - 1)[column]
    after = np.concatenate([[0], compact + 1])[:-1]
    gaps = compact - np.where(np.diff(row, prepend=-1) != 0, 0, after)
    columns = np.full(side.height, np.count_nonzero(side.live))
    return gaps, _widths(columns, side.counts)[row]


def _widths(columns: Ints, counts: Ints) -> Ints:
    """Return the Rice width of each row from integers alone: floor(log2(0.96 * mean gap))."""
    mean = (columns - counts) * 62915 // (counts + 1) >> 16  # 62915 / 2**16 = 0.96
    exponents: Ints = np.frexp(mean.astype(np.float64))[1].astype(np.int64)
    return np.maximum(exponents - 1, 0)


def _distinct(widths: Ints) -> list[int]:
    found: list[int] = nonzero(bincount(widths)).tolist()
    return found


def _running(values: Ints, counts: Ints) -> Ints:
    """Return the running sum of `values`, starting anew at each row."""
    total = np.cumsum(values)
    ends = np.cumsum(counts)
    before = np.where(ends - counts > 0, total[np.maximum(ends - counts - 1, 0)], 0)
    return cast("Ints", total - repeat(before, counts))
