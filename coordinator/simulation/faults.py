# SPDX-License-Identifier: Apache-2.0
"""What goes wrong in a run, and how often: values, drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass, replace

from edge_sdk.errors import ConfigError

CLASSES = (
    "network",
    "partition",
    "broker",
    "device",
    "coordinator",
    "disk",
    "clock",
    "leave",
    "replay",
)
"""Kinds of faults that can be left out of a run."""

NEVER_S = 1e12


@dataclass(frozen=True, slots=True)
class Faults:
    """Shares of messages, mean seconds between faults, chances."""

    latency_s: float = 0.1
    lose: float = 0.0
    repeat: float = 0.0
    corrupt: float = 0.0
    reorder: float = 0.0
    partition_every_s: float = NEVER_S
    """Of the whole fleet, the coordinator included."""
    broker_every_s: float = NEVER_S
    broker_forgets: float = 0.0
    device_every_s: float = NEVER_S
    """Of the whole fleet."""
    coordinator_every_s: float = NEVER_S
    doomed: float = 0.0
    """Of a life that begins: the chance that it ends at some step of its own."""
    power: float = 0.0
    """Of a device's death: the chance that its page cache is lost as well."""
    disk_every_s: float = NEVER_S
    """Of the whole fleet and the coordinator: a disk is full, or slow, for a while."""
    unready_every_s: float = NEVER_S
    """Of the whole fleet: a device's conditions lapse for a while."""
    clocks: bool = False
    leave: float = 0.0
    """Share of the devices that go for good."""
    replay: float = 0.0
    """Of what is said of presence and offers: the chance that something older is played back."""

    @property
    def any_message(self) -> float:
        """Share of messages that something happens to."""
        return self.lose + self.repeat + self.corrupt


def classes_of(text: str) -> tuple[str, ...]:
    """Read "all", "none", or names with commas between them."""
    if text in ("all", "none"):
        return CLASSES if text == "all" else ()
    return tuple(text.split(","))


def draw(rng: random.Random, classes: Collection[str] = CLASSES) -> Faults:
    """Draw how bad a run will be, in the classes named.

    Raises: ConfigError for a class that there is not.
    """
    for name in classes:
        if name not in CLASSES:
            raise ConfigError(f"expected faults among {', '.join(CLASSES)}, got {name!r}")

    def share(most: float) -> float:
        return most * rng.random() ** 3

    def every_s(often: float, seldom: float) -> float:
        return float(often * (seldom / often) ** rng.random())

    full = Faults(
        latency_s=rng.choice((0.05, 0.3, 2.0)),
        lose=share(0.1),
        repeat=share(0.2),
        corrupt=share(0.05),
        reorder=share(0.3),
        partition_every_s=every_s(4, 60),
        broker_every_s=every_s(25, 300),
        broker_forgets=rng.choice((0.0, 0.3, 1.0)),
        device_every_s=every_s(2, 40),
        coordinator_every_s=every_s(12, 150),
        doomed=share(0.9),
        power=rng.random(),
        disk_every_s=every_s(6, 100),
        unready_every_s=every_s(5, 60),
        clocks=True,
        leave=share(0.25),
        replay=share(0.3),
    )
    return _only(full, classes)


def _only(full: Faults, classes: Collection[str]) -> Faults:
    none = Faults()
    kept = full
    for name, fields in _OF.items():
        if name not in classes:
            kept = replace(kept, **{field: getattr(none, field) for field in fields})
    if "device" not in classes and "coordinator" not in classes:
        kept = replace(kept, doomed=0.0)
    return kept


_OF = {
    "network": ("latency_s", "lose", "repeat", "corrupt", "reorder"),
    "partition": ("partition_every_s",),
    "broker": ("broker_every_s", "broker_forgets"),
    "device": ("device_every_s", "power", "unready_every_s"),
    "coordinator": ("coordinator_every_s",),
    "disk": ("disk_every_s",),
    "clock": ("clocks",),
    "leave": ("leave",),
    "replay": ("replay",),
}
