# SPDX-License-Identifier: Apache-2.0
"""One training child for several devices of a process: it takes their jobs one after another.

A fresh child for each job costs the start of an interpreter and of a runtime, many times what a
short training takes. This one stays for the next job, so a process that hosts fifty devices never
has more than one child. It is still a process apart: memory that runs out takes it alone, the job
it was at fails, and the next job gets a new child.
"""

from __future__ import annotations

import json
import math
import os
import queue
import selectors
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import IO, Any, NoReturn, cast

from edge_sdk.training import ChildTrainer, TrainFailed, TrainJob, TrainResult, answer, last_words

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
        idle_s: float = _IDLE_S,
    ) -> None:
        self._once = ChildTrainer(python, nice=nice, grace_s=grace_s)
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
        child: _Child | None = None
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

    def _carry_out(self, order: _Order, child: _Child | None) -> _Child | None:
        """Do one job; return the child if it can do another."""
        try:
            if child is None or child.is_gone:
                _end(child)
                child = _Child(self._once)
            order.done.set_result(self._train(order, child))
        except Exception as error:  # noqa: BLE001 - whoever brought the job is told, the next may do better
            order.done.set_exception(_named(error))
        return child if child is None or child.is_free else _end(child)

    def _train(self, order: _Order, child: _Child) -> TrainResult:
        seconds, job = order.job.budget.seconds, order.job
        if seconds is None:
            return child.train(job, order.cancel, math.inf)
        left_s = seconds - (time.monotonic() - order.at_s)
        if left_s <= 0:
            raise TrainFailed(f"its {seconds:g} s went by while it waited its turn")
        job = replace(job, budget=replace(job.budget, seconds=left_s))
        return child.train(job, order.cancel, left_s + self._grace_s)


class _Child:
    """A worker process that answers each line with a line."""

    def __init__(self, once: ChildTrainer) -> None:
        self._once = once
        self._noise = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
        self._heard = b""
        try:
            self._process = once.started(stderr=self._noise)
        except BaseException:
            self._noise.close()
            raise
        self.is_free = True
        """Whether it waits for a job: not after one that was broken off."""

    @property
    def is_gone(self) -> bool:
        return self._process.poll() is not None

    def train(self, job: TrainJob, cancel: threading.Event, patience_s: float) -> TrainResult:
        self.is_free = False
        self._ask(json.dumps(self._once.request(job)))
        said = self._answer(cancel, time.monotonic() + patience_s)
        self.is_free = True
        if "error" in said:
            raise TrainFailed(str(said["error"]))
        return answer(json.dumps(said), job.delta)

    def end(self) -> None:
        self._process.kill()
        with suppress(OSError), self._process:  # waits, and closes the pipes
            self._noise.close()

    def _ask(self, line: str) -> None:
        try:
            asked = cast("IO[str]", self._process.stdin)
            asked.write(line + "\n")
            asked.flush()
        except OSError:
            self._fail()

    def _answer(self, cancel: threading.Event, until_s: float) -> dict[str, Any]:
        """Return the next line that is an answer; other libraries may print before it."""
        heard = cast("IO[str]", self._process.stdout).fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(heard, selectors.EVENT_READ)
            while not cancel.is_set():
                line, found, rest = self._heard.partition(b"\n")
                if found:
                    self._heard = rest
                    if (said := _said(line)) is not None:
                        return said
                elif time.monotonic() > until_s:
                    raise TrainFailed("still training long after its budget; killed")
                elif selector.select(_POLL_S):
                    self._hear(heard)
        raise TrainFailed("cancelled")

    def _hear(self, heard: int) -> None:
        if not (more := os.read(heard, 65536)):
            self._fail()
        self._heard += more

    def _fail(self) -> NoReturn:
        code = self._process.wait()
        self._noise.seek(0)
        raise TrainFailed(last_words(code, "", self._noise.read().decode(errors="replace")))


def _said(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _named(error: Exception) -> TrainFailed:
    if isinstance(error, TrainFailed):
        return error
    return TrainFailed(f"cannot train: {' '.join(str(error).split())}")


def _end(child: _Child | None) -> _Child | None:
    """End a child, if there is one; what is left is none."""
    if child is not None:
        child.end()
    return None
