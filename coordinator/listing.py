# SPDX-License-Identifier: Apache-2.0
"""Rows as the commands show them: JSON for machines, a table for people."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def listing(
    rows: Sequence[Row],
    as_json: bool,
    columns: Sequence[str],
    derived: Mapping[str, Callable[[Any], Any]] | None = None,
) -> str:
    """Return rows as JSON or as a table; in a table, a list is shown by its length."""
    if as_json:
        return json.dumps(rows, indent=2)
    ways = derived or {}
    table = [
        [_cell(ways[name](row) if name in ways else row.get(name)) for name in columns]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(columns, *table, strict=True)]
    lines = [
        "  ".join(cell.ljust(n) for cell, n in zip(line, widths, strict=True)).rstrip()
        for line in [list(columns), *table]
    ]
    return "\n".join(lines)


def _cell(value: object) -> str:
    if isinstance(value, list | tuple):
        return str(len(value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)
