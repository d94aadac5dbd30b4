# SPDX-License-Identifier: Apache-2.0
"""A model of onnxruntime's arena: which pages a sequence of allocations touches.

The runtime's best-fit allocator with coalescing rounds a request up to 256 bytes and takes the
smallest free chunk that holds it, the lowest in memory among equals. It splits a chunk of at least
twice the request. Where none fits it maps a region, each twice as large as the one before, and
never gives one back; a later region lies below the earlier ones. What a process pays for is not the
regions but the pages of them that were ever written. Pure.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple

PAGE_BYTES = 4096
_LEAST_BYTES = 256
_FIRST_REGION_BYTES = 1 << 20


class Chunk(NamedTuple):
    """A piece of a region. Chunks sort as the allocator prefers them: by size, then address."""

    size: int
    below: int  # regions are numbered downwards: 0, -1, -2
    start: int


class Arena:
    """Regions, their free chunks and their touched pages."""

    def __init__(self) -> None:
        self._next_bytes = _FIRST_REGION_BYTES
        self._free: list[Chunk] = []  # sorted
        self._starts: dict[tuple[int, int], Chunk] = {}  # free ones, by (region, first byte)
        self._ends: dict[tuple[int, int], Chunk] = {}  # and by (region, byte past the last)
        self._touched: list[bytearray] = []

    @property
    def resident(self) -> int:
        """Return the bytes of all pages that were ever part of an allocation."""
        return PAGE_BYTES * sum(region.count(1) for region in self._touched)

    @property
    def mapped(self) -> int:
        """Return the bytes of all regions."""
        return PAGE_BYTES * sum(map(len, self._touched))

    def allocate(self, size: int) -> Chunk:
        """Take a chunk of at least `size` bytes, all of which will be written."""
        need = max(_LEAST_BYTES, -(-size // _LEAST_BYTES) * _LEAST_BYTES)
        at = bisect_left(self._free, (need,))
        chunk = self._free[at] if at < len(self._free) else self._region(need)
        self._remove(chunk)
        if chunk.size >= 2 * need:
            rest = Chunk(chunk.size - need, chunk.below, chunk.start + need)
            self._add(rest)
            chunk = chunk._replace(size=need)
        first, last = chunk.start // PAGE_BYTES, (chunk.start + need - 1) // PAGE_BYTES
        self._touched[-chunk.below][first : last + 1] = b"\1" * (last + 1 - first)
        return chunk

    def release(self, chunk: Chunk) -> None:
        """Give a chunk back; it joins free neighbours."""
        size, below, start = chunk
        before = self._ends.get((below, start))
        after = self._starts.get((below, start + size))
        for neighbour in (before, after):
            if neighbour is not None:
                self._remove(neighbour)
                size, start = size + neighbour.size, min(start, neighbour.start)
        self._add(Chunk(size, below, start))

    def _region(self, need: int) -> Chunk:
        """Map a region; it doubles unless it already had to for `need`."""
        grew = self._next_bytes < need
        while self._next_bytes < need:
            self._next_bytes *= 2
        chunk = Chunk(self._next_bytes, -len(self._touched), 0)
        self._touched.append(bytearray(self._next_bytes // PAGE_BYTES))
        if not grew:
            self._next_bytes *= 2
        self._add(chunk)
        return chunk

    def _add(self, chunk: Chunk) -> None:
        insort(self._free, chunk)
        self._starts[chunk.below, chunk.start] = chunk
        self._ends[chunk.below, chunk.start + chunk.size] = chunk

    def _remove(self, chunk: Chunk) -> None:
        del self._free[bisect_left(self._free, chunk)]
        del self._starts[chunk.below, chunk.start]
        del self._ends[chunk.below, chunk.start + chunk.size]
