# SPDX-License-Identifier: Apache-2.0
"""What healthy devices notice of a thousand connections that mean harm: nothing lost, and how late.

A real mosquitto with the settings and rights of `fedge coordinator broker-config`, TLS included.
Devices publish at a steady pace, first undisturbed, then beside the hostile clients, which are a
process of low priority: in earnest they would have a processor of their own. One way, from a
device's publish to the consumer's hands.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from coordinator import broker_config, certificates
from coordinator.broker import free_port
from coordinator.mqtt import Mqtt
from edge_sdk import topics
from edge_sdk.errors import FedgeError, TransportError
from edge_sdk.signing import DeviceKey

HOST, PASSWORD, EVERY_S, SIZE = "127.0.0.1", "a-card-was-stolen", 0.1, 2_000
START_S, LAST_S = 30.0, 20.0


def measure(
    hostile: int = 1000, devices: int = 20, seconds: float = 10.0
) -> list[Mapping[str, Any]]:
    """Measure undisturbed and beside `hostile` connections; one row each, milliseconds."""
    with tempfile.TemporaryDirectory(prefix="fedge-bench-") as folder:
        return asyncio.run(_measured(Path(folder), hostile, devices, seconds))


async def _measured(
    folder: Path, hostile: int, devices: int, seconds: float
) -> list[Mapping[str, Any]]:
    keys = [DeviceKey.from_seed(i.to_bytes(32, "little")) for i in range(1, devices + 1)]
    async with _broker(folder, hostile) as port, contextlib.AsyncExitStack() as stack:
        url = f"mqtts://{HOST}:{port}"
        coordinator = await _client(stack, url, "coordinator", "coordinator", folder)
        await coordinator.subscribe(topics.up_filter("bench"))
        fleet = [await _client(stack, url, key.id, "device", folder) for key in keys]
        await _paced(coordinator, fleet, keys, 1.0)  # everything once, before it is timed
        calm = await _paced(coordinator, fleet, keys, seconds)
        async with _attack(folder, port, hostile):
            await _paced(coordinator, fleet, keys, 1.0)
            under = await _paced(coordinator, fleet, keys, seconds)
    return [_row("undisturbed", 0, *calm), _row("attacked", hostile, *under)]


async def _client(
    stack: contextlib.AsyncExitStack, url: str, name: str, user: str, folder: Path
) -> Mqtt:
    entered = Mqtt(url, name, username=user, password=PASSWORD, ca_file=folder / "ca.pem")
    return await stack.enter_async_context(entered)


async def _paced(
    coordinator: Mqtt, fleet: Sequence[Mqtt], keys: Sequence[DeviceKey], seconds: float
) -> tuple[int, list[float]]:
    """Let each device publish every so often; return how many were sent, and what each took, ms."""
    took: dict[tuple[str, int], float] = {}
    ours = {key.id for key in keys}
    rounds, all_there = round(seconds / EVERY_S), asyncio.Event()
    sent = rounds * len(keys)

    def heard() -> None:
        if len(took) == sent:
            all_there.set()

    listening = asyncio.create_task(_listen(coordinator, ours, took, heard))
    sending = [
        asyncio.create_task(_publish(mqtt, key.id, rounds, i * EVERY_S / len(keys)))
        for i, (mqtt, key) in enumerate(zip(fleet, keys, strict=True))
    ]
    await asyncio.gather(*sending)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LAST_S):
            await all_there.wait()
    listening.cancel()
    await asyncio.gather(listening, return_exceptions=True)
    return sent, list(took.values())


async def _publish(mqtt: Mqtt, device: str, rounds: int, first_s: float) -> None:
    topic = topics.up("bench", device, "update")
    at_s = time.monotonic() + first_s
    waiting = set[asyncio.Task[None]]()
    for number in range(rounds):
        await asyncio.sleep(max(0.0, at_s - time.monotonic()))
        head = number.to_bytes(4, "little") + time.perf_counter_ns().to_bytes(8, "little")
        waiting.add(asyncio.create_task(mqtt.publish(topic, head + bytes(SIZE))))
        at_s += EVERY_S
    await asyncio.gather(*waiting)


async def _listen(
    coordinator: Mqtt,
    ours: set[str],
    took: dict[tuple[str, int], float],
    heard: Callable[[], None],
) -> None:
    async for topic, payload, ack in coordinator.messages():
        now = time.perf_counter_ns()
        device = topics.parse(topic).device
        if device in ours:
            number = int.from_bytes(payload[:4], "little")
            since = int.from_bytes(payload[4:12], "little")
            took.setdefault((device, number), (now - since) / 1e6)
            heard()
        ack()


def _row(what: str, hostile: int, sent: int, took: list[float]) -> Mapping[str, Any]:
    cuts = statistics.quantiles(took, n=100)
    return {
        "what": what,
        "hostile": hostile,
        "sent": sent,
        "lost": sent - len(took),
        "p50_ms": cuts[49],
        "p99_ms": cuts[98],
        "worst_ms": max(took),
    }


@contextlib.asynccontextmanager
async def _broker(folder: Path, hostile: int) -> AsyncIterator[int]:
    program = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        raise FedgeError("expected mosquitto, it is not installed: apt install mosquitto")
    port = free_port()
    _configure(folder, port, hostile)
    child = await asyncio.create_subprocess_exec(
        program, "-c", str(folder / "fedge.conf"), stderr=asyncio.subprocess.DEVNULL
    )
    try:
        async with asyncio.timeout(START_S):
            while not await _listens(port):
                if child.returncode is not None:
                    raise TransportError(f"mosquitto ended with code {child.returncode}")
                await asyncio.sleep(0.02)
        yield port
    finally:
        child.kill()
        await child.wait()


def _configure(folder: Path, port: int, hostile: int) -> None:
    now = dt.datetime.now(dt.UTC)
    authority = certificates.authority("bench", now)
    issued = certificates.broker(authority, [HOST], now)
    (folder / "ca.pem").write_bytes(authority.certificate)
    (folder / "broker.pem").write_bytes(issued.certificate)
    (folder / "broker.key").write_bytes(issued.key)
    fleet = broker_config.Fleet(
        folder=PurePosixPath(folder), port=port, devices=max(1000, hostile), identity="client"
    )
    lines = broker_config.config(fleet)
    if os.geteuid() == 0:  # else it would become a user who cannot read here
        lines += "user root\n"
    (folder / "fedge.conf").write_text(lines)
    (folder / broker_config.RIGHTS).write_text(broker_config.rights(fleet))
    for user in ("device", "coordinator"):
        flags = ["-b"] if user == "coordinator" else ["-c", "-b"]
        command = ["mosquitto_passwd", *flags, str(folder / fleet.passwords), user, PASSWORD]
        subprocess.run(command, check=True, capture_output=True)


async def _listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection(HOST, port)
    except OSError:
        return False
    writer.close()
    return True


@contextlib.asynccontextmanager
async def _attack(folder: Path, port: int, count: int) -> AsyncIterator[None]:
    command = ["nice", "-n", "15", sys.executable, "-m", "coordinator.bench.hostile_clients"]
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(
        *command, HOST, str(port), str(count), str(folder / "ca.pem"), PASSWORD,
        stdin=pipe, stdout=pipe,
    )  # fmt: skip
    try:
        if child.stdout is None or not await child.stdout.readline():
            raise FedgeError("the hostile clients did not begin")
        yield
    finally:
        child.kill()
        await child.wait()
