# SPDX-License-Identifier: Apache-2.0
"""Who may take part in a task: an expression over what is known of a device. Pure, nothing runs.

    where = "site == 'north' and not beta"
    where = "board in ['pi4', 'pi5'] and (ram_mib >= 2000 or swap)"

A tag is what a device says of itself (`tags` in `device.toml`) or what an operator assigned, whose
word wins. A name alone asks whether the tag is there and is neither false, nor 0, nor empty. A tag
that is not there equals nothing and is neither less nor more than anything.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

from edge_sdk.bounds import TAG_NAME, Tag, is_tag
from edge_sdk.errors import ConfigError

MAX_LENGTH = 1000
MAX_DEPTH = 32

Tags: TypeAlias = Mapping[str, Tag]
Test: TypeAlias = Callable[[Tags], bool]

_TOKEN = re.compile(
    r"""\s*(?:
        (?P<text>'[^'\\]*'|"[^"\\]*")
      | (?P<number>-?[0-9]+(?:\.[0-9]+)?)(?![\w.])
      | (?P<word>[A-Za-z_][A-Za-z0-9_.-]*)
      | (?P<mark>==|!=|<=|>=|<|>|\(|\)|\[|\]|,)
    )""",
    re.VERBOSE,
)
_COMPARISONS: dict[str, Callable[[Tag, Tag], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_WORDS = ("and", "or", "not", "in", "true", "false")


class Where(NamedTuple):
    """An expression that was read: its text, and whether the tags of a device hold to it."""

    text: str
    holds: Test


def where(text: str) -> Where:
    """Read an expression.

    Raises: ConfigError of one line: what was expected, what came, and where.
    """
    if len(text) > MAX_LENGTH:
        raise ConfigError(f"where: expected up to {MAX_LENGTH} characters, got {len(text)}")
    reader = _Reader(text, _tokens(text))
    test = reader.either(0)
    if reader.kind:
        raise reader.unexpected("the end, and, or")
    return Where(text, test)


class _Token(NamedTuple):
    kind: str
    text: str
    at: int


def _tokens(text: str) -> list[_Token]:
    found, at = [], 0
    while text[at:].strip():
        match = _TOKEN.match(text, at)
        if match is None:
            start = at + len(text[at:]) - len(text[at:].lstrip())
            raise ConfigError(f"where: cannot read {text[start : start + 20]!r} at {start}")
        kind = str(match.lastgroup)
        found.append(_Token(kind, match[kind], match.start(kind)))
        at = match.end()
    return [*found, _Token("", "", len(text))]


class _Reader:
    """Recursive descent over the tokens; `depth` bounds the recursion."""

    def __init__(self, text: str, tokens: list[_Token]) -> None:
        self._text, self._tokens, self._at = text, tokens, 0

    @property
    def kind(self) -> str:
        return self._tokens[self._at].kind

    def unexpected(self, wanted: str) -> ConfigError:
        token = self._tokens[self._at]
        came = repr(token.text) if token.kind else "the end"
        return ConfigError(f"where: expected {wanted} at {token.at} of {self._text!r}, got {came}")

    def _takes(self, *words: str) -> str:
        """Return the next token's text if it is one of `words` (not in quotes), and move on."""
        token = self._tokens[self._at]
        if token.kind not in ("word", "mark") or token.text not in words:
            return ""
        self._at += 1
        return token.text

    def either(self, depth: int) -> Test:
        if depth > MAX_DEPTH:
            raise ConfigError(f"where: expected at most {MAX_DEPTH} levels of brackets and not")
        tests = [self._both(depth)]
        while self._takes("or"):
            tests.append(self._both(depth))
        return tests[0] if len(tests) == 1 else lambda tags: any(t(tags) for t in tests)

    def _both(self, depth: int) -> Test:
        tests = [self._negated(depth)]
        while self._takes("and"):
            tests.append(self._negated(depth))
        return tests[0] if len(tests) == 1 else lambda tags: all(t(tags) for t in tests)

    def _negated(self, depth: int) -> Test:
        is_negated = False
        while self._takes("not"):
            is_negated = not is_negated
        test = self._one(depth)
        return (lambda tags: not test(tags)) if is_negated else test

    def _one(self, depth: int) -> Test:
        if self._takes("("):
            test = self.either(depth + 1)
            if not self._takes(")"):
                raise self.unexpected("')'")
            return test
        name = self._name()
        if sign := self._takes(*_COMPARISONS):
            return _compared(name, sign, self._value())
        if self._takes("in"):
            return _among(name, self._values())
        return lambda tags: bool(tags.get(name, False))

    def _name(self) -> str:
        token = self._tokens[self._at]
        if token.kind != "word" or token.text in _WORDS:
            raise self.unexpected("a tag's name, not or '('")
        self._at += 1
        return token.text

    def _value(self) -> Tag:
        token = self._tokens[self._at]
        if token.kind == "text":
            value: Tag = token.text[1:-1]
        elif token.kind == "number":
            value = float(token.text) if "." in token.text else int(token.text)
        elif token.kind == "word" and token.text in ("true", "false"):
            value = token.text == "true"
        else:
            raise self.unexpected("a number, true, false or text in quotes")
        self._at += 1
        return value

    def _values(self) -> list[Tag]:
        if not self._takes("["):
            raise self.unexpected("'['")
        values = [self._value()]
        while self._takes(","):
            values.append(self._value())
        if not self._takes("]"):
            raise self.unexpected("',' or ']'")
        return values


def _compared(name: str, sign: str, value: Tag) -> Test:
    compare, is_order = _COMPARISONS[sign], sign not in ("==", "!=")

    def test(tags: Tags) -> bool:
        found = tags.get(name)
        if found is None or _kind(found) != _kind(value):
            return sign == "!="
        return (not is_order or _kind(value) != "flag") and compare(found, value)

    return test


def _among(name: str, values: list[Tag]) -> Test:
    tests = [_compared(name, "==", value) for value in values]
    return lambda tags: any(test(tags) for test in tests)


def _kind(value: Tag) -> str:
    """True is not 1 here, and nothing is compared across kinds."""
    if isinstance(value, bool):
        return "flag"
    return "text" if isinstance(value, str) else "number"


def assigned(text: str) -> tuple[str, Tag | None]:
    """Read `name=value` from a command line; None for `name=`, which takes the tag away.

    Raises: ConfigError when it is not of that form, or out of bounds.
    """
    name, sign, said = text.partition("=")
    if not sign or not TAG_NAME.fullmatch(name) or name in _WORDS:
        raise ConfigError(f"expected NAME=VALUE with a NAME such as site, got {text[:60]!r}")
    if not said:
        return name, None
    value: Tag = said
    if said in ("true", "false"):
        value = said == "true"
    elif re.fullmatch(r"-?[0-9]{1,18}", said):
        value = int(said)
    elif re.fullmatch(r"-?[0-9]{1,18}\.[0-9]{1,18}", said):
        value = float(said)
    if not is_tag(value):
        raise ConfigError(f"tag {name}: expected up to 64 printable characters, got {said[:80]!r}")
    return name, value
