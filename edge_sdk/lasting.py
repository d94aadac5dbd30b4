# SPDX-License-Identifier: Apache-2.0
"""One training child for several devices of a process: it takes their jobs one after another.

A fresh child for each job costs the start of an interpreter and of a runtime, many times what a
short training takes. This one stays for the next job, so a process that hosts fifty devices never
has more than one child. It is still a process apart: memory that runs out takes it alone, the job
it was at fails, and the next job gets a new child.
"""

from __future__ import annotations

import math
import queue
import sys
import threading
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass, field, replace

from edge_sdk.child import HANG_S, Child
from edge_sdk.training import ChildTrainer, TrainFailed, TrainJob, TrainResult

_POLL_S = 0.1
_IDLE_S = 60.0


@dataclass(slots=True)
class _Order:
    """A job that waits its turn; `done` tells the thread that brought it."""

    job: TrainJob
    cancel: threading.Event
    at_s: float
    done: Future[TrainResult] = field(default_factory=Future)


class LastingTrainer:
    """A `LocalTraining` for several devices: first come, first served, by a child that stays.

    Time spent waiting comes off a job's seconds, so that its update is still in time. A child that
    has had nothing to do for `idle_s` is ended, and the memory is the system's again.
    """

    def __init__(
        self,
        python: str = sys.executable,
        *,
        nice: int = 10,
        grace_s: float = 120.0,
        hang_s: float = HANG_S,
        idle_s: float = _IDLE_S,
    ) -> None:
        self._once = ChildTrainer(python, nice=nice, grace_s=grace_s, hang_s=hang_s)
        self._grace_s, self._idle_s = grace_s, idle_s
        self._orders: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()
        # The kernel ends a child with the thread that started it: that thread stays as well.
        self._thread = threading.Thread(target=self._serve, name="fedge-trainings", daemon=True)
        self._thread.start()

    def train(self, job: TrainJob, cancel: threading.Event) -> TrainResult:
        """Wait for a turn and train. Raises: TrainFailed, also when cancelled."""
        order = _Order(job, cancel, time.monotonic())
        self._orders.put(order)
        while True:
            try:
                return order.done.result(_POLL_S)
            except NotYet:
                if cancel.is_set() and order.done.cancel():
                    raise TrainFailed("cancelled before its turn") from None

    def close(self) -> None:
        """End the child, once the job under way has ended."""
        self._orders.put(None)
        self._thread.join(2 * _POLL_S + 1.0)

    def _serve(self) -> None:
        child: Child | None = None
        while True:
            try:
                order = self._orders.get(timeout=self._idle_s if child else None)
            except queue.Empty:
                child = _end(child)
                continue
            if order is None:
                _end(child)
                return
            if order.done.set_running_or_notify_cancel():
                child = self._carry_out(order, child)

    def _carry_out(self, order: _Order, child: Child | None) -> Child | None:
        """Do one job; return the child if it can do another."""
        try:
            if child is None or child.is_gone:
                _end(child)
                child = self._once.started()
            order.done.set_result(self._train(order, child))
        except Exception as error:  # noqa: BLE001 - whoever brought the job is told, the next may do better
            order.done.set_exception(_named(error))
        return child if child is None or child.is_free else _end(child)

    def _train(self, order: _Order, child: Child) -> TrainResult:
        seconds, job = order.job.budget.seconds, order.job
        if seconds is None:
            return self._once.carried_out(child, job, order.cancel, math.inf)
        left_s = seconds - (time.monotonic() - order.at_s)
        if left_s <= 0:
            raise TrainFailed(f"its {seconds:g} s went by while it waited its turn")
        job = replace(job, budget=replace(job.budget, seconds=left_s))
        return self._once.carried_out(child, job, order.cancel, left_s + self._grace_s)


def _named(error: Exception) -> TrainFailed:
    if isinstance(error, TrainFailed):
        return error
    return TrainFailed(f"cannot train: {' '.join(str(error).split())}")


def _end(child: Child | None) -> Child | None:
    """End a child, if there is one; what is left is none."""
    if child is not None:
        child.end()
    return None
