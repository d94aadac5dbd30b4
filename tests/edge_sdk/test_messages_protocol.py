# SPDX-License-Identifier: Apache-2.0
import json
import re
from pathlib import Path
from typing import Any

import pytest

from edge_sdk import chunks, messages
from edge_sdk.messages import KINDS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "protocol.md").read_text()
RULE = re.compile(r"^(\w+) = \{ +; kind (\d+), body = (.*)\n((?:  .*\n)+)\}", re.MULTILINE)
FIELD = re.compile(r"^  (\? )?(\d+): .*; (\w+)$", re.MULTILINE)
RULES = {int(number): (name, body, rows) for name, number, body, rows in RULE.findall(PAGE)}


@pytest.mark.parametrize("number", KINDS)
def test_the_page_names_every_field_in_its_place(number: int) -> None:
    name, body, rows = RULES[number]
    written = [(int(key), field, bool(mark)) for mark, key, field in FIELD.findall(rows)]
    read = [
        (field.key, field.name, "MISSING" not in repr(field.default))
        for field in messages._layout(number)
    ]
    assert written == read
    assert name == KINDS[number].__name__.lower()
    assert (body == "0") is ("body" not in KINDS[number].__dataclass_fields__)


def test_the_page_gives_the_limits_that_hold() -> None:
    assert f"at most {messages.MAX_FRAME:,} bytes" in PAGE
    assert f"at most {messages.MAX_TRANSFER >> 20} MiB" in PAGE
    assert f"leaving {4096:,} bytes" in PAGE
    assert f"exactly {messages.OVERHEAD}+H+B bytes" in PAGE
    assert chunks.MIN_PACKET < messages.MAX_FRAME


def test_every_kind_has_a_vector_that_its_key_verifies() -> None:
    cases: list[dict[str, Any]] = json.loads(
        (Path(__file__).parent / "golden" / "messages.json").read_text()
    )
    assert {case["kind"] for case in cases} == {kind.__name__ for kind in KINDS.values()}
    for case in cases:
        frame = bytes.fromhex(case["frame"])
        assert messages.verify(frame, case["topic"], bytes.fromhex(case["public"]))
        message, _ = messages.decode(frame, case["topic"])
        for name, value in case["fields"].items():
            is_bytes = isinstance(value, dict) and set(value) == {"hex"}
            plain = bytes.fromhex(value["hex"]) if is_bytes else value
            assert getattr(message, name) == plain
