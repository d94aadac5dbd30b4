# SPDX-License-Identifier: Apache-2.0
"""Tables of the documentation, written from what `fedge bench` measured.

``python -m coordinator.bench.pages FIGURES DOCS``: FIGURES is a folder of `fedge bench .. --json`
outputs, as `scripts/bench` leaves it; DOCS is the folder of pages. A table stands between
``<!-- table NAME -->`` and ``<!-- end -->``, and is replaced when FIGURES has what it is made of.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_sdk.errors import ConfigError

Row = Mapping[str, Any]
Cells = Sequence[str]

_TABLE = re.compile(r"(<!-- table ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_MODES = {"all": "all", "head": "head", "bias": "biases", "int8": "int8 head"}


def main() -> None:
    """Rewrite every page of DOCS that has a table for which there are FIGURES."""
    figures, docs = Path(sys.argv[1]), Path(sys.argv[2])
    found = {file.stem: json.loads(file.read_text()) for file in sorted(figures.glob("*.json"))}
    for page in sorted(docs.rglob("*.md")):
        text = page.read_text()
        made = filled(text, found)
        if made != text:
            page.write_text(made)
            print(f"{page}: tables rewritten")


def filled(text: str, found: Mapping[str, Any]) -> str:
    """Return a page with its tables made anew; those without figures stay.

    Raises: ConfigError for a table that nobody knows how to make.
    """

    def made(match: re.Match[str]) -> str:
        name = match[2]
        if name not in TABLES:
            raise ConfigError(f"expected a table of {', '.join(TABLES)}, got {name!r}")
        source, make = TABLES[name]
        if source not in found:
            return match[0]
        return f"{match[1]}{make(found[source])}\n{match[3]}"

    return _TABLE.sub(made, text)


def _step(tables: Mapping[str, list[Row]]) -> str:
    """Time and memory of each mode at batch 16, and the ratio to torch at batch 4 beside."""
    rows = [row for row in tables["step"] if row["mode"] != "int8"]
    few = {(r["model"], r["mode"]): r["ratio"] for r in rows if r["batch"] == 4}
    return _table(
        ("model", "trained", "numbers", "ms", "/ torch", "at batch 4", "peak, MiB", "/ torch",
         "training adds: predicted, MiB", "measured"),
        [
            (
                row["model"], _MODES[row["mode"]], f"{row['trained']:,}", _ms(row["ms"]),
                _ratio(row["ratio"]), _ratio(few.get((row["model"], row["mode"]))),
                _mib(row["rss_mib"], 0), _ratio(row["rss_ratio"]), _mib(row["predicted_mib"]),
                _mib(row["added_mib"]),
            )
            for row in rows
            if row["batch"] == 16
        ],
    )  # fmt: skip


def _twins(tables: Mapping[str, list[Row]]) -> str:
    """The head of an int8 network next to that of its float32 twin."""
    rows = [row for row in tables["step"] if row["mode"] == "int8" and row["peer_ms"]]
    return _table(
        ("model", "engine", "batch", "float32, ms", "int8, ms", "/ float32", "peak, MiB",
         "/ float32", "training adds: predicted, MiB", "measured"),
        [
            (
                row["model"], row["engine"], str(row["batch"]), _ms(row["peer_ms"]),
                _ms(row["ms"]), _ratio(row["ratio"]), _mib(row["rss_mib"], 0),
                _ratio(row["rss_ratio"]), _mib(row["predicted_mib"]), _mib(row["added_mib"]),
            )
            for row in rows
        ],
    )  # fmt: skip


def _peers(tables: Mapping[str, list[Row]]) -> str:
    """Ours next to onnxruntime-training."""
    return _table(
        ("model", "trained", "its ms", "ours", "ours / its", "its peak, MiB", "ours / its", ""),
        [
            (
                row["model"], _MODES[row["mode"]], _ms(row["peer_ms"]), _ms(row["ms"]),
                _ratio(row["ratio"]), _mib(row["peer_rss_mib"], 0), _ratio(row["rss_ratio"]),
                row["note"],
            )
            for row in tables["step"]
        ],
    )  # fmt: skip


def _engines(tables: Mapping[str, list[Row]]) -> str:
    """Every engine on the same steps in the same minutes."""
    rows = [row for row in tables["step"] if row["mode"] != "int8"]
    return _table(
        ("model", "trained", "engine", "ms", "/ torch", "peak, MiB", "/ torch", ""),
        [
            (
                row["model"], _MODES[row["mode"]], row["engine"], _ms(row["ms"]),
                _ratio(row["ratio"]), _mib(row["rss_mib"], 0), _ratio(row["rss_ratio"]),
                row["note"],
            )
            for row in rows
        ],
    )  # fmt: skip


def _memory(tables: Mapping[str, list[Row]]) -> str:
    """Predicted and measured, a row for each model and selection, a column for each batch."""
    rows = tables["memory"]
    batches = sorted({row["batch"] for row in rows})
    cases = list(dict.fromkeys((row["model"], row["train"]) for row in rows))
    lines = []
    for case in cases:
        own = {row["batch"]: row for row in rows if (row["model"], row["train"]) == case}
        both = (f"{_mib(own[b]['predicted_mib'])} / {_mib(own[b]['measured_mib'])}" for b in own)
        worst = max((row["off"] for row in own.values()), key=abs)
        lines.append((*case, *both, f"{worst:+.1%}"))
    return _table(("model", "trained", *(f"batch {b}" for b in batches), "worst"), lines)


def _codec(tables: Mapping[str, list[Row]]) -> str:
    return _table(
        ("delta", "codec", "density", "ratio", "encode ms", "decode ms"),
        [
            (
                row["delta"], row["codec"], f"{row['density']:.3f}", f"{row['ratio']:.0f}",
                f"{row['encode_ms']:.1f}", f"{row['decode_ms']:.1f}",
            )
            for row in tables["codec"]
        ],
    )  # fmt: skip


def _aggregate(tables: Mapping[str, list[Row]]) -> str:
    rows = tables["aggregate"]
    cells = [(row["codec"], f"{row['updates_per_s']:,.0f}") for row in rows]
    return _table(("codec", "updates / s"), cells)


def _device(tables: Mapping[str, list[Row]]) -> str:
    return _table(
        ("model", "trained", "engine", "application, MiB", "its training child", "together"),
        [
            (
                row["model"], _MODES[row["mode"]], row["engine"], _mib(row["application_mib"], 0),
                _mib(row["training_mib"], 0), _mib(row["together_mib"], 0),
            )
            for row in tables["device"]
        ],
    )  # fmt: skip


TABLES: dict[str, tuple[str, Callable[[Mapping[str, list[Row]]], str]]] = {
    "step": ("step", _step),
    "int8-head": ("engines", _twins),
    "onnxruntime-training": ("onnxruntime-training", _peers),
    "engines": ("engines", _engines),
    "device": ("device", _device),
    "memory": ("memory", _memory),
    "codec": ("codec", _codec),
    "aggregate": ("aggregate", _aggregate),
}
"""How a table is made: of which file of figures, by what."""


def _table(head: Cells, rows: Iterable[Cells]) -> str:
    """Lay out Markdown, without columns that are empty throughout."""
    lines = list(rows)
    used = [i for i, name in enumerate(head) if name or any(line[i] for line in lines)]
    whole = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(line[i] for i in used)} |" for line in whole)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _mib(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


if __name__ == "__main__":
    main()
