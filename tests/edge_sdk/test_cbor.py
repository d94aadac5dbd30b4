# SPDX-License-Identifier: Apache-2.0
import math
from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk import cbor
from edge_sdk.errors import MessageError

_finite = st.floats(allow_nan=False, allow_infinity=False)
_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
_scalar = (
    st.none()
    | st.booleans()
    | st.integers(-(2**64), 2**64 - 1)
    | _finite
    | st.binary(max_size=40)
    | _text
)
_keys = st.integers(-(2**64), 2**64 - 1) | _text
values = st.recursive(
    _scalar,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_keys, inner, max_size=4),
    max_leaves=20,
)


def _depth(value: Any) -> int:
    items = value.values() if isinstance(value, dict) else value
    nested = isinstance(value, dict | list)
    return 1 + max((_depth(v) for v in items), default=0) if nested else 1


shallow = values.filter(lambda v: _depth(v) <= cbor.MAX_DEPTH - 1)


@given(shallow)
def test_what_is_encoded_comes_back_the_same_to_the_type(value: Any) -> None:
    assert repr(_sorted(cbor.decode(cbor.encode(value)))) == repr(_sorted(value))


@given(shallow)
def test_another_implementation_reads_the_same_value(value: Any) -> None:
    assert repr(_sorted(cbor2.loads(cbor.encode(value)))) == repr(_sorted(value))


@given(st.binary(max_size=64))
def test_any_bytes_are_either_canonical_or_refused(data: bytes) -> None:
    try:
        value = cbor.decode(data)
    except MessageError:
        return
    assert cbor.encode(value) == data
    assert cbor2.loads(data) == value


@given(shallow, st.data())
def test_a_damaged_encoding_is_refused_or_another_canonical_value(value: Any, data: Any) -> None:
    raw = bytearray(cbor.encode(value))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        other = cbor.decode(bytes(raw))
    except MessageError:
        return
    assert cbor.encode(other) == raw


@pytest.mark.parametrize(
    ("value", "raw"),
    [
        (0, "00"),
        (23, "17"),
        (24, "1818"),
        (1_000_000, "1a000f4240"),
        (2**64 - 1, "1bffffffffffffffff"),
        (-1, "20"),
        (-(2**64), "3bffffffffffffffff"),
        (1.0, "fa3f800000"),
        (0.1, "fb3fb999999999999a"),
        (-0.0, "fa80000000"),
        (b"\1\2", "420102"),
        ("ü", "62c3bc"),
        ([1, [True, None]], "820182f5f6"),
        ({"a": 1, 256: 2, 1: 3}, "a301031901000261" + "6101"),
        ((1, 2), "820102"),
    ],
)
def test_known_values_have_known_bytes(value: Any, raw: str) -> None:
    assert cbor.encode(value).hex() == raw


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        ("", "more bytes"),
        ("0000", "after it"),
        ("1817", "shortest"),
        ("190018", "shortest"),
        ("5f4101ff", "indefinite"),
        ("9fff", "indefinite"),
        ("c000", "tags"),
        ("f7", "simple"),
        ("f93c00", "not in this format"),
        ("fb3ff0000000000000", "shortest"),
        ("fa7fc00000", "finite"),
        ("fb7ff0000000000000", "finite"),
        ("61ff", "UTF-8"),
        ("a201000100", "repeated"),
        ("a202000100", "out of order"),
        ("a1f500", "keys"),
        ("a1410100", "keys"),
        ("5bffffffffffffffff", "left"),
        ("9bffffffffffffffff", "left"),
        ("bb7fffffffffffffff", "left"),
        ("8a00", "left"),
        ("81" * 8 + "00", "nesting"),
    ],
)
def test_what_is_not_canonical_is_refused_with_a_reason(raw: str, why: str) -> None:
    with pytest.raises(MessageError, match=why):
        cbor.decode(bytes.fromhex(raw))


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, 2**64, -(2**64) - 1, {True: 1}, {1.5: 1}, {1, 2}, "\ud800"]
)
def test_what_the_subset_does_not_hold_is_not_written(value: Any) -> None:
    with pytest.raises(MessageError):
        cbor.encode(value)


def test_nesting_ends_at_eight_levels_both_ways() -> None:
    deep: Any = 1
    for _ in range(cbor.MAX_DEPTH - 1):
        deep = [deep]
    assert cbor.decode(cbor.encode(deep)) == deep
    with pytest.raises(MessageError, match="nesting"):
        cbor.encode([deep])


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return sorted(((repr(k), _sorted(v)) for k, v in value.items()))
    return [_sorted(v) for v in value] if isinstance(value, list) else value
