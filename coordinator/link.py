# SPDX-License-Identifier: Apache-2.0
"""The connection to the broker, as the service sees it. `mqtt.py` is the real one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Protocol


class Link(Protocol):
    """Messages in, with an acknowledgement each; messages out."""

    on_up: Callable[[], None]
    """Called at every connection: what was sent to us in between may be lost."""

    def messages(self) -> AsyncIterator[tuple[str, bytes, Callable[[], None]]]:
        """Yield topic, payload, and what to call once the message is dealt with."""
        ...

    async def subscribe(self, *filters: str) -> None:
        """Subscribe, now and after every reconnect."""
        ...

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Publish at least once.

        Raises: TransportError when the broker is out of reach for too long.
        """
        ...
