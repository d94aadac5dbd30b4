# SPDX-License-Identifier: Apache-2.0
"""What a device's agent is told once, and what it says of itself to the coordinator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edge_sdk import messages, topics
from edge_sdk.bounds import Tag
from edge_sdk.conditions import Condition, always
from edge_sdk.limits import Limits
from edge_sdk.signing import Identity
from edge_sdk.training import CHECKPOINT_S


@dataclass(frozen=True, slots=True)
class Settings:
    """What an agent is told once."""

    task: str
    name: str
    sdk: str
    boot: int
    conditions: Condition = always
    min_examples: int = 1
    threads: int = 1
    engine: str = "auto"
    root: Path = Path("/")
    checkpoint_s: float = CHECKPOINT_S
    limits: Limits = Limits()  # noqa: RUF009 - frozen, as the value is
    tags: Mapping[str, Tag] = field(default_factory=dict)
    """What the device says of itself."""
    start: int = 0
    """Drawn at random for this start; 0 where none was."""
    pinned: bytes | None = None
    """The one coordinator key to trust; without it, the first one seen."""


def hello(key: Identity, settings: Settings, *, online: bool, connection: int = 0) -> bytes:
    """Return a device's signed status message."""
    status = messages.Status(
        device=key.id,
        key=key.public,
        online=online,
        boot=settings.boot,
        name=settings.name or key.id,
        sdk=settings.sdk,
        tags=dict(settings.tags) or None,
        start=settings.start,
        connection=connection,
    )
    return messages.encode(status, key, topics.status(key.id))
