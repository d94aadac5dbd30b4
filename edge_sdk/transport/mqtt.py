# SPDX-License-Identifier: Apache-2.0
"""The transport over a real broker: one thread, one connection, a bounded queue.

Always `clean_start=False`: Debian 12's mosquitto forgets, over a restart, any session that ever
began clean. Speaks MQTT 5 where the broker has it, else 3.1.1.
"""

from __future__ import annotations

import contextlib
import logging
import random
import selectors
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from edge_sdk.errors import TransportError
from edge_sdk.transport import Counters
from edge_sdk.transport.endpoint import Endpoint
from edge_sdk.transport.link import PACKET_ROOM, Hello, Link, Sink
from edge_sdk.transport.packet_size import PacketSize
from edge_sdk.transport.redial import LinkError, Redial

log = logging.getLogger(__name__)

ANSWER_S = 5.0  # for a CONNACK
GOODBYE_S = 2.0  # for what is queued at `close`
_MAX_PACKET = 120_000


class _Sent(NamedTuple):
    topic: str
    payload: bytes
    retain: bool
    at: float


class Mqtt:
    """A `Transport` over MQTT: QoS 1 both ways, TLS, a will, reconnects by itself.

    Args beyond the obvious: `will` is retained, or made anew for each connection where it is a
    function, and `close` publishes it too, so that a device
    that leaves politely is gone as surely as one that vanishes. `session_s` is how long the broker
    keeps what comes for us while we are away. `window` messages are under way at once, at most
    `queue_bytes` wait behind them; what is over that is dropped and counted.
    """

    def __init__(
        self,
        url: str,
        client_id: str,
        *,
        ca_file: str | Path | None = None,
        username: str | None = None,
        password: str | None = None,
        password_file: str | Path | None = None,
        will: tuple[str, bytes] | Callable[[], tuple[str, bytes]] | None = None,
        keepalive_s: int = 30,
        session_s: int = 86_400,
        window: int = 4,
        queue_bytes: int = 72 * 2**20,
        backoff_s: tuple[float, float] = (1.0, 60.0),
        rng: random.Random | None = None,
    ) -> None:
        self.endpoint = Endpoint.parse(
            url,
            ca_file=ca_file,
            username=username,
            password=password,
            password_file=password_file,
        )
        self.counters = Counters()
        self.error: TransportError | None = None
        """Why there is no connection now, in one line; None when there is one."""
        self._size = PacketSize(_MAX_PACKET, keepalive_s)
        self._make_will = will if callable(will) else None
        first = None if callable(will) else will
        self._hello = Hello(client_id, first, keepalive_s, session_s)
        self._window, self._queue_bytes = window, queue_bytes
        jitter = rng or random.Random()  # noqa: S311 - spreads reconnects, guards nothing
        self._redial = Redial(*backoff_s, jitter, self.endpoint.version)
        self._filters: dict[str, None] = {}  # in the order they came
        self._retained: dict[str, bytes] = {}  # not acknowledged yet, the latest of each topic
        self._queue: deque[tuple[str, bytes, bool]] = deque()
        self._queued_bytes = 0
        self._open: Counter[str] = Counter()  # topics of what is queued or under way
        self._wishes: deque[tuple[bool, list[str]]] = deque()  # (subscribe?, filters)
        self._under_way: dict[int, _Sent] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._link: Link | None = None
        self._is_told_up = False
        self._refused = ""
        self._doorbell: socket.socket | None = None  # wakes the thread
        self._on_message: Callable[[str, bytes], None] = lambda _topic, _payload: None
        self._on_state: Callable[[bool], None] = lambda _is_up: None

    # --- the port, called from any thread ------------------------------------------------------
    def start(
        self, on_message: Callable[[str, bytes], None], on_state: Callable[[bool], None]
    ) -> None:
        """Begin; the broker may come later. The callbacks run in this transport's thread."""
        self._on_message, self._on_state = on_message, on_state
        heard, self._doorbell = socket.socketpair()
        heard.settimeout(0)
        self._doorbell.settimeout(0)
        name = f"fedge-mqtt-{self._hello.client_id}"
        self._thread = threading.Thread(target=self._run, args=(heard,), name=name, daemon=True)
        self._thread.start()

    @property
    def is_up(self) -> bool:
        """Whether the broker has us now."""
        link = self._link
        return link is not None and link.is_up

    @property
    def max_packet(self) -> int:
        """The largest payload to publish now; less where the broker or a slow link asks for it."""
        return max(self._size.limit, self._size.carried)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Queue a message, or drop it (counted) when offline or over the queue's limit.

        Of a retained topic the latest payload is kept until the broker has it.
        """
        with self._lock:
            if retain:
                self._retained[topic] = payload
            if not self.is_up or self._queued_bytes + len(payload) > self._queue_bytes:
                self.counters.dropped += not retain
                return
            self._queue.append((topic, payload, retain))
            self._queued_bytes += len(payload)
            self._open[topic] += 1
        self._ring()

    def is_sending(self, topic: str) -> bool:
        """Whether a message on `topic` waits here, or for the broker's acknowledgement."""
        with self._lock:
            return topic in self._open

    def subscribe(self, *filters: str) -> None:
        """Add topic filters, now and at every reconnect."""
        with self._lock:
            self._filters.update(dict.fromkeys(filters))
            self._wishes.append((True, list(filters)))
        self._ring()

    def unsubscribe(self, *filters: str) -> None:
        """Drop topic filters."""
        with self._lock:
            for one in filters:
                self._filters.pop(one, None)
            self._wishes.append((False, list(filters)))
        self._ring()

    def close(self) -> None:
        """Send what is queued, the will, and DISCONNECT; then stop the thread."""
        self._closing.set()
        self._ring()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(2 * ANSWER_S + GOODBYE_S)

    def probe(self) -> None:
        """Connect once, beside any running connection, and disconnect.

        Raises: TransportError, which says what to do.
        """
        hello = Hello(f"{self._hello.client_id}-probe", clean=True)
        for version in (self._redial.version, 4):
            try:
                return self._knock(hello, version)
            except LinkError as error:
                if error.cause not in {"version", "silent"} or version == 4:
                    raise
        return None

    # --- the thread ----------------------------------------------------------------------------
    def _run(self, heard: socket.socket) -> None:
        with heard:
            while not self._closing.is_set():
                error = self._connection(heard)
                if error is not None:
                    self._closing.wait(self._down(error))
        if self._doorbell is not None:
            self._doorbell.close()

    def _connection(self, heard: socket.socket) -> LinkError | None:
        """Live through one connection; return why it ended, or None if we ended it."""
        if self._make_will is not None:
            self._hello = replace(self._hello, will=self._make_will())
        link = Link(
            self.endpoint,
            self._hello,
            self._redial.version,
            Sink(self._up, self._took, self._acked),
        )
        try:
            link.open()
            self._link = link
            with _watch(link, heard) as wait:
                self._serve(link, wait)
        except LinkError as error:
            return error
        except Exception as error:  # a fault in here must not leave a device without a transport
            log.exception("the transport failed and connects again")
            return LinkError(f"the transport failed: {error!r:.100}", "lost")
        finally:
            self._link = None
            link.fail("closed", "lost") if link.error else link.close()
        return link.error

    def _serve(self, link: Link, wait: Callable[[float], None]) -> None:
        answer_by = time.monotonic() + ANSWER_S
        leave_by: float | None = None
        while link.error is None:
            now = time.monotonic()
            if not link.is_up and now >= answer_by:
                link.fail(
                    f"{self.endpoint} did not answer in {ANSWER_S:g} s: is it MQTT?", "silent"
                )
                return
            if self._closing.is_set():
                leave_by = self._say_goodbye(now) if leave_by is None else leave_by
                if now >= leave_by or not (link.is_up and (self._queue or self._under_way)):
                    return
            if link.is_up:
                self._feed(link)
            is_quiet = link.is_up and not self._closing.is_set()
            wait(self._hello.keepalive_s / 6 if is_quiet else 0.1)
            link.tick()

    def _say_goodbye(self, now: float) -> float:
        if self._hello.will is not None:
            self.publish(*self._hello.will, retain=True)
        return now + GOODBYE_S

    def _feed(self, link: Link) -> None:
        window = min(self._window, link.server_window)
        while True:
            with self._lock:
                wish = self._wishes.popleft() if self._wishes else None
                item = None
                if wish is None and self._queue and self._has_room(window):
                    item = self._queue.popleft()
                    self._queued_bytes -= len(item[1])
            if wish is not None:
                ask = link.subscribe if wish[0] else link.unsubscribe
                ask(wish[1])
            elif item is not None:
                self._send(link, item)
            else:
                return

    def _has_room(self, window: int) -> bool:
        """So much is under way at once that a ping behind it is answered in time."""
        sent = self._under_way.values()
        size = sum(len(one.payload) for one in sent) + len(self._queue[0][1])
        return not sent or (len(sent) < window and size <= self._size.limit)

    def _send(self, link: Link, item: tuple[str, bytes, bool]) -> None:
        topic, payload, retain = item
        mid = link.publish(topic, payload, retain=retain)
        self._under_way[mid] = _Sent(topic, payload, retain, time.monotonic())
        self.counters.messages_up += 1
        self.counters.bytes_up += len(payload)

    def _up(self) -> None:
        link = self._link
        if link is None:
            return
        self.error = None
        self._size.allow(min(_MAX_PACKET, link.server_packet - PACKET_ROOM))
        self._redial.up(time.monotonic())
        log.info("mqtt is up: %s, MQTT %s", self.endpoint, "5" if link.version == 5 else "3.1.1")
        with self._lock:
            gone = [one for wanted, some in self._wishes if not wanted for one in some]
            gone = [one for one in gone if one not in self._filters]  # the session may have them
            self._wishes = deque([(True, list(self._filters)), (False, gone)])
            again = [(topic, payload, True) for topic, payload in self._retained.items()]
            self._queue.extendleft(reversed(again))
            self._open.update(topic for topic, _, _ in again)
            self._queued_bytes += sum(len(payload) for _, payload, _ in again)
        self._is_told_up = True
        _guarded(self._on_state, self._is_told_up)

    def _down(self, error: LinkError) -> float:
        now = time.monotonic()
        if self._under_way:
            self._size.lost(now - min(sent.at for sent in self._under_way.values()))
        with self._lock:
            self.counters.dropped += sum(not retain for _, _, retain in self._queue)
            self._queue.clear()
            self._queued_bytes = 0
            self._under_way.clear()
            self._open.clear()
        self.error = error
        wait_s = self._redial.failed(error, now)
        level = logging.WARNING if self._redial.is_news else logging.DEBUG
        log.log(level, "mqtt is down, next try in %.1f s: %s", wait_s, error)
        if self._is_told_up:
            self._is_told_up = False
            _guarded(self._on_state, self._is_told_up)
        return wait_s

    def _took(self, topic: str, payload: bytes, _: int) -> None:
        self.counters.messages_down += 1
        self.counters.bytes_down += len(payload)
        _guarded(self._on_message, topic, payload)

    def _acked(self, mid: int, error: str | None) -> None:
        if error is not None and error != self._refused:
            self._refused = error
            log.warning("mqtt at %s: %s", self.endpoint, error)
        sent = self._under_way.pop(mid, None)
        if sent is None:
            return
        self._size.acked(len(sent.payload), time.monotonic() - sent.at)
        with self._lock:
            self._open -= Counter((sent.topic,))  # keeps no zeros
            if sent.retain and self._retained.get(sent.topic) is sent.payload:
                del self._retained[sent.topic]

    def _knock(self, hello: Hello, version: int) -> None:
        link = Link(self.endpoint, hello, version, Sink(_nothing, _nothing, _nothing))
        link.open()
        answer_by = time.monotonic() + ANSWER_S
        with _watch(link, None) as wait:
            while not link.is_up and link.error is None:
                if time.monotonic() >= answer_by:
                    link.fail(f"{self.endpoint} did not answer: is it MQTT?", "silent")
                    break
                wait(0.2)
        if link.error is not None:
            link.fail("closed", "lost")
            raise link.error
        link.close()

    def _ring(self) -> None:
        if self._doorbell is None:
            return
        with contextlib.suppress(OSError):  # full: it rings already; closed: nobody listens
            self._doorbell.send(b"\0")


def _nothing(*_: object) -> None:
    """Do nothing: a probe only wants to know whether it is let in."""


def _guarded(call: Callable[..., None], *args: object) -> None:
    try:
        call(*args)
    except Exception:  # a fault in the application must not cost the connection
        log.exception("a callback of the transport raised")


@contextlib.contextmanager
def _watch(link: Link, heard: socket.socket | None) -> Iterator[Callable[[float], None]]:
    """Give a function that waits, at most so many seconds, for the link or the doorbell."""
    with selectors.DefaultSelector() as selector:
        sock = link.socket
        if sock is not None:
            selector.register(sock, selectors.EVENT_READ)
        if heard is not None:
            selector.register(heard, selectors.EVENT_READ)

        def wait(seconds: float) -> None:
            if sock is None or link.socket is None:
                return
            writing = selectors.EVENT_WRITE if link.wants_write else 0
            selector.modify(sock, selectors.EVENT_READ | writing)
            for key, mask in selector.select(seconds):
                if key.fileobj is heard and heard is not None:
                    heard.recv(4096)
                    continue
                if mask & selectors.EVENT_READ:
                    link.read()
                if mask & selectors.EVENT_WRITE and link.error is None:
                    link.write()

        yield wait
