# SPDX-License-Identifier: Apache-2.0
"""Tables of the documentation are written from the command's output, and stand in its pages."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from coordinator.bench import pages
from edge_sdk.errors import ConfigError

DOCS = Path(__file__).resolve().parents[2] / "docs"
COST: dict[str, Any] = {
    "model": "dscnn", "mode": "head", "engine": "ort", "batch": 16, "threads": 2, "trained": 780,
    "ms": 1.234, "rss_mib": 64.6, "predicted_mib": 21.3, "added_mib": 20.8, "off": 0.02,
    "peer": "torch", "peer_ms": 12.34, "peer_rss_mib": 320.0, "ratio": 0.1, "rss_ratio": 0.2,
    "losses_differ_by": 0.0, "load": 0.1, "note": "",
}  # fmt: skip


def filled(name: str, rows: list[dict[str, Any]], source: str = "step") -> list[str]:
    file, _ = pages.TABLES[name]
    text = pages.filled(f"a\n<!-- table {name} -->\nold\n<!-- end -->\nb", {file: {source: rows}})
    first, *table, last = text.split("\n")
    assert (first, last) == ("a", "b")
    return table[1:-1]


def test_every_table_stands_in_one_page() -> None:
    text = "\n".join(page.read_text() for page in DOCS.rglob("*.md"))
    assert sorted(re.findall(r"<!-- table ([\w-]+) -->", text)) == sorted(pages.TABLES)
    assert text.count("<!-- end -->") == len(pages.TABLES)


def test_a_step_stands_with_its_ratio_at_batch_4_and_its_memory() -> None:
    rows = [COST, {**COST, "batch": 4, "ratio": 0.456}, {**COST, "mode": "int8"}]
    head, _, *lines = filled("step", rows)
    assert head.startswith("| model | trained | numbers | ms | / torch | at batch 4 |")
    assert lines == ["| dscnn | head | 780 | 1.23 | 0.10 | 0.46 | 65 | 0.20 | 21.3 | 20.8 |"]


def test_what_was_not_measured_is_a_dash_and_says_why() -> None:
    missing = {**COST, "engine": "litert", "ms": None, "ratio": None, "note": "not installed"}
    head, _, *lines = filled("engines", [COST, missing])
    assert head.endswith("| / torch |  |")
    assert lines[0] == "| dscnn | head | ort | 1.23 | 0.10 | 65 | 0.20 |  |"
    assert lines[1] == "| dscnn | head | litert | - | - | 65 | 0.20 | not installed |"
    assert filled("engines", [COST])[0].endswith("| peak, MiB | / torch |")


def test_an_int8_head_stands_next_to_its_twin() -> None:
    int8 = {**COST, "mode": "int8", "peer": "float32", "peer_ms": 2.0, "ratio": 0.617}
    (line,) = filled("int8-head", [COST, int8, {**int8, "peer_ms": None}])[2:]
    assert line == "| dscnn | ort | 16 | 2.00 | 1.23 | 0.62 | 65 | 0.20 | 21.3 | 20.8 |"


def test_memory_has_a_column_for_each_batch() -> None:
    row = {"model": "har", "train": "all", "predicted_mib": 10.0, "measured_mib": 10.5}
    rows = [{**row, "batch": 4, "off": 0.01}, {**row, "batch": 16, "off": -0.0476}]
    head, _, line = filled("memory", rows, "memory")
    assert head == "| model | trained | batch 4 | batch 16 | worst |"
    assert line == "| har | all | 10.0 / 10.5 | 10.0 / 10.5 | -4.8% |"


@pytest.mark.parametrize(
    ("name", "row", "line"),
    [
        ("onnxruntime-training", COST, "| dscnn | head | 12.3 | 1.23 | 0.10 | 320 | 0.20 |"),
        ("aggregate", {"codec": "lean", "updates_per_s": 3461.2}, "| lean | 3,461 |"),
        (
            "codec",
            {"delta": "flat", "codec": "lean", "density": 0.0081, "ratio": 430.2, "encode_ms": 1.4,
             "decode_ms": 0.11},
            "| flat | lean | 0.008 | 430 | 1.4 | 0.1 |",
        ),
        (
            "device",
            {"model": "dscnn", "mode": "head", "engine": "litert", "application_mib": 55.8,
             "training_mib": 41.1, "together_mib": 96.9},
            "| dscnn | head | litert | 56 | 41 | 97 |",
        ),
    ],
)  # fmt: skip
def test_others(name: str, row: dict[str, Any], line: str) -> None:
    source = {"onnxruntime-training": "step"}.get(name, name)
    assert filled(name, [row], source)[2:] == [line]


def test_tables_without_figures_stay_and_unknown_ones_are_named() -> None:
    text = "<!-- table step -->\nold\n<!-- end -->"
    assert pages.filled(text, {}) == text
    with pytest.raises(ConfigError, match="got 'nosuch'"):
        pages.filled(text.replace("step", "nosuch"), {})


def test_pages_are_rewritten_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, figures = tmp_path / "page.md", tmp_path / "figures"
    figures.mkdir()
    page.write_text("<!-- table aggregate -->\n<!-- end -->\n")
    rows = {"aggregate": [{"codec": "lean", "updates_per_s": 2.0}]}
    (figures / "aggregate.json").write_text(json.dumps(rows))
    monkeypatch.setattr(sys, "argv", ["pages", str(figures), str(tmp_path)])
    pages.main()
    assert "| lean | 2 |" in page.read_text()
