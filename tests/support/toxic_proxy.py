# SPDX-License-Identifier: Apache-2.0
"""A TCP relay that ails: it cuts, slows or flips bytes, by a seed.

No namespaces and no root: what a process sees of a bad network, short of packets, which
`tun_network` has.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Self


@dataclass(frozen=True, slots=True)
class Ailment:
    """What becomes of one connection; counted from its first byte, both directions together.

    Attributes:
        cut_after: bytes after which it is closed, None for never.
        flip_every: a byte in about so many is altered; 0 for none.
        bytes_per_s, delay_s: of each direction.
    """

    cut_after: int | None = None
    flip_every: int = 0
    bytes_per_s: float | None = None
    delay_s: float = 0.0


Doctor = Callable[[int, random.Random], Ailment]
"""Says what ails the n-th connection, from 0."""


class ToxicProxy:
    """Relays `port` of loopback to `target`, in a thread of its own; a context manager."""

    def __init__(self, target: int, doctor: Doctor, seed: int = 0) -> None:
        self.port, self.connections, self.carried = 0, 0, 0
        self._target, self._doctor, self._rng = target, doctor, _draws(seed)
        self._loop = asyncio.new_event_loop()
        self._listening = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._listening.wait(5)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._serving.cancel)
        self._thread.join(5)

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    def _run(self) -> None:
        with contextlib.closing(self._loop), contextlib.suppress(asyncio.CancelledError):
            self._serving = self._loop.create_task(self._serve())
            self._loop.run_until_complete(self._serving)

    async def _serve(self) -> None:
        listening = socket.create_server(("127.0.0.1", 0))
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # holds next to nothing
        server = await asyncio.start_server(self._relay, sock=listening, limit=4096)
        self.port = server.sockets[0].getsockname()[1]
        self._listening.set()
        try:
            await server.serve_forever()
        finally:
            server.close()
            rest = asyncio.all_tasks() - {asyncio.current_task()}
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.CancelledError):  # the proxy ends
            await self._relayed(reader, writer)

    async def _relayed(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ailment = self._doctor(self.connections, self._rng)
        self.connections += 1
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        carried, seed = [0], self._rng.getrandbits(32)
        ways = [
            _Way(reader, far_writer, ailment, carried, _draws(seed)),
            _Way(far_reader, writer, ailment, carried, _draws(seed + 1)),
        ]
        carrying = [asyncio.create_task(way.carry()) for way in ways]
        try:
            await asyncio.wait(carrying, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in carrying:
                one.cancel()
            await asyncio.gather(*carrying, return_exceptions=True)
            self.carried += carried[0]
            for end in (writer, far_writer):
                end.transport.abort()


class _Way(NamedTuple):
    """One direction of one connection; `carried` is shared by both."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    ailment: Ailment
    carried: list[int]
    rng: random.Random

    async def carry(self) -> None:
        """Carry bytes until one end closes or the ailment ends it."""
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        delivering = asyncio.create_task(self._deliver(under_way))
        with contextlib.suppress(OSError):
            try:
                await self._take_in(under_way)
                await under_way.join()
            finally:
                delivering.cancel()
                await asyncio.gather(delivering, return_exceptions=True)

    async def _take_in(self, under_way: asyncio.Queue[tuple[float, bytes]]) -> None:
        ailment, loop, last = self.ailment, asyncio.get_running_loop(), 0.0
        while data := await self.reader.read(1024 if ailment.bytes_per_s is None else 128):
            before = self.carried[0]
            if ailment.cut_after is not None and before + len(data) > ailment.cut_after:
                under_way.put_nowait((0.0, data[: max(0, ailment.cut_after - before)]))
                return
            self.carried[0] += len(data)
            if ailment.bytes_per_s is not None:
                await asyncio.sleep(len(data) / ailment.bytes_per_s)
            due = loop.time() + ailment.delay_s
            last = max(last, due)  # in order, as TCP has it
            under_way.put_nowait((last, _flipped(data, ailment.flip_every, self.rng)))

    async def _deliver(self, under_way: asyncio.Queue[tuple[float, bytes]]) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due, data = await under_way.get()
            if due > loop.time():
                await asyncio.sleep(due - loop.time())
            self.writer.write(data)
            await self.writer.drain()
            under_way.task_done()


def _draws(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 - repeats by its seed


def _flipped(data: bytes, every: int, rng: random.Random) -> bytes:
    if not every:
        return data
    altered = bytearray(data)
    for place in range(len(altered)):
        if rng.randrange(every) == 0:
            altered[place] ^= 1 << rng.randrange(8)
    return bytes(altered)
