# SPDX-License-Identifier: Apache-2.0
"""Devices that speak the protocol and train nothing, around a real coordinator on a memory broker.

Nothing here sleeps for time to pass: `until` waits for a condition, the clock is moved by hand.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import hand_bundles
import numpy as np

from coordinator.desk import RoundResult
from coordinator.pacing import Pace
from coordinator.service import Coordinator
from coordinator.task import Task
from coordinator.testing import ManualClock, MemoryLink
from edge_sdk import chunks, codec, messages, params, topics
from edge_sdk.bundle import Bundle
from edge_sdk.messages import CheckIn, Invite, Message, Offer, Receipt, Status, Update
from edge_sdk.signing import DeviceKey
from edge_sdk.transport.memory import MemoryBroker

DENSE = codec.from_spec("dense")
BUNDLE = hand_bundles.mlp()


def body(seed: int, scale: float = 0.1, bundle: Bundle = BUNDLE) -> bytes:
    """Encode a random delta, the same for the same seed."""
    flat = np.random.default_rng(seed).normal(size=params.count(bundle.shapes)) * scale
    delta = params.unflatten(flat.astype(np.float32), bundle.shapes)
    blob, _ = DENSE.encode(delta, DENSE.init(bundle.shapes))
    return blob


class FakeDevice:
    """A device with a key: it checks in whenever it is asked to, and reports when told to."""

    def __init__(self, broker: MemoryBroker, index: int, tasks: tuple[str, ...] = ("t",)) -> None:
        self.key = DeviceKey.from_seed(bytes([index]) * 32)
        self.id, self.index, self.tasks = self.key.id, index, tasks
        self.broker, self.boot = broker, 1
        self.examples = 10 * index
        self.checks_in = True
        self.offers: dict[str, Offer] = {}
        self.invites: list[tuple[str, Invite]] = []
        self.receipts: list[Receipt] = []
        self.missing: list[messages.Missing] = []
        self.outbox: dict[bytes, tuple[str, bytes]] = {}
        self.parts: dict[tuple[str, str, int], messages.Part] = {}

    def start(self) -> None:
        """Connect, show the status, listen."""
        will = self.frame(self.status(online=False), topics.status(self.id))
        self.transport = self.broker.transport(self.id, (topics.status(self.id), will))
        self.transport.start(self._take, lambda _up: None)
        for task in self.tasks:
            self.transport.subscribe(topics.down_filter(task, self.id))
            for what in ("bundle", "weights"):
                self.transport.subscribe(topics.parts_filter(task, what))
        self.send(self.status(online=True), topics.status(self.id), retain=True)
        for task in self.tasks:
            self.transport.subscribe(topics.offer(task))

    def status(self, *, online: bool) -> Status:
        return Status(self.id, self.key.public, online, self.boot, f"n{self.index}", "0.1.0")

    def frame(self, message: Message, topic: str, key: DeviceKey | None = None) -> bytes:
        return messages.encode(message, key or self.key, topic)

    def send(self, message: Message, topic: str, *, retain: bool = False) -> bytes:
        frame = self.frame(message, topic)
        self.transport.publish(topic, frame, retain=retain)
        return frame

    def check_in(self, task: str = "t", *, ready: bool = True) -> None:
        message = CheckIn(self.offers[task].call, ready, self.examples)
        self.send(message, topics.up(task, self.id, "checkin"))

    def update(self, number: int | None = None, task: str = "t", **changes: Any) -> Update:
        """Make the update that answers the newest invitation, or the one to round `number`."""
        invite = next(
            i for t, i in reversed(self.invites) if t == task and number in (None, i.round)
        )
        fields: dict[str, Any] = {
            "round": invite.round,
            "version": invite.version,
            "examples": self.examples,
            "steps": 5,
            "loss": 1.0 / self.index,
            "seconds": 0.5,
            "body": body(1000 * invite.round + self.index),
        }
        return Update(**(fields | changes))

    def report(self, number: int | None = None, task: str = "t", **changes: Any) -> bytes:
        """Send an update; return its frame."""
        topic = topics.up(task, self.id, "update")
        frame = self.send(self.update(number, task, **changes), topic)
        self.outbox[messages.Signed(frame, topic).id] = (topic, frame)
        return frame

    def report_in_chunks(self, packet: int = 700, task: str = "t") -> list[bytes]:
        """Send an update in small chunks, the last first."""
        frame = self.frame(self.update(task=task), topics.up(task, self.id, "update"))
        topic = topics.up(task, self.id, "chunk")
        cut = chunks.split(frame, packet)
        return [self.send(chunk, topic) for chunk in reversed(cut)]

    def outcomes(self, number: int | None = None) -> list[str]:
        return [r.outcome for r in self.receipts if number in (None, r.round)]

    def _take(self, topic: str, payload: bytes) -> None:
        message, signed = messages.decode(payload, topic)
        task = topics.parse(topic).task
        match message:
            case Offer():
                assert signed.by(message.key)
                is_new = task not in self.offers or self.offers[task].call != message.call
                self.offers[task] = message
                if is_new and self.checks_in and message.state == "open":
                    self.check_in(task)
                for waiting in self.outbox.values() if is_new else ():
                    self.transport.publish(*waiting)
            case Invite():
                assert signed.by(self.offers[task].key)
                self.invites.append((task, message))
            case Receipt():
                assert signed.by(self.offers[task].key)
                self.receipts.append(message)
                self.outbox.pop(message.update, None)
            case messages.Missing():
                assert signed.by(self.offers[task].key)
                self.missing.append(message)
            case messages.Part():
                place = f"patch{topics.slot(message.version):02}"
                what = place if message.what == "patch" else message.what
                self.parts[task, what, message.index] = message


class World:
    """A coordinator, its store's folder, a broker in memory and a clock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.broker = MemoryBroker()
        self.clock = ManualClock()
        self.results: list[RoundResult] = []
        self.starts = 0

    def devices(self, count: int, tasks: tuple[str, ...] = ("t",)) -> list[FakeDevice]:
        """Start devices 1 to `count`."""
        made = [FakeDevice(self.broker, i, tasks) for i in range(1, count + 1)]
        for device in made:
            device.start()
        return made

    @contextlib.asynccontextmanager
    async def coordinator(self, *tasks: tuple[Task, Pace]) -> AsyncIterator[Coordinator]:
        """Run a coordinator that trains `tasks`; leaving ends it without a word."""
        self.starts += 1
        link = MemoryLink(self.broker, f"coordinator-{self.starts}")
        coordinator = Coordinator(store=self.folder, link=link, clock=self.clock)
        async with coordinator:
            loops = [asyncio.create_task(self._train(coordinator, *task)) for task in tasks]
            try:
                yield coordinator
                for loop in loops:
                    if loop.done():
                        loop.result()
            finally:
                for loop in loops:
                    loop.cancel()
                await asyncio.gather(*loops, return_exceptions=True)
        link.close()

    async def _train(self, coordinator: Coordinator, task: Task, pace: Pace) -> None:
        async with contextlib.aclosing(coordinator.train(task, pace)) as results:
            async for result in results:
                self.results.append(result)

    async def until(self, condition: Callable[[], object], within_s: float = 10.0) -> None:
        """Let messages flow until `condition` holds; fail when it does not."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + within_s
        while True:
            self.broker.pump()
            if condition():
                return
            assert loop.time() < deadline, f"not within {within_s} s: {condition}"
            await asyncio.sleep(0.001)


Story = Callable[[World], Coroutine[Any, Any, None]]


def play(tmp_path: Path, story: Story) -> World:
    """Run a story in a world of its own, and return that."""
    world = World(tmp_path / "store")
    asyncio.run(story(world))
    return world


def invited(
    devices: Sequence[FakeDevice], number: int, task: str | None = None
) -> Callable[[], bool]:
    """Return the claim that each of them has an invitation to a round, of this task or of any."""
    return lambda: all(
        any(i.round == number and task in {None, name} for name, i in d.invites) for d in devices
    )
