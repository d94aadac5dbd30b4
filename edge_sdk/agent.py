# SPDX-License-Identifier: Apache-2.0
"""The thread that deals with the coordinator: frames in, session steps, actions out.

Everything that happens (a frame, a connection, a finished training) is put into one queue; one
thread takes it out, steps the pure session and does what it says. Nothing that the network sends
ends this thread: what is wrong is counted and logged, seldom.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from edge_sdk import events as ev
from edge_sdk import messages, opening, topics
from edge_sdk.errand import Errand, Errands
from edge_sdk.errors import FedgeError, MessageError, RefusedError, StoreError
from edge_sdk.failpoints import Failpoints
from edge_sdk.fetching import Fetching
from edge_sdk.journal import Journal
from edge_sdk.local import Local
from edge_sdk.messages import Heard, Invite, Missing, Offer, Part, Receipt
from edge_sdk.meter import Meter
from edge_sdk.model import Model
from edge_sdk.outbox import Outbox
from edge_sdk.presence import Presence
from edge_sdk.readiness import Readiness
from edge_sdk.rollcall import RollCall
from edge_sdk.session import next_due, step
from edge_sdk.settings import Settings
from edge_sdk.signing import Identity
from edge_sdk.stint import Stint
from edge_sdk.store import Store
from edge_sdk.training import LocalTraining
from edge_sdk.transport import Transport
from edge_sdk.trust import Trust
from edge_sdk.types import Clock
from edge_sdk.uploads import Uploads

log = logging.getLogger(__name__)

CONDITIONS_POLL_S = 10.0
STATUS_EVERY_S = 30.0
STOP_PATIENCE_S = 3.0
MAX_QUEUED_BYTES = 32 * 2**20
LOG_BAD_EVERY_S = 60.0


@dataclass(slots=True)
class Tally:
    """What has been done since the start."""

    rounds: int = 0
    receipts: Counter[str] = field(default_factory=Counter)
    bad_frames: int = 0
    last_receipt: dict[str, Any] | None = None


Thunk = Callable[[], list[ev.Event]]


class Agent:
    """One device's dealings with one task, in one thread."""

    def __init__(
        self,
        settings: Settings,
        *,
        key: Identity,
        presence: Presence,
        store: Store,
        local: Local,
        outbox: Outbox,
        transport: Transport,
        trainer: LocalTraining,
        clock: Clock,
        failpoints: Failpoints,
        on_updated: Callable[[Model], None],
        errands: Errands = Errand,
    ) -> None:
        self.tally = Tally()
        self.on_turn: Callable[[], object] | None = None
        """Called in the agent's thread after each turn, the idle ones included."""
        self._settings, self._key, self._store, self._local = settings, key, store, local
        self._outbox, self._transport = outbox, transport
        self._clock, self._failpoints, self._on_updated = clock, failpoints, on_updated
        self._uploads = Uploads(
            task=settings.task,
            key=key,
            store=store,
            outbox=outbox,
            publish=transport.publish,
            failpoints=failpoints,
            max_packet=lambda: getattr(transport, "max_packet", messages.MAX_FRAME),
            is_sending=getattr(transport, "is_sending", lambda _topic: False),
        )
        self._trust = Trust(store, settings.pinned)
        version = local.model.version if local.model else -1
        self._roll = RollCall(settings.task, key, presence, transport, version)
        self._queue: queue.SimpleQueue[Thunk | None] = queue.SimpleQueue()
        self._queued_bytes, self._queue_lock = 0, threading.Lock()
        usage = store.folder / "usage.json"
        self._meter = Meter(usage, settings.limits, clock, settings.root, store.disk)
        where, counters = store.folder / "why", transport.counters
        self._journal = Journal(where, clock, counters, settings.boot, store.disk)
        self._readiness = Readiness(settings, self._meter, local, counters, store.quota)
        self._fetching = Fetching(settings.task, store, local, transport, self._readiness.may_take)
        self._stint = Stint(
            store=store,
            local=local,
            uploads=self._uploads,
            meter=self._meter,
            clock=clock,
            failpoints=failpoints,
            later=self._queue.put,
            trainer=trainer,
            errands=errands,
            limits=settings.limits,
            threads=settings.threads,
            engine=settings.engine,
            root=settings.root,
            checkpoint_s=settings.checkpoint_s,
        )
        self._session = opening.first(
            settings,
            key.id,
            now=clock.monotonic(),
            local=local,
            outbox=outbox,
            stint=self._stint,
        )
        self._is_leaving = False
        self._conditions_at = self._status_at = self._bad_logged_at = float("-inf")
        self._journal_at = clock.monotonic()
        self._written: dict[str, Any] = {}
        local.when_decided = lambda: self._queue.put(list)  # a turn looks at the trial
        self._thread = threading.Thread(target=self._run, name=f"fedge-agent-{key.id}", daemon=True)

    # --- from other threads -------------------------------------------------------------------
    def start(self) -> None:
        """Begin, in a thread of its own; the broker may come later."""
        self._thread.start()
        self.begin()

    def begin(self) -> None:
        """Connect, and leave it to the caller to take turns: for simulation."""
        if self._session.round is not None:
            self.poke()  # whether it may go on is asked before an offer is heard
        self._transport.subscribe(
            topics.offer(self._settings.task),
            topics.down_filter(self._settings.task, self._key.id),
        )
        self._transport.start(self._on_frame, self._on_state)

    def poke(self) -> None:
        """Look at the conditions again: there are new examples."""
        self._queue.put(self._conditions)

    def stop(self) -> None:
        """End the training under way and the thread; at most a few seconds."""
        self._queue.put(None)
        self._stint.cancel()
        if self._thread.is_alive():
            self._thread.join(STOP_PATIENCE_S)
        self._roll.leave(self._session)
        self._stint.cancel()  # what had begun meanwhile
        self._stint.join(STOP_PATIENCE_S)
        self._fetching.close()
        self._readiness.count()
        self._meter.close()
        self._journal.flush()
        self._written = {}
        self._write_status()

    def settle(self) -> None:
        """Keep the parts of a download that came while we left the broker: they were paid for."""
        self._is_leaving = True
        with contextlib.suppress(queue.Empty):
            while not self._thread.is_alive():
                if (thunk := self._queue.get_nowait()) is not None:
                    self._guarded(thunk)
        self._fetching.close()

    @property
    def is_online(self) -> bool:
        """Whether the broker has us."""
        return self._session.is_online

    @property
    def state(self) -> str:
        """One word for what the device does in this task: waiting, offline, idle, or a phase."""
        session = self._session
        if session.round is not None:
            return session.round.phase.value
        if session.model is None:
            return "waiting"
        return "idle" if session.is_online else "offline"

    def status(self) -> dict[str, Any]:
        """Return what ``fedge device status`` shows."""
        return self._standing() | {"rss_peak_kib": self._local.runtime.peak_kib()}

    def _standing(self) -> dict[str, Any]:
        """Return the status but for the memory, which changes of itself."""
        session, counters, model = self._session, self._transport.counters, self._local.model
        return {
            "device": self._key.id,
            "task": self._settings.task,
            "state": self.state,
            "online": session.is_online,
            "version": model.version if model else None,
            "bundle": model.bundle if model else None,
            "model": model.weights if model else None,
            "refused": self._local.refused,
            "on_trial": self._local.slots.trial is not None,
            "models_refused": [
                {"version": r.model.version, "model": r.model.weights, "reason": r.reason}
                for r in self._local.slots.refused
            ],
            "examples": self._local.examples,
            "error_threshold": self._local.threshold,
            "ready": session.is_ready,
            "conditions_lapsed": list(self._readiness.lapsed),
            "today": self._meter.status(),
            "rounds": self.tally.rounds,
            "receipts": dict(self.tally.receipts),
            "last_receipt": self.tally.last_receipt,
            "outbox": len(self._outbox),
            "bad_frames": self.tally.bad_frames,
            "offers_passed_over": self._roll.newest.passed_over,
            "bytes_up": counters.bytes_up,
            "bytes_down": counters.bytes_down,
            "messages_up": counters.messages_up,
            "messages_down": counters.messages_down,
            "dropped": counters.dropped,
            "child_rss_peak_kib": self._stint.peak_kib,
            "training": self._stint.status(),
            "boot": self._roll.presence.boot,
        }

    def _on_frame(self, topic: str, payload: bytes) -> None:
        if not payload:
            return  # a part that is no longer retained
        with self._queue_lock:
            if self._queued_bytes + len(payload) > MAX_QUEUED_BYTES:
                self.tally.bad_frames += 1  # it comes again: retained, or sent until answered
                return
            self._queued_bytes += len(payload)
        arrived_at = self._clock.monotonic()
        self._queue.put(lambda: self._received(topic, payload, arrived_at))

    def _on_state(self, is_up: bool) -> None:
        self._queue.put(self._connected if is_up else self._disconnected)

    # --- the thread ---------------------------------------------------------------------------
    def _run(self) -> None:
        while self.turn(self.wait_s()):
            if self.on_turn is not None:
                self.on_turn()

    def turn(self, timeout_s: float) -> bool:
        """Act on the next thing in the queue, or on time alone; return False when told to stop."""
        try:
            thunk = self._queue.get(timeout=timeout_s)
        except queue.Empty:
            thunk = list
        if thunk is None:
            return False
        self._step_all([ev.Tick(self._clock.monotonic()), *self._guarded(thunk)])
        self._step_all(self._due())
        return True

    def wait_s(self) -> float:
        """Return how long to wait before the next turn, unless something comes."""
        if not self._queue.empty():
            return 0.0
        now = self._clock.monotonic()
        due = [self._conditions_at + CONDITIONS_POLL_S, self._status_at + STATUS_EVERY_S]
        due.append(self._roll.due_at(self._session))
        if (at := next_due(self._session)) is not None:
            due.append(at)
        return min(max(min(due) - now, 0.02), CONDITIONS_POLL_S)

    def _guarded(self, thunk: Thunk) -> list[ev.Event]:
        try:
            return thunk()
        except MessageError as error:
            self._bad(str(error))
        except FedgeError as error:
            log.warning("refused reason=%s", error)
        except Exception:  # whatever a frame sets off, the app goes on
            self.tally.bad_frames += 1
            log.exception("unexpected failure, going on")
        return []

    def _due(self) -> list[ev.Event]:
        now, events = self._clock.monotonic(), self._guarded(self._look_at_trial)
        if now >= self._conditions_at + CONDITIONS_POLL_S:
            events += self._conditions()
        if now >= self._journal_at + STATUS_EVERY_S:
            self._journal_at = now
            self._journal.flush()
        if now >= self._status_at + STATUS_EVERY_S:
            self._write_status()
        self._roll.ask(self._session, now)
        return events + self._fetching.look(now)

    def _step_all(self, events: list[ev.Event]) -> None:
        pending = deque(events)
        while pending:
            event = pending.popleft()
            if isinstance(event, ev.BundleRefused):
                self._write_status()  # somebody will want to know
            before = self._session
            self._session, actions = step(before, event)
            self._journal.note(before, event, self._session, actions)
            for action in actions:
                pending += self._guarded(partial(self._do, action))

    # --- what comes in ------------------------------------------------------------------------
    def _connected(self) -> list[ev.Event]:
        self._roll.here()
        self._fetching.connected(self._clock.monotonic())
        return [ev.Connected()]

    def _disconnected(self) -> list[ev.Event]:
        self._fetching.disconnected(self._clock.monotonic())
        return [ev.Disconnected()]

    def _received(self, topic: str, payload: bytes, arrived_at: float) -> list[ev.Event]:
        with self._queue_lock:
            self._queued_bytes -= len(payload)
        message, signed = messages.decode(payload, topic, scheme=self._key.verify)
        self._trust.check(message, signed)
        if self._is_leaving and not isinstance(message, Part):
            return []  # it comes again
        match message:
            case Offer() | Heard():
                return self._called(message)
            case Invite():
                return self._invited(message, arrived_at)
            case Receipt():
                return self._receipted(message)
            case Missing():
                self._uploads.supply(message)
                return []
            case Part():
                return self._fetching.part(message, self._clock.monotonic())
        raise MessageError(f"{type(message).__name__} is not for a device")

    def _called(self, message: Offer | Heard) -> list[ev.Event]:
        now = self._clock.monotonic()
        events = self._roll.take(message, now)
        if any(isinstance(event, ev.Offered) for event in events):
            self._fetching.offered(now)
        return events

    def _invited(self, invite: Invite, arrived_at: float) -> list[ev.Event]:
        self._failpoints.reach("invited")
        self._stint.invited(invite)
        self._readiness.round_began()
        left_s = invite.deadline_s - (self._clock.monotonic() - arrived_at)
        event = ev.Invited(invite.round, invite.version, invite.model, max(0.0, left_s))
        return [*self._conditions(), event]

    def _receipted(self, receipt: Receipt) -> list[ev.Event]:
        log.info(
            "receipt round=%d outcome=%s reason=%s", receipt.round, receipt.outcome, receipt.reason
        )
        self.tally.receipts[receipt.outcome] += 1
        self.tally.last_receipt = {
            "round": receipt.round,
            "outcome": receipt.outcome,
            "reason": receipt.reason,
        }
        self._readiness.round_ended()
        self._failpoints.reach("on_receipt")
        rest_s = receipt.rest_s or 0.0
        said = receipt.outcome, receipt.counted, rest_s, receipt.reason
        return [ev.Receipted(receipt.update, *said)]

    def _conditions(self) -> list[ev.Event]:
        self._conditions_at = self._clock.monotonic()
        return [self._readiness.look(is_training=bool(self._stint.in_use))]

    # --- what to do ---------------------------------------------------------------------------
    def _do(self, action: ev.Action) -> list[ev.Event]:
        match action:
            case ev.CheckIn():
                self._roll.check_in(action)
            case ev.Fetch():
                bundle, now = self._session.bundle, self._session.now
                return self._fetching.begin(action, bundle, self._roll.offer, now)
            case ev.SwitchModel():
                return self._switch(action)
            case ev.Train() | ev.StopTraining() | ev.Submit() | ev.Abandon():
                return self._do_round(action)
            case ev.Resend(update):
                if self._readiness.may_take(1):
                    self._uploads.resend(update)
            case ev.Drop(update, accepted):
                return self._drop(update, accepted=accepted)
        return []

    def _drop(self, update: bytes, *, accepted: bool) -> list[ev.Event]:
        try:
            self._uploads.settle(update, accepted=accepted)
        except StoreError as error:
            log.warning("receipt not kept, asked for again reason=%s", error)
            return [ev.DropFailed(w.update, w.round) for w in self._outbox if w.update == update]
        self._write_status()
        return []

    def _switch(self, action: ev.SwitchModel) -> list[ev.Event]:
        try:
            model = self._local.switch(action.bundle, action.model, action.version)
        except StoreError as error:
            log.warning("model not switched version=%d reason=%s", action.version, error)
            return [ev.SwitchFailed(action.bundle, action.model, str(error))]
        except RefusedError as error:  # said in the log by whoever judged it
            return [ev.BundleRefused(action.bundle, str(error))]
        except (FedgeError, ModuleNotFoundError) as error:
            log.warning("model refused version=%d reason=%s", action.version, error)
            return [ev.ModelRefused(action.bundle, action.model, str(error))]
        log.info("model in use version=%d weights=%s", model.version, model.weights[:12])
        self._in_use(model)
        return [ev.ModelReady(action.bundle, action.model, action.version)]

    def _in_use(self, model: Model) -> None:
        """Tidy up after a switch, and tell whoever wants to know."""
        here = {model.bundle, model.weights} | self._local.slots.kept
        self._store.forget_models(here | self._stint.in_use)
        self._write_status()
        try:
            self._on_updated(model)
        except Exception:  # the app's own code
            log.exception("when_updated failed, going on")

    def _look_at_trial(self) -> list[ev.Event]:
        refusal = self._local.look(self._clock.monotonic())
        model = self._local.model
        if refusal is None or model is None:
            return []
        self._in_use(model)
        bad, good = refusal.model, model
        return [
            ev.ModelRefused(bytes.fromhex(bad.bundle), bytes.fromhex(bad.weights)),
            ev.ModelReady(bytes.fromhex(good.bundle), bytes.fromhex(good.weights), good.version),
        ]

    def _do_round(
        self, action: ev.Train | ev.StopTraining | ev.Submit | ev.Abandon
    ) -> list[ev.Event]:
        match action:
            case ev.Train(round_):
                current = self._session.round
                left_s = current.deadline_at - self._session.now if current else 0.0
                return self._stint.begin(round_, left_s)
            case ev.StopTraining():
                self._stint.cancel()
            case ev.Submit(round_):
                events = self._stint.submit(round_)
                self.tally.rounds += sum(isinstance(event, ev.Sent) for event in events)
                return events
            case ev.Abandon(round_):
                self._stint.abandon(round_)
        return []

    # --- the rest -----------------------------------------------------------------------------
    def _bad(self, reason: str) -> None:
        self.tally.bad_frames += 1
        now = self._clock.monotonic()
        if now >= self._bad_logged_at + LOG_BAD_EVERY_S:
            self._bad_logged_at = now
            log.warning("frame refused total=%d reason=%s", self.tally.bad_frames, reason)

    def _write_status(self) -> None:
        self._status_at = self._clock.monotonic()
        standing = self._standing()
        if standing == self._written:
            return  # an idle device spares its card
        try:
            self._store.write_status(standing | {"rss_peak_kib": self._local.runtime.peak_kib()})
            self._written = standing
        except FedgeError as error:
            log.warning("status not written reason=%s", error)
