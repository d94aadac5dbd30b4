# SPDX-License-Identifier: Apache-2.0
"""Which offer is the newest; an older one holds only where the coordinator says so. Pure.

Offers are in the order of their `call` and `round`. A coordinator whose store was restored from a
copy counts again from there, so an older offer may be the one that holds: the device then asks, by
a check-in that nobody has seen before, and takes what the answer to that very check-in names.
"""

from __future__ import annotations

from edge_sdk.messages import Heard, Offer
from edge_sdk.session import moment

ASK_AFTER_S = 5.0
"""What a newer offer may take to follow an older one that was retained."""
ASK_WITHIN_S = 30.0
"""Over how long devices ask, each at its own moment: the first to ask may be enough."""
ASK_AGAIN_S = 60.0


class Newest:
    """The newest offer of one task, for one start of a device.

    Args:
        device: its id.
        version: that of the model in use: an offer of an older one is older; -1 is none.
    """

    def __init__(self, device: str, version: int = -1) -> None:
        self._device, self._version = device, version
        self._order: tuple[int, int] | None = None
        self._passed: Offer | None = None
        self._turn = 0
        self._again_at = float("-inf")
        self.ask_at = float("inf")
        """When to ask which offer holds."""
        self.passed_over = 0
        """How many offers were not taken."""

    def takes(self, offer: Offer, now: float) -> bool:
        """Say whether an offer is to be taken, as the newest of all so far."""
        order = offer.call, offer.round
        is_older = offer.version < self._version if self._order is None else order < self._order
        if is_older:
            self._passed = offer
            self.passed_over += 1
            at = now + ASK_AFTER_S + moment(self._device, offer.call) * ASK_WITHIN_S
            self.ask_at = min(self.ask_at, max(at, self._again_at))
            return False
        self._take(order)
        return True

    def asked(self, now: float) -> int | None:
        """Return the call to name when it is time to ask; None when it is not."""
        if now < self.ask_at or self._passed is None:
            return None
        self.ask_at = self._again_at = now + ASK_AGAIN_S
        return self._passed.call if self._order is None else self._order[0]

    def asking(self, turn: int) -> None:
        """Note the number of the check-in that asks."""
        self._turn = turn

    def answered(self, word: Heard, start: int) -> Offer | None:
        """Take in an answer to our question; return the offer that was passed over and holds."""
        if not self._turn or (word.start, word.turn) != (start, self._turn):
            return None
        passed, order = self._passed, (word.call, word.round)
        self._turn = 0
        self._take(order)
        if passed is None or (passed.call, passed.round) < order:
            return None
        self._order = passed.call, passed.round
        return passed

    def _take(self, order: tuple[int, int]) -> None:
        self._order, self._passed, self.ask_at = order, None, float("inf")
