# SPDX-License-Identifier: Apache-2.0
"""How long a coordinator that was killed takes to be back: real processes, a real broker.

The store holds the fleet, an open round and updates that wait for its end, the broker every
device's status. Measured from `exec` to the new offer that devices hear, and to the receipt for an
update that is sent, as from an outbox, upon that offer.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coordinator.bench import recipes
from coordinator.broker import embedded
from coordinator.fleet import Known
from coordinator.mqtt import Mqtt
from coordinator.service import DATABASE
from coordinator.store import Store, StoredRound, StoredUpdate
from coordinator.task import Task
from coordinator.versions import first_version
from edge_sdk import codec, messages, params, topics
from edge_sdk.bundle import Bundle
from edge_sdk.messages import Offer, Receipt, Status, Update
from edge_sdk.signing import DeviceKey

TASK, ROUND = "bench", 1
CONFIG = """broker = "{url}"
store = "."
[task.bench]
bundle = "bench.fedge"
pace = ["rounds", {{ cohort = {cohort}, deadline_s = 86400 }}]
"""
WAIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Scene:
    """What a killed coordinator left behind; `late` are devices whose updates come meanwhile."""

    folder: Path
    url: str
    keys: Sequence[DeviceKey]
    bundle: Bundle
    blob: bytes
    late: Sequence[DeviceKey]
    calls: set[int]
    """The roll calls heard so far: what else a dead coordinator said may still be on its way."""


def measure(
    devices: int = 1000, pending: int = 300, model: str = "dscnn", repeat: int = 5
) -> list[Mapping[str, Any]]:
    """Kill and restart a coordinator `repeat` times; give the median and the worst, seconds.

    `cpu_s` is the processor time that it took of that: what a busy machine leaves as it is.
    """
    with tempfile.TemporaryDirectory(prefix="fedge-bench-") as folder:
        told = asyncio.run(_measured(Path(folder), devices, pending, model, repeat))
    offers, receipts, cpus = zip(*told, strict=True)
    return [
        {
            "devices": devices,
            "pending": pending,
            "model": model,
            "restarts": repeat,
            "offer_s": statistics.median(offers),
            "offer_worst_s": max(offers),
            "receipt_s": statistics.median(receipts),
            "receipt_worst_s": max(receipts),
            "cpu_s": statistics.median(cpus),
        }
    ]


async def _measured(
    folder: Path, devices: int, pending: int, model: str, repeat: int
) -> list[tuple[float, float, float]]:
    from coordinator.compiler import build

    bundle = build(recipes.model(model), loss=recipes.LOSSES[model])
    bundle.save(folder / "bench.fedge")
    keys = [DeviceKey.from_seed(i.to_bytes(32, "little")) for i in range(1, devices + 1)]
    blob = _blob(bundle)
    await _fill(folder, keys, pending, bundle, blob)
    async with embedded(kind="mosquitto", port=0, folder=folder / "broker") as url:
        (folder / "coordinator.toml").write_text(CONFIG.format(url=url, cohort=devices))
        scene = Scene(folder, url, keys, bundle, blob, keys[pending : pending + repeat], set())
        async with Mqtt(url, "bench", session_s=0) as ear:
            await asyncio.gather(*(_say_hello(ear, key) for key in keys))
            await ear.subscribe(
                topics.offer(TASK), *(topics.down_filter(TASK, k.id) for k in scene.late)
            )
            heard = ear.messages()
            await _restart(scene, ear, heard, None)  # makes its session at the broker
            return [await _restart(scene, ear, heard, key) for key in scene.late]


async def _restart(
    scene: Scene, ear: Mqtt, heard: AsyncIterator[Any], device: DeviceKey | None
) -> tuple[float, float, float]:
    """Start the coordinator, answer its offer with an update, time its words, kill it."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "coordinator", "run", "--config"]
    child = await asyncio.create_subprocess_exec(
        *command, str(scene.folder / "coordinator.toml"), stderr=asyncio.subprocess.DEVNULL
    )
    told: dict[type, float] = {}
    wanted = {Offer} if device is None else {Offer, Receipt}
    try:
        async with asyncio.timeout(WAIT_S):
            while not wanted <= told.keys():
                where, payload, ack = await anext(heard)
                ack()
                message, _ = messages.decode(payload, where)
                since_s = time.perf_counter() - began
                match message:
                    case Offer() if message.call not in scene.calls:
                        scene.calls.add(message.call)
                        told[Offer] = since_s
                        if device is not None:  # as its outbox does
                            topic = topics.up(TASK, device.id, "update")
                            frame = messages.encode(_update(scene.blob), device, topic)
                            await ear.publish(topic, frame)
                    case Receipt() if device is not None and f"/{device.id}/" in where:
                        told[Receipt] = since_s
        cpu_s = _cpu_s(child.pid)
    finally:
        child.kill()
        await child.wait()
    return told[Offer], told.get(Receipt, 0.0), cpu_s


def _cpu_s(pid: int) -> float:
    """Return the processor time that a process has taken (proc(5), stat, fields 14 and 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _say_hello(ear: Mqtt, key: DeviceKey) -> None:
    topic = topics.status(key.id)
    status = Status(key.id, key.public, online=True, boot=1, name=key.id, sdk="bench")
    await ear.publish(topic, messages.encode(status, key, topic), retain=True)


async def _fill(
    folder: Path, keys: Sequence[DeviceKey], pending: int, bundle: Bundle, blob: bytes
) -> None:
    store = await asyncio.to_thread(Store, folder / DATABASE)
    with contextlib.closing(store):
        known = [Known(k.id, k.public, k.id, "bench", online=True, boot=1) for k in keys]
        await asyncio.gather(*map(store.remember, known))
        first = first_version(Task(TASK, bundle), bundle)
        await store.resume(TASK, bytes.fromhex(bundle.digest), first)
        cohort = frozenset(k.id for k in keys)
        goal = len(keys)
        await store.open_round(
            TASK, StoredRound(ROUND, 0, cohort, quorum=goal, goal=goal, deadline_s=86400.0, seed=1)
        )
        await asyncio.gather(*(store.count(TASK, _stored(k.id, blob)) for k in keys[:pending]))


def _stored(device: str, blob: bytes) -> StoredUpdate:
    said = _update(blob)
    return StoredUpdate(
        round=ROUND,
        device=device,
        hash=device.encode(),
        version=0,
        examples=said.examples,
        steps=said.steps,
        loss=said.loss,
        seconds=said.seconds,
        size=len(blob),
        outcome="counted",
        blob=blob,
    )


def _update(blob: bytes) -> Update:
    return Update(round=ROUND, version=0, examples=10, steps=5, loss=1.0, seconds=1.0, body=blob)


def _blob(bundle: Bundle) -> bytes:
    chain = codec.preset("default")
    flat = np.random.default_rng(0).standard_normal(params.count(bundle.shapes)) * 1e-3
    delta = params.unflatten(flat.astype(np.float32), bundle.shapes)
    return chain.encode(delta, chain.init(bundle.shapes))[0]
