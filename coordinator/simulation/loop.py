# SPDX-License-Identifier: Apache-2.0
"""An asyncio loop whose time is a number: nobody waits, and the same calls run in the same order.

When nothing is ready the clock is set to the next timer. There are no sockets, no threads and no
other source of events, so a run is a function of what it was begun with.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

Report = Callable[[str, BaseException | None], None]


class _Nothing:
    """A selector that hears of nothing, and lets virtual time pass instead of waiting."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def select(self, timeout: float | None) -> list[object]:
        """Move the clock to the next timer."""
        if timeout is None:
            raise RuntimeError("nothing is left to happen: something waits for ever")
        if timeout > 0:
            self._loop.now_s += timeout
        return []


class VirtualLoop(asyncio.BaseEventLoop):
    """`asyncio` in virtual time, in one thread. `report` hears of what a callback raised."""

    def __init__(self, report: Report) -> None:
        super().__init__()
        self.now_s = 0.0
        self._selector = _Nothing(self)
        self.set_exception_handler(
            lambda _, context: report(str(context["message"]), context.get("exception"))
        )

    def time(self) -> float:
        """Return the virtual seconds since the start."""
        return self.now_s

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

    def _process_events(self, event_list: list[object]) -> None:
        """Do nothing: no socket ever has news."""


async def settled(*some: Awaitable[object]) -> None:
    """Wait until all of these are done, however they ended."""
    await asyncio.gather(*some, return_exceptions=True)
