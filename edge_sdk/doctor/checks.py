# SPDX-License-Identifier: Apache-2.0
"""Every check in its order, and the examination that goes through them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from edge_sdk.doctor import connection, hardware, software, standing
from edge_sdk.doctor.board import Board
from edge_sdk.doctor.finding import Amiss, Finding
from edge_sdk.errors import FedgeError

_FAILED, _CONFIG, _BROKER, _MISSING = 1, 3, 4, 6  # exit codes

Check = Callable[[Board], str]
"""Says what it found where all is well. Raises: Amiss, or what reading the board raises."""

CHECKS: dict[str, tuple[Check, int]] = {
    "configuration": (software.configuration, _CONFIG),
    "packages": (software.packages, _MISSING),
    "engine": (software.engine, _MISSING),
    "telemetry": (software.telemetry, _FAILED),
    "memory": (hardware.memory, _FAILED),
    "clock": (hardware.clock, _FAILED),
    "disk": (hardware.disk, _FAILED),
    "temperature": (hardware.temperature, _FAILED),
    "throttling": (hardware.throttling, _FAILED),
    "state": (standing.state, _FAILED),
    "broker": (connection.broker, _BROKER),
    "certificate": (connection.certificate, _BROKER),
    "conditions": (standing.conditions, _FAILED),
    "limits": (standing.limits, _FAILED),
}
"""Each check by its name, with the exit code of its failure."""


def examine(board: Board, checks: Mapping[str, tuple[Check, int]] = CHECKS) -> Iterator[Finding]:
    """Check everything, or these alone, in the order in which a person would mend it."""
    for name, (check, code) in checks.items():
        try:
            yield Finding(name, "ok", check(board))
        except Amiss as found:
            yield Finding(name, found.state, found.says, found.do, code)
        except (FedgeError, OSError, ImportError, ValueError, KeyError) as error:
            says = " ".join(str(error).split())
            do = re.split(r"[:;] ", says)[-1] if re.search(r"[:;] ", says) else ""
            yield Finding(name, "fail", says, do, code)
