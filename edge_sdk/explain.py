# SPDX-License-Identifier: Apache-2.0
"""What a bundle holds and costs, as a table for a terminal and for a notebook. Pure."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edge_sdk import sizes

Row = tuple[str, str]


@dataclass(frozen=True, slots=True, repr=False)
class Explanation:
    """Rows of a name and what it says; `str()` is a table, notebooks show `_repr_html_`."""

    title: str
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.rows)
        return "\n".join([self.title, *(f"  {name:<{width}}  {said}" for name, said in self.rows)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
            f"<td style='text-align:left'>{html.escape(said)}</td></tr>"
            for name, said in self.rows
        )
        return f"<table><caption>{html.escape(self.title)}</caption>{cells}</table>"


def of(manifest: Mapping[str, Any], digest: str, size: int) -> Explanation:
    """Explain a checked manifest, next to the bundle's digest and its size in bytes."""
    cost = manifest["cost"]
    rows = [
        ("digest", digest),
        ("size", sizes.spelled(size)),
        ("input", _port(manifest["input"])),
        ("output", _port(manifest["output"])),
        ("loss", manifest["loss"]),
        ("trains", f"{_spelled(manifest['train'])}, {len(manifest['params'])} tensors"),
        ("optimizer", f"{_spelled(manifest['optimizer'])}, lr {manifest['lr']:g}"),
        ("formats", _formats(manifest)),
        *((_LABELS.get(name, name), _cost(name, value)) for name, value in sorted(cost.items())),
    ]
    return Explanation(f"bundle {manifest['name']} ({manifest['producer']})", tuple(rows))


_LABELS = {
    "params": "parameters",
    "trainable": "trainable",
    "trainable_share": "trainable share",
    "operators": "operators",
    "train_operators": "operators to train",
    "flops_forward": "FLOPs forward",
    "flops_step": "FLOPs of a step",
    "bytes_dense": "dense update",
    "bytes_update": "update as sent",
    "ram_train": "RAM to train adds",
    "ram_peak": "peak RAM",
    "batch": "rows a step, at most",
    "micro_batch": "rows at a time",
    "recomputed": "operators computed again",
    "unsized": "not in RAM: tensors of unknown size",
}


def _formats(manifest: Mapping[str, Any]) -> str:
    """Say in which formats the graphs are, and which of them only predict."""
    said = [
        name if "train" in roles else f"{name} to predict only"
        for name, roles in sorted(manifest["graphs"].items())
    ]
    return f"{', '.join(said)}; the model came as {manifest['source']}"


def _cost(name: str, value: Any) -> str:
    if isinstance(value, Mapping) and name.startswith("ram_"):
        told = sorted((int(rows), size) for rows, size in value.items())
        return ", ".join(f"batch {n} {sizes.spelled(size)}" for n, size in told) or "none"
    if isinstance(value, Mapping):
        counts = sorted(value.items(), key=lambda item: (-item[1], item[0]))
        return ", ".join(f"{key} {n:g}" for key, n in counts) or "none"
    if name.startswith(("bytes_", "ram_")):
        return sizes.spelled(value)
    if name.endswith("_share"):
        return f"{value:.1%}"
    return f"{value:,}"


def _port(port: Mapping[str, Any]) -> str:
    shape = "x".join("?" if d is None else str(d) for d in port["shape"])
    scale = "" if port["scale"] is None else f", scale {port['scale']:g}"
    return f"{port['name']} {port['dtype']}[{shape}]{scale}"


def _spelled(spec: Any) -> str:
    """Spell a value as Python would be written: ["momentum", {"lr": 0.1}] is momentum(lr=0.1)."""
    if isinstance(spec, list) and spec and isinstance(spec[0], str):
        return f"{spec[0]}({', '.join(_arguments(spec[1:]))})" if len(spec) > 1 else spec[0]
    if isinstance(spec, list):
        return ", ".join(_spelled(part) for part in spec) or "none"
    return str(spec)


def _arguments(args: list[Any]) -> list[str]:
    words: list[str] = []
    for arg in args:
        words += [f"{k}={v}" for k, v in arg.items()] if isinstance(arg, dict) else [str(arg)]
    return words
