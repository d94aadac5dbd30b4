# SPDX-License-Identifier: Apache-2.0
"""Time for the service, as a port: read it, or wait for an event no longer than until a moment."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Protocol


class Clock(Protocol):
    """What the service needs of time; a test passes one that it moves by hand."""

    def monotonic(self) -> float:
        """Return seconds on a clock that never goes back."""
        ...

    async def wait(self, event: asyncio.Event, until_s: float = math.inf) -> bool:
        """Wait for `event`, at most until the clock shows `until_s`; say whether it was set."""
        ...


class SystemClock:
    """The machine's monotonic clock."""

    def monotonic(self) -> float:
        """Return the system's monotonic seconds."""
        return time.monotonic()

    async def wait(self, event: asyncio.Event, until_s: float = math.inf) -> bool:
        """Wait for `event` or the moment, whichever is first."""
        left_s = None if until_s == math.inf else max(0.0, until_s - self.monotonic())
        try:
            await asyncio.wait_for(event.wait(), left_s)
        except TimeoutError:
            return event.is_set()
        return True
