# SPDX-License-Identifier: Apache-2.0
"""An asyncio loop whose time is a number: nobody waits, and the same calls run in the same order.

When nothing is ready the clock is set to the next timer. There are no sockets, no threads and no
other source of events, so a run is a function of what it was begun with.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NoReturn, TypeVar, TypeVarTuple, Unpack

T = TypeVar("T")
Args = TypeVarTuple("Args")

Report = Callable[[str, BaseException | None], None]


class VirtualLoop(asyncio.BaseEventLoop):
    """`asyncio` in virtual time, in one thread. `report` hears of what a callback raised."""

    _ready: deque[asyncio.Handle]

    def __init__(self, report: Report) -> None:
        super().__init__()
        self.now_s = 0.0
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._timers_ever = 0
        self.set_exception_handler(
            lambda _, context: report(str(context["message"]), context.get("exception"))
        )

    def time(self) -> float:
        """Return the virtual seconds since the start."""
        return self.now_s

    def call_at(
        self,
        when: float,
        callback: Callable[[Unpack[Args]], object],
        *args: *Args,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        """Call back at a virtual time; at the same moment, in the order of the calls."""
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        self._timers_ever += 1
        heapq.heappush(self._timers, (when, self._timers_ever, timer))
        return timer

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """Run `main` to its end, and close the loop."""
        try:
            asyncio.set_event_loop(self)
            return self.run_until_complete(main)
        finally:
            asyncio.set_event_loop(None)
            self.close()

    def run_in_executor(self, *_: object) -> NoReturn:
        """Refuse: a thread's timing is nobody's to repeat."""
        raise RuntimeError("a simulation has no threads")

    def call_soon_threadsafe(self, *_: object, **__: object) -> NoReturn:
        """Refuse, for the same reason."""
        raise RuntimeError("a simulation has no threads")

    def _run_once(self) -> None:
        """Run what is ready; when nothing is, let time pass until the next timer."""
        if not self._ready:
            self._ready.append(self._next_timer())
        for _ in range(len(self._ready)):
            handle = self._ready.popleft()
            if not handle.cancelled():
                handle._run()  # noqa: SLF001 - as the loop that this is one of does

    def _next_timer(self) -> asyncio.TimerHandle:
        while self._timers:
            when, _, timer = heapq.heappop(self._timers)
            if not timer.cancelled():
                self.now_s = max(self.now_s, when)
                return timer
        raise RuntimeError("nothing is left to happen: something waits for ever")


async def settled(*some: Awaitable[object]) -> None:
    """Wait until all of these are done, however they ended."""
    await asyncio.gather(*some, return_exceptions=True)
