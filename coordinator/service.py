# SPDX-License-Identifier: Apache-2.0
"""The coordinator: joins the pure rounds to the store, the broker and the clock.

async with Coordinator("mqtts://localhost", store="/var/lib/fedge") as coordinator:
    async for r in coordinator.train(Task("pump", "pump.fedge"), rounds(cohort=20, deadline_s=600)):
        print(r.number, r.outcome, len(r.reported), r.metrics["loss"])
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from coordinator import desk as desks
from coordinator import pacing, sampling
from coordinator.clock import Clock, SystemClock
from coordinator.desk import Desk, Next, RoundResult
from coordinator.fleet import Fleet
from coordinator.intake import Intake, Later
from coordinator.letters import FileMarker, Letters, Marker
from coordinator.link import Link
from coordinator.pacing import Pace
from coordinator.publishing import Publisher, seed_of
from coordinator.rounds import Action, Declined, Invite, Left, Round, begin
from coordinator.store import Store, StoredRound
from coordinator.task import Task
from coordinator.versions import first_version
from coordinator.warden import Warden
from coordinator.writer import ContradictionError
from edge_sdk import params as tensors
from edge_sdk import topics
from edge_sdk.errors import ConfigError, FedgeError, StoreError
from edge_sdk.signing import DeviceKey, Identity
from edge_sdk.types import Params

if TYPE_CHECKING:
    from typing import Self

log = logging.getLogger(__name__)

IN_FLIGHT = 256
"""Messages dealt with at a time: more wait at the broker, not in memory."""
RETRY_S = 1.0
STOP_S = 2.0
DATABASE, KEY, MARKER = "coordinator.db", "coordinator.key", "handling"


class Coordinator:
    """Trains tasks on the devices behind one broker. Use it with `async with`.

    Args:
        url: mqtt://[user[:password]@]host[:1883] or mqtts://host[:8883].
        store: the folder of the database and of the coordinator's key; or an open `Store`, which
            is closed with us, for simulation.
        ca_file: whom to trust for mqtts, in place of the system's authorities.
        username, password: credentials at the broker.
        client_id: the name of the session at the broker.
        clock: time, for tests.
        link: a connection in place of `url`, for tests and simulation.
        signer: who signs, in place of the key in the store's folder.

    Raises: StoreError when the store cannot be used, TransportError when the broker cannot be
        reached at the start.
    """

    def __init__(
        self,
        url: str = "",
        *,
        store: str | Path | Store,
        ca_file: str | Path | None = None,
        username: str | None = None,
        password: str | None = None,
        client_id: str = "fedge-coordinator",
        clock: Clock | None = None,
        link: Link | None = None,
        signer: Identity | None = None,
    ) -> None:
        if isinstance(store, Store) and signer is None:
            raise ConfigError("expected a signer beside an open store, got none")
        self._given_store, self._given_signer = store, signer
        self._clock = clock or SystemClock()
        self._given_link = link
        self._connect = {
            "url": url,
            "client_id": client_id,
            "ca_file": ca_file,
            "username": username,
            "password": password,
        }
        self._stack = contextlib.AsyncExitStack()
        self._work: set[asyncio.Task[None]] = set()
        self._slots = asyncio.Semaphore(IN_FLIGHT)
        self._failed: BaseException | None = None

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            self._store, signer = await self._open_store(stack)
            link = await self._open_link(stack)
            self._publisher = Publisher(link, signer)
            letters = Letters(self._store, self._clock, self._marker(stack))
            await letters.load()
            self._intake = Intake(
                self._store,
                self._publisher,
                self._act,
                self._clock.monotonic,
                letters,
                scheme=signer.verify,
            )
            for known in await self._store.devices():
                self.fleet.remember(known)
            self._warden = Warden(self._store, self._intake, self._clock, self._fail)
            await self._warden.heed()
            stack.push_async_callback(_cancelled, asyncio.create_task(self._warden.keep()))
            reader = asyncio.create_task(self._read(link), name="fedge-intake")
            stack.push_async_callback(self._stop, reader)
            await link.subscribe(topics.status_filter())
            self._link = link
            link.on_up = self._reconnected
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    @property
    def fleet(self) -> Fleet:
        """The devices known, who is online and who checked in."""
        return self._intake.fleet

    @property
    def counters(self) -> Counter[str]:
        """Messages by outcome: counted, late, duplicate, stale, refused, forged, malformed, .."""
        return self._intake.counters

    async def train(self, task: Task, pace: Pace) -> AsyncGenerator[RoundResult, None]:
        """Yield each round's result, commits and aborts, until the task is at its last version.

        A round that was open when an earlier coordinator died goes on where it was. Several tasks
        train at once, each in its own loop; between two rounds the loop's body has all the time
        it wants.
        Raises: BundleError, ConfigError and StoreError when the task cannot start.
        """
        if pace.size is not None and task.late == "refuse":
            raise ConfigError(
                f'task {task.name}: a buffered pace lives on late updates; late = "fold"'
            )
        desk = await self._open(task, pace)
        try:
            while desk.current is not None or _goes_on(desk, pace):
                if desk.current is None:
                    await self._begin(desk, pace)
                result = await self._finish(desk)
                await self._publisher.model(desk, "open" if _goes_on(desk, pace) else "closed")
                pause_s = pace.select_s if result.outcome == "abort" else pace.rest_s
                desk.next_at_s = self._clock.monotonic() + pause_s
                yield result
                if _goes_on(desk, pace):
                    await self._rest(desk)
        finally:
            self._running.discard(task.name)

    async def params(self, task: Task, version: int) -> Params:
        """Return the trainable tensors of one version, for evaluation and export.

        Raises: StoreError when there is none of that number, or it is older than is kept.
        """
        shapes = task.load().shapes
        stored = await self._store.version(task.name, version)
        return tensors.unflatten(np.frombuffer(stored.params, "<f4").astype(np.float32), shapes)

    async def check_alive(self) -> str | None:
        """Return once the loop has turned and the store has answered: what troubles it, if any.

        In trouble no receipt is sent and no round begins, until it is over.
        Raises: what stopped the coordinator, if something did.
        """
        await self._store.probe()
        self._raise_if_failed()
        return self._store.trouble

    @property
    def _running(self) -> set[str]:
        return self._intake.running

    async def _open_store(self, stack: contextlib.AsyncExitStack) -> tuple[Store, Identity]:
        given, signer = self._given_store, self._given_signer
        if isinstance(given, Store):
            stack.callback(given.close)
            return given, cast("Identity", signer)
        store = await asyncio.to_thread(Store, Path(given) / DATABASE)
        stack.push_async_callback(asyncio.to_thread, store.close)
        return store, signer or DeviceKey.load_or_create(Path(given) / KEY)

    def _marker(self, stack: contextlib.AsyncExitStack) -> Marker | None:
        if isinstance(self._given_store, Store):
            return None
        marker = FileMarker(Path(self._given_store) / MARKER)
        stack.callback(marker.close)
        return marker

    async def _open_link(self, stack: contextlib.AsyncExitStack) -> Link:
        if self._given_link is not None:
            return self._given_link
        from coordinator.mqtt import Mqtt

        connect: dict[str, Any] = self._connect
        return await stack.enter_async_context(Mqtt(**connect))

    async def _open(self, task: Task, pace: Pace) -> Desk:
        if task.name in self._running:
            raise ConfigError(f"task {task.name} is already being trained: give each its own name")
        self._running.add(task.name)
        try:
            bundle = task.load()
            await self._settled()  # an update on its way into an earlier loop of the same task
            first = first_version(task, bundle)
            digest = bytes.fromhex(bundle.digest)
            recent = max(desks.RECENT, (pace.max_staleness or 0) + 1)
            resumed = await self._store.resume(task.name, digest, first, recent)
            desk = desks.begin(task, bundle, pace, resumed, self._clock.monotonic())
            desk.spread_s = pacing.spread_s(len(self.fleet.devices))
            self.fleet.admit(task.name, task.entry)
            if unmet := pacing.unmet(pace, task.entry.devices):
                log.warning("task %s: %s", task.name, unmet)
            self.fleet.recall(task.name)
            self._warden.hold(desk)
            for work in self._intake.open(desk):
                self._spawn(work)
            await self._link.subscribe(topics.up_filter(task.name))
            self._note_absent(desk)
            await self._publisher.all(desk)
        except BaseException:
            self._running.discard(task.name)
            raise
        log.info(
            "task open task=%s version=%d call=%d pending=%d round=%s",
            task.name,
            desk.version.number,
            desk.call,
            len(desk.folded),
            desk.current.number if desk.current else "-",
        )
        return desk

    async def _begin(self, desk: Desk, pace: Pace) -> None:
        """Wait for enough devices, store the round, then invite them."""
        number, name = desk.next_round, desk.task.name
        seed = seed_of(name, desk.task.seed, number)
        cohort = await self._select(desk, pace, seed)
        standings = self.fleet.standings(name)
        call = desk.call
        goal = min(pace.cohort, len(cohort)) if pace.size is None else pace.size
        opened, actions = begin(
            number, desk.version.number, cohort, quorum=min(pace.quorum, goal), goal=goal
        )
        deadline_s = pace.time_for(self.fleet.lately_s.get(name, ()))
        stored = StoredRound(
            *(number, opened.version, opened.cohort, opened.quorum, goal, deadline_s, seed),
            standings=standings,
        )
        await self._insist(name, lambda: self._store.open_round(name, stored))
        desk.open(stored, opened, self._clock.monotonic())
        # After a new roll call nobody is ready yet, and nobody has withdrawn either.
        self._note_absent(desk, self.fleet.ready(name) if desk.call == call else None)
        log.info("round open task=%s round=%d cohort=%d", name, number, len(cohort))
        self._act(desk, actions)

    def _note_absent(self, desk: Desk, ready: AbstractSet[str] | None = None) -> None:
        """Tell the open round who left, or is no longer `ready`, while nobody was listening."""
        for device in sorted(desk.current.awaited) if desk.current else ():
            if self.fleet.has_left(device):
                self._act(desk, desk.apply(Left(device)))
            elif ready is not None and device not in ready:
                self._act(desk, desk.apply(Declined(device)))

    async def _select(self, desk: Desk, pace: Pace, seed: int) -> Sequence[str]:
        if pace.size is not None:
            return await self._select_idle(desk, seed)
        quorum_since: float | None = None
        while True:
            desk.changed.clear()
            self._warden.hold(desk)
            ready, now = self.fleet.ready(desk.task.name), self._clock.monotonic()
            if len(ready) < pace.quorum:
                quorum_since = None
            elif quorum_since is None:
                quorum_since = now
            waited_s = 0.0 if quorum_since is None else now - quorum_since
            wanted = pace.invite(len(ready), waited_s, self.fleet.completion_of(desk.task.name))
            if wanted:
                return sampling.uniform(ready, wanted, np.random.default_rng(seed))
            until_s = math.inf if quorum_since is None else quorum_since + pace.select_s
            await self._wait(desk, until_s)

    async def _select_idle(self, desk: Desk, seed: int) -> Sequence[str]:
        """Wait until somebody is idle and the pace has room for them."""
        while True:
            desk.changed.clear()
            self._warden.hold(desk)
            chosen = self._idle(desk, seed)
            if chosen:
                return chosen
            await self._wait(desk, self._clock.monotonic() + desk.pace.deadline_s)

    def _idle(self, desk: Desk, seed: int) -> Sequence[str]:
        ready = self.fleet.ready(desk.task.name)
        idle, room = desk.wanted(ready, self._clock.monotonic())
        return sampling.uniform(idle, room, np.random.default_rng(seed)) if room else ()

    async def _top_up(self, desk: Desk, r: Round) -> None:
        """Put idle devices to work in an open-ended round: who reported is replaced at once."""
        seed = seed_of(desk.stored(r.number).seed, len(r.cohort))
        if not (new := frozenset(self._idle(desk, seed))):
            return
        name, cohort = desk.task.name, r.cohort | new
        await self._insist(name, lambda: self._store.join_round(name, r.number, cohort))
        self._act(desk, desk.join(new, self._clock.monotonic()))

    async def _finish(self, desk: Desk) -> RoundResult:
        """Wait until the open round is settled, then store what it came to."""
        r = desk.current
        if r is None:
            raise RuntimeError("no round is open")
        await self._outwait(desk, desk.stored(r.number).deadline_s)
        settled = desk.settle()
        await self._keep(desk, settled)
        desk.close(settled)
        result = settled.result
        self._learn_completion(desk.task.name, result)
        _log_result(desk.task.name, result)
        return result

    async def _outwait(self, desk: Desk, deadline_s: float) -> None:
        """Wait until the open round is settled."""
        deadline, extensions = self._clock.monotonic() + deadline_s, desk.pace.extend
        while (r := desk.current) is not None and r.verdict == "waiting":
            desk.changed.clear()
            if r.is_open_ended:
                await self._top_up(desk, r)
            if await self._wait(desk, deadline) or self._clock.monotonic() < deadline:
                continue
            deadline += deadline_s
            if extensions and not r.has_quorum:
                extensions -= 1
                log.info("round extended task=%s round=%d", desk.task.name, r.number)
            else:
                self._act(desk, desk.expire())

    def _learn_completion(self, task: str, r: RoundResult) -> None:
        """Note the share that completed; who was still at work when the goal was met is no loss."""
        lost = len(r.left) + len(r.declined) + (len(r.stragglers) if r.is_expired else 0)
        self.fleet.completed(task, len(r.reported) + lost, len(r.reported))

    async def _keep(self, desk: Desk, settled: Next) -> None:
        """Store what a round came to."""
        name, record = desk.task.name, settled.result.record()

        async def write() -> None:
            if settled.version is None:
                await self._store.abort(name, settled.result.number, record, settled.folded)
            else:
                await self._store.commit(name, settled.version, settled.folded, record)

        await self._insist(name, write)

    async def _insist(self, task: str, write: Callable[[], Awaitable[None]]) -> None:
        """Write, however long the disk refuses: rounds wait for it and lose nothing."""
        said = ""
        while True:
            try:
                return await write()
            except ContradictionError:
                raise
            except StoreError as error:
                if said != (said := str(error)):
                    log.warning("round waits for the disk task=%s reason=%s", task, error)
                await self._clock.wait(asyncio.Event(), self._clock.monotonic() + RETRY_S)

    async def _rest(self, desk: Desk) -> None:
        """Pause as the pace says, and after an abort: a fleet in trouble is not asked at once."""
        while self._clock.monotonic() < desk.next_at_s:
            desk.changed.clear()
            await self._wait(desk, desk.next_at_s)

    async def _wait(self, desk: Desk, until_s: float) -> bool:
        self._raise_if_failed()
        happened = await self._clock.wait(desk.changed, until_s)
        self._raise_if_failed()
        return happened

    def _raise_if_failed(self) -> None:
        if self._failed is not None:
            raise self._failed

    def _reconnected(self) -> None:
        """Call the roll anew: the broker may have lost check-ins, updates and what it retained."""
        for name in sorted(self._running & self._intake.desks.keys()):
            self._spawn(self._call_roll(self._intake.desks[name]))

    async def _call_roll(self, desk: Desk) -> None:
        async def write() -> None:
            desk.call = await self._store.next_call(desk.task.name)

        await self._insist(desk.task.name, write)
        desk.spread_s = pacing.spread_s(len(self.fleet.devices))
        self.fleet.recall(desk.task.name)
        self._intake.called(desk)
        await self._publisher.all(desk)

    def _act(self, desk: Desk, actions: tuple[Action, ...]) -> None:
        for action in actions:
            if isinstance(action, Invite):
                self._spawn(self._publisher.invite(desk, action.device))
        desk.changed.set()

    async def _read(self, link: Link) -> None:
        try:
            async for topic, payload, ack in link.messages():
                work = self._intake.take(topic, payload)
                if work is None:
                    ack()
                    continue
                await self._slots.acquire()
                self._spawn(self._do(work, ack))
        except FedgeError as error:
            self._fail(error)
        else:
            self._fail(FedgeError("the connection to the broker is closed"))

    def _fail(self, error: FedgeError) -> None:
        """End every task with what cannot be gone on from."""
        self._failed = error
        for desk in self._intake.desks.values():
            desk.changed.set()

    async def _do(self, work: Later, ack: Callable[[], None]) -> None:
        try:
            await work
        finally:
            self._slots.release()
            ack()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(_guarded(work))
        self._work.add(task)
        task.add_done_callback(self._work.discard)

    async def _settled(self) -> None:
        if self._work:
            await asyncio.wait(self._work)

    async def _stop(self, reader: asyncio.Task[None]) -> None:
        """Stop reading, give what is under way a moment, and let the outboxes resend the rest."""
        reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reader
        if self._work:
            _, late = await asyncio.wait(self._work, timeout=STOP_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _guarded(work: Coroutine[Any, Any, None]) -> None:
    """Whatever a message or the network does, the rounds go on."""
    try:
        await work
    except Exception:
        log.exception("work failed")


def _goes_on(desk: Desk, pace: Pace) -> bool:
    return pace.last_version is None or desk.version.number < pace.last_version


def _log_result(task: str, r: RoundResult) -> None:
    log.info(
        "round %s task=%s round=%d version=%d "
        "reported=%d left=%d stragglers=%d late=%d loss=%.4g%s",
        r.outcome,
        task,
        r.number,
        r.version,
        len(r.reported),
        len(r.left),
        len(r.stragglers),
        len(r.late),
        r.metrics["loss"],
        f" reason={r.reason!r}" if r.reason else "",
    )
