# SPDX-License-Identifier: Apache-2.0
"""One run: a coordinator, a broker and devices, troubled for a while, then left to finish.

Everything is drawn from the seed: the task, its pace, the faults and when they strike. After the
trouble the network heals, every process that is to come back does, and the run goes on until the
task is at its last version and every device at rest; that has to happen in bounded time.
"""

from __future__ import annotations

import asyncio
import gc
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from coordinator import config, pacing
from coordinator.pacing import Pace
from coordinator.service import Coordinator
from coordinator.simulation import faults as trouble
from coordinator.simulation.board import OUTBOX_BYTES, Board
from coordinator.simulation.database import Database
from coordinator.simulation.ends import Trunk
from coordinator.simulation.faults import CLASSES, Faults
from coordinator.simulation.listen import listening
from coordinator.simulation.loop import VirtualLoop
from coordinator.simulation.memo import remembering
from coordinator.simulation.model import tiny
from coordinator.simulation.network import Network
from coordinator.simulation.process import LIFE, Killed, Process, Tasks, factory
from coordinator.simulation.signer import identity
from coordinator.simulation.trace import Trace
from coordinator.simulation.watch import Broken, Watch
from coordinator.store import Store
from coordinator.strategy import Strategy, fedadam, fedavg, fedavgm, fedbuff
from coordinator.task import Task
from edge_sdk.errors import ConfigError, FedgeError

REAL_SIGNATURES_EVERY = 50
TICK_S = 5.0
PATIENCE_S = 1500.0
"""Within this after the trouble the task is done: retries of ten minutes, and its rounds."""
REST_S = 200.0
"""Within this after its last version every device is at rest."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What is simulated; the seed draws what is not given."""

    seed: int
    devices: int = 20
    rounds: int = 5
    faults: tuple[str, ...] = CLASSES
    config: Path | None = None
    """A `coordinator.toml` whose task is simulated, with the bundle of all simulations."""
    task: str | None = None
    """Which of its tasks; None for the first."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a run."""

    seed: int
    broken: Broken | None
    versions: tuple[str, ...]
    """The digest of each version, from 0."""
    rounds: dict[str, int]
    receipts: dict[str, int]
    faults: dict[str, int]
    events: int
    virtual_s: float
    trace: str
    """A hash of all that happened: the same seed comes to the same."""
    latest: list[str] = field(default_factory=list)
    """The latest events, if an invariant broke."""

    @property
    def holds(self) -> bool:
        """Whether every invariant held."""
        return self.broken is None


def simulate(setup: Setup) -> Outcome:
    """Run one seed to its end, or to the first invariant that does not hold."""
    return World(setup).run()


class World:
    """All there is in one run."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.rng = rng = random.Random(f"fedge {setup.seed}")  # noqa: S311 - faults, not secrets
        self.faults = trouble.draw(rng, setup.faults)
        self.task, self.pace = _task(rng, setup)
        self.loop = VirtualLoop(self._report)
        self.loop.set_task_factory(factory)
        self.trace = Trace(self.loop)
        self.watch = Watch(self.task, self.pace, self.trace)
        self.network = Network(self.loop, rng, self.faults, self.trace)
        self.database = Database(rng, self.watch.committed)
        real = setup.seed % REAL_SIGNATURES_EVERY == REAL_SIGNATURES_EVERY - 1
        self.key = identity(f"{setup.seed} coordinator", real=real)
        packet = rng.choice((120_000, 120_000, 512))
        self.boards = [
            Board(
                i,
                identity(f"{setup.seed} {i}", real=real),
                self.task.name,
                network=self.network,
                watch=self.watch,
                rng=rng,
                max_packet=packet,
            )
            for i in range(setup.devices)
        ]
        self.is_calm = False
        self.is_done = False
        self._process: Process | None = None
        self._life = Tasks()
        self._main: asyncio.Task[None] | None = None
        self._link: Trunk | None = None

    def run(self) -> Outcome:
        """Run to the end."""
        had_gc = gc.isenabled()
        gc.disable()  # a run is short, and what is young in it is all of it
        try:
            with listening(self.watch), remembering():
                self.loop.run(self._run())
            return self._outcome()
        finally:
            if had_gc:
                gc.enable()

    def _outcome(self) -> Outcome:
        watch, trace = self.watch, self.trace
        self.database.db.close()
        return Outcome(
            seed=self.setup.seed,
            broken=watch.broken,
            versions=tuple(digest.hex() for digest in watch.digests),
            rounds=dict(sorted(Counter(watch.rounds.values()).items())),
            receipts=dict(sorted(watch.outcomes.items())),
            faults=dict(sorted(trace.faults.items())),
            events=trace.events,
            virtual_s=self.loop.now_s,
            trace=trace.digest,
            latest=[] if watch.broken is None else trace.latest(),
        )

    # --- the course of a run --------------------------------------------------------------------
    async def _run(self) -> None:
        supervisor = asyncio.create_task(self._supervise())
        for board in self.boards:
            self._later(self.rng.uniform(0.0, 5.0), partial(self._boot, board))
        self._begin_trouble()
        calm_s = self.rng.uniform(30.0, 90.0)
        await self._until(lambda: self.is_done, calm_s)
        self._calm()
        if not await self._until(lambda: self.is_done, PATIENCE_S):
            self.watch.fail(
                "I5", f"not done {PATIENCE_S:g} s after the last fault: {self._state()}"
            )
        if not await self._until(lambda: not self._restless(), REST_S):
            self.watch.fail("I3", f"not at rest after {REST_S:g} s: {self._restless()[0]}")
        for board in self.boards:
            if not board.has_left:
                self.watch.residual(board.name, board.residual())
        if self.watch.broken is None:
            self.watch.finish(self.database.db)
        supervisor.cancel()
        await self._end_coordinator()
        for board in self.boards:
            if board.process is not None:
                board.process.end()

    async def _until(self, claim: Callable[[], object], seconds: float) -> bool:
        """Let time pass until `claim` holds or an invariant breaks; say whether it came true."""
        until_s = self.loop.now_s + seconds
        while self.watch.broken is None and not claim():
            if self.loop.now_s >= until_s:
                return False
            await asyncio.sleep(min(TICK_S, until_s - self.loop.now_s))
            self._tick()
        return True

    def _tick(self) -> None:
        if self._link is not None and self._link.is_up:
            self.watch.tick()
        for board in self.boards:
            if board.outbox_bytes > OUTBOX_BYTES:
                self.watch.fail("I6", f"{board.name} holds {board.outbox_bytes} bytes of updates")

    def _restless(self) -> list[str]:
        found = ((board.name, board.waits_for) for board in self.boards)
        return [f"{name}: {why}" for name, why in found if why]

    def _state(self) -> str:
        newest, rounds = self.watch.newest, Counter(self.watch.rounds.values())
        return f"version {newest}, rounds {dict(rounds)}"

    def _report(self, message: str, error: BaseException | None) -> None:
        if not isinstance(error, Killed):
            self.watch.fail("crash", f"{message}: {error!r}")

    def _later(self, seconds: float, what: Callable[[], object]) -> None:
        self.loop.call_later(seconds, what)

    # --- processes ------------------------------------------------------------------------------
    def _new_process(self, name: str, steps: int) -> Process:
        origin, drift, doomed = self.rng.uniform(0.0, 1e5), 0.0, None
        if self.faults.clocks and not self.is_calm:
            drift = self.rng.uniform(-5e-4, 5e-4)
        if not self.is_calm and self.rng.random() < self.faults.doomed:
            doomed = self.rng.randint(1, steps)
        if not self.faults.clocks:
            origin = self.loop.now_s
        self.trace.event("start", name, "" if doomed is None else f"ends at step {doomed}")
        return Process(name, self.loop, origin, drift, doomed)

    def _boot(self, board: Board) -> None:
        if board.is_running or board.has_left:
            return
        process = self._new_process(board.name, 400)
        process.on_end.append(lambda: self._board_ended(board))
        board.start(process)

    def _board_ended(self, board: Board) -> None:
        self.trace.event("end", board.name)
        if not self.is_calm and self.rng.random() < self.faults.power:
            self.trace.fault("power cut", board.name, board.disk.power_cut())
        self._later(self.rng.uniform(0.2, 15.0), lambda: self._boot(board))

    async def _supervise(self) -> None:
        while True:
            self._life = Tasks()
            process = self._process = self._new_process("coordinator", 1500)
            ended = asyncio.Event()
            process.on_end.append(ended.set)
            token = LIFE.set(self._life)
            self._main = asyncio.create_task(self._coordinate(process))
            LIFE.reset(token)
            ending = asyncio.create_task(ended.wait())
            await asyncio.wait({self._main, ending}, return_when=asyncio.FIRST_COMPLETED)
            ending.cancel()
            await self._end_coordinator()
            self.trace.event("end", "coordinator")
            await asyncio.sleep(self.rng.uniform(0.2, 5.0))

    async def _end_coordinator(self) -> None:
        if self._process is not None:
            self._process.end()
        await self._life.clear()

    async def _coordinate(self, process: Process) -> None:
        link = Trunk(self.network, process, self.watch)
        process.on_end.append(link.end)
        self._link = link
        link.connect()
        store = Store(self.database.writer(process))
        self.watch.excuse()
        try:
            async with Coordinator(
                store=store, signer=self.key, clock=process, link=link
            ) as coordinator:
                async for result in coordinator.train(self.task, self.pace):
                    self.trace.event(result.outcome, "round", str(result.number))
                self.is_done = True
                self.trace.event("done", "coordinator")
                await asyncio.Event().wait()
        except FedgeError as error:  # its disk was full at the start: it is started again
            self.trace.event("gave up", "coordinator", str(error)[:60])
        except Exception as error:  # noqa: BLE001 - nothing else may end it
            self.watch.fail("crash", f"the coordinator ended with {error!r}")

    # --- trouble --------------------------------------------------------------------------------
    def _begin_trouble(self) -> None:
        f = self.faults
        self._now_and_then(f.partition_every_s, self._partition)
        self._now_and_then(f.broker_every_s, self._break_broker)
        self._now_and_then(f.device_every_s, self._end_board)
        self._now_and_then(f.coordinator_every_s, self._end_main)
        self._now_and_then(f.disk_every_s, self._fill_disk)
        self._now_and_then(f.unready_every_s, self._unready)
        for board in self.boards:
            if self.rng.random() < f.leave and self._may_leave():
                board.has_left = True
                at_s = self.rng.uniform(5.0, 60.0)
                self._later(at_s, partial(self._leave, board))

    def _may_leave(self) -> bool:
        """Say whether enough stay for a quorum, and for a cohort where only that commits."""
        staying = sum(not board.has_left for board in self.boards)
        return staying - 1 >= max(self.pace.quorum, self.pace.size or 0) + 2

    def _now_and_then(self, every_s: float, what: Callable[[], object]) -> None:
        if every_s >= trouble.NEVER_S:
            return

        def strike() -> None:
            if not self.is_calm:
                what()
                self._now_and_then(every_s, what)

        self._later(self.rng.expovariate(1.0 / every_s), strike)

    def _some_board(self) -> Board:
        return self.rng.choice(self.boards)

    def _partition(self) -> None:
        who = "coordinator" if self.rng.random() < 0.1 else self._some_board().name
        up, down = self.rng.choice(((True, True), (True, False), (False, True)))
        seconds = self.rng.choice((1.0, 5.0, 20.0, 40.0)) * self.rng.uniform(0.5, 1.5)
        self.trace.fault("partition", who, f"up={up} down={down} {seconds:.1f} s")
        self.network.partition(who, up=up, down=down, seconds=seconds)

    def _break_broker(self) -> None:
        broker = self.network.broker
        if not broker.is_up:
            return
        self.trace.fault("broker", "broker", f"forgets {self.faults.broker_forgets:.0%}")
        broker.stop()
        forgets = self.faults.broker_forgets
        self._later(self.rng.uniform(0.1, 12.0), lambda: broker.start(self.rng, forgets))

    def _end_board(self) -> None:
        board = self._some_board()
        if not board.is_running or board.process is None:
            return
        if self.rng.random() < 0.2:
            self.trace.fault("stop", board.name)
            board.stop()
        else:
            self.trace.fault("kill", board.name)
            board.process.end()

    def _leave(self, board: Board) -> None:
        self.trace.fault("leave", board.name)
        if board.process is not None:
            board.process.end()

    def _end_main(self) -> None:
        if self._process is None or self._main is None or not self._process.is_alive:
            return
        if self.rng.random() < 0.2:
            self.trace.fault("stop", "coordinator")
            self._main.cancel()
        else:
            self.trace.fault("kill", "coordinator")
            self._process.end()

    def _fill_disk(self) -> None:
        seconds = self.rng.uniform(1.0, 20.0)
        draw = self.rng.random()
        if draw < 0.6:
            disk, name = self._some_board().disk, "device"
            disk.is_full = True
            self._later(seconds, lambda: setattr(disk, "is_full", False))
        elif draw < 0.8:
            name, self.database.is_full = "coordinator", True
            self.watch.excuse(seconds)
            self._later(seconds, self._empty_database)
        else:
            name, self.database.stall_s = "coordinator, slow", self.rng.uniform(0.1, 3.0)
            self.watch.excuse(seconds)
            self._later(seconds, self._quicken_database)
        self.trace.fault("disk", name, f"{seconds:.1f} s")

    def _empty_database(self) -> None:
        self.database.is_full = False
        self.watch.excuse()

    def _quicken_database(self) -> None:
        self.database.stall_s = 0.0
        self.watch.excuse()

    def _unready(self) -> None:
        board = self._some_board()
        board.is_ready = False
        self.trace.fault("unready", board.name)
        self._later(self.rng.uniform(2.0, 30.0), lambda: setattr(board, "is_ready", True))

    def _calm(self) -> None:
        """End all trouble."""
        self.is_calm = True
        self.trace.event("calm", "all")
        self.network.faults = self.faults = Faults()
        if self._process is not None:
            self._process.doomed_at = None
        self._empty_database()
        self._quicken_database()
        if not self.network.broker.is_up:
            self.network.broker.start(self.rng, 0.0)
        self.network.heal()
        for board in self.boards:
            board.disk.is_full, board.is_ready = False, True
            if board.process is not None:
                board.process.doomed_at = None
            if board.has_left and board.is_running:
                self._leave(board)
            self._boot(board)


def _task(rng: random.Random, setup: Setup) -> tuple[Task, Pace]:
    """Draw the task and its pace, where they are not given."""
    pace = _pace(rng, setup)
    task = Task(
        "sim",
        tiny(),
        strategy=_strategy(rng, pace),
        codec=rng.choice(("default", "default", "lean", "exact-ish", "dense", "stateless")),
        downlink=rng.choice(("downlink", "downlink", "dense")),
        late="fold" if pace.size is not None else rng.choice(("fold", "fold", "refuse")),
        max_norm=100.0,
        seed=rng.randrange(2**31),
    )
    if setup.config is not None:
        return _configured(setup.config, setup.task)
    return task, pace


def _configured(file: Path, name: str | None) -> tuple[Task, Pace]:
    """Return a task of a configuration as it is simulated.

    Raises: ConfigError when there is none of that name.
    """
    tasks = [both for both in config.load(file).tasks if name in (None, both[0].name)]
    if not tasks:
        raise ConfigError(f"expected a task of {file}, got {name!r}")
    task, pace = tasks[0]
    return replace(task, bundle=tiny()), pace


def _pace(rng: random.Random, setup: Setup) -> Pace:
    most = max(2, setup.devices * 6 // 10)
    cohort = rng.randint(max(2, most // 3), most)
    deadline_s = rng.uniform(6.0, 30.0)
    if rng.random() < 0.15:
        size = max(1, cohort // 2)
        return pacing.buffered(
            size=size,
            concurrency=cohort,
            deadline_s=deadline_s,
            max_staleness=rng.choice((2, 10)),
            count=setup.rounds,
        )
    return pacing.rounds(
        cohort=cohort,
        quorum=rng.randint(1, cohort),
        deadline_s=deadline_s,
        count=setup.rounds,
        overselect=rng.choice((1.0, 1.3, "auto")),
        select_s=rng.uniform(1.0, 5.0),
        extend=rng.choice((0, 0, 1)),
        adapt=rng.choice((None, None, 3.0)),
    )


def _strategy(rng: random.Random, pace: Pace) -> Strategy:
    if pace.size is not None:
        return fedbuff()
    if rng.random() < 0.7:
        return fedavg()
    return rng.choice((fedadam, fedavgm))()
