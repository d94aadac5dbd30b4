# SPDX-License-Identifier: Apache-2.0
"""Devices whose updates are bad sit out for some rounds, each time for twice as long. Pure.

Time is counted in rounds of the task, which survive a restart and no clock can bend. A bad update
is one that its device signed and that breaks its bounds: what anybody could have sent in a device's
name is never held against it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from edge_sdk.errors import ConfigError

MOST_DOUBLINGS = 6
"""A term is never longer than 64 times the first."""


@dataclass(frozen=True, slots=True)
class Rules:
    """When a device is set aside, and for how long.

    Args:
        strikes: bad updates that set a device aside; 0 never does.
        window: rounds within which they count together.
        rounds: rounds of the first term; each further one is twice as long.
        hours: a term also ends after so many hours of the coordinator's running, doubled alike, so
            that a task whose devices are all set aside does not stand still for ever.

    Raises: ConfigError when a setting is out of bounds.
    """

    strikes: int = 3
    window: int = 20
    rounds: int = 20
    hours: float = 24.0

    def __post_init__(self) -> None:
        for name, least, most in (("strikes", 0, 16), ("window", 1, 10_000), ("rounds", 1, 10_000)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise ConfigError(
                    f"quarantine: expected {name} from {least} to {most}, got {value!r}"
                )
        is_number = isinstance(self.hours, int | float) and not isinstance(self.hours, bool)
        if not is_number or not 0 < self.hours < math.inf:
            raise ConfigError(f"quarantine: expected hours above 0, got {self.hours!r}")


@dataclass(frozen=True, slots=True)
class Conduct:
    """What is held against one device in one task.

    `until` is the first round that it may be invited to again (0: it was never set aside), `terms`
    how often it was, `strikes` the rounds of the bad updates that still count.
    """

    strikes: tuple[int, ...] = ()
    terms: int = 0
    until: int = 0
    reason: str = ""

    def is_held(self, number: int) -> bool:
        """Whether the device sits out round `number`."""
        return number < self.until

    def doubled(self) -> int:
        """How many times the first term the latest one is."""
        return 1 << min(max(self.terms - 1, 0), MOST_DOUBLINGS)


def strike(before: Conduct, number: int, rules: Rules, reason: str) -> Conduct:
    """Hold a bad update, seen while `number` was the newest round, against its device.

    On parole, which lasts a window, one is enough.
    """
    if not rules.strikes or before.is_held(number):
        return before
    recent = (*(at for at in before.strikes if at > number - rules.window), number)
    on_parole = before.terms > 0 and number < before.until + rules.window
    if len(recent) < rules.strikes and not on_parole:
        return replace(before, strikes=recent, reason=reason)
    held = Conduct((), before.terms + 1, 0, reason)
    return replace(held, until=number + 1 + rules.rounds * held.doubled())


def release(before: Conduct, number: int) -> Conduct:
    """Let a device take part from round `number` on, on parole: its terms are not forgotten."""
    return replace(before, strikes=(), until=min(before.until, number))


def says(held: Conduct) -> str:
    """Tell a device, in one line, that it is set aside, until when and why."""
    return (
        f"in quarantine until round {held.until} of this task; the last bad update: {held.reason}"
    )
