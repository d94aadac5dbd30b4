# SPDX-License-Identifier: Apache-2.0
"""The port through which a device talks to a broker; `mqtt.py` and `memory.py` fill it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


@dataclass(slots=True)
class Counters:
    """PUBLISH payloads since the start: what a metered link is asked to carry, retries included."""

    bytes_up: int = 0
    bytes_down: int = 0
    messages_up: int = 0
    messages_down: int = 0
    dropped: int = 0
    """Messages not sent: there was no connection, or the queue was full."""


class Transport(Protocol):
    """One connection to one broker, kept up until `close`; QoS 1 in both directions.

    QoS 1 is transport, never durability: a broker may lose what it acknowledged, and what is not
    acknowledged when the connection ends is dropped. Whoever needs more waits for a receipt and
    sends again. Only the latest payload of each retained topic outlives a reconnect.
    """

    counters: Counters

    def start(
        self, on_message: Callable[[str, bytes], None], on_state: Callable[[bool], None]
    ) -> None:
        """Connect and stay connected. The callbacks run in the transport's thread: be quick."""
        ...

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Queue a message; never blocks, and drops it where `Counters.dropped` says."""
        ...

    def subscribe(self, *filters: str) -> None:
        """Add topic filters; they are asked for again at every reconnect."""
        ...

    def unsubscribe(self, *filters: str) -> None:
        """Drop topic filters."""
        ...

    def close(self) -> None:
        """Send what is queued (for two seconds at most), then the will, and disconnect."""
        ...
