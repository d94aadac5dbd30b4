# SPDX-License-Identifier: Apache-2.0
"""When a device may train: values that combine with ``&``, ``|`` and ``~``.

``when.on_mains & when.idle & when.cooler_than(70)``. A condition looks at the board through
`Surroundings`, whose root stands in for ``/`` in tests. Any ``() -> bool`` combines with them.
A reading that this board does not have never forbids: a board without a battery is on mains, one
without a thermometer is cool.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from edge_sdk.errors import ConfigError
from edge_sdk.types import Spec

IDLE_LOAD = 0.5  # of one core, per core: below it a board counts as idle
SUPPLY_TYPES = {"Mains", "USB", "USB_C", "USB_PD", "Wireless"}


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a condition may look at.

    `root` stands for ``/``; `examples` is how many labelled examples are stored; `own_load` is how
    many cores our own training keeps busy, which must not make the board look busy to itself.
    """

    root: Path = Path("/")
    examples: int = 0
    own_load: float = 0.0


@dataclass(frozen=True, slots=True)
class Condition:
    """A named claim about the board; ``&``, ``|``, ``~`` join it to others and to any function."""

    name: str
    holds: Callable[[Surroundings], bool]
    parts: tuple[Condition, ...] = ()

    def __and__(self, other: ConditionLike) -> Condition:
        both = (*_all_of(self), *_all_of(condition(other)))
        parts = tuple(p for p in both if p is not always) or (always,)
        return Condition(
            " & ".join(p.name for p in parts), lambda s: all(p.holds(s) for p in parts), parts
        )

    def __rand__(self, other: ConditionLike) -> Condition:
        return condition(other) & self

    def __or__(self, other: ConditionLike) -> Condition:
        right = condition(other)
        return Condition(f"({self.name} | {right.name})", lambda s: self.holds(s) or right.holds(s))

    def __ror__(self, other: ConditionLike) -> Condition:
        return condition(other) | self

    def __invert__(self) -> Condition:
        return Condition(f"~{self.name}", lambda s: not self.holds(s))

    def __repr__(self) -> str:
        return f"when.{self.name}" if self.name.isidentifier() else f"when({self.name})"

    def lapsed(self, surroundings: Surroundings) -> tuple[str, ...]:
        """Return the names of the parts that do not hold now; empty when training may go on."""
        return tuple(p.name for p in _all_of(self) if not p.holds(surroundings))


ConditionLike: TypeAlias = Condition | Callable[[], bool]


def condition(value: ConditionLike) -> Condition:
    """Make a condition of any ``() -> bool``; a condition passes unchanged.

    Raises: ConfigError when `value` cannot be called.
    """
    if isinstance(value, Condition):
        return value
    if not callable(value):
        raise ConfigError(f"expected a condition such as when.idle or a function, got {value!r}")
    call = value
    return Condition(getattr(value, "__name__", "custom"), lambda _: bool(call()))


def cooler_than(celsius: float) -> Condition:
    """Hold while the hottest sensor of the board reads below `celsius` degrees."""
    if not 0 < celsius < 150:
        raise ConfigError(f"cooler_than expects degrees Celsius between 0 and 150, got {celsius}")
    return Condition(
        f"cooler_than({celsius:g})",
        lambda s: all(degrees < celsius for degrees in temperatures(s.root)),
    )


def examples(minimum: int) -> Condition:
    """Hold once at least `minimum` labelled examples are stored."""
    if minimum < 1:
        raise ConfigError(f"examples expects a count of at least 1, got {minimum}")
    return Condition(f"examples({minimum})", lambda s: s.examples >= minimum)


def from_spec(spec: Spec) -> Condition:
    """Read ``["on_mains", ["cooler_than", 70]]``, as a configuration file spells it: all must hold.

    Raises: ConfigError when a name is unknown or a value is out of range.
    """
    result = always
    for item in spec:
        result = result & _one(item)
    return result


def temperatures(root: Path) -> tuple[float, ...]:
    """Return what each thermal sensor below `root` reads, in degrees Celsius."""
    zones = sorted(root.glob("sys/class/thermal/thermal_zone*/temp"))
    readings = (_number(_text(zone)) for zone in zones)
    return tuple(value / 1000 for value in readings if value is not None)


def load_per_core(root: Path) -> float:
    """Return the load of the last minute divided by the cores; 0 where it cannot be read."""
    load = _number(_text(root / "proc/loadavg").partition(" ")[0]) or 0.0
    return load / _cores(root)


def _all_of(value: Condition) -> tuple[Condition, ...]:
    return value.parts or (value,)


def _is_idle(s: Surroundings) -> bool:
    return load_per_core(s.root) - s.own_load / _cores(s.root) < IDLE_LOAD


def _is_on_mains(s: Surroundings) -> bool:
    supplies = list(_supplies(s.root))
    outside = [online for kind, online, _ in supplies if kind in SUPPLY_TYPES]
    if any(outside):
        return True
    batteries = [status for kind, _, status in supplies if kind == "Battery"]
    if not batteries:
        return not outside
    return not outside and all(status in {"Charging", "Full"} for status in batteries)


def _supplies(root: Path) -> Iterator[tuple[str, bool, str]]:
    for supply in sorted(root.glob("sys/class/power_supply/*")):
        if _text(supply / "scope") != "Device":  # the battery of a mouse says nothing of the board
            online = _text(supply / "online") not in {"", "0"}
            yield _text(supply / "type"), online, _text(supply / "status")


def _cores(root: Path) -> int:
    total = 0
    for part in _text(root / "sys/devices/system/cpu/online").split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            total += int(last or first) - int(first) + 1
    return max(1, total)


def _text(path: Path) -> str:
    try:
        return path.read_text("ascii", "replace").strip()
    except OSError:  # a reading that this board does not have
        return ""


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _one(item: object) -> Condition:
    match item:
        case str() if item in PLAIN:
            return PLAIN[item]
        case [str() as name, int() | float() as value] if name in TAKES_A_NUMBER:
            return TAKES_A_NUMBER[name](value)
    known = ", ".join([*PLAIN, *(f'["{name}", NUMBER]' for name in TAKES_A_NUMBER)])
    raise ConfigError(f"conditions: expected any of {known}, got {item!r}")


always = Condition("always", lambda _: True)
never = Condition("never", lambda _: False)
idle = Condition("idle", _is_idle)
on_mains = Condition("on_mains", _is_on_mains)

PLAIN = {"always": always, "never": never, "idle": idle, "on_mains": on_mains}
TAKES_A_NUMBER: dict[str, Callable[..., Condition]] = {
    "cooler_than": cooler_than,
    "examples": examples,
}
