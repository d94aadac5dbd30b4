# SPDX-License-Identifier: Apache-2.0
"""One life of a simulated program: it can end at any step, and then nothing it does counts.

A step is whatever somebody else could see: a byte to the disk, a message, a transaction. Between
two steps a program could as well have died at either.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from coordinator.simulation.loop import VirtualLoop

ROUNDING_S = 1e-6
"""Longer than what rounding may lose: who waits until a moment is woken after it."""


class Killed(BaseException):
    """The process is gone: raised out of every port that it still calls, caught by no program."""


@dataclass(slots=True, eq=False)
class Process:
    """A life. `doomed_at` is the step at which it ends, if it is to end at one."""

    name: str
    loop: VirtualLoop
    origin_s: float = 0.0
    """What its monotonic clock showed when it began."""
    drift: float = 0.0
    """How much faster than true its clock is: 1e-4 is 100 parts in a million."""
    doomed_at: int | None = None
    is_alive: bool = True
    steps: int = 0
    on_end: list[Callable[[], None]] = field(default_factory=list)
    _began_s: float = 0.0

    def __post_init__(self) -> None:
        self._began_s = self.loop.now_s

    def monotonic(self) -> float:
        """Return its own clock's seconds."""
        return self.origin_s + (self.loop.now_s - self._began_s) * (1 + self.drift)

    async def wait(self, event: asyncio.Event, until_s: float = float("inf")) -> bool:
        """Wait for `event` until its own clock shows `until_s`; say whether it was set."""
        left_s = None
        if until_s != float("inf"):
            left_s = max(0.0, until_s - self.monotonic()) / (1 + self.drift) + ROUNDING_S
        try:
            async with asyncio.timeout(left_s):
                await event.wait()
        except TimeoutError:
            self.check()
            return event.is_set()
        self.check()
        return True

    def step(self) -> None:
        """Take a step; it may be the last. Raises: Killed."""
        self.check()
        self.steps += 1
        if self.steps == self.doomed_at:
            self.end()
            raise Killed(self.name)

    def check(self) -> None:
        """Raise Killed in a process that is gone."""
        if not self.is_alive:
            raise Killed(self.name)

    def end(self) -> None:
        """Die at once."""
        if self.is_alive:
            self.is_alive = False
            for tell in self.on_end:
                tell()


LIFE: contextvars.ContextVar[Tasks | None] = contextvars.ContextVar("LIFE", default=None)


class Tasks:
    """The asyncio tasks of one process, in the order in which they began."""

    def __init__(self) -> None:
        self._all: dict[asyncio.Task[object], None] = {}

    def begin(self, task: asyncio.Task[object]) -> None:
        """Take note of a task."""
        self._all[task] = None
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[object]) -> None:
        self._all.pop(task, None)
        if not task.cancelled():
            task.exception()  # whatever it was, its process is told by other means

    async def clear(self) -> None:
        """Cancel what is left until nothing is: every port they turn to is dead already."""
        while self._all:
            for task in list(self._all):
                task.cancel()
            await asyncio.sleep(0)


def factory(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> Any:
    """Make a task, and enter it in the books of the process that it belongs to."""
    task: asyncio.Task[object] = asyncio.Task(coroutine, loop=loop, **options)
    if (tasks := LIFE.get()) is not None:
        tasks.begin(task)
    return task
