# SPDX-License-Identifier: Apache-2.0
"""What is looked at: a device's configuration, its state folder, and the machine below a root."""

from __future__ import annotations

import datetime as dt
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_sdk.device_config import DeviceConfig

if TYPE_CHECKING:
    from edge_sdk.bundle import Bundle


@dataclass(frozen=True, slots=True)
class Board:
    """Where a device is looked at: its configuration, its state folder, and the machine."""

    config: DeviceConfig
    state: Path
    root: Path = Path("/")
    now_s: float = field(default_factory=lambda: dt.datetime.now(dt.UTC).timestamp())
    home: Path = field(default_factory=Path.home)
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    def status(self) -> dict[str, Any]:
        """Return what the device last wrote of itself; nothing before its first start."""
        try:
            found = json.loads((self.state / "status.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def bundle(self) -> Bundle | None:
        """Return the bundle in use, else the one that the configuration names."""
        from edge_sdk.bundle import Bundle

        digest = self.status().get("bundle")
        stored = self.state / "bundles" / f"{digest}.fedge"
        if digest and stored.exists():
            return Bundle.load(stored)
        return Bundle.load(self.config.bundle) if self.config.bundle else None
