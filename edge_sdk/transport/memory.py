# SPDX-License-Identifier: Apache-2.0
"""A broker in one process for tests and simulation: the semantics of MQTT, without time or threads.

Nothing happens until `pump`: then messages are delivered one by one, in the order in which they
were queued, from the caller's thread. Two runs that make the same calls see the same messages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from edge_sdk.topics import matches
from edge_sdk.transport import Counters

QUEUE_LIMIT = 1000
"""Messages kept for a client that is away; the newest are lost beyond it, as mosquitto does."""

_Task = Callable[[], None]
Will = tuple[str, bytes] | Callable[[], tuple[str, bytes]]
"""What is published when a connection ends, or what makes it as one begins."""


@dataclass(slots=True)
class _Session:
    """What the broker keeps for one client id, also while it is away."""

    filters: dict[str, None] = field(default_factory=dict)
    waiting: deque[tuple[str, bytes]] = field(default_factory=deque)
    transport: MemoryTransport | None = None


class MemoryBroker:
    """Retained messages, wills, wildcards, sessions that outlive a connection.

    `fate(client_id, topic, payload)` says how many copies of a message reach a client: 1 if it is
    not given, 0 loses it, 2 doubles it.
    """

    def __init__(self, fate: Callable[[str, str, bytes], int] | None = None) -> None:
        self.retained: dict[str, bytes] = {}
        self.is_up = True
        self._fate = fate
        self._sessions: dict[str, _Session] = {}
        self._members: list[MemoryTransport] = []
        self._tasks: deque[_Task] = deque()

    def transport(self, client_id: str, will: Will | None = None) -> MemoryTransport:
        """Make a client's transport; connect it with `start`."""
        member = MemoryTransport(self, client_id, will)
        self._members.append(member)
        return member

    def pump(self, limit: int = 1_000_000) -> int:
        """Deliver what is queued, and what that causes, until all is quiet; return how much it was.

        Raises: RuntimeError after `limit` deliveries: the clients are talking in a circle.
        """
        done = 0
        while self._tasks:
            if done >= limit:
                raise RuntimeError(f"not quiet after {limit} deliveries: a loop between clients?")
            self._tasks.popleft()()
            done += 1
        return done

    def cut(self, client_id: str) -> None:
        """Break one client's connection: its will is published, its session kept."""
        session = self._sessions.get(client_id)
        if session is not None and session.transport is not None:
            self.part(session.transport, session.transport.will)

    def restore(self, client_id: str) -> None:
        """Let a client that was cut off connect again."""
        for member in self._members:
            if member.client_id == client_id and member.is_started and not member.is_up:
                self.attach(member)

    def stop(self, *, forget: bool = False) -> None:
        """Stop the broker: every connection ends, no will is sent; `forget` loses what it held."""
        self.is_up = False
        self._tasks.clear()
        for session in self._sessions.values():
            if session.transport is not None:
                self.part(session.transport, None)
        if forget:
            self.retained.clear()
            self._sessions.clear()

    def resume(self) -> None:
        """Start the broker again; every client that has not been closed connects."""
        self.is_up = True
        for member in self._members:
            if member.is_started and not member.is_up:
                self.attach(member)

    # --- what a transport asks -----------------------------------------------------------------
    def attach(self, member: MemoryTransport) -> None:
        """Connect a client, or not if the broker is down; an older connection of its id ends."""
        if not self.is_up:
            return
        session = self._sessions.setdefault(member.client_id, _Session())
        if session.transport is not None and session.transport is not member:
            self.part(session.transport, session.transport.will)  # taken over
        member.begin()
        session.transport, member.is_up = member, True
        self._tasks.append(lambda: member.tell(is_up=True))
        waiting, session.waiting = session.waiting, deque()
        for topic, payload in waiting:
            self._queue(session, topic, payload)
        self.subscribe(member, list(member.filters))

    def part(self, member: MemoryTransport, will: tuple[str, bytes] | None) -> None:
        """End a client's connection, publishing `will` if there is one."""
        session = self._sessions[member.client_id]
        session.transport, member.is_up = None, False
        self._tasks.append(lambda: member.tell(is_up=False))
        if will is not None:
            self.publish(*will, retain=True)

    def publish(self, topic: str, payload: bytes, *, retain: bool) -> None:
        """Pass a message on to whoever subscribed, and retain it if asked."""
        if retain and payload:
            self.retained[topic] = payload
        elif retain:
            self.retained.pop(topic, None)
        for session in list(self._sessions.values()):
            if any(matches(pattern, topic) for pattern in session.filters):
                self._queue(session, topic, payload)

    def _queue(self, session: _Session, topic: str, payload: bytes) -> None:
        if session.transport is not None:
            self._tasks.append(lambda: self._deliver(session, topic, payload))
        elif len(session.waiting) < QUEUE_LIMIT:
            session.waiting.append((topic, payload))

    def _deliver(self, session: _Session, topic: str, payload: bytes) -> None:
        member = session.transport
        if member is None:  # it left while this was on the way
            self._queue(session, topic, payload)
            return
        copies = 1 if self._fate is None else self._fate(member.client_id, topic, payload)
        for _ in range(copies):
            member.take(topic, payload)

    def subscribe(self, member: MemoryTransport, filters: list[str]) -> None:
        """Add filters to a client's session and send what is retained there."""
        session = self._sessions[member.client_id]
        session.filters.update(dict.fromkeys(filters))
        for topic, payload in list(self.retained.items()):
            if any(matches(pattern, topic) for pattern in filters):
                self._queue(session, topic, payload)

    def unsubscribe(self, client_id: str, filters: list[str]) -> None:
        """Drop filters of a client's session."""
        for pattern in filters:
            self._sessions[client_id].filters.pop(pattern, None)


class MemoryTransport:
    """A `Transport` on a `MemoryBroker`.

    As over MQTT, what is published offline is dropped, but for the latest of each retained topic.
    """

    def __init__(self, broker: MemoryBroker, client_id: str, will: Will | None) -> None:
        self.client_id = client_id
        self.will = None if callable(will) else will
        self._make_will = will if callable(will) else None
        self.counters = Counters()
        self.filters: dict[str, None] = {}
        self.is_started = self.is_up = False
        self._broker = broker
        self._kept: dict[str, bytes] = {}
        self._gone: tuple[str, ...] = ()  # unsubscribed, perhaps behind the session's back
        self._on_message: Callable[[str, bytes], None] = lambda _topic, _payload: None
        self._on_state: Callable[[bool], None] = lambda _is_up: None

    def start(
        self, on_message: Callable[[str, bytes], None], on_state: Callable[[bool], None]
    ) -> None:
        """Connect; the callbacks run inside `MemoryBroker.pump`."""
        self._on_message, self._on_state = on_message, on_state
        self.is_started = True
        self._broker.attach(self)

    def begin(self) -> None:
        """Make the will of the connection that begins."""
        if self._make_will is not None:
            self.will = self._make_will()

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Hand a message to the broker, or drop it (counted) when offline."""
        if not self.is_up:
            if retain:
                self._kept[topic] = payload
            self.counters.dropped += not retain
            return
        self.counters.messages_up += 1
        self.counters.bytes_up += len(payload)
        self._broker.publish(topic, payload, retain=retain)

    def subscribe(self, *filters: str) -> None:
        """Add topic filters, now and at every reconnect."""
        self.filters.update(dict.fromkeys(filters))
        if self.is_up:
            self._broker.subscribe(self, list(filters))

    def unsubscribe(self, *filters: str) -> None:
        """Drop topic filters."""
        for pattern in filters:
            self.filters.pop(pattern, None)
        self._gone += filters
        if self.is_up:
            self._broker.unsubscribe(self.client_id, list(filters))

    def close(self) -> None:
        """Publish the will and disconnect; the session stays with the broker."""
        self.is_started = False
        if self.is_up:
            if self.will is not None:
                self.publish(*self.will, retain=True)
            self._on_state = lambda _is_up: None
            self._broker.part(self, None)

    def tell(self, *, is_up: bool) -> None:
        """Tell the application that it is connected, or no longer."""
        if is_up and self.is_up:
            gone = [pattern for pattern in self._gone if pattern not in self.filters]
            self._broker.unsubscribe(self.client_id, gone)
            self._gone = ()
            kept, self._kept = self._kept, {}
            for topic, payload in kept.items():
                self.publish(topic, payload, retain=True)
        self._on_state(is_up)

    def take(self, topic: str, payload: bytes) -> None:
        """Deliver a message to the application."""
        self.counters.messages_down += 1
        self.counters.bytes_down += len(payload)
        self._on_message(topic, payload)
