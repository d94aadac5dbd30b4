# SPDX-License-Identifier: Apache-2.0
"""What a device is ready to spend: on one bundle, and in a day. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import cast

from edge_sdk.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that a bundle may take, and that learning may take of the board in a day.

    A bundle beyond is refused before it runs; a device at a limit of the day, too warm or on
    battery takes part in no round. The defaults suit a Raspberry Pi with 1 GiB, on mains.
    Raises: ConfigError for a limit that is not above 0.
    """

    max_bundle_bytes: int = 64 << 20
    """The bundle itself."""
    max_ram_bytes: int = 256 << 20
    """Training: weights, optimizer state and constants, counted here; and the peak it declares."""
    max_flops_step: int = 20_000_000_000
    """Floating-point operations to train on one example, as declared."""
    max_update_bytes: int = 8 << 20
    """One update, as declared."""
    max_nodes: int = 10_000
    """Nodes of one graph."""
    max_disk_bytes: int | None = None
    """All that the device keeps; None for what the disk has."""
    max_bytes_per_day: int | None = None
    """Sent and received together; None is no limit."""
    max_minutes_per_day: float | None = None
    """Of training; None is no limit."""
    max_celsius: float | None = None
    """Of the board's hottest sensor; None is no limit."""
    on_battery: bool = True
    """Whether it may train on battery."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value, kind = getattr(self, f.name), str(f.type)
            if value is None and kind.endswith("None"):
                continue
            says, holds = _KINDS[kind.removesuffix(" | None")]
            if not holds(value):
                raise ConfigError(f"{f.name}: expected {says}, got {value!r}")
        if self.max_celsius is not None and self.max_celsius >= 150:
            raise ConfigError(
                f"max_celsius: expected degrees Celsius below 150, got {self.max_celsius:g}"
            )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_positive(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < cast("float", value) < math.inf


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


_KINDS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "int": ("a whole number of at least 1", _is_count),
    "float": ("a number above 0", _is_positive),
    "bool": ("true or false", _is_flag),
}
