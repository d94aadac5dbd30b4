# SPDX-License-Identifier: Apache-2.0
"""One round's training, waited for in a thread of its own while the agent goes on listening."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol, TypeAlias

from edge_sdk.errors import FedgeError
from edge_sdk.messages import Invite
from edge_sdk.training import Budget, LocalTraining, TrainFailed, TrainJob, TrainResult

log = logging.getLogger(__name__)

SHARE_OF_DEADLINE = 0.8  # training ends by then, so that its update can still be counted
DEFAULT_BATCH = 32

Ended = Callable[[int, TrainResult | TrainFailed], None]


class Running(Protocol):
    """Carries out trainings, one at a time."""

    def begin(self, round_: int, job: TrainJob) -> None:
        """Start training."""
        ...

    def cancel(self) -> None:
        """Ask the training under way to end."""
        ...

    def join(self, timeout_s: float) -> None:
        """Wait for it to end."""
        ...


Errands: TypeAlias = Callable[[LocalTraining, Path, Ended], Running]
"""Makes a `Running`: `Errand`, but in simulations."""


class Errand:
    """Runs one training at a time; `ended` is called with its result, or why there is none."""

    def __init__(self, trainer: LocalTraining, folder: Path, ended: Ended) -> None:
        self._trainer, self._folder, self._ended = trainer, folder, ended
        self._cancel = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, round_: int, job: TrainJob) -> None:
        """Start training; the delta goes to this errand's folder."""
        self._cancel = threading.Event()
        job = replace(job, out=self._folder / f"{round_}.delta.bin")
        work = (round_, job, self._cancel)
        self._thread = threading.Thread(
            target=self._run, args=work, name="fedge-training", daemon=True
        )
        self._thread.start()

    def cancel(self) -> None:
        """Ask the training under way to end."""
        self._cancel.set()

    def join(self, timeout_s: float) -> None:
        """Wait for it to end."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _run(self, round_: int, job: TrainJob, cancel: threading.Event) -> None:
        try:
            self._ended(round_, self._trained(job, cancel))
        except TrainFailed as failed:
            self._ended(round_, failed)
        except (FedgeError, OSError, ValueError, TypeError) as error:
            self._ended(round_, TrainFailed(" ".join(str(error).split())))

    def _trained(self, job: TrainJob, cancel: threading.Event) -> TrainResult:
        """Train; once more, from where it stood, when somebody killed the training process."""
        began_s = time.monotonic()
        try:
            return self._trainer.train(job, cancel)
        except TrainFailed as failed:
            if failed.kind != "killed" or cancel.is_set() or job.budget.seconds is None:
                raise
            left_s = job.budget.seconds - (time.monotonic() - began_s)
            if left_s <= 0:
                raise
            log.warning("training goes on from its checkpoint reason=%s", failed.reason)
            return self._trainer.train(
                replace(job, budget=replace(job.budget, seconds=left_s)), cancel
            )


def budget(invite: Invite, left_s: float, today_s: float = math.inf) -> Budget:
    """Return the invitation's budget, with an end in time for the update to count.

    Args:
        invite: the round's.
        left_s: how long it is to the deadline.
        today_s: how long there may be training yet today.
    """
    seconds = max(1.0, min(SHARE_OF_DEADLINE * left_s, today_s))
    return Budget(
        epochs=invite.epochs,
        steps=invite.steps,
        seconds=seconds if invite.seconds is None else min(seconds, invite.seconds),
        batch=invite.batch or DEFAULT_BATCH,
        lr=invite.lr,
        mu=invite.mu or 0.0,
    )
