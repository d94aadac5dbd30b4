# SPDX-License-Identifier: Apache-2.0
"""The two ends of the simulated network: a device's transport and the coordinator's link."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import AsyncIterator, Callable

from coordinator.simulation.network import Client, Message, Network
from coordinator.simulation.process import Killed, Process
from coordinator.simulation.watch import Watch
from edge_sdk.transport import Counters


class Radio(Client):
    """A `Transport`: QoS 1 that forgets what was not sent when the connection ends."""

    def __init__(
        self,
        network: Network,
        process: Process,
        name: str,
        will: Callable[[], tuple[str, bytes]],
        max_packet: int,
    ) -> None:
        super().__init__(network, name)
        self._will = will
        self.counters = Counters()
        self.max_packet = max_packet
        self._process = process
        self._filters: dict[str, None] = {}
        self._gone: dict[str, None] = {}
        self._kept: dict[str, bytes] = {}
        self._on_message: Callable[[str, bytes], None] = lambda _topic, _payload: None
        self._on_state: Callable[[bool], None] = lambda _is_up: None

    def start(
        self, on_message: Callable[[str, bytes], None], on_state: Callable[[bool], None]
    ) -> None:
        """Connect and stay connected."""
        self._on_message, self._on_state = on_message, on_state
        self.connect()

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Send, or drop."""
        self._process.step()
        if retain:
            self._kept[topic] = payload
        if self.wire is None:
            self.counters.dropped += not retain
            return
        self.counters.messages_up += 1
        self.counters.bytes_up += len(payload)
        self._send(Message(topic, payload), retain=retain)

    def subscribe(self, *filters: str) -> None:
        """Add filters."""
        self._process.step()
        self._filters.update(dict.fromkeys(filters))
        if (wire := self.wire) is not None:
            self.network.control(wire, lambda: self.network.broker.subscribe(wire, filters))

    def unsubscribe(self, *filters: str) -> None:
        """Drop filters."""
        self._process.step()
        for pattern in filters:
            self._filters.pop(pattern, None)
            self._gone[pattern] = None
        if (wire := self.wire) is not None:
            self.network.control(wire, lambda: self.network.broker.unsubscribe(wire, filters))

    def close(self) -> None:
        """Say goodbye: the will, then the end of the connection."""
        if self.wire is not None and self.wire.will is not None:
            self.publish(*self.wire.will, retain=True)

    def will(self) -> Message:
        """Return the device's will for a connection that begins."""
        return Message(*self._will())

    def turned(self) -> None:
        """Do again what a new connection needs, and tell the device."""
        wire = self.wire
        if wire is not None:
            filters = tuple(self._filters)
            gone = tuple(pattern for pattern in self._gone if pattern not in self._filters)
            self._gone = {}
            broker = self.network.broker
            self.network.control(wire, lambda: broker.subscribe(wire, filters))
            if gone:
                self.network.control(wire, lambda: broker.unsubscribe(wire, gone))
            for topic, payload in self._kept.items():
                self._send(Message(topic, payload), retain=True)
        self._on_state(wire is not None)

    def take(self, message: Message, number: int) -> None:
        """Hand a message to the device."""
        if (wire := self.wire) is None or self.is_gone:
            return
        self.network.broker.acknowledge(wire, number)
        self.network.trace.event("got", self.id, message.topic, message.payload[-16:])
        self.counters.messages_down += 1
        self.counters.bytes_down += len(message.payload)
        self._on_message(message.topic, message.payload)

    def _send(self, message: Message, *, retain: bool) -> None:
        def arrive(came: Message) -> None:
            if retain and self._kept.get(message.topic) is message.payload:
                del self._kept[message.topic]
            self.network.broker.publish(came, retain=retain)

        if self.wire is not None:
            self.network.cross(self.wire, message, arrive, is_up=True)


class Trunk(Client):
    """A `Link`: what is published is sent until the broker has it, and retained things again."""

    def __init__(self, network: Network, process: Process, watch: Watch) -> None:
        super().__init__(network, "coordinator")
        self.on_up: Callable[[], None] = lambda: None
        self._process, self._said, self._excuse = process, watch.said, watch.excuse
        self._context = contextvars.copy_context()
        self._filters: dict[str, None] = {}
        self._retained: dict[str, bytes] = {}
        self._pending: dict[int, tuple[Message, bool, asyncio.Future[None]]] = {}
        self._asked: list[asyncio.Future[None]] = []
        self._count = 0
        self._inbox: asyncio.Queue[tuple[Message, Callable[[], None]]] = asyncio.Queue()

    async def messages(self) -> AsyncIterator[tuple[str, bytes, Callable[[], None]]]:
        """Yield what arrives."""
        while True:
            message, ack = await self._inbox.get()
            self._process.check()
            yield message.topic, message.payload, ack

    async def subscribe(self, *filters: str) -> None:
        """Subscribe, and wait until the broker has it, if there is one."""
        self._process.step()
        self._filters.update(dict.fromkeys(filters))
        if (wire := self.wire) is None:
            return
        self.network.control(wire, lambda: self.network.broker.subscribe(wire, filters))
        done = self._process.loop.create_future()
        self._asked.append(done)
        self.network.answered(wire, lambda: _settle(done))
        await done
        self._process.check()

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Send until it is acknowledged, over however many connections."""
        self._process.step()
        self._said(topic, payload)
        if retain:
            self._retained[topic] = payload
        self._count += 1
        number, done = self._count, self._process.loop.create_future()
        self._pending[number] = Message(topic, payload), retain, done
        self._send(number)
        try:
            await done
        finally:
            self._pending.pop(number, None)
        self._process.check()

    def turned(self) -> None:
        """Make a broker whole that may have lost everything."""
        for asked in self._asked:  # it is asked for again below
            _settle(asked)
        self._asked = []
        if (wire := self.wire) is None:
            return
        self._excuse()
        filters = tuple(self._filters)
        self.network.control(wire, lambda: self.network.broker.subscribe(wire, filters))
        waiting = {(m.topic, m.payload) for m, retain, _ in self._pending.values() if retain}
        for topic, payload in self._retained.items():
            if (topic, payload) not in waiting:
                self._cross(Message(topic, payload), retain=True)
        for number in self._pending:
            self._send(number)
        with contextlib.suppress(Killed):
            self._process.check()
            self._context.run(self.on_up)  # what it begins is this process's

    def take(self, message: Message, number: int) -> None:
        """Put a message into the inbox; it is acknowledged when it has been dealt with."""
        wire = self.wire
        if wire is None or self.is_gone:
            return
        self.network.trace.event("got", self.id, message.topic, message.payload[-16:])

        def ack() -> None:
            if self._process.is_alive:
                self.network.broker.acknowledge(wire, number)

        self._inbox.put_nowait((message, ack))

    def _send(self, number: int) -> None:
        if (wire := self.wire) is None:
            return
        message, retain, done = self._pending[number]
        self._cross(message, retain=retain)
        self.network.answered(wire, lambda: _settle(done))

    def _cross(self, message: Message, *, retain: bool) -> None:
        if self.wire is not None:
            self.network.cross(
                self.wire,
                message,
                lambda came: self.network.broker.publish(came, retain=retain),
                is_up=True,
            )


def _settle(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)
