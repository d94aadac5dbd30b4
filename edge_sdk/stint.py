# SPDX-License-Identifier: Apache-2.0
"""A device's part in a round, from the invitation to the update, over a kill and a power cut.

What was taken up is written down before the work begins, and forgotten once the update is in the
outbox or the round is let go. A process that finds it goes on from the training's checkpoint.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from edge_sdk import events as ev
from edge_sdk import footprint
from edge_sdk.errand import DEFAULT_BATCH, Errands, budget
from edge_sdk.errors import FedgeError, StoreError
from edge_sdk.failpoints import Failpoints
from edge_sdk.limits import Limits
from edge_sdk.local import Local
from edge_sdk.messages import Invite
from edge_sdk.meter import Meter
from edge_sdk.session import Retry, Round
from edge_sdk.setbacks import Setbacks
from edge_sdk.store import Store
from edge_sdk.training import LocalTraining, TrainFailed, TrainJob, TrainResult
from edge_sdk.types import Clock
from edge_sdk.underway import MOST_ATTEMPTS, UnderWay
from edge_sdk.uploads import Uploads
from edge_sdk.usage import Instant

log = logging.getLogger(__name__)

INVITES_KEPT = 4
MEMORY_FACTOR = 2
"""How much more than a bundle may declare the training process may allocate: the runtime's share,
which no bundle knows. Examples come on top."""

Later = Callable[[Callable[[], list[ev.Event]]], None]


class Stint:
    """The round that this device takes part in, if any. For the agent's thread alone."""

    def __init__(
        self,
        *,
        store: Store,
        local: Local,
        uploads: Uploads,
        meter: Meter,
        clock: Clock,
        failpoints: Failpoints,
        later: Later,
        trainer: LocalTraining,
        errands: Errands,
        limits: Limits,
        threads: int,
        engine: str,
        root: Path,
        checkpoint_s: float,
    ) -> None:
        self._store, self._local, self._uploads, self._meter = store, local, uploads, meter
        self._clock, self._failpoints, self._later = clock, failpoints, later
        self._limits, self._threads, self._engine = limits, threads, engine
        self._checkpoint_s = checkpoint_s
        self._boot = footprint.boot_id(root)
        self._errand = errands(trainer, store.train, self._on_ended)
        self._invites: dict[int, Invite] = {}
        self._trained: dict[int, TrainResult] = {}
        self._rows = 0
        self._since_s = 0.0
        self._kept = store.under_way()
        self.has_let_go = False
        """Whether the round that was found under way was not gone on with: nobody was told yet."""
        self._setbacks = store.setbacks() or Setbacks()
        self.failures: Counter[str] = Counter()
        """How many trainings gave no update since the start, by kind."""
        self.peak_kib = 0
        """The most memory that a training took since the start."""
        self.in_use: frozenset[str] = frozenset()
        """The digests of what a training under way reads."""

    @property
    def retry(self) -> Retry:
        """When to train at the earliest, after what went wrong before this start."""
        retry = Retry(at=self._clock.monotonic())
        for _ in range(min(self._setbacks.in_a_row, 8)):
            retry = retry.after(self._clock.monotonic())
        return retry

    def resumed(self, sent: Iterable[int]) -> Round | None:
        """Return the round that the process before this one was at; None if there is none left.

        `sent`: the rounds whose updates are in the outbox.
        """
        kept, now = self._kept, self._clock.monotonic()
        if kept is None or kept.invite.round in set(sent):
            self._forget()
            return None
        invite, left_s = kept.invite, kept.left(self._now())
        if kept.attempts >= MOST_ATTEMPTS:
            log.warning("round let go round=%d reason=begun %d times", invite.round, kept.attempts)
            known = self._setbacks.of(kept.bundle)  # it took the whole process with it
            self._remember(known.out_of_memory(known.rows(invite.batch or DEFAULT_BATCH)))
            self._forget()
            self.has_let_go = True
            return None
        log.info("round found under way round=%d left_s=%.0f", invite.round, left_s)
        self._invites[invite.round] = invite
        event = ev.Invited(invite.round, invite.version, invite.model, max(0.0, left_s))
        return Round(event, now + left_s, resumed_at=now)

    def invited(self, invite: Invite) -> None:
        """Keep an invitation in mind."""
        self._invites[invite.round] = invite
        for old in sorted(self._invites)[:-INVITES_KEPT]:
            del self._invites[old]

    def begin(self, round_: int, left_s: float) -> list[ev.Event]:
        """Train for a round that has `left_s` seconds to its deadline."""
        model, invite, bundle = self._local.model, self._invites.get(round_), self._local.bundle
        if model is None or invite is None or bundle is None:
            return [ev.TrainFailed(round_)]
        try:
            self._note(invite, bundle.digest, left_s)
            anchor = self._uploads.anchor(invite, model.weights, bundle)
        except FedgeError as error:
            log.warning("training not begun round=%d reason=%s", round_, error)
            return [ev.TrainFailed(round_, str(error))]
        given = budget(invite, left_s, self._meter.left_s)
        self._rows = self._setbacks.of(bundle.digest).rows(given.batch)
        job = TrainJob(
            bundle=self._store.bundle_path(model.bundle),
            weights=self._store.weights_path(model.weights),
            samples=self._local.samples_path,
            budget=replace(given, batch=self._rows, seconds_in_all=invite.seconds),
            seed=invite.seed,
            threads=self._threads,
            engine=self._engine,
            anchor=anchor,
            checkpoint=self._checkpoint(round_) if self._checkpoint_s > 0 else None,
            checkpoint_s=self._checkpoint_s,
            memory=self._memory(),
        )
        log.info("training round=%d version=%d rows=%d", round_, model.version, self._rows)
        self.in_use = frozenset({model.bundle, model.weights})
        self._since_s = self._clock.monotonic()
        self._meter.will_train(job.budget.seconds or 0.0)
        self._errand.begin(round_, job)
        self._failpoints.reach("training")
        return []

    def submit(self, round_: int) -> list[ev.Event]:
        """Put the update of a round whose training has ended into the outbox."""
        result, invite = self._trained.pop(round_, None), self._invites.get(round_)
        bundle = self._local.bundle
        if result is None or invite is None or bundle is None:
            return [ev.TrainFailed(round_)]
        try:
            update = self._uploads.submit(invite, result, bundle)
        except FedgeError as error:
            log.warning("update not made round=%d reason=%s", round_, error)
            return [ev.TrainFailed(round_, str(error))]
        finally:
            self._forget()
        return [ev.Sent(update, round_)]

    def abandon(self, round_: int) -> None:
        """Let go of a round: nothing of it stays on disk."""
        self._trained.pop(round_, None)
        if self._kept is not None:
            log.info("round let go round=%d", round_)
            self._forget()

    def cancel(self) -> None:
        """Ask the training under way to end."""
        self._errand.cancel()

    def join(self, timeout_s: float) -> None:
        """Wait for it to end."""
        self._errand.join(timeout_s)

    def status(self) -> dict[str, Any]:
        """Return how trainings went, as ``fedge device status`` shows it."""
        known = self._setbacks
        return {
            "failures": dict(self.failures),
            "out_of_memory_in_a_row": known.in_a_row,
            "most_rows": known.batch,
        }

    def _on_ended(self, round_: int, result: TrainResult | TrainFailed) -> None:
        """Called from the training's thread."""
        self._later(partial(self._ended, round_, result))

    def _ended(self, round_: int, result: TrainResult | TrainFailed) -> list[ev.Event]:
        self.in_use = frozenset()
        self._meter.trained(self._clock.monotonic() - self._since_s)
        self._learn(round_, result)
        if isinstance(result, TrainFailed):
            self.failures[result.kind] += 1
            log.warning(
                "training failed round=%d kind=%s reason=%s", round_, result.kind, result.reason
            )
            return [ev.TrainFailed(round_, result.reason)]
        self._trained = {round_: result}
        self.peak_kib = max(self.peak_kib, result.peak_bytes >> 10)
        log.info(
            "trained round=%d steps=%d resumed_at=%d seconds=%.1f loss=%.4f stopped_by=%s",
            round_,
            result.steps,
            result.resumed_at,
            result.seconds,
            result.loss,
            result.stopped_by,
        )
        self._failpoints.reach("after_train")
        figures = {
            "steps": result.steps,
            "seconds": round(result.seconds, 1),
            "loss": round(float(result.loss), 4),
            "stopped_by": result.stopped_by,
        }
        return [ev.Trained(round_, figures)]

    def _learn(self, round_: int, result: TrainResult | TrainFailed) -> None:
        """Remember how many rows this board can take, if that has changed."""
        bundle, invite = self._local.bundle, self._invites.get(round_)
        if bundle is None or invite is None:
            return
        known = self._setbacks.of(bundle.digest)
        if isinstance(result, TrainResult):
            self._remember(known.ended_well(invite.batch or DEFAULT_BATCH))
        elif result.kind in {"oom", "killed"}:  # twice, by then: whoever kills wants the memory
            self._remember(known.out_of_memory(self._rows))

    def _remember(self, known: Setbacks) -> None:
        if known == self._setbacks.of(known.bundle):
            return
        self._setbacks = known
        try:
            self._store.set_setbacks(known)
        except StoreError as error:
            log.warning("what memory allows is not kept reason=%s", error)

    def _note(self, invite: Invite, bundle: str, left_s: float) -> None:
        """Write down what is taken up; what another round left is deleted."""
        kept = self._kept
        before = kept.attempts if kept is not None and kept.invite.round == invite.round else 0
        self._store.clear_training(keep=self._checkpoint(invite.round).name if before else "")
        self._kept = UnderWay(invite, bundle, left_s, self._now(), before + 1)
        self._store.set_under_way(self._kept)

    def _forget(self) -> None:
        was_kept, self._kept = self._kept is not None, None
        try:
            if was_kept:
                self._store.forget_under_way()
            self._store.clear_training()
        except StoreError as error:
            log.warning("round not forgotten reason=%s", error)

    def _checkpoint(self, round_: int) -> Path:
        return self._store.train / f"{round_}.checkpoint"

    def _memory(self) -> int:
        return MEMORY_FACTOR * self._limits.max_ram_bytes + 3 * self._local.samples_bytes

    def _now(self) -> Instant:
        return Instant(self._boot, self._clock.monotonic())
