# SPDX-License-Identifier: Apache-2.0
"""A simulated device: the production agent on a simulated disk, network, clock and training.

Made of the same parts as `edge_sdk.device.Device`, and driven turn by turn in the loop's thread.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np

from coordinator.simulation.disk import Disk
from coordinator.simulation.ends import Radio
from coordinator.simulation.model import Pretence, train
from coordinator.simulation.network import Network
from coordinator.simulation.process import Killed, Process
from coordinator.simulation.watch import Kept, Watch
from edge_sdk import files
from edge_sdk.agent import Agent
from edge_sdk.conditions import condition
from edge_sdk.errand import Ended
from edge_sdk.errors import StoreError
from edge_sdk.failpoints import Failpoints
from edge_sdk.local import Local
from edge_sdk.outbox import Entry, Outbox
from edge_sdk.presence import Presence
from edge_sdk.settings import Settings
from edge_sdk.signing import Identity
from edge_sdk.store import Residual, Store
from edge_sdk.training import LocalTraining, TrainFailed, TrainJob, TrainResult
from edge_sdk.trial import Terms

OUTBOX_BYTES = 2**16
MIN_TURN_S = 1e-4


class Board:
    """One device, over all its lives."""

    def __init__(
        self,
        number: int,
        key: Identity,
        task: str,
        *,
        network: Network,
        watch: Watch,
        rng: random.Random,
        max_packet: int,
    ) -> None:
        self.number, self.key, self.task = number, key, task
        self.network, self.watch, self.rng = network, watch, rng
        self.max_packet = max_packet
        self.disk = Disk(rng)
        self.process: Process | None = None
        self.is_ready = True
        self.has_left = False
        self.speed_s = rng.choice((0.3, 1.0, 1.0, 3.0, 8.0))
        self.examples = rng.randint(5, 200)
        self.boots = 0
        self.secret = rng.randbytes(16)
        """An example, if it had any: it lies among its samples and never leaves."""
        self._agent: Agent | None = None
        self._outbox: _WatchedOutbox | None = None
        self._local: Local | None = None
        self._radio: Radio | None = None
        self._store: Store | None = None
        self._turn: float | None = None
        """When its next turn is."""

    @property
    def name(self) -> str:
        """The device's id."""
        return self.key.id

    @property
    def is_running(self) -> bool:
        """Whether it has a process now."""
        return self.process is not None and self.process.is_alive

    @property
    def waits_for(self) -> str:
        """What it has still to do before it is at rest; nothing for one that is gone."""
        if self.has_left:
            return ""
        if not self.is_running or self._outbox is None or self._local is None:
            return "it is down"
        if len(self._outbox):
            return f"{len(self._outbox)} updates have no receipt"
        model = self._local.model
        newest = self.watch.newest
        if model is None or model.version != newest:
            return f"it has version {model.version if model else None} of {newest}"
        return ""

    def start(self, process: Process) -> None:
        """Begin a life."""
        self.process = process
        process.on_end.append(self._ended)
        self.boots += 1
        try:
            self._start(process)
        except Killed:
            return
        except StoreError as error:  # its folder cannot be used now: whoever runs it tries again
            self.network.trace.event("gave up", self.name, str(error)[:60])
            process.end()
            return
        self._schedule(0.0)

    def stop(self) -> None:
        """End a life politely."""
        process, agent = self.process, self._agent
        if process is None or agent is None or not process.is_alive:
            return
        try:
            agent.stop()
            if self._radio is not None:
                self._radio.close()
        except Killed:
            return
        process.end()

    def residual(self) -> Residual | None:
        """Return what the codec carries to the next update."""
        return None if self._store is None or not self.is_running else self._store.residual()

    @property
    def outbox_bytes(self) -> int:
        """What the outbox takes."""
        return 0 if self._outbox is None else self._outbox.size_bytes

    def poke(self) -> None:
        """Something came for the agent."""
        self._schedule(MIN_TURN_S)

    def _start(self, process: Process) -> None:
        store = _WatchedStore(Path(f"/{self.number}"), self.disk.of(process), self)
        self._store = store
        boot = store.count_boot()
        settings = Settings(
            task=self.task,
            name="",
            sdk="fedge",
            boot=boot,
            start=_start(self.name, self.boots),
            conditions=condition(lambda: self.is_ready),
            root=Path("/nowhere"),
        )
        presence = Presence(self.key, settings, store.count_boot)
        ring = store.samples / "examples.ring"
        if not store.disk.names(store.samples):
            files.write(ring, self.secret * 4, disk=store.disk)
        terms = Terms(starts=1 << 30)  # a life that ends here never ends for the model's sake
        self._local = Local(store, None, runtime=Pretence(self.examples), terms=terms)
        self._outbox = _WatchedOutbox(store, self)
        self._radio = Radio(self.network, process, self.name, presence.will, self.max_packet)
        process.on_end.append(self._radio.end)
        self._agent = Agent(
            settings,
            key=self.key,
            presence=presence,
            store=store,
            local=self._local,
            outbox=self._outbox,
            transport=_Poking(self._radio, self),
            trainer=_NOBODY,
            clock=process,
            failpoints=_Steps(process),
            on_updated=lambda _: None,
            errands=lambda _, folder, ended: Training(self, process, store, folder, ended),
        )
        self._agent.begin()

    def _ended(self) -> None:
        self._turn = None

    def _schedule(self, wait_s: float) -> None:
        """Take a turn after a while. A timer that is no longer wanted fires, and finds that out."""
        loop = self.network.loop
        at_s = loop.now_s + wait_s
        if self._turn is None or at_s < self._turn:
            self._turn = at_s
            loop.call_at(at_s, self._take_turn, at_s)

    def _take_turn(self, at_s: float) -> None:
        agent, process = self._agent, self.process
        if at_s != self._turn or agent is None or process is None or not process.is_alive:
            return
        self._turn = None
        try:
            agent.turn(0.0)
            wait_s = agent.wait_s()
        except Killed:
            return
        self._schedule(max(MIN_TURN_S, wait_s / (1 + process.drift)))


class Training:
    """A `Running`: takes virtual time, and comes to what `model.train` says."""

    def __init__(
        self, board: Board, process: Process, store: Store, folder: Path, ended: Ended
    ) -> None:
        self._board, self._process, self._store = board, process, store
        self._folder, self._ended = folder, ended
        self._timer: asyncio.TimerHandle | None = None
        self._under_way: tuple[int, TrainJob] | None = None

    def begin(self, round_: int, job: TrainJob) -> None:
        """Start."""
        board = self._board
        seconds = board.speed_s * board.rng.uniform(0.5, 1.5)
        limit = job.budget.seconds
        seconds = seconds if limit is None else min(seconds, limit)
        self._under_way = round_, job
        self._timer = board.network.loop.call_later(seconds, self._end, seconds)

    def cancel(self) -> None:
        """Break off."""
        if self._under_way is not None and self._timer is not None:
            self._timer.cancel()
            self._timer = self._board.network.loop.call_later(0.1, self._end, None)

    def join(self, timeout_s: float) -> None:
        """Nobody waits in virtual time."""

    def _end(self, seconds: float | None) -> None:
        if self._under_way is None or not self._process.is_alive:
            return
        (round_, job), self._under_way = self._under_way, None
        result: TrainResult | TrainFailed
        try:
            result = self._train(round_, job, seconds)
        except TrainFailed as error:
            result = error
        except (StoreError, OSError) as error:
            result = TrainFailed(str(error))
        except Killed:
            return
        self._ended(round_, result)
        self._board.poke()

    def _train(self, round_: int, job: TrainJob, seconds: float | None) -> TrainResult:
        if seconds is None:
            raise TrainFailed("cancelled")
        board, disk = self._board, self._store.disk
        base = np.frombuffer(disk.read(job.weights), "<f4").astype(np.float32)
        if (luck := board.rng.random()) > 0.98:
            raise TrainFailed("the training process was killed by SIGKILL; is there enough memory?")
        delta = train(base, (board.number, round_, job.seed % 2**32), luck)
        path = self._folder / f"{round_}.delta.bin"
        files.write(path, delta.astype("<f4").tobytes(), disk=disk)
        board.watch.trained(board.name, delta)
        return TrainResult(path, board.examples, 3, 1, 0.5, seconds, "epochs", 1 << 20)


class _WatchedOutbox(Outbox):
    """The production outbox, and somebody who takes notes."""

    def __init__(self, store: Store, board: Board) -> None:
        self._board = board
        super().__init__(store.outbox, OUTBOX_BYTES, store.disk)
        residual = store.residual()
        held = b"" if residual is None else residual.to_bytes()
        board.watch.restarted(board.name, {waiting.update for waiting in self}, held)

    def append(self, entry: Entry) -> tuple[bytes, ...]:
        """Keep an update."""
        watch, name = self._board.watch, self._board.name
        watch.keeping(name, _noted(entry))
        dropped = super().append(entry)
        watch.kept(name, entry.update)
        return dropped

    def remove(self, update: bytes) -> None:
        """Take an update out."""
        watch, name = self._board.watch, self._board.name
        watch.removing(name, update)
        super().remove(update)
        watch.removed(name, update)


class _WatchedStore(Store):
    """The production state folder, and somebody who takes notes."""

    def __init__(self, folder: Path, disk: files.Disk, board: Board) -> None:
        self._board = board
        super().__init__(folder, disk)

    def set_residual(self, residual: Residual) -> None:
        """Move the residual on."""
        watch, name, data = self._board.watch, self._board.name, residual.to_bytes()
        watch.moving(name, data)
        super().set_residual(residual)
        watch.moved(name, data)


class _Steps(Failpoints):
    """Each failpoint is a step at which the process may end."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self._process = process

    def reach(self, name: str) -> None:
        """Take a step."""
        del name
        self._process.step()


class _Poking:
    """A transport that has the agent take a turn whenever it tells it something."""

    def __init__(self, radio: Radio, board: Board) -> None:
        self._radio, self._board = radio, board
        self.counters, self.max_packet = radio.counters, radio.max_packet
        self.close = radio.close
        self.subscribe, self.unsubscribe = radio.subscribe, radio.unsubscribe

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Send, under somebody's eyes."""
        board = self._board
        board.watch.sent(board.name, topic, payload, board.secret)
        self._radio.publish(topic, payload, retain=retain)

    def start(
        self, on_message: Callable[[str, bytes], None], on_state: Callable[[bool], None]
    ) -> None:
        """Connect."""

        def message(topic: str, payload: bytes) -> None:
            on_message(topic, payload)
            self._board.poke()

        def state(is_up: bool) -> None:
            on_state(is_up)
            self._board.poke()

        self._radio.start(message, state)


class _Nobody(LocalTraining):
    """No training is run but by `Training`."""

    def train(self, job: TrainJob, cancel: object) -> TrainResult:
        raise TrainFailed(f"nobody trains {job.out}: {cancel}")


_NOBODY = _Nobody()


def _start(name: str, boots: int) -> int:
    """Return what tells a life from every other, without a draw."""
    drawn = hashlib.sha256(f"{name} {boots}".encode()).digest()
    return int.from_bytes(drawn[:8], "big") >> 1


def _noted(entry: Entry) -> Kept:
    return Kept(entry.update, entry.round, entry.frame, entry.if_accepted, entry.if_refused)
