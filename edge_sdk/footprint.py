# SPDX-License-Identifier: Apache-2.0
"""What this process costs in memory, as the kernel counts it."""

from __future__ import annotations

import resource
from pathlib import Path


def peak_kib(status: Path = Path("/proc/self/status")) -> int:
    """Return the most memory this process ever had resident (VmHWM), KiB."""
    for line in status.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
