# SPDX-License-Identifier: Apache-2.0
"""The coordinator's connection to its broker: paho driven by the asyncio loop, acked by hand.

A message is acknowledged to the broker only when its consumer says so, after its own commit, and
the broker sends at most `receive_maximum` ahead of that: what is in memory is bounded by the
consumer's pace. What waits for the broker's acknowledgement, every subscription and the latest of
each retained topic are sent again after a reconnect, so that a broker that lost all is made whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias

import paho.mqtt.client as paho

from edge_sdk.errors import ConfigError, TransportError
from edge_sdk.transport import Counters
from edge_sdk.transport.endpoint import Endpoint
from edge_sdk.transport.link import Hello, Link, Sink
from edge_sdk.transport.redial import LinkError, Redial

log = logging.getLogger(__name__)

ANSWER_S = 5.0
GOODBYE_S = 2.0
Delivery: TypeAlias = tuple[str, bytes, Callable[[], None]]
"""Topic, payload, and the call that acknowledges it: once, from the loop's thread."""


@dataclass(slots=True, eq=False)
class _Pending:
    """A publish that the broker has not acknowledged."""

    topic: str
    payload: bytes
    retain: bool
    done: asyncio.Future[None] = field(repr=False)


class Mqtt:
    """`async with Mqtt(url, id) as mqtt: async for topic, payload, ack in mqtt.messages(): ...`.

    Entering connects, and raises TransportError when that fails, unless `patient`: then it goes on
    in the background, as it does after every later loss. Over MQTT 3.1.1 there is no Receive
    Maximum: what is in memory is then bounded by the broker's own window, if it has one.
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
        will: tuple[str, bytes] | None = None,
        receive_maximum: int = 64,
        window: int = 64,
        keepalive_s: int = 30,
        session_s: int = 86_400,
        backoff_s: tuple[float, float] = (1.0, 60.0),
        patient: bool = False,
        rng: random.Random | None = None,
    ) -> None:
        if not hasattr(paho.Client, "ack"):
            raise ConfigError("the coordinator needs paho-mqtt 2: pip install 'paho-mqtt>=2'")
        self.endpoint = Endpoint.parse(
            url,
            ca_file=ca_file,
            username=username,
            password=password,
            password_file=password_file,
        )
        self.counters = Counters()
        self.error: TransportError | None = None
        """Why there is no connection now; None when there is one."""
        self.unacked = 0
        """Messages handed over on this connection and not acknowledged yet."""
        self.on_up: Callable[[], None] = lambda: None
        """Called each time the broker has us again, once subscriptions are on their way."""
        self._hello = Hello(
            client_id, will, keepalive_s, session_s, receive_maximum, manual_ack=True
        )
        jitter = rng or random.Random()  # noqa: S311 - spreads reconnects, guards nothing
        self._redial = Redial(*backoff_s, jitter, self.endpoint.version)
        self._patient = patient
        self._window = window
        self._filters: dict[str, None] = {}
        self._retained: dict[str, bytes] = {}
        self._waiting: dict[_Pending, None] = {}  # not handed to the link yet, in order
        self._under_way: dict[int, _Pending] = {}
        self._asked: dict[int, asyncio.Future[None]] = {}  # SUBSCRIBEs
        self._inbox: asyncio.Queue[Delivery | None] = asyncio.Queue()
        self._link: Link | None = None
        self._writing = False
        self._turned = asyncio.Event()  # the link came up, or ended
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._run(first), name="fedge-mqtt")
        try:
            await first
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(TimeoutError, TransportError):
            async with asyncio.timeout(GOODBYE_S):
                if self.is_up and self._hello.will is not None:
                    await self.publish(*self._hello.will, retain=True)
        await self._stop()

    @property
    def is_up(self) -> bool:
        """Whether the broker has us now."""
        return self._link is not None and self._link.is_up

    async def messages(self) -> AsyncIterator[Delivery]:
        """Give what arrives, across reconnects, until the connection is closed.

        An acknowledgement that comes after its connection has ended is void: the broker will
        deliver that message again.
        """
        while (delivery := await self._inbox.get()) is not None:
            yield delivery

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Send with QoS 1 and wait for the broker's acknowledgement, across reconnects.

        At most `window` messages are under way; the rest wait in order. A retained payload is
        remembered and sent again after each reconnect; an empty one ends that.
        Raises: TransportError when the broker refuses the message, or we are closed.
        """
        if self._task is None or self._task.done():
            raise TransportError("this connection is closed: open another")
        if retain and payload:
            self._retained[topic] = payload
        elif retain:
            self._retained.pop(topic, None)
        pending = _Pending(topic, payload, retain, asyncio.get_running_loop().create_future())
        self._waiting[pending] = None
        self._feed()
        try:
            await pending.done
        finally:
            self._waiting.pop(pending, None)

    async def subscribe(self, *filters: str) -> None:
        """Add topic filters, now and after every reconnect; wait until the broker has them.

        Raises: TransportError when the broker refuses them.
        """
        self._filters.update(dict.fromkeys(filters))
        if (link := self._link) is None or not link.is_up:
            return
        loop = asyncio.get_running_loop()
        answers = {mid: loop.create_future() for mid in link.subscribe(list(filters))}
        self._asked.update(answers)
        self._after(link)
        await asyncio.gather(*answers.values())

    def unsubscribe(self, *filters: str) -> None:
        """Drop topic filters."""
        for one in filters:
            self._filters.pop(one, None)
        if (link := self._link) is not None and link.is_up:
            link.unsubscribe(list(filters))
            self._after(link)

    # --- connecting ----------------------------------------------------------------------------
    async def _run(self, first: asyncio.Future[None]) -> None:
        while True:
            tried = self._redial.version
            error = await self._connection(first)
            wait_s = self._redial.failed(error, time.monotonic())
            if not first.done() and not self._patient:
                if self._redial.version >= tried:  # there is no older version left to try
                    first.set_exception(error)
                    return
                wait_s = 0.0
            elif not first.done():
                first.set_result(None)
            self._down(error, wait_s)
            await asyncio.sleep(wait_s)

    async def _connection(self, first: asyncio.Future[None]) -> LinkError:
        """Live through one connection; return why it ended."""
        loop = asyncio.get_running_loop()
        sink = Sink(self._up, self._took, self._acked)
        link = Link(self.endpoint, self._hello, self._redial.version, sink)
        try:
            await _opened(link)
            if (sock := link.socket) is not None:
                link.on_close = lambda fd: (loop.remove_reader(fd), loop.remove_writer(fd))
                self._link, self._writing = link, False
                loop.add_reader(sock, self._readable, link)
                await self._watch(link, first)
        except LinkError as error:
            return error
        except Exception as error:  # a fault in here must not leave the coordinator deaf
            log.exception("the connection failed and is made again")
            return LinkError(f"the connection failed: {error!r:.100}", "lost")
        finally:
            self._link = None
            link.fail("closed", "lost") if link.error else link.close()
        return link.error or LinkError(f"{self.endpoint} hung up at once", "silent")

    async def _watch(self, link: Link, first: asyncio.Future[None]) -> None:
        loop = asyncio.get_running_loop()
        answer_by = loop.time() + ANSWER_S
        while link.error is None:
            if link.is_up and not first.done():
                first.set_result(None)
            if not link.is_up and loop.time() >= answer_by:
                link.fail(
                    f"{self.endpoint} did not answer in {ANSWER_S:g} s: is it MQTT?", "silent"
                )
                return
            link.tick()
            self._after(link)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._hello.keepalive_s / 6 if link.is_up else 0.5):
                    await self._turned.wait()
            self._turned.clear()

    def _down(self, error: LinkError, wait_s: float) -> None:
        self._waiting = dict.fromkeys([*self._under_way.values(), *self._waiting])
        self._under_way.clear()
        self.unacked = 0
        for answer in self._asked.values():  # they are asked for again
            _settle(answer)
        self._asked.clear()
        while self._inbox.qsize() > self._hello.receive_maximum:  # these will come again
            self._inbox.get_nowait()
        self.error = error
        level = logging.WARNING if self._redial.is_news else logging.DEBUG
        log.log(level, "mqtt is down, next try in %.1f s: %s", wait_s, error)

    async def _stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._inbox.put_nowait(None)
        for pending in [*self._under_way.values(), *self._waiting]:
            _settle(pending.done, "the connection was closed before the broker had this message")
        for answer in self._asked.values():
            _settle(answer)

    # --- what the link tells -------------------------------------------------------------------
    def _up(self) -> None:
        if (link := self._link) is None:
            return
        self.error = None
        self._redial.up(time.monotonic())
        log.info("mqtt is up: %s, MQTT %s", self.endpoint, "5" if link.version == 5 else "3.1.1")
        link.subscribe(list(self._filters))
        said = {(p.topic, p.payload) for p in self._waiting if p.retain}
        loop = asyncio.get_running_loop()
        again = [
            _Pending(topic, payload, retain=True, done=loop.create_future())
            for topic, payload in self._retained.items()
            if (topic, payload) not in said
        ]
        for pending in again:  # nobody awaits these: a refusal is seen where it was said first
            pending.done.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._waiting = dict.fromkeys([*again, *self._waiting])
        self._turned.set()
        self._feed()
        self.on_up()

    def _took(self, topic: str, payload: bytes, mid: int) -> None:
        link, is_acked = self._link, False
        self.counters.messages_down += 1
        self.counters.bytes_down += len(payload)
        self.unacked += 1

        def ack() -> None:
            nonlocal is_acked
            if is_acked or link is None or link is not self._link or not link.is_up:
                return
            is_acked = True
            self.unacked -= 1
            link.ack(mid)
            self._after(link)

        self._inbox.put_nowait((topic, payload, ack))

    def _acked(self, mid: int, error: str | None) -> None:
        if mid in self._asked:
            _settle(self._asked.pop(mid), error)
        elif mid in self._under_way:
            _settle(self._under_way.pop(mid).done, error)
            self._feed()

    # --- moving bytes --------------------------------------------------------------------------
    def _readable(self, link: Link) -> None:
        link.read()
        self._after(link)

    def _writable(self, link: Link) -> None:
        link.write()
        self._after(link)

    def _after(self, link: Link) -> None:
        """See to what a call on the link may have left: bytes to write, or its end."""
        sock = link.socket
        if link.error is not None or sock is None:
            self._turned.set()
            return
        if link.wants_write != self._writing:
            loop = asyncio.get_running_loop()
            self._writing = link.wants_write
            if self._writing:
                loop.add_writer(sock, self._writable, link)
            else:
                loop.remove_writer(sock)

    def _feed(self) -> None:
        if (link := self._link) is None or not link.is_up:
            return
        window = min(self._window, link.server_window)
        while self._waiting and len(self._under_way) < window:
            pending = next(iter(self._waiting))
            del self._waiting[pending]
            if pending.done.done():  # its caller has given up
                continue
            self.counters.messages_up += 1
            self.counters.bytes_up += len(pending.payload)
            try:
                mid = link.publish(pending.topic, pending.payload, retain=pending.retain)
            except ValueError as error:
                _settle(pending.done, f"cannot publish on {pending.topic[:64]!r}: {error}")
                continue
            self._under_way[mid] = pending
        self._after(link)


def _settle(future: asyncio.Future[None], error: str | None = None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(TransportError(error))


async def _opened(link: Link) -> None:
    """Open a link in a thread, for its handshake blocks; one that comes too late is closed."""
    opening = asyncio.get_running_loop().run_in_executor(None, link.open)

    def discard(late: asyncio.Future[None]) -> None:
        if late.cancelled() or late.exception() is None:
            link.close()

    try:
        await asyncio.shield(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(discard)
        raise
