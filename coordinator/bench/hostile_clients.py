# SPDX-License-Identifier: Apache-2.0
"""Clients that mean harm to a broker, as a process of their own.

``python -m coordinator.bench.hostile_clients HOST PORT COUNT CA PASSWORD``. Of every ten
connections three open TCP and are silent, three stop in the middle of CONNECT, two send it a byte
at a time, one sends noise and comes back when it is thrown out, and one has a password (of a card
that was stolen) and publishes noise where it may and where it may not. It prints a line when all
have begun, and ends with its standard input.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
import sys
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from edge_sdk import topics

SLOWLY_S, NOISE_S, PUBLISH_S = 0.5, 1.0, 0.2
KINDS = ("silent", "half", "noise", "half", "slow", "silent", "thief", "slow", "half", "silent")


@dataclass(frozen=True, slots=True)
class Target:
    """The broker, and what a thief knows."""

    host: str
    port: int
    tls: ssl.SSLContext
    password: str


async def main(host: str, port: int, count: int, ca: str, password: str) -> None:
    """Begin `count` connections and keep them until standard input ends."""
    target = Target(host, port, ssl.create_default_context(cafile=ca), password)
    began = asyncio.Semaphore(0)
    tasks = [asyncio.create_task(_one(target, i, began)) for i in range(count)]
    for _ in range(count):
        await began.acquire()
    print("begun", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _one(target: Target, index: int, began: asyncio.Semaphore) -> None:
    kind, is_first = KINDS[index % len(KINDS)], True
    while True:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            tls = None if kind == "silent" else target.tls
            reader, writer = await asyncio.open_connection(target.host, target.port, ssl=tls)
            if is_first:
                began.release()
                is_first = False
            with contextlib.closing(writer):
                reading = asyncio.create_task(_drain(reader))
                try:
                    await _race(_ways(kind, target, index, writer), reading)
                finally:
                    reading.cancel()
        await asyncio.sleep(NOISE_S)


async def _race(doing: Coroutine[Any, Any, None], reading: asyncio.Task[None]) -> None:
    task = asyncio.create_task(doing)
    try:
        await asyncio.wait({task, reading}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _drain(reader: asyncio.StreamReader) -> None:
    while await reader.read(4096):
        pass


async def _ways(kind: str, target: Target, index: int, writer: asyncio.StreamWriter) -> None:
    rng = random.Random(index)  # noqa: S311 - repeats by its number
    client = f"dbad{index:012x}"
    hello = connect_packet(client, "device", target.password)
    if kind == "noise":
        while True:
            writer.write(rng.randbytes(200))
            await writer.drain()
            await asyncio.sleep(NOISE_S)
    if kind == "half":
        writer.write(hello[: len(hello) // 2])
    elif kind == "slow":
        for i in range(len(hello) - 1):
            writer.write(hello[i : i + 1])
            await asyncio.sleep(SLOWLY_S)
    elif kind == "thief":
        writer.write(hello)
        places = [
            topics.up("bench", client, "update"),
            topics.status(client),
            "fedge/1/t/bench/offer",
        ]
        for n in range(1, 2**16):
            writer.write(publish_packet(rng.choice(places), rng.randbytes(200), n))
            await writer.drain()
            await asyncio.sleep(PUBLISH_S)
    await asyncio.Event().wait()


def connect_packet(client: str, user: str, password: str) -> bytes:
    """Return a CONNECT of MQTT 3.1.1 with a name and a password (OASIS standard, 3.1)."""
    body = _text("MQTT") + bytes([4, 0xC2, 0, 120]) + _text(client) + _text(user) + _text(password)
    return _packet(0x10, body)


def publish_packet(topic: str, payload: bytes, number: int) -> bytes:
    """Return a PUBLISH of MQTT 3.1.1 with QoS 1 (OASIS standard, 3.3)."""
    return _packet(0x32, _text(topic) + number.to_bytes(2, "big") + payload)


def _packet(kind: int, body: bytes) -> bytes:
    size, left = bytearray(), len(body)
    while True:
        left, digit = divmod(left, 128)
        size.append(digit | (0x80 if left else 0))
        if not left:
            return bytes([kind, *size]) + body


def _text(text: str) -> bytes:
    data = text.encode()
    return len(data).to_bytes(2, "big") + data


if __name__ == "__main__":
    _host, _port, _count, _ca, _password = sys.argv[1:]
    asyncio.run(main(_host, int(_port), int(_count), _ca, _password))
