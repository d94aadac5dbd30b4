# SPDX-License-Identifier: Apache-2.0
"""fedge on the device: `Device`, `Bundle`, `Trainer`, `codec`, `when`.

Names are loaded when they are first used: importing edge_sdk loads no engine and no network.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edge_sdk import codec as codec
    from edge_sdk import conditions as when
    from edge_sdk.bundle import Bundle as Bundle
    from edge_sdk.device import Device as Device
    from edge_sdk.trainer import Trainer as Trainer

__all__ = ["Bundle", "Device", "Trainer", "codec", "when"]
__version__ = "0.1.0"

_WHERE = {
    "Bundle": "edge_sdk.bundle:Bundle",
    "Device": "edge_sdk.device:Device",
    "Trainer": "edge_sdk.trainer:Trainer",
    "codec": "edge_sdk.codec",
    "when": "edge_sdk.conditions",
}


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module 'edge_sdk' has no attribute {name!r}")
    from importlib import import_module

    where, _, attribute = _WHERE[name].partition(":")
    module = import_module(where)
    found: object = getattr(module, attribute) if attribute else module
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
