# SPDX-License-Identifier: Apache-2.0
"""The coordinator daemon and the workstation tools.

Names load on first use: importing `coordinator` loads neither numpy, paho nor sqlite.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coordinator import pacing as pacing
    from coordinator import strategy as strategies
    from coordinator.desk import RoundResult as RoundResult
    from coordinator.service import Coordinator as Coordinator
    from coordinator.task import Task as Task

_FROM = {
    "Coordinator": "service",
    "RoundResult": "desk",
    "Task": "task",
}

__all__ = [
    "Coordinator",
    "RoundResult",
    "Task",
    "pacing",
    "strategies",
]


def __getattr__(name: str) -> Any:
    if name == "strategies":
        return import_module("coordinator.strategy")
    if name == "pacing":
        return import_module("coordinator.pacing")
    if name in _FROM:
        return getattr(import_module(f"coordinator.{_FROM[name]}"), name)
    raise AttributeError(f"module 'coordinator' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
