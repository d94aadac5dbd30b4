# SPDX-License-Identifier: Apache-2.0
"""For tests and simulation: a clock that is moved by hand, a connection to a broker in memory."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable

from edge_sdk.transport.memory import MemoryBroker


class ManualClock:
    """A `Clock` that stands still until `advance`."""

    def __init__(self) -> None:
        self._now_s = 0.0
        self._moved = asyncio.Event()

    def monotonic(self) -> float:
        """Return the seconds it was advanced."""
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Move on, waking whoever waits."""
        self._now_s += seconds
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    async def wait(self, event: asyncio.Event, until_s: float = math.inf) -> bool:
        """Wait for `event`, at most until the clock is moved to `until_s`."""
        while not event.is_set() and self._now_s < until_s:
            waits = [asyncio.ensure_future(e.wait()) for e in (event, self._moved)]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
        return event.is_set()


class MemoryLink:
    """A `Link` to a `MemoryBroker`, for which a message is acknowledged once it is delivered."""

    def __init__(self, broker: MemoryBroker, client_id: str = "coordinator") -> None:
        self.broker = broker
        self.on_up: Callable[[], None] = lambda: None
        self._queue: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()
        self._transport = broker.transport(client_id)
        self._transport.start(lambda *message: self._queue.put_nowait(message), self._turned)

    async def messages(self) -> AsyncIterator[tuple[str, bytes, Callable[[], None]]]:
        """Yield what the broker delivers."""
        while True:
            topic, payload = await self._queue.get()
            yield topic, payload, lambda: None

    async def subscribe(self, *filters: str) -> None:
        """Subscribe at once."""
        self._transport.subscribe(*filters)

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Hand a message to the broker; it goes out at the next `pump`."""
        self._transport.publish(topic, payload, retain=retain)

    def close(self) -> None:
        """Disconnect; the session stays with the broker."""
        self._transport.close()

    def _turned(self, is_up: bool) -> None:
        if is_up:
            self.on_up()
