# SPDX-License-Identifier: Apache-2.0
"""Whatever bytes come: a lattice within bounds or a CodecError, in little memory."""

from __future__ import annotations

import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_sdk import codec, params
from edge_sdk.codec import bits, body, hadamard, positions, rows, symbols
from edge_sdk.errors import CodecError
from edge_sdk.types import Shapes

SHAPES: Shapes = {"w": (40, 33), "v": (3, 8, 8), "b": (40,)}
COUNT = params.count(SHAPES)


def clustered(seed: int, k: int) -> codec.Lattice:
    """Positions in few rows and columns, so that the table of rows is the cheapest."""
    rng = np.random.default_rng(seed)
    where = np.zeros((40, 33), np.bool_)
    where[np.ix_(rng.permutation(40)[:20], rng.permutation(33)[:16])] = True
    found = np.flatnonzero(where)[: k or None]
    q = rng.integers(1, 400, found.size) * rng.choice([-1, 1], found.size)
    return codec.Lattice(found, q.astype(np.int32), 0.25)


def scattered(seed: int, share: float) -> codec.Lattice:
    rng = np.random.default_rng(seed)
    found = np.flatnonzero(rng.random(COUNT) < share)
    return codec.Lattice(found, rng.integers(1, 300, found.size).astype(np.int32), 0.25)


def bodies() -> dict[str, bytes]:
    delta = {
        k: np.random.default_rng(1).standard_normal(s).astype(np.float32) for k, s in SHAPES.items()
    }
    made = {}
    for name in ("stateless", "dense", "exact-ish"):
        c = codec.preset(name)
        made[name] = c.encode(delta, c.init(SHAPES))[0]
    table = rows.pack(rows.tabulate((some := clustered(0, 0)).positions, SHAPES))
    levels = symbols.pack(np.abs(some.q).astype(np.int64) - 1)
    made["rows"] = lattice_body(some.q.size, positions.ROWS, table, levels, some.q)
    for name, share in (("rice", 0.01), ("gaps", 0.12), ("bitmap", 0.42), ("nothing", 0.0)):
        made[name] = body.write(scattered(3, share), SHAPES)
    found = scattered(5, 0.2)
    for name, packed in {
        "gaps": (positions.GAPS, positions._pack_gaps(np.diff(found.positions, prepend=-1) - 1)),
        "bitmap": (positions.BITMAP, bits.deflate(positions._bitmap(found.positions, COUNT))),
    }.items():
        made[name] = lattice_body(found.q.size, *packed, b"", found.q)
    return made


def lattice_body(  # noqa: PLR0917 - the parts of a body, in order
    k: int, coding: int, where: bytes, magnitudes: bytes, q: np.ndarray, step: int = 0x3E80
) -> bytes:
    head = body.HEAD.pack(1, body.LATTICE, COUNT)
    head += body.LATTICE_HEAD.pack(step, k, coding, len(where), len(magnitudes))
    return head + where + magnitudes + bits.pack_flags(q < 0)


BODIES = bodies()


def test_the_bodies_that_are_damaged_here_use_every_coding() -> None:
    kinds = {blob[1] for blob in BODIES.values()}
    codings = {blob[12] for blob in BODIES.values() if blob[1] == body.LATTICE}
    assert kinds == {body.LATTICE, body.SIGNS, body.FLOATS}
    assert codings == {0, 1, 2, 3, 4}
    for blob in BODIES.values():
        codec.lattice(blob, SHAPES)


def check(blob: bytes) -> None:
    """Decode; a lattice that comes out is within its bounds."""
    try:
        got = codec.lattice(blob, SHAPES)
    except CodecError:
        return
    assert np.isfinite(body.dense(got, COUNT)).all()
    assert got.step > 0
    if got.positions is None:
        assert got.q.size == COUNT
    else:
        assert got.q.size == got.positions.size <= COUNT
        assert np.all(np.diff(got.positions) > 0)
        assert not got.positions.size or 0 <= got.positions[0] <= got.positions[-1] < COUNT


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_is_cut_off_anywhere_is_refused(name: str) -> None:
    blob = BODIES[name]
    for end in {*range(min(len(blob), 80)), *range(0, len(blob), 1 + len(blob) // 60)}:
        with pytest.raises(CodecError):
            codec.lattice(blob[:end], SHAPES)
    with pytest.raises(CodecError):
        codec.lattice(blob + b"\0", SHAPES)


@settings(
    max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(data=st.data())
def test_damaged_bits_never_crash(data: st.DataObject) -> None:
    blob = bytearray(BODIES[data.draw(st.sampled_from(sorted(BODIES)))])
    last = min(len(blob), data.draw(st.sampled_from([24, 60, 10**6]))) - 1
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, last))] = data.draw(st.integers(0, 255))
    check(bytes(blob))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    kind=st.integers(0, 4), k=st.integers(0, COUNT + 1), coding=st.integers(0, 5), data=st.data()
)
def test_any_sections_behind_a_sound_head_never_crash(
    kind: int, k: int, coding: int, data: st.DataObject
) -> None:
    where, rest = data.draw(st.binary(max_size=120)), data.draw(st.binary(max_size=120))
    size = data.draw(st.integers(0, len(rest)))
    head = body.HEAD.pack(1, kind, COUNT)
    head += body.LATTICE_HEAD.pack(0x3F80, k, coding, len(where), size)
    check(head + where + rest)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.binary(max_size=200))
def test_any_bytes_never_crash(blob: bytes) -> None:
    check(blob)


ONES = np.ones(1, np.int32)


@pytest.mark.parametrize(
    ("blob", "says"),
    [
        (b"", "expected an update body"),
        (body.HEAD.pack(2, 1, COUNT), "version 1, got 2; upgrade"),
        (body.HEAD.pack(1, 1, COUNT + 1), "another model's"),
        (body.HEAD.pack(1, 9, COUNT), "kind 1 to 3, got 9"),
        (lattice_body(COUNT + 1, 1, b"", b"", ONES), "at most"),
        (lattice_body(1, 7, b"", b"", ONES), "coding from 0 to 4, got 7"),
        (lattice_body(1, 0, b"", b"", ONES), "expected all"),
        (lattice_body(1, 1, b"\x1f" + b"\0" * 7, b"", ONES), "Rice codes within"),
        (lattice_body(1, 1, b"\x00" + b"\0" * 400, b"", ONES), "sum to at most"),
        (lattice_body(2, 1, b"\x00\x01", b"", ONES), "unary codes"),
        (lattice_body(1, 1, b"\x00\x01\x00", b"", ONES), "unary codes"),
        (lattice_body(1, 2, b"\x1f", b"", ONES), "gaps within"),
        (lattice_body(1, 2, b"\0" + symbols.pack(np.array([COUNT])), b"", ONES), "below"),
        (lattice_body(1, 3, b"garbage", b"", ONES), "body is damaged"),
        (lattice_body(2, 3, bits.deflate(bytes(COUNT // 8)), b"", ONES), "body is damaged"),
        (lattice_body(0, 4, b"\0" * 40, b"", ONES[:0]), "table of rows"),
        (lattice_body(1, 4, b"\0" * 5, b"", ONES), "table of rows"),
        (lattice_body(1, 4, rows.HEAD.pack(2**32 - 1, 0, 0) + b"\0", b"", ONES), "cut off"),
        (lattice_body(1, 1, b"\x00\x01", b"", ONES, step=0), "positive, finite step"),
        (lattice_body(1, 1, b"\x00\x01", b"", ONES, step=0xBF80), "positive, finite step"),
        (lattice_body(1, 1, b"\x00\x01", b"", ONES, step=0x7F80), "positive, finite step"),
        (lattice_body(1, 1, b"\x00\x01", b"", ONES, step=0x7FC0), "positive, finite step"),
        (lattice_body(1, 1, b"\x00\x01", b"", ONES, step=0x0001), "positive, finite step"),
        (
            lattice_body(1, 1, b"\x00\x01", symbols.pack(np.array([5])), ONES, step=0x7F7F),
            "within float32",
        ),
        (
            lattice_body(1, 1, b"\x00\x01", symbols.pack(np.array([2**23])), ONES),
            "expected values up to",
        ),
        (lattice_body(1, 1, b"\x00\x01", b"\x09\0\0\0\0", ONES), "of kind 0 or 1"),
        (lattice_body(1, 1, b"\x00\x01", b"\x00", ONES), "list of symbols"),
        (lattice_body(1, 1, b"\x00\x01", b"\x00\x01\0\0\0\x05\x05", ONES), "nothing after"),
        (lattice_body(1, 1, b"\x00\x01", b"", ONES)[:-1] + b"\x02", "zero padding"),
        (body.HEAD.pack(1, 2, COUNT) + b"\x80\x3f" + bytes(900), "rotated signs"),
        (body.HEAD.pack(1, 3, COUNT) + bytes(9), "bytes of float32"),
        (
            body.HEAD.pack(1, 3, COUNT) + struct.pack("<f", np.nan) + bytes(4 * COUNT - 4),
            "finite numbers",
        ),
    ],
)
def test_each_kind_of_damage_has_its_line(blob: bytes, says: str) -> None:
    with pytest.raises(CodecError, match=says):
        codec.lattice(blob, SHAPES)


def test_a_rotated_scale_above_its_bound_is_refused() -> None:
    blob = bytearray(BODIES["stateless"])
    at = body.HEAD.size + 2 + hadamard.KEY_BYTES
    blob[at : at + 2] = b"\xff\xff"
    with pytest.raises(CodecError, match="expected scales up to"):
        codec.lattice(bytes(blob), SHAPES)


def test_rows_that_do_not_fit_their_tensor_are_refused() -> None:
    table = bytearray(rows.pack(rows.tabulate(clustered(0, 0).positions, SHAPES)))
    k = clustered(0, 0).q.size
    live, counts, _ = rows.HEAD.unpack_from(table)
    np.testing.assert_array_equal(rows.unpack(bytes(table), k, SHAPES), clustered(0, 0).positions)
    with pytest.raises(CodecError, match="positions in rows"):
        rows.unpack(bytes(table), k + 1, SHAPES)
    start = rows.HEAD.size + 1
    dead = bits.deflate(bytes(bits.size_of_flags(33 + 64 + 40)), matches=True)
    cut = bytes(table[rows.HEAD.size : start]) + dead + bytes(table[start + live :])
    head = rows.HEAD.pack(len(dead), counts, rows.HEAD.unpack_from(table)[2])
    with pytest.raises(CodecError, match="live columns"):
        rows.unpack(head + cut, k, SHAPES)
    with pytest.raises(CodecError, match="fewer unary bits"):
        rows.unpack(bytes(table) + b"\1" * (2 * k), k, SHAPES)
    low = rows.HEAD.unpack_from(table)[2]
    end = start + live + counts + low
    longer = bytes(table[rows.HEAD.size : end]) + b"\0" + bytes(table[end:])
    with pytest.raises(CodecError, match="bytes of low bits"):
        rows.unpack(rows.HEAD.pack(live, counts, low + 1) + longer, k, SHAPES)


def test_a_gap_that_leaves_its_row_is_refused() -> None:
    shapes: Shapes = {"w": (2, 300)}
    table = rows.tabulate(np.arange(290), shapes)
    blob = rows.pack(table)
    # the same gaps, with one zero bit more before the last
    ends = np.r_[np.zeros(289, np.int64), [1]]
    size = len(bits.pack_ends(np.zeros(290, np.int64)))
    with pytest.raises(CodecError, match="inside their row"):
        rows.unpack(blob[:-size] + bits.pack_ends(ends), 290, shapes)


def peak_of(blob: bytes, shapes: Shapes) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(CodecError):
            codec.lattice(blob, shapes)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


BIG: Shapes = {"w": (2**28,)}


@pytest.mark.parametrize("coding", [positions.RICE, positions.GAPS, positions.ROWS])
def test_a_huge_count_costs_nothing_before_its_bytes_are_there(coding: int) -> None:
    head = body.HEAD.pack(1, body.LATTICE, 2**28)
    blob = head + body.LATTICE_HEAD.pack(0x3F80, 2**28, coding, 100, 0) + bytes(100)
    assert peak_of(blob, BIG) < 200_000


def test_a_huffman_bomb_is_held_to_the_size_that_was_declared() -> None:
    bomb = zlib.compress(bytes(200_000_000), 9, wbits=-15)
    for where in (b"", b"\0" + symbols.HEAD.pack(symbols.HUFFMAN, len(bomb)) + bomb):
        if where:
            blob = lattice_body(1000, positions.GAPS, where, b"", np.ones(1000))
        else:
            packed = symbols.HEAD.pack(symbols.HUFFMAN, len(bomb)) + bomb
            blob = lattice_body(COUNT, positions.ALL, b"", packed, np.ones(COUNT))
        assert peak_of(blob, SHAPES) < 4 * len(blob) + 500_000


def test_a_body_for_too_large_a_model_is_refused() -> None:
    huge: Shapes = {"w": (2**28 + 1,)}
    with pytest.raises(CodecError):
        codec.lattice(body.HEAD.pack(1, 1, 2**28 + 1), huge)


def test_lists_of_bits_are_as_long_as_they_say() -> None:
    for width in range(20):
        values = np.arange(13) * 77 % (1 << width)
        packed = bits.pack_fixed(values, width)
        np.testing.assert_array_equal(bits.unpack_fixed(packed, 13, width), values)
        assert bits.unpack_fixed(b"", 0, width).size == 0
        with pytest.raises(CodecError, match="bytes"):
            bits.unpack_fixed(packed + b"\0", 13, width)


def test_a_value_above_its_limit_is_refused() -> None:
    packed = bits.pack_rice(np.array([3, 9, 4]), 2)
    assert bits.unpack_rice_values(packed, 3, 9).tolist() == [3, 9, 4]
    with pytest.raises(CodecError, match="values up to 8, got 9"):
        bits.unpack_rice_values(packed, 3, 8)
