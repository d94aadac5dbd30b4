# SPDX-License-Identifier: Apache-2.0
"""A coordinator and devices that train for real, in virtual time: what a day teaches in a minute.

Coordinator, store, rounds, pace and messages are the product's; the devices speak the protocol,
train with the product's trainer and codec, and take as long as their `Nature` says. Nothing waits
for real time, and the same seed gives the same run.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import math
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from fake_fleet import FakeDevice
from numpy.typing import NDArray

from coordinator.desk import RoundResult
from coordinator.pacing import Pace
from coordinator.schema import migrate
from coordinator.service import Coordinator
from coordinator.store import Store
from coordinator.task import Task
from coordinator.testing import ManualClock, MemoryLink
from coordinator.writer import Work, transact
from edge_sdk import codec, topics
from edge_sdk.bundle import Bundle
from edge_sdk.messages import Invite, Receipt, Update
from edge_sdk.signing import DeviceKey
from edge_sdk.trainer import Trainer
from edge_sdk.transport.memory import MemoryBroker
from edge_sdk.types import Params

T = TypeVar("T")
Rows = tuple[NDArray[Any], NDArray[Any]]


class Fate(NamedTuple):
    """How an invitation ends: after `seconds` with an update, or with the device gone for as long.

    `away_s`: for how long it is gone; None when it reports.
    """

    seconds: float
    away_s: float | None = None


Nature = Callable[[int, np.random.Generator], Fate]
"""From a device's number and chance to what becomes of one invitation."""


def steady(times_s: Sequence[float]) -> Nature:
    """Every device reports, each after its own time."""
    return lambda index, _rng: Fate(times_s[index])


def troubled(drop: float, straggle: float, deadline_s: float) -> Nature:
    """Lose a share of invitations, and bring another share's updates after the deadline."""

    def nature(_index: int, rng: np.random.Generator) -> Fate:
        kind, part = rng.random(), rng.random()
        if kind < drop:
            return Fate(part * deadline_s, deadline_s)
        if kind < drop + straggle:
            return Fate((1.05 + 0.9 * part) * deadline_s)
        return Fate((0.2 + 0.6 * part) * deadline_s)

    return nature


class Point(NamedTuple):
    """One version: when it came, how many updates had been counted by then, its score."""

    at_s: float
    updates: int
    score: float


@dataclass(slots=True)
class Run:
    """What became of a run."""

    points: list[Point] = field(default_factory=list)
    results: list[RoundResult] = field(default_factory=list)

    def last(self, count: int = 5, updates: int | None = None) -> float:
        """Return the mean score of the last versions up to a count of updates."""
        scores = [p.score for p in self.points if updates is None or p.updates <= updates]
        return float(np.mean(scores[-count:]))

    def reached_s(self, score: float, of: int = 5) -> float:
        """Return when the mean score of `of` versions in a row first was at least `score`."""
        for i in range(of, len(self.points) + 1):
            if np.mean([p.score for p in self.points[i - of : i]]) >= score:
                return self.points[i - 1].at_s
        return math.inf


class VirtualClock(ManualClock):
    """A clock that knows until when it is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self._until: list[float] = []

    @property
    def next_s(self) -> float:
        """When the first of those who wait wakes by time alone."""
        return min(self._until, default=math.inf)

    async def wait(self, event: asyncio.Event, until_s: float = math.inf) -> bool:
        """Wait for `event`, at most until the clock is moved to `until_s`."""
        self._until.append(until_s)
        try:
            return await super().wait(event, until_s)
        finally:
            self._until.remove(until_s)


class Direct:
    """A `Writing` without thread or disk."""

    def __init__(self) -> None:
        self.transactions = 0
        self._db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        migrate(self._db)

    async def run(self, work: Work[T], *, urgent: bool = False) -> T:
        del urgent
        (outcome,) = transact(self._db, [work], Path(":memory:"))
        self.transactions += 1
        if isinstance(outcome, Exception):
            raise outcome
        return cast("T", outcome)

    def close(self) -> None:
        self._db.close()


class Learner(FakeDevice):
    """A device that trains, one round at a time, as the product's session would."""

    def __init__(self, fleet: Fleet, index: int) -> None:
        super().__init__(fleet.broker, index + 1)
        self.fleet, self.place = fleet, index
        self.examples = len(fleet.rows[index][1])
        self.state = fleet.codec.init(fleet.bundle.shapes, seed=index)
        self.busy: Invite | None = None
        self.waiting: tuple[Invite, float] | None = None
        self.pending: Any = None

    def start(self) -> None:
        """Connect; weights are had from the store, not from retained parts."""
        will = self.frame(self.status(online=False), topics.status(self.id))
        self.transport = self.broker.transport(self.id, (topics.status(self.id), will))
        self.transport.start(self._take, lambda _up: None)
        self.transport.subscribe(topics.down_filter("t", self.id), topics.offer("t"))
        self.send(self.status(online=True), topics.status(self.id), retain=True)

    def _take(self, topic: str, payload: bytes) -> None:
        super()._take(topic, payload)
        kind = topics.parse(topic).kind
        if kind == "invite":
            self.invited(self.invites.pop()[1])
        elif kind == "receipt":
            self.settled(self.receipts[-1])

    def invited(self, invite: Invite) -> None:
        until_s = self.fleet.now_s + invite.deadline_s
        if self.busy is not None:
            self.waiting = (invite, until_s)
            return
        self.busy = invite
        fate = self.fleet.nature(self.place, self.fleet.rng)
        if fate.away_s is not None:
            away_s = fate.away_s
            self.fleet.at(fate.seconds, lambda: self.leave(away_s))
        else:
            self.fleet.at(fate.seconds, self.finish)

    def leave(self, away_s: float) -> None:
        self.busy = self.waiting = None
        self.broker.cut(self.id)
        self.fleet.at(away_s, self.come_back)

    def come_back(self) -> None:
        self.broker.restore(self.id)
        self.send(self.status(online=True), topics.status(self.id), retain=True)
        self.check_in()

    def finish(self) -> None:
        """Train, send, and take up the invitation that waited, if it is still good."""
        invite, self.busy = cast("Invite", self.busy), None
        made = self.fleet.train(self.place, invite)
        blob, self.pending = self.fleet.codec.encode(made.delta, self.state)
        self.state = self.fleet.codec.commit(self.pending, accepted=True)
        fields = (invite.round, invite.version, self.examples, made.steps, made.loss, 1.0)
        self.send(Update(*fields, blob), topics.up("t", self.id, "update"))
        waiting, self.waiting = self.waiting, None
        if waiting is None:
            return
        invite, until_s = waiting
        if self.fleet.now_s < until_s and self.offers["t"].version == invite.version:
            self.invited(invite)
        else:
            self.check_in(ready=False)
            self.check_in()

    def settled(self, receipt: Receipt) -> None:
        if receipt.outcome not in {"counted", "late"}:
            self.state = self.fleet.codec.commit(self.pending, accepted=False)


class Made(NamedTuple):
    """What a training gave."""

    delta: Params
    steps: int
    loss: float


class Fleet:
    """Devices with rows of their own, a coordinator, and the time."""

    def __init__(
        self,
        bundle: Bundle,
        rows: Sequence[Rows],
        task: Task,
        *,
        nature: Nature,
        score: Callable[[Params], float],
        seed: int = 0,
    ) -> None:
        self.bundle, self.rows, self.task = bundle, rows, task
        self.nature, self.score = nature, score
        self.codec = codec.from_spec(task.codec_spec)
        self.rng = np.random.default_rng([seed, 7])
        self.broker, self.clock = MemoryBroker(), VirtualClock()
        self.run = Run()
        self._trainer = Trainer(bundle, seed=seed)
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._ticket = itertools.count()
        self._versions: dict[int, Params] = {}
        self._updates = 0

    @property
    def now_s(self) -> float:
        """The virtual time."""
        return self.clock.monotonic()

    def at(self, after_s: float, act: Callable[[], None]) -> None:
        """Do something later."""
        heapq.heappush(self._queue, (self.now_s + after_s, next(self._ticket), act))

    def train(self, place: int, invite: Invite) -> Made:
        """Train on a device's rows from the version that it was invited to."""
        x, y = self.rows[place]
        self._trainer.load_params(self._versions[invite.version])
        done = self._trainer.fit(
            x, y, epochs=invite.epochs, steps=invite.steps, batch=invite.batch or 32, lr=invite.lr
        )
        return Made(self._trainer.delta(), done["steps"], done["loss"])

    def live(self, pace: Pace, until: Callable[[Run], bool]) -> Run:
        """Run until `until` holds."""
        asyncio.run(self._live(pace, until))
        return self.run

    async def _live(self, pace: Pace, until: Callable[[Run], bool]) -> None:
        link = MemoryLink(self.broker)
        made = Coordinator(
            store=Store(Direct(), keep=1000),
            signer=DeviceKey.from_seed(b"c" * 32),
            link=link,
            clock=self.clock,
        )
        devices = [Learner(self, i) for i in range(len(self.rows))]
        for device in devices:
            device.start()
        async with made as coordinator:
            loop = asyncio.create_task(self._train(coordinator, pace))
            try:
                await self._quiet()
                while not until(self.run):
                    await self._next()
                    if loop.done():
                        loop.result()
                        return
            finally:
                loop.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await loop

    async def _next(self) -> None:
        """Go to whatever comes next: of the devices, or of the coordinator's own waits."""
        device_s = self._queue[0][0] if self._queue else math.inf
        clock_s = self.clock.next_s
        at_s = min(device_s, clock_s)
        if at_s == math.inf:
            raise RuntimeError("nobody will ever do anything again")
        self.clock.advance(max(0.0, at_s - self.now_s))
        if device_s <= at_s:
            heapq.heappop(self._queue)[2]()
        await self._quiet()

    async def _quiet(self) -> None:
        """Let everything that is under way come to its end."""
        ready = cast("Any", asyncio.get_running_loop())._ready
        while True:
            moved = self.broker.pump()
            await asyncio.sleep(0)
            if not moved and not ready:
                return

    async def _train(self, coordinator: Coordinator, pace: Pace) -> None:
        self._versions[0] = self.bundle.params()
        async with contextlib.aclosing(coordinator.train(self.task, pace)) as results:
            async for result in results:
                self.run.results.append(result)
                if result.outcome != "commit":
                    continue
                self._updates += len(result.reported) + len(result.late)
                made = await coordinator.params(self.task, result.version)
                self._versions[result.version] = made
                self.run.points.append(Point(self.now_s, self._updates, self.score(made)))
