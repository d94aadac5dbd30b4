# SPDX-License-Identifier: Apache-2.0
"""Integers to bits and back, without a loop over symbols: flags, fixed widths, Rice, Huffman.

Every reader is told how much to expect, and refuses before it allocates more. The entropy coder is
raw deflate, which `zlib` brings everywhere; a reader does not care which strategy the writer used.
Rice coding follows Rice and Plaunt (1971), laid out as split streams so that numpy reads it whole.
"""

from __future__ import annotations

import zlib
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from edge_sdk.errors import CodecError

Ints: TypeAlias = NDArray[np.int64]

ESCAPE = 255
"""The byte symbol that says: the rest of this value stands in the list of large ones."""


def nonzero(flags: NDArray[Any]) -> Ints:
    """Return where `flags` are not zero; int64 also where addresses have 32 bits."""
    return np.flatnonzero(flags).astype(np.int64, copy=False)


def bincount(values: NDArray[Any], minlength: int = 0) -> Ints:
    """Return how often each value from 0 up occurs."""
    counts = np.bincount(values.astype(np.intp, copy=False), minlength=minlength)
    return counts.astype(np.int64, copy=False)


def repeat(values: NDArray[Any], counts: NDArray[Any]) -> NDArray[Any]:
    """Return each value as often as its count says."""
    return np.repeat(values, counts.astype(np.intp, copy=False))


def size_of_flags(count: int) -> int:
    """Return the bytes that `count` flags take."""
    return (count + 7) // 8


def pack_flags(flags: NDArray[np.bool_]) -> bytes:
    """Pack booleans eight to a byte, the first in the lowest bit."""
    return np.packbits(flags, bitorder="little").tobytes()


def unpack_flags(data: bytes, count: int) -> NDArray[np.bool_]:
    """Return `count` booleans.

    Raises: CodecError when `data` is not exactly as long as that takes, or its padding is not zero.
    """
    if len(data) != size_of_flags(count):
        raise CodecError(f"expected {size_of_flags(count)} bytes of flags, got {len(data)}")
    if count % 8 and data[-1] >> (count % 8):
        raise CodecError("expected zero padding after the flags, got set bits; the body is damaged")
    bits = np.unpackbits(np.frombuffer(data, np.uint8), count=count, bitorder="little")
    return bits.view(np.bool_)


def size_of_fixed(count: int, width: int) -> int:
    """Return the bytes that `count` integers of `width` bits take."""
    return count * (width // 8) + (count + 7) // 8 * (width % 8)


def pack_fixed(values: Ints, width: int) -> bytes:
    """Keep the low `width` bits of each value: whole bytes as planes, the rest eight to a word."""
    whole, rest = divmod(width, 8)
    planes = [(values >> (8 * i)).astype(np.uint8).tobytes() for i in range(whole)]
    if rest:
        groups = np.zeros(((values.size + 7) // 8, 8), np.uint64)
        groups.reshape(-1)[: values.size] = (values >> (8 * whole)) & ((1 << rest) - 1)
        words = groups[:, 0].copy()
        for i in range(1, 8):
            words |= groups[:, i] << np.uint64(rest * i)
        planes.append(words.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :rest].tobytes())
    return b"".join(planes)


def unpack_fixed(data: bytes, count: int, width: int) -> Ints:
    """Return `count` integers of `width` bits, in `[0, 2**width)`.

    Raises: CodecError when `data` is not exactly as long as that takes.
    """
    if len(data) != size_of_fixed(count, width):
        raise CodecError(f"expected {size_of_fixed(count, width)} bytes, got {len(data)}")
    whole, rest = divmod(width, 8)
    values = np.zeros(count, np.int64)
    for i in range(whole):
        values |= np.frombuffer(data, np.uint8, count, i * count).astype(np.int64) << (8 * i)
    if rest:
        rows = (count + 7) // 8
        padded = np.zeros((rows, 8), np.uint8)
        padded[:, :rest] = np.frombuffer(data, np.uint8, rows * rest, whole * count).reshape(
            rows, rest
        )
        words = padded.view("<u8").astype(np.int64)
        shifted = (words >> (rest * np.arange(8))) & ((1 << rest) - 1)
        values |= shifted.reshape(-1)[:count] << (8 * whole)
    return values


def rice_width(values: Ints) -> tuple[int, int]:
    """Return the best Rice parameter for these values and the bytes that it takes."""
    count, total = values.size, int(values.sum())
    guess = max(0, (total * 45426 // max(1, count) >> 16).bit_length() - 1)  # 45426 / 2**16 = ln 2
    sizes = [(size_of_rice(values, b), b) for b in (guess, guess + 1)]
    size, width = min(sizes)
    return width, size


def size_of_rice(values: Ints, width: int) -> int:
    """Return the bytes that `pack_rice` makes."""
    unary = size_of_flags(values.size + int((values >> width).sum()))
    return 1 + unary + size_of_fixed(values.size, width)


def pack_rice(values: Ints, width: int) -> bytes:
    """Rice-code non-negative values: the width, the low bits, then all quotients in unary."""
    return bytes([width]) + pack_fixed(values, width) + pack_ends(values >> width)


def unpack_rice(data: bytes, count: int, limit: int) -> tuple[Ints, Ints, int]:
    """Return where the unary codes end, the low bits, and the width.

    Value `i` is `((ends[i] - ends[i-1] - 1) << width) + low[i]`; a caller that wants running sums
    gets them from `ends` without taking differences first. `limit` bounds the sum of all values.
    Raises: CodecError on a length, count or width that cannot be.
    """
    width = data[0] if data else 0
    low_size = size_of_fixed(count, width)
    if not data or (1 << width) > 2 * max(1, limit) or len(data) < 1 + low_size:
        raise CodecError(f"expected {count} Rice codes within {limit}, got {len(data)} bytes")
    unary = data[1 + low_size :]
    if len(unary) > size_of_flags(count + (limit >> width)):
        raise CodecError(f"expected Rice codes that sum to at most {limit}, got more")
    return unpack_ends(unary, count), unpack_fixed(data[1 : 1 + low_size], count, width), width


def pack_ends(quotients: Ints) -> bytes:
    """Write non-negative integers in unary: as many zeros, then a one."""
    ends = np.cumsum(quotients) + np.arange(quotients.size, dtype=np.int64)
    flags = np.zeros(int(ends[-1]) + 1 if ends.size else 0, np.bool_)
    flags[ends] = True
    return pack_flags(flags)


def unpack_ends(unary: bytes, count: int) -> Ints:
    """Return where the ones of a unary stream stand.

    Raises: CodecError when there are not exactly `count`, or the last byte holds none.
    """
    flags = np.unpackbits(np.frombuffer(unary, np.uint8), bitorder="little").view(np.bool_)
    ones = int(np.count_nonzero(flags))
    if ones != count or (unary and not unary[-1]):
        raise CodecError(f"expected {count} unary codes, got {ones}; the body is damaged")
    return nonzero(flags)


def unpack_rice_values(data: bytes, count: int, limit: int) -> Ints:
    """Return `count` Rice-coded values, each at most `limit`."""
    ends, low, width = unpack_rice(data, count, limit)
    values = (np.diff(ends, prepend=-1) - 1 << width) + low
    if count and int(values.max()) > limit:
        raise CodecError(f"expected values up to {limit}, got {int(values.max())}")
    return cast("Ints", values)


def deflate(data: bytes, *, matches: bool = False) -> bytes:
    """Entropy-code bytes with Huffman codes alone, or with `matches` of earlier runs as well."""
    strategy = zlib.Z_DEFAULT_STRATEGY if matches else zlib.Z_HUFFMAN_ONLY
    coder = zlib.compressobj(6, zlib.DEFLATED, -15, 9, strategy)
    return coder.compress(data) + coder.flush()


def inflate(data: bytes, size: int) -> bytes:
    """Undo `deflate`, holding never more than `size + 1` bytes.

    Raises: CodecError when the stream is damaged, or does not hold exactly `size` bytes.
    """
    coder = zlib.decompressobj(-15)
    try:
        out = coder.decompress(data, size + 1)
    except zlib.error as error:
        raise CodecError(f"expected a deflate stream, got {error}; the body is damaged") from None
    if len(out) != size or not coder.eof or coder.unused_data:
        raise CodecError(f"expected a stream of exactly {size} bytes; the body is damaged")
    return out
