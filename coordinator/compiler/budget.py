# SPDX-License-Identifier: Apache-2.0
"""The widest selection, and the most rows a step, that a device's means allow.

Every limit is compared with what the manifest's cost table says. Selections are tried from the
widest: all, then the last k layers, biases, the last layer. Costs hardly ever fall as a selection
widens, so the last k are searched by halving. Where a selection is too much, the channels of it
that contribute most may do. Of the ways to go about a batch (at once, in slices,
with activations computed twice) a selection takes the fastest that fits. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from edge_sdk import sizes
from edge_sdk.errors import CompileError, ConfigError

Cost = Mapping[str, Any]

MOST_ROWS, LEAST_ROWS = 32, 4
"""Rows of a step, where the caller names none: what devices take unless told, and below which a
gradient is mostly noise."""


class Way(NamedTuple):
    """How a step goes about its batch.

    `rows`: so many at a time, None for all at once; `again`: activations are computed twice where
    that saves memory.
    """

    rows: int | None = None
    again: bool = False


Price = Callable[[str, Way], Cost | None]
"""What a selection costs, gone about in a way; None for one that cannot be."""
AT_ONCE = Way()
"""The whole batch, everything kept."""

SHARES = (0.5, 0.25, 0.125)
"""Shares of a selection's numbers to try where the whole is too much."""

_SLICES = (16, 8, 4, 2, 1)
_WORTH_SLICING = 4
"""Rows at a time from which on slices cost less time than computing activations twice."""


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
    """What to train, on how many rows a step, and how; `rows` is None when memory is no matter."""

    train: str
    rows: int | None
    way: Way = AT_ONCE


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


def ways(rows: int | None, again: bool | None, batch: int | None = None) -> list[Way]:
    """Return the ways to choose from, the fastest first, which takes the most memory.

    Args:
        rows: at a time, where the caller says so.
        again: whether activations are computed twice, where the caller says so.
        batch: rows of a step, by default `MOST_ROWS`.
    """
    slices = [n for n in _SLICES if n < (batch or MOST_ROWS)]
    counts = [None, *slices] if rows is None else [rows]
    found = [Way(n, twice) for n in counts for twice in (False, True) if again in {None, twice}]
    if again is not None or rows is not None:
        return found
    return [w for w in found if not w.again or (w.rows or MOST_ROWS) <= _WORTH_SLICING]


def fitting_rows(cost: Cost, limits: Budget) -> int | None:
    """Return the most rows a step within the limits, None when not even the least fit."""
    wanted = [limits.batch] if limits.batch else _choices(cost)
    for n in wanted:
        if _fits(cost, limits, n):
            return n
    return None


def choose(
    selections: Sequence[str],
    price: Price,
    limits: Budget,
    told: Sequence[Way] = (AT_ONCE,),
    shares: Sequence[float] = (),
) -> Choice:
    """Return the first of `selections`, widest first, that keeps within the limits.

    It goes about its batch in the first of the ways `told` that lets it: the fastest. Where it does
    not keep within the limits as a whole, the first of its `shares` does that lets it.

    Raises: CompileError naming the nearest limits that would do.
    """
    return _Search(price, limits, told, shares).run(selections)


class _Search:
    """Prices that were asked for already."""

    def __init__(
        self, price: Price, limits: Budget, told: Sequence[Way], shares: Sequence[float]
    ) -> None:
        self._price, self._limits, self._ways, self._shares = price, limits, told, shares
        self._priced: dict[tuple[str, Way], Cost | None] = {}

    def run(self, selections: Sequence[str]) -> Choice:
        found = self._searched(selections)
        if found is not None:
            return found
        known = {asked: cost for asked, cost in self._priced.items() if cost is not None}
        raise CompileError(refusal(known, self._limits))

    def _searched(self, selections: Sequence[str]) -> Choice | None:
        if found := self._chosen(selections[0]):
            return found
        layered = [s for s in selections[1:] if s.startswith("last:") and s != "last:1"]
        low, high = 0, len(layered)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._may_fit(layered[middle]) else (middle + 1, high)
        rest = [s for s in selections[1:] if s not in layered]
        for train in (*layered[low:][:1], *rest):
            if found := self._chosen(train):
                return found
        return None

    def _parts(self, train: str) -> list[str]:
        """Return a selection and its shares, widest first."""
        if train != "all" and (not train.startswith("last:") or train == "last:1"):
            return [train]
        among = "" if train == "all" else f":{train}"
        return [train, *(f"sparse:{share:g}{among}" for share in self._shares)]

    def _may_fit(self, train: str) -> bool:
        """Tell whether any part of a selection fits: the narrowest that can be, if one does."""
        for part in reversed(self._parts(train)):
            if self._rows(part):
                return True
            if self._cost(part, self._ways[-1]) is not None:
                break
        return False

    def _chosen(self, train: str) -> Choice | None:
        """Return the widest part of a selection that fits, and how."""
        if not self._may_fit(train):
            return None
        part, rows = next((p, n) for p in self._parts(train) if (n := self._rows(p)))
        way = next(w for w in self._ways if self._fits(part, w, rows))
        return Choice(part, None if self._limits.ram is None else rows, way)

    def _rows(self, train: str) -> int | None:
        """Return the most rows a step on which a selection fits in any way.

        Those that take least are the last two, or the first for a model so small that the nodes of
        a loop are more than what it saves.
        """
        tried = dict.fromkeys((self._ways[-1], *self._ways[-2:-1], self._ways[0]))
        costs = (self._cost(train, way) for way in tried)
        found = (fitting_rows(cost, self._limits) for cost in costs if cost is not None)
        return max((n for n in found if n), default=None)

    def _fits(self, train: str, way: Way, rows: int) -> bool:
        cost = self._cost(train, way)
        return cost is not None and _fits(cost, self._limits, rows)

    def _cost(self, train: str, way: Way) -> Cost | None:
        if (train, way) not in self._priced:
            self._priced[train, way] = self._price(train, way)
        return self._priced[train, way]


def refusal(priced: Mapping[tuple[str, Way], Cost], limits: Budget) -> str:
    """Say in one line which limits of those priced are nearest to being enough."""

    def overshoot(asked: tuple[str, Way]) -> float:
        needs = _needs(priced[asked], limits, _least(priced[asked], limits))
        return max(need / most for _, need, most in needs)

    nearest = min(priced, key=overshoot)
    train, way = nearest
    least = _least(priced[nearest], limits)
    needs = _needs(priced[nearest], limits, least)
    given = ", ".join(f"{name} {_spelled(name, most)}" for name, _, most in needs)
    enough = ", ".join(
        f"{name}={_spelled(name, max(need, most))}" for name, need, most in needs if need > most
    )
    rows = f" at batch {least}" if limits.ram is not None else ""
    how = "" if way.rows is None else f", micro_batch={way.rows}"
    how += ", recompute=True" if way.again else ""
    return (
        f"expected training within {given}; the nearest is train={train!r}{rows}{how}: "
        f"give {enough}"
    )


def _fits(cost: Cost, limits: Budget, rows: int) -> bool:
    return all(need <= most for _, need, most in _needs(cost, limits, rows))


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
