# SPDX-License-Identifier: Apache-2.0
"""What a device is ready to spend on a bundle. Pure."""

from __future__ import annotations

from dataclasses import dataclass, fields

from edge_sdk.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that a bundle may take; a bundle beyond is refused before it runs.

    The defaults suit a Raspberry Pi with 1 GiB.
    Raises: ConfigError for a limit below 1.
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

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{f.name}: expected a whole number of at least 1, got {value!r}")
