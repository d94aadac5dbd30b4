# SPDX-License-Identifier: Apache-2.0
"""What a field of a manifest has to be, as checks that are put together. Pure.

A check takes a field's name and its value, and raises a BundleError of one line that names the
field, what was expected and what came.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from edge_sdk.errors import BundleError

Check = Callable[[str, Any], None]
MOST = 10_000
"""Items of a list, or keys of an object, where nothing else is said."""
MAX_NUMBERS = 1 << 25  # 128 MiB of float32: what an archive can carry


def fail(field: str, expected: str, got: object, advice: str = "rebuild the bundle") -> NoReturn:
    """Raise: BundleError of one line, by the field's name, what was expected and what came."""
    shown = repr(got)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    raise BundleError(f"manifest {field}: expected {expected}, got {shown}; {advice}")


def claim(expected: str, holds: Callable[[Any], bool]) -> Check:
    """Return the check that something holds of a value."""

    def run(field: str, value: Any) -> None:
        if not holds(value):
            fail(field, expected, value)

    return run


def one_of(*allowed: str) -> Check:
    """Return the check that a value is one of these words."""
    return claim(f"one of {', '.join(allowed)}", lambda v: isinstance(v, str) and v in allowed)


def or_null(inner: Check) -> Check:
    """Return a check that lets null pass as well."""
    return lambda field, value: None if value is None else inner(field, value)


def list_of(inner: Check, most: int = MOST) -> Check:
    """Return the check of a list, item by item."""

    def run(field: str, value: Any) -> None:
        if not isinstance(value, list) or len(value) > most:
            fail(field, f"a list of at most {most}", value)
        for i, item in enumerate(value):
            inner(f"{field}[{i}]", item)

    return run


def table_of(inner: Check) -> Check:
    """Return the check of an object with any keys, value by value."""

    def run(field: str, value: Any) -> None:
        if not isinstance(value, dict) or len(value) > MOST:
            fail(field, "an object", value)
        for key, item in value.items():
            inner(f"{field}.{key}", item)

    return run


def fields(schema: Mapping[str, Check], optional: tuple[str, ...] = ()) -> Check:
    """Return the check of an object with these keys, and no others."""

    def run(field: str, value: Any) -> None:
        if not isinstance(value, dict):
            fail(field or "(whole)", "an object", value)
        for key in value:
            if key not in schema:
                fail(f"{field}.{key}".lstrip("."), "no such field", value[key], "upgrade fedge")
        for key, inner in schema.items():
            if key in value:
                inner(f"{field}.{key}".lstrip("."), value[key])
            elif key not in optional:
                fail(f"{field}.{key}".lstrip("."), "a value", None)

    return run


def is_int(value: object, low: int, high: int) -> bool:
    """Tell whether a value is a whole number within these bounds."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(value: Any) -> bool:
    """Tell whether a value is a finite number that a float can hold with room to spare."""
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and math.isfinite(value) and abs(value) < 1e300


def _is_scale(value: object) -> bool:
    return isinstance(value, int | float) and is_number(value) and value > 0


def either(*checks: Check) -> Check:
    """Return the check that one of these holds; the last says what was expected."""

    def run(field: str, value: Any) -> None:
        for inner in checks[:-1]:
            try:
                return inner(field, value)
            except BundleError:
                continue
        return checks[-1](field, value)

    return run


ANY: Check = claim("a JSON value", lambda _: True)
TEXT = claim("a string of 1 to 1000", lambda v: isinstance(v, str) and 0 < len(v) <= 1000)
FLAG = claim("true or false", lambda v: isinstance(v, bool))
COUNT = claim("a whole number from 0", lambda v: is_int(v, 0, 1 << 60))
OFFSET = claim("a byte offset", lambda v: is_int(v, 0, 1 << 31))
INDEX = claim("an index", lambda v: is_int(v, 0, MOST))
SIZE = claim("a dimension", lambda v: is_int(v, 0, MAX_NUMBERS))
ROWS = claim("a number of rows from 1", lambda v: is_int(v, 1, 1 << 31))
NUMBER = claim("a finite number", is_number)
SCALE = claim("a scale above 0", _is_scale)
LEVEL = claim("a zero point", lambda v: is_int(v, -(1 << 31), (1 << 31) - 1))
SHAPE = list_of(SIZE, 16)
ORDER = list_of(INDEX, 16)
OPEN_SHAPE = list_of(or_null(SIZE), 16)
