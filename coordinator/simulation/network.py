# SPDX-License-Identifier: Apache-2.0
"""A broker and the connections to it, in virtual time, with all that can go wrong on the way.

What crosses a connection takes time, in order as over TCP. A partition holds bytes back in one
direction or both; one that outlasts the keepalive ends the connection, at the broker's end and at
the client's, each in its own time. Beyond what TCP and QoS 1 allow, messages are also lost,
repeated, overtaken and damaged, for devices and coordinator promise to bear it.
"""

from __future__ import annotations

import functools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from coordinator.simulation.faults import Faults
from coordinator.simulation.loop import VirtualLoop
from coordinator.simulation.trace import Trace
from edge_sdk import topics

QUEUE_LIMIT = 1000
"""Messages kept for a session that is away, as mosquitto has it."""
KEEPALIVE_S = 12.0
REDIAL_S = 1.0, 6.0

CAPTURED = 512
"""Frames of which somebody keeps what may be played back."""
REPLAY_WITHIN_S = 30.0

_matches = functools.cache(topics.matches)


@functools.cache
def _start(pattern: str) -> str:
    """Return what comes before a filter's first wildcard."""
    return pattern.partition("+")[0].partition("#")[0]


@functools.lru_cache(4096)
def _starts(topic: str) -> tuple[str, ...]:
    """Return what may come before the first wildcard of a filter that matches a topic."""
    levels = topic.split("/")
    return *("/".join(levels[:i]) + "/" for i in range(1, len(levels))), topic


class Message(NamedTuple):
    """What is published."""

    topic: str
    payload: bytes


@dataclass(slots=True, eq=False)
class Session:
    """What the broker keeps of one client id, also while it is away."""

    filters: dict[str, None] = field(default_factory=dict)
    waiting: deque[Message] = field(default_factory=deque)
    under_way: dict[int, Message] = field(default_factory=dict)
    """Sent and not acknowledged: sent again on the next connection."""
    wire: Wire | None = None


class Broker:
    """Retained messages, sessions that outlive connections, wills."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self.retained: dict[str, bytes] = {}
        self.sessions: dict[str, Session] = {}
        self.is_up = True
        self._sent = 0
        self._index: dict[str, list[tuple[str, Session]]] | None = {}
        """Filters and who has them, by what comes before their first wildcard."""

    def stop(self) -> None:
        """Die: no will is published, and no client hears of it but by its connection."""
        self.is_up = False
        for session in self.sessions.values():
            if (wire := session.wire) is not None:
                self._part(session)
                wire.close()

    def start(self, rng: random.Random, forgets: float) -> None:
        """Come back, with each retained message and session forgotten by this chance."""
        if self.is_up:
            return
        self.is_up = True
        self.retained = {k: v for k, v in self.retained.items() if rng.random() >= forgets}
        self.sessions = {k: v for k, v in self.sessions.items() if rng.random() >= forgets}
        self._index = None

    def attach(self, wire: Wire) -> None:
        """Take a connection; an older one of the same client ends."""
        session = self.sessions.setdefault(wire.client.id, Session())
        if (old := session.wire) is not None:
            self.drop(old)
        session.wire = wire
        waiting, session.waiting = session.waiting, deque()
        for message in waiting:
            self._deliver(session, message)

    def drop(self, wire: Wire) -> None:
        """End a connection that was not closed politely: its will is published."""
        session = self.sessions.get(wire.client.id)
        if session is None or session.wire is not wire:
            return
        self._part(session)
        if wire.will is not None:
            self.publish(wire.will, retain=True)

    def _part(self, session: Session) -> None:
        session.wire = None
        session.waiting.extendleft(reversed(session.under_way.values()))
        session.under_way = {}

    def publish(self, message: Message, *, retain: bool) -> None:
        """Pass a message on to whoever subscribed."""
        self._network.overheard(message, retain)
        self.pass_on(message, retain=retain)

    def pass_on(self, message: Message, *, retain: bool) -> None:
        """Pass a message on that nobody listens in to."""
        if retain and message.payload:
            self.retained[message.topic] = message.payload
        for session in self._subscribers(message.topic):
            self._deliver(session, message)

    def _subscribers(self, topic: str) -> list[Session]:
        """Return who has a filter for a topic."""
        if self._index is None:
            self._index = {}
            for session in self.sessions.values():
                for pattern in session.filters:
                    self._index.setdefault(_start(pattern), []).append((pattern, session))
        found = dict[int, Session]()
        for start in _starts(topic):
            for pattern, session in self._index.get(start, ()):
                if _matches(pattern, topic):
                    found[id(session)] = session
        return list(found.values())

    def subscribe(self, wire: Wire, filters: tuple[str, ...]) -> None:
        """Add filters to a session, and send what is retained there."""
        session = self.sessions[wire.client.id]
        for pattern in filters:
            if pattern not in session.filters:
                session.filters[pattern] = None
                if self._index is not None:
                    self._index.setdefault(_start(pattern), []).append((pattern, session))
        wild = [pattern for pattern in filters if _start(pattern) != pattern]
        for topic, payload in list(self.retained.items()):
            if topic in filters or any(_matches(pattern, topic) for pattern in wild):
                self._deliver(session, Message(topic, payload))

    def unsubscribe(self, wire: Wire, filters: tuple[str, ...]) -> None:
        """Drop filters of a session."""
        held = self.sessions[wire.client.id].filters
        for pattern in held.keys() & filters:
            del held[pattern]
            self._index = None

    def acknowledge(self, wire: Wire, number: int) -> None:
        """Take note that a client has a message."""
        session = self.sessions.get(wire.client.id)
        if session is not None and session.wire is wire:
            session.under_way.pop(number, None)

    def _deliver(self, session: Session, message: Message) -> None:
        if (wire := session.wire) is None:
            if len(session.waiting) < QUEUE_LIMIT:
                session.waiting.append(message)
            return
        self._sent += 1
        number = self._sent
        session.under_way[number] = message
        self._network.cross(
            wire, message, lambda m: wire.client.take(m, number), is_up=False, lost=number
        )


class Client:
    """One end of the connections of one client id; `is_up` as the client believes."""

    def __init__(self, network: Network, name: str) -> None:
        self.network, self.id = network, name
        self.wire: Wire | None = None
        self.is_gone = False

    def connect(self) -> None:
        """Connect, and go on trying."""
        self.network.dial(self, self.network.delay_s())

    @property
    def is_up(self) -> bool:
        """Whether this end knows of a connection."""
        return self.wire is not None

    def end(self) -> None:
        """The process is gone: the broker finds out by its connection, and sends the will."""
        self.is_gone = True
        if (wire := self.wire) is not None:
            self.wire = None
            self.network.cut(wire, told_s=self.network.delay_s())

    def will(self) -> Message | None:
        """Return what the broker publishes at the end of a connection that begins."""
        return None

    def turned(self) -> None:
        """Called when the broker has us, or no longer."""

    def take(self, message: Message, number: int) -> None:
        """Called with each message; `acknowledge` the number."""


@dataclass(slots=True, eq=False)
class Wire:
    """One connection."""

    client: Client
    broker: Broker
    will: Message | None = None
    is_open: bool = True
    last_up_s: float = 0.0
    last_down_s: float = 0.0

    def close(self) -> None:
        """End it for the client; the broker has its own view."""
        self.is_open = False
        client = self.client
        if client.wire is self:
            client.wire = None
            if not client.is_gone:
                client.turned()
                client.network.redial(client)


@dataclass(slots=True)
class _Blocked:
    """Until when a client's bytes are held back."""

    up_s: float = 0.0
    down_s: float = 0.0


class Network:
    """All connections to one broker."""

    def __init__(self, loop: VirtualLoop, rng: random.Random, faults: Faults, trace: Trace) -> None:
        self.loop, self.rng, self.trace = loop, rng, trace
        self.faults = faults
        self.broker = Broker(self)
        self._blocked: dict[str, _Blocked] = {}
        self._captured: list[tuple[Message, bool]] = []

    def overheard(self, message: Message, retain: bool) -> None:
        """Keep what tells of presence and offers; now and then something of it is played back."""
        if not self.faults.replay or not message.topic.endswith(("/status", "/checkin", "/offer")):
            return
        if len(self._captured) >= CAPTURED:
            del self._captured[self.rng.randrange(CAPTURED)]
        self._captured.append((message, retain))
        if self.rng.random() < self.faults.replay:
            wait_s = self.rng.uniform(0.0, REPLAY_WITHIN_S)
            self.loop.call_later(wait_s, self._replay, *self.rng.choice(self._captured))

    def _replay(self, message: Message, retain: bool) -> None:
        if self.faults.replay and self.broker.is_up:
            self.trace.fault("replay", "broker", message.topic)
            self.broker.pass_on(message, retain=retain)

    def delay_s(self) -> float:
        """Return what a message takes."""
        draw = self.rng.random()
        return (
            0.005 + 0.05 * draw if draw < 0.9 else 0.05 + 8 * self.faults.latency_s * (draw - 0.9)
        )

    def cross(
        self,
        wire: Wire,
        message: Message,
        arrive: Callable[[Message], None],
        *,
        is_up: bool,
        lost: int = 0,
    ) -> None:
        """Carry a message over a connection, one way, whatever becomes of it there."""
        if not wire.is_open:
            return
        copies = 1
        faults = self.faults
        if faults.any_message and (draw := self.rng.random()) < faults.any_message:
            if (draw := draw - faults.lose) < 0:
                self.trace.fault("lose", wire.client.id, message.topic)
                if lost:
                    wire.broker.acknowledge(wire, lost)
                return
            if (draw := draw - faults.repeat) < 0:
                self.trace.fault("repeat", wire.client.id, message.topic)
                copies = 2
            elif draw - faults.corrupt < 0:
                self.trace.fault("corrupt", wire.client.id, message.topic)
                message = message._replace(payload=self._damaged(message.payload))
        for _ in range(copies):
            self._schedule(wire, message, arrive, is_up)

    def control(self, wire: Wire, arrive: Callable[[], None]) -> None:
        """Carry a packet to the broker that TCP alone decides about."""

        def arrived() -> None:
            if wire.is_open and self._has(wire):
                arrive()

        self.loop.call_at(self._arrival_s(wire, is_up=True), arrived)

    def answered(self, wire: Wire, arrive: Callable[[], None]) -> None:
        """Call when the broker's answer to what was just sent is here, if it ever is."""

        def arrived() -> None:
            if wire.is_open:
                arrive()

        at = self._arrival_s(wire, is_up=False) + self.delay_s()
        if (blocked := self._blocked.get(wire.client.id)) is not None:
            at = max(at, blocked.up_s + 0.02)
        self.loop.call_at(at, arrived)

    def _schedule(
        self, wire: Wire, message: Message, arrive: Callable[[Message], None], is_up: bool
    ) -> None:
        at = self._arrival_s(wire, is_up)

        def arrived() -> None:
            if wire.is_open and (not is_up or self._has(wire)):
                arrive(message)

        self.loop.call_at(at, arrived)

    def _has(self, wire: Wire) -> bool:
        session = self.broker.sessions.get(wire.client.id)
        return self.broker.is_up and session is not None and session.wire is wire

    def _arrival_s(self, wire: Wire, is_up: bool) -> float:
        at = self.loop.now_s + self.delay_s()
        if (blocked := self._blocked.get(wire.client.id)) is not None:
            at = max(at, (blocked.up_s if is_up else blocked.down_s) + 0.01)
        if self.faults.reorder and self.rng.random() < self.faults.reorder:
            return at + self.rng.uniform(0.0, 2.0)
        if is_up:
            at = wire.last_up_s = max(at, wire.last_up_s + 1e-6)
        else:
            at = wire.last_down_s = max(at, wire.last_down_s + 1e-6)
        return at

    def _damaged(self, payload: bytes) -> bytes:
        if not payload:
            return b"\x00"
        at = self.rng.randrange(len(payload))
        if self.rng.random() < 0.5:
            return payload[:at]
        return (
            payload[:at] + bytes([payload[at] ^ (1 << self.rng.randrange(8))]) + payload[at + 1 :]
        )

    # --- connections ----------------------------------------------------------------------------
    def dial(self, client: Client, wait_s: float) -> None:
        """Let a client connect, after a while."""
        self.loop.call_later(wait_s, self._connect, client)

    def redial(self, client: Client) -> None:
        """Let a client connect again, with a jitter."""
        self.dial(client, self.rng.uniform(*REDIAL_S))

    def _connect(self, client: Client) -> None:
        if client.is_gone or client.wire is not None:
            return
        blocked = self._blocked.get(client.id, _Blocked())
        now = self.loop.now_s
        if not self.broker.is_up or max(blocked.up_s, blocked.down_s) > now:
            self.redial(client)
            return
        wire = Wire(client, self.broker, client.will(), last_up_s=now, last_down_s=now)
        client.wire = wire
        self.trace.event("connect", client.id)
        self.broker.attach(wire)
        client.turned()

    def partition(self, client_id: str, *, up: bool, down: bool, seconds: float) -> None:
        """Hold a client's bytes back in one direction or both."""
        until_s = self.loop.now_s + seconds
        blocked = self._blocked.setdefault(client_id, _Blocked())
        if up:
            blocked.up_s = max(blocked.up_s, until_s)
        if down:
            blocked.down_s = max(blocked.down_s, until_s)
        session = self.broker.sessions.get(client_id)
        if session is None or (wire := session.wire) is None or seconds < KEEPALIVE_S:
            return
        # Without a ping the broker gives up after 1.5 keepalives, without an answer the client.
        self.loop.call_later(KEEPALIVE_S * 1.5, self.broker.drop, wire)
        self.loop.call_later(KEEPALIVE_S * self.rng.uniform(1.0, 1.6), wire.close)

    def cut(self, wire: Wire, *, told_s: float = 0.0) -> None:
        """Break a connection: the client knows now, the broker a little later."""
        wire.close()
        self.loop.call_later(told_s, self.broker.drop, wire)

    def heal(self) -> None:
        """End all partitions, and let every connection begin anew: what was lost is sent again."""
        self._blocked = {}
        for session in list(self.broker.sessions.values()):
            if (wire := session.wire) is not None:
                self.cut(wire)
