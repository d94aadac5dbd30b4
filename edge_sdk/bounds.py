# SPDX-License-Identifier: Apache-2.0
"""What a field of a message may hold: a type and its bound in one name. Pure."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, TypeAlias

from edge_sdk.types import Spec

MAX_PART_BYTES = 2**30
MAX_SLICES = 65_535
MAX_MISSING = 512
"""How many missing slices are asked for at a time."""

MAX_PATCHES = 32
"""How many versions back an offer may have patches for."""
MAX_SECONDS = 31 * 86_400.0
MAX_TAGS, MAX_TAG_BYTES = 16, 1024
TAG_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}")
Tag: TypeAlias = bool | int | float | str
"""What a tag of a device may be."""


def _as_is(value: object) -> object:
    return value


class Bound(NamedTuple):
    """A test, the words for what passes it, and how a sender's value is made plain first."""

    says: str
    holds: Callable[[object], bool]
    tidy: Callable[[object], object] = _as_is


def _is_a(kind: type, value: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _integer(low: int, high: int) -> Bound:
    def holds(value: Any) -> bool:
        return _is_a(int, value) and low <= value <= high

    def tidy(value: Any) -> object:  # numpy's integers
        if type(value) is int:  # as good as always: asking an abstract class is slow
            return value
        return int(value) if _is_a(numbers.Integral, value) else value

    return Bound(f"an integer of {low} to {high}", holds, tidy)


def _number(low: float, high: float, says: str) -> Bound:
    def holds(value: Any) -> bool:
        return isinstance(value, float) and math.isfinite(value) and low <= value <= high

    def tidy(value: Any) -> object:  # integers, and numpy's floats
        if type(value) is float:
            return value
        return float(value) if _is_a(numbers.Real, value) else value

    return Bound(says, holds, tidy)


def _text(size: int) -> Bound:
    def holds(value: Any) -> bool:  # printable: it will stand in logs and on terminals
        return isinstance(value, str) and len(value) <= size and value.isprintable()

    return Bound(f"at most {size} printable characters", holds)


def _one_line(value: object) -> object:
    return "".join(filter(str.isprintable, " ".join(str(value).split())))[:200]


def _hash(size: int) -> Bound:
    return Bound(f"{size} bytes", lambda value: isinstance(value, bytes) and len(value) == size)


def _one_of(*words: str) -> Bound:
    return Bound(f"one of {', '.join(words)}", lambda value: value in words)


def _code(size: int) -> Bound:
    word = re.compile(f"[a-z-]{{0,{size}}}")
    return Bound(
        f"at most {size} of a-z and -", lambda v: isinstance(v, str) and bool(word.fullmatch(v))
    )


def _maybe(bound: Bound) -> Bound:
    def holds(value: Any) -> bool:
        return value is None or bound.holds(value)

    return Bound(f"{bound.says}, or nothing", holds, bound.tidy)


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _are_sizes(value: object) -> bool:
    size = _integer(1, MAX_PART_BYTES)
    return isinstance(value, list) and len(value) <= MAX_PATCHES and all(map(size.holds, value))


def _are_slices(value: object) -> bool:
    index = _integer(0, MAX_SLICES - 1)
    return isinstance(value, list) and len(value) <= MAX_MISSING and all(map(index.holds, value))


def is_tag(value: object) -> bool:
    """Say whether a tag of a device may have this value."""
    if isinstance(value, str):
        return len(value) <= 64 and value.isprintable()
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and -(2**53) <= value <= 2**53


def are_tags(value: object) -> bool:
    """Say whether these may be the tags of a device: few, short, and small together."""
    return (
        isinstance(value, dict)
        and len(value) <= MAX_TAGS
        and all(isinstance(k, str) and TAG_NAME.fullmatch(k) for k in value)
        and all(map(is_tag, value.values()))
        and sum(len(f"{k}{v}".encode()) for k, v in value.items()) <= MAX_TAG_BYTES
    )


def _is_spec(value: object) -> bool:
    return isinstance(value, list) and 0 < len(value) <= 16 and _is_plain(value, 5)


def _is_plain(value: object, depth: int) -> bool:
    if isinstance(value, list):
        return depth > 0 and len(value) <= 16 and all(_is_plain(v, depth - 1) for v in value)
    if isinstance(value, dict):
        pairs = value.items()
        return (
            depth > 0
            and len(value) <= 16
            and all(
                isinstance(k, str) and len(k) <= 32 and _is_plain(v, depth - 1) for k, v in pairs
            )
        )
    if isinstance(value, str):
        return len(value) <= 32 and value.isprintable()
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, int)


_REAL = _number(-math.inf, math.inf, "a finite float")
_SECONDS = _number(0.0, MAX_SECONDS, "seconds, a float of 0 to 31 days")
_NATURAL = _integer(1, 2**32 - 1)

Flag: TypeAlias = Annotated[bool, Bound("true or false", _is_flag)]
Word32: TypeAlias = Annotated[int, _integer(0, 2**32 - 1)]
Word63: TypeAlias = Annotated[int, _integer(0, 2**63 - 1)]
Natural: TypeAlias = Annotated[int, _NATURAL]
SliceCount: TypeAlias = Annotated[int, _integer(1, MAX_SLICES)]
PartSize: TypeAlias = Annotated[int, _integer(1, MAX_PART_BYTES)]
Real: TypeAlias = Annotated[float, _REAL]
Seconds: TypeAlias = Annotated[float, _SECONDS]
Label: TypeAlias = Annotated[str, _text(64)]
Sentence: TypeAlias = Annotated[str, _text(200)._replace(tidy=_one_line)]
Code: TypeAlias = Annotated[str, _code(16)]
Hash16: TypeAlias = Annotated[bytes, _hash(16)]
Hash32: TypeAlias = Annotated[bytes, _hash(32)]
OfferState: TypeAlias = Annotated[str, _one_of("open", "closed")]
Outcome: TypeAlias = Annotated[str, _one_of("counted", "late", "stale", "refused", "duplicate")]
MaybeCorrection: TypeAlias = Annotated[str | None, _maybe(_one_of("feddyn", "scaffold"))]
PartKind: TypeAlias = Annotated[str, _one_of("bundle", "weights", "patch")]
CodecSpec: TypeAlias = Annotated[Spec, Bound("a codec, as lists of names and numbers", _is_spec)]
MaybeNatural: TypeAlias = Annotated[int | None, _maybe(_NATURAL)]
MaybeReal: TypeAlias = Annotated[float | None, _maybe(_REAL)]
MaybeSeconds: TypeAlias = Annotated[float | None, _maybe(_SECONDS)]
Slices: TypeAlias = Annotated[list[int], Bound(f"up to {MAX_MISSING} slices", _are_slices)]
MaybePartSize: TypeAlias = Annotated[int | None, _maybe(_integer(1, MAX_PART_BYTES))]
MaybeSizes: TypeAlias = Annotated[
    list[int] | None,
    _maybe(Bound(f"up to {MAX_PATCHES} sizes in bytes", _are_sizes)),
]
MaybeHash16: TypeAlias = Annotated[bytes | None, _maybe(_hash(16))]
MaybeTags: TypeAlias = Annotated[
    dict[str, Tag] | None,
    _maybe(
        Bound(f"up to {MAX_TAGS} tags: short names with text, numbers, true or false", are_tags)
    ),
]
