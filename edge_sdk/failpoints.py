# SPDX-License-Identifier: Apache-2.0
"""Named points where a test or a drill makes a process stall or die, set from the environment.

``FEDGE_FAILPOINTS="after_train:sleep=8,before_last_chunk:kill@2"`` sleeps 8 seconds each time
``after_train`` is reached and kills the process with SIGKILL the second time ``before_last_chunk``
is. Unset, a point costs one dictionary look-up.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from dataclasses import dataclass

from edge_sdk.errors import ConfigError

log = logging.getLogger(__name__)

VARIABLE = "FEDGE_FAILPOINTS"
DEVICE = ("invited", "training", "after_train", "before_last_chunk", "after_send", "on_receipt")
CHILD = ("checkpoint",)
"""In the training process, each time that it has kept where it stands."""
COORDINATOR = ("before_commit", "after_commit")
"""Either side of each transaction that changed something."""
POINTS = (*DEVICE, *CHILD, *COORDINATOR)


@dataclass(slots=True)
class Failpoint:
    """What happens at one point: at its `at`-th visit, or at each when `at` is None."""

    name: str
    action: str
    seconds: float = 0.0
    at: int | None = None
    visits: int = 0

    def reach(self) -> None:
        """Count a visit and do what was asked, if it is this visit's turn."""
        self.visits += 1
        if self.at is not None and self.visits != self.at:
            return
        log.warning("failpoint name=%s action=%s", self.name, self.action)
        if self.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.seconds)


class Failpoints:
    """The failpoints of a process."""

    def __init__(self, spec: str = "") -> None:
        parsed = [_parse(part.strip()) for part in spec.split(",") if part.strip()]
        self._points = {point.name: point for point in parsed}

    @classmethod
    def from_environment(cls) -> Failpoints:
        """Read ``FEDGE_FAILPOINTS``.

        Raises: ConfigError when it names an unknown point or action.
        """
        return cls(os.environ.get(VARIABLE, ""))

    def reach(self, name: str) -> None:
        """Say that the point `name` is reached."""
        if (point := self._points.get(name)) is not None:
            point.reach()


def _parse(text: str) -> Failpoint:
    name, _, rest = text.partition(":")
    action, _, at = rest.partition("@")
    kind, _, value = action.partition("=")
    if name not in POINTS or kind not in {"kill", "sleep"}:
        raise ConfigError(
            f"{VARIABLE}: expected POINT:kill or POINT:sleep=SECONDS with a point of "
            f"{', '.join(POINTS)}, got {text!r}"
        )
    try:
        return Failpoint(name, kind, float(value or 0), int(at) if at else None)
    except ValueError as error:
        raise ConfigError(f"{VARIABLE}: {text!r} has a value that is no number") from error
