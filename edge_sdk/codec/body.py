# SPDX-License-Identifier: Apache-2.0
"""The body of an update: one integer lattice, whichever codec made it.

A lattice is a step, sorted positions and one integer each; the numbers meant are `q * step`. The
step is a bfloat16, so `q * step` is exact in float32 up to |q| = 2**16 and the coordinator's
fixed-point sum is exact as well. docs/reference/codec-format.md is normative. Every bound is
checked before anything is allocated.
"""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_sdk import params
from edge_sdk.codec import bits, hadamard, positions, symbols
from edge_sdk.codec.bits import Ints, nonzero
from edge_sdk.codec.steps import HUGE, TINY, read_step, word_of
from edge_sdk.errors import CodecError
from edge_sdk.types import Array, Params, Shapes

VERSION = 1
LATTICE, SIGNS, FLOATS = 1, 2, 3
MAX_COUNT = 2**28
"""The largest model, in numbers: 1 GiB of float32. No sum of gaps below can overflow."""
MAX_LEVEL = 2**23
"""The largest |q| of a lattice body."""

HEAD = struct.Struct("<BBI")  # version, kind, count
LATTICE_HEAD = struct.Struct(
    "<HIBII"
)  # step, k, position coding, bytes of positions, of magnitudes


class Lattice(NamedTuple):
    """An update: number `positions[i]` changes by `q[i] * step`, all others by nothing."""

    positions: Ints | None  # ascending, unique; None: every number, in order
    q: NDArray[np.int32]
    step: float  # positive


def write(lattice: Lattice, shapes: Shapes) -> bytes:
    """Write a lattice body. `lattice.step` must be a bfloat16 (see `round_step`)."""
    count = params.count(shapes)
    q = lattice.q.astype(np.int64)
    found = lattice.positions
    if found is not None and found.size * 2 > count:
        q, found = _spread(q, found, count), None
    if found is None:
        coding, where, kept = positions.ALL, b"", q[q != 0]
        magnitudes = symbols.pack(np.abs(q)) if count else b""
    else:
        coding, where = positions.pack(found, count, shapes)
        kept, magnitudes = q, _pack_magnitudes(np.abs(q) - 1)
    step = word_of(lattice.step)
    head = LATTICE_HEAD.pack(step, q.size, coding, len(where), len(magnitudes))
    prefix = HEAD.pack(VERSION, LATTICE, count)
    return b"".join([prefix, head, where, magnitudes, bits.pack_flags(kept < 0)])


def write_signs(rotated: hadamard.Rotated, shapes: Shapes) -> bytes:
    """Write a body of rotated signs."""
    step = word_of(rotated.step)
    head = HEAD.pack(VERSION, SIGNS, params.count(shapes)) + struct.pack("<H", step)
    scales = rotated.scales.astype("<u2").tobytes()
    return b"".join([head, rotated.key, scales, bits.pack_flags(rotated.negative)])


def write_floats(flat: Array) -> bytes:
    """Write a body of plain float32, for comparisons."""
    return HEAD.pack(VERSION, FLOATS, flat.size) + flat.astype("<f4").tobytes()


def lattice(blob: bytes, shapes: Shapes) -> Lattice:
    """Decode a body, whichever codec made it, for a model of these shapes.

    Raises: CodecError when the body is damaged, meant for another model, or of a newer format.
    """
    count = params.count(shapes)
    if len(blob) < HEAD.size:
        raise CodecError(f"expected an update body, got {len(blob)} bytes")
    version, kind, declared = HEAD.unpack_from(blob)
    if version != VERSION:
        raise CodecError(f"expected update body version {VERSION}, got {version}; upgrade fedge")
    if declared != count or count > MAX_COUNT:
        raise CodecError(f"expected an update of {count} numbers, got {declared}: another model's")
    if kind not in READERS:
        raise CodecError(f"expected an update body of kind 1 to 3, got {kind}; upgrade fedge")
    return READERS[kind](bytes(blob[HEAD.size :]), shapes, count)


def decode(blob: bytes, shapes: Shapes) -> Params:
    """Return the delta that a body carries, as named float32 tensors.

    Raises: CodecError as `lattice` does.
    """
    return params.unflatten(dense(lattice(blob, shapes), params.count(shapes)), shapes)


def dense(update: Lattice, count: int) -> Array:
    """Return a lattice as a flat vector: float32, `[count]`."""
    values = scaled(update)
    if update.positions is None:
        return values
    flat = np.zeros(count, np.float32)
    flat[update.positions] = values
    return flat


def scaled(update: Lattice) -> Array:
    """Return `q * step` for each of a lattice's integers, rounded once, to float32."""
    return (update.q * np.float64(update.step)).astype(np.float32)


def norm(update: Lattice) -> float:
    """Return the L2 norm of the delta that a lattice carries."""
    q = update.q.astype(np.float64)
    return update.step * math.sqrt(float(np.dot(q, q)))


def _spread(q: Ints, found: Ints, count: int) -> Ints:
    full = np.zeros(count, np.int64)
    full[found] = q
    return full


def _pack_magnitudes(extra: Ints) -> bytes:
    """Write |q| - 1; nothing at all where every |q| is 1."""
    return symbols.pack(extra) if extra.any() else b""


def _read_lattice(data: bytes, shapes: Shapes, count: int) -> Lattice:
    if len(data) < LATTICE_HEAD.size:
        raise CodecError(f"expected a lattice, got {len(data)} bytes; the body is cut off")
    word, k, coding, where_size, size = LATTICE_HEAD.unpack_from(data)
    step = read_step(word)
    start, end = LATTICE_HEAD.size + where_size, LATTICE_HEAD.size + where_size + size
    if k > count or end > len(data):
        raise CodecError(
            f"expected at most {count} positions within the body, got {k}, {end} bytes"
        )
    found = positions.unpack(coding, data[LATTICE_HEAD.size : start], k, shapes, count)
    magnitudes = _read_magnitudes(data[start:end], k, every=found is None)
    q = _signed(magnitudes, data[end:], every=found is None)
    _check_range(int(magnitudes.max(initial=0)), step)
    return Lattice(found, q, step)


def _read_magnitudes(data: bytes, k: int, *, every: bool) -> Ints:
    if every:
        return symbols.unpack(data, k, MAX_LEVEL) if k else np.zeros(0, np.int64)
    return symbols.unpack(data, k, MAX_LEVEL - 1) + 1 if data else np.ones(k, np.int64)


def _signed(magnitudes: Ints, signs: bytes, *, every: bool) -> NDArray[np.int32]:
    q = magnitudes.astype(np.int32)
    if not every:
        q *= hadamard.signs_of(bits.unpack_flags(signs, q.size))
        return q
    at = nonzero(q)
    q[at[bits.unpack_flags(signs, at.size)]] *= -1
    return q


def _check_range(largest: int, step: float) -> None:
    if largest * step > HUGE:
        raise CodecError(f"expected changes within float32, got {largest} steps of {step}")


def _read_signs(data: bytes, _shapes: Shapes, count: int) -> Lattice:
    step = read_step(struct.unpack_from("<H", data)[0]) if len(data) >= 2 else TINY
    scales_at = 2 + hadamard.KEY_BYTES
    signs_at = scales_at + 2 * hadamard.chunks_of(count)
    if len(data) != signs_at + bits.size_of_flags(hadamard.padded(count)):
        raise CodecError(f"expected rotated signs of {count} numbers, got {len(data)} bytes")
    scales = np.frombuffer(data[scales_at:signs_at], "<u2").astype(np.int32)
    if scales.size and int(scales.max()) > hadamard.MAX_SCALE:
        raise CodecError(f"expected scales up to {hadamard.MAX_SCALE}, got {int(scales.max())}")
    negative = bits.unpack_flags(data[signs_at:], hadamard.padded(count))
    q = hadamard.restore(hadamard.Rotated(data[2:scales_at], step, scales, negative), count)
    _check_range(max(int(q.max(initial=0)), -int(q.min(initial=0))), step)
    return Lattice(None, q, step)


def _read_floats(data: bytes, _shapes: Shapes, count: int) -> Lattice:
    if len(data) != 4 * count:
        raise CodecError(f"expected {4 * count} bytes of float32, got {len(data)}")
    flat = np.frombuffer(data, "<f4")
    largest = float(np.abs(flat).max(initial=0.0))
    if not math.isfinite(largest):
        raise CodecError("expected finite numbers, got NaN or infinity; the body is damaged")
    exponent = math.frexp(largest)[1] - 30
    q = np.rint(np.ldexp(flat.astype(np.float64), -exponent)).astype(np.int32)
    return Lattice(None, q, math.ldexp(1.0, exponent))


READERS = {LATTICE: _read_lattice, SIGNS: _read_signs, FLOATS: _read_floats}
