# SPDX-License-Identifier: Apache-2.0
"""Where channels are: last, as TFLite has them, or first, as ONNX wants them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

Layout: TypeAlias = Literal["last", "first"]
"""TFLite's own order, or the last dimension moved to axis 1."""


def to_first(rank: int) -> tuple[int, ...]:
    """Return the transposition that moves the last dimension to axis 1."""
    return (0, rank - 1, *range(1, rank - 1)) if rank > 2 else tuple(range(rank))


def to_last(rank: int) -> tuple[int, ...]:
    """Return the transposition that moves axis 1 to the end."""
    return (0, *range(2, rank), 1) if rank > 2 else tuple(range(rank))


def place(axis: int, rank: int, layout: Layout) -> int:
    """Return where a dimension of TFLite's order is in a layout."""
    return to_first(rank).index(axis) if layout == "first" else axis


def moved(values: Sequence[Any], layout: Layout) -> list[Any]:
    """Return one value for each dimension in the order of a layout."""
    order = to_first(len(values)) if layout == "first" else range(len(values))
    return [values[n] for n in order]
