# SPDX-License-Identifier: Apache-2.0
"""Whether a device may train now: its conditions and its limits of the day, looked at together."""

from __future__ import annotations

import logging

from edge_sdk.conditions import Surroundings
from edge_sdk.events import ConditionsChanged
from edge_sdk.local import Local
from edge_sdk.meter import Meter, within
from edge_sdk.quota import Quota
from edge_sdk.settings import Settings
from edge_sdk.transport import Counters

log = logging.getLogger(__name__)


class Readiness:
    """Looks at the board when asked, and counts what is sent and received."""

    def __init__(
        self, settings: Settings, meter: Meter, local: Local, counters: Counters, quota: Quota
    ) -> None:
        self._settings, self._meter, self._local, self._quota = settings, meter, local, quota
        self._counters = counters
        self._may_train = settings.conditions & within(settings.limits)
        self.lapsed: tuple[str, ...] = ()
        """What did not hold when it was last looked at."""

    def look(self, *, is_training: bool) -> ConditionsChanged:
        """Return whether training may go on, and what does not hold."""
        examples = self._local.examples
        busy = self._settings.threads if is_training else 0
        around = Surroundings(self._settings.root, examples, busy)
        try:
            lapsed = self._may_train.lapsed(around)
        except Exception:  # a condition is the app's code: its failure must not end ours
            log.exception("a condition failed, taken as not holding")
            lapsed = ("failed",)
        self.count()
        lapsed += self._meter.lapsed(self._update_bytes())
        if not is_training and self._quota.left < self._local.round_bytes:
            lapsed += ("disk",)  # the model answers all the same
        if lapsed != self.lapsed:
            log.info("conditions lapsed=%s", ",".join(lapsed) or "none")
        self.lapsed = lapsed
        return ConditionsChanged(not lapsed, examples, lapsed)

    def count(self) -> None:
        """Take note of what was sent and received."""
        self._meter.count(self._counters.bytes_up + self._counters.bytes_down)

    def may_take(self, size: int) -> bool:
        """Say whether so many bytes may come yet today."""
        self.count()
        return size <= self._meter.left_bytes

    def round_began(self) -> None:
        """Take note of an invitation."""
        self.count()
        self._meter.round_began()

    def round_ended(self) -> None:
        """Take note of a receipt."""
        self.count()
        self._meter.round_ended()

    def _update_bytes(self) -> float:
        bundle = self._local.bundle
        return float(bundle.manifest["cost"].get("bytes_update", 0)) if bundle else 0.0
