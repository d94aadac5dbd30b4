# SPDX-License-Identifier: Apache-2.0
"""Amounts of memory as people write them: ``24MiB``, ``8 KiB``, ``1.5GB``, or a number. Pure."""

from __future__ import annotations

import math
import re

from edge_sdk.errors import ConfigError

_UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
_UNITS |= {"kb": 1000, "mb": 1000**2, "gb": 1000**3}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE | re.ASCII)


def parse(size: str | int) -> int:
    """Return a number of bytes, at least 1.

    Raises: ConfigError for anything that is not a size.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        found = size
    else:
        match = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
        unit = _UNITS.get(match[2].lower()) if match else None
        found = math.floor(float(match[1]) * unit) if match and unit else 0
    if found < 1:
        raise ConfigError(
            f"expected a size such as '24MiB', '8KiB' or a number of bytes, got {size!r}"
        )
    return found


def spelled(size: float) -> str:
    """Write a number of bytes for people, to a tenth of its unit."""
    for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size:.0f} B"


def enough(size: int) -> str:
    """Write the least size of a tenth of its unit that holds `size` bytes, as `parse` takes it."""
    for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{math.ceil(10 * size / unit) / 10:.1f}{name}"
    return f"{size}B"
