# SPDX-License-Identifier: Apache-2.0
"""What a device has used in its day, and when a new day begins, whatever its clocks do. Pure.

A day is 24 hours from the first use on. Boards have no battery-backed clock, and clocks are set:
so the time that counts is the monotonic clock's, which runs at the pace of a watch and is never
set. It stands still while the board is off; the time off counts only where the clock of the wall
was synchronized before and after. What cannot be proven to have passed has not passed: a clock
that jumps never opens a second day.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

DAY_S = 86_400.0
SANE_FROM_S = 1_767_225_600.0
"""2026-01-01: a clock that says less was never set."""


@dataclass(frozen=True, slots=True)
class Instant:
    """A moment on the clocks of a board."""

    boot: str
    """What the kernel calls this boot."""
    monotonic: float
    """Seconds since the boot, at least those that the board was awake."""
    wall: float = 0.0
    """Seconds since 1970; 0 unless the clock is known to be right."""


class Usage(NamedTuple):
    """The day so far."""

    bytes: int = 0
    """Sent and received."""
    training_s: float = 0.0
    elapsed_s: float = 0.0
    """Of the day, as far as this board was on."""
    seen: Instant | None = None
    """When that was."""
    began: Instant | None = None
    """The earliest moment of the day at which the clock of the wall was right."""

    @property
    def left_s(self) -> float:
        """How long the day lasts yet, at the most."""
        return max(0.0, DAY_S - self.elapsed_s)


def at(usage: Usage, now: Instant) -> Usage:
    """Return the usage of the day that it is `now`: the same day's, or a new one's."""
    usage = usage._replace(elapsed_s=usage.elapsed_s + _passed(usage.seen, now), seen=now)
    if now.wall >= SANE_FROM_S and usage.began is None:
        usage = usage._replace(began=now)
    if usage.elapsed_s >= DAY_S or _wall_passed(usage.began, now) >= DAY_S:
        return Usage(seen=now, began=now if now.wall >= SANE_FROM_S else None)
    return usage


def _passed(before: Instant | None, now: Instant) -> float:
    """Return the seconds that the board was on; those before this boot's first look are lost."""
    if before is None:
        return 0.0
    start = before.monotonic if before.boot == now.boot else 0.0
    return max(0.0, now.monotonic - start)


def _wall_passed(before: Instant | None, now: Instant) -> float:
    """Return the seconds by the clock of the wall; within one boot the monotonic one knows better.

    A clock that was set while the board was on says nothing: both moments count only where it was
    synchronized.
    """
    if before is None or before.boot == now.boot or now.wall < SANE_FROM_S:
        return 0.0
    return now.wall - before.wall
