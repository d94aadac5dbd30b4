# SPDX-License-Identifier: Apache-2.0
"""The widest selection, and the most rows a step, that a device's means allow.

Every limit is compared with what the manifest's cost table says. Selections are tried from the
widest: all, then the last k layers, biases, the last layer. Costs hardly ever fall as a selection
widens, so the last k are searched by halving. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from edge_sdk import sizes
from edge_sdk.errors import CompileError, ConfigError

Cost = Mapping[str, Any]
Price = Callable[[str], Cost]

MOST_ROWS, LEAST_ROWS = 32, 4
"""Rows of a step, where the caller names none: what devices take unless told, and below which a
gradient is mostly noise."""


class Way(NamedTuple):
    """How a step goes about its batch. `rows`: so many at a time, None for all at once."""

    rows: int | None = None


AT_ONCE = Way()
"""The whole batch, everything kept."""


class Budget(NamedTuple):
    """Limits; None is none. `batch`: rows of a step that must fit, None to choose."""

    ram: int | None = None
    update: int | None = None
    flops: int | None = None
    batch: int | None = None

    @property
    def is_open(self) -> bool:
        """Tell whether there is no limit at all."""
        return self[:3] == (None, None, None)


class Choice(NamedTuple):
    """What to train, and on how many rows a step; `rows` is None when memory is no matter."""

    train: str
    rows: int | None


def budget(
    max_ram: str | int | None,
    max_bytes_per_update: str | int | None,
    max_flops: float | None,
    batch: int | None,
) -> Budget:
    """Read limits as people write them. Raises: ConfigError for one that is none."""
    for name, value in (("max_flops", max_flops), ("batch", batch)):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and value >= 1):
            raise ConfigError(f"expected {name} of at least 1, got {value!r}")
    ram = None if max_ram is None else sizes.parse(max_ram)
    update = None if max_bytes_per_update is None else sizes.parse(max_bytes_per_update)
    return Budget(ram, update, None if max_flops is None else int(max_flops), batch)


def fitting_rows(cost: Cost, limits: Budget) -> int | None:
    """Return the most rows a step within the limits, None when not even the least fit."""
    wanted = [limits.batch] if limits.batch else _choices(cost)
    for n in wanted:
        if all(need <= most for _, need, most in _needs(cost, limits, n)):
            return n
    return None


def choose(selections: Sequence[str], price: Price, limits: Budget) -> Choice:
    """Return the first of `selections`, widest first, that keeps within the limits.

    Raises: CompileError naming the nearest limits that would do.
    """
    priced: dict[str, Cost] = {}

    def fitting(train: str) -> int | None:
        if train not in priced:
            priced[train] = price(train)
        return fitting_rows(priced[train], limits)

    found = fitting(selections[0])
    if found:
        return _chosen(selections[0], found, limits)
    layered = [s for s in selections[1:] if s.startswith("last:") and s != "last:1"]
    low, high = 0, len(layered)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fitting(layered[middle]) else (middle + 1, high)
    rest = [s for s in selections[1:] if s not in layered]
    for train in (*layered[low:][:1], *rest):
        found = fitting(train)
        if found:
            return _chosen(train, found, limits)
    raise CompileError(refusal(priced, limits))


def refusal(priced: Mapping[str, Cost], limits: Budget) -> str:
    """Say in one line which limits of those priced are nearest to being enough."""

    def overshoot(train: str) -> float:
        needs = _needs(priced[train], limits, _least(priced[train], limits))
        return max(need / most for _, need, most in needs)

    nearest = min(priced, key=overshoot)
    least = _least(priced[nearest], limits)
    needs = _needs(priced[nearest], limits, least)
    given = ", ".join(f"{name} {_spelled(name, most)}" for name, _, most in needs)
    enough = ", ".join(
        f"{name}={_spelled(name, max(need, most))}" for name, need, most in needs if need > most
    )
    rows = f" at batch {least}" if limits.ram is not None else ""
    return (
        f"expected training within {given}; the nearest is train={nearest!r}{rows}: give {enough}"
    )


def _chosen(train: str, found: int, limits: Budget) -> Choice:
    return Choice(train, None if limits.ram is None else found)


def _least(cost: Cost, limits: Budget) -> int:
    return limits.batch or _choices(cost)[-1]


def _choices(cost: Cost) -> list[int]:
    """Return the batch sizes to choose from, largest first."""
    told = map(int, cost["ram_train"])
    return sorted((n for n in told if LEAST_ROWS <= n <= MOST_ROWS), reverse=True)


def _needs(cost: Cost, limits: Budget, batch: int) -> list[tuple[str, int, int]]:
    """Return name, need and limit of each limit that is set."""
    told = [
        ("max_ram", cost["ram_train"][str(batch)], limits.ram),
        ("max_bytes_per_update", cost["bytes_update"], limits.update),
        ("max_flops", cost["flops_step"], limits.flops),
    ]
    return [(name, need, most) for name, need, most in told if most is not None]


def _spelled(name: str, size: int) -> str:
    return str(size) if name == "max_flops" else repr(sizes.enough(size))
