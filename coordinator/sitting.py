# SPDX-License-Identifier: Apache-2.0
"""Which of two frames a device said later, by the numbers that it gave them. Pure."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Sitting(NamedTuple):
    """One connection of one start of a device.

    `boot` counts starts, on the device's disk; `start` tells one from every other, 0 where a device
    does not say; `connection` counts within a start.
    """

    boot: int = 0
    start: int = 0
    connection: int = 0


class Age(Enum):
    """What a frame is beside the newest that was heard."""

    ANEW = "of a later start"
    FRESH = "of the newest start, and not older"
    OLD = "older"
    UNPROVEN = "of another start that is not proven to be later"


def age(newest: Sitting, said: Sitting, *, is_over: bool, is_will: bool) -> Age:
    """Compare a frame with the newest sitting of its device.

    Args:
        newest: the latest that was heard of, its `boot` the greatest ever.
        said: that of the frame.
        is_over: whether the will of the newest was heard.
        is_will: whether the frame is a will.
    """
    if said.start != newest.start:
        if said.boot > newest.boot:
            return Age.ANEW
        return Age.UNPROVEN if said.start else Age.OLD
    if not said.start:
        return _untold(newest, said, is_will=is_will)
    if said.connection != newest.connection:
        return Age.FRESH if said.connection > newest.connection else Age.OLD
    return Age.OLD if is_over and not is_will else Age.FRESH


def _untold(newest: Sitting, said: Sitting, *, is_will: bool) -> Age:
    """Compare by the count of starts alone: who says that it is here is believed."""
    if said.boot > newest.boot:
        return Age.ANEW
    return Age.OLD if is_will and said.boot < newest.boot else Age.FRESH
