# SPDX-License-Identifier: Apache-2.0
"""When to try a broker again, in which version of MQTT, and how loudly to say so. Pure."""

from __future__ import annotations

import random
from typing import Literal, TypeAlias

from edge_sdk.errors import TransportError

STABLE_S = 20.0
Cause: TypeAlias = Literal["absent", "silent", "auth", "version", "tls", "lost", "refused"]


class LinkError(TransportError):
    """A connection failed or ended; `cause` says what kind of failure it was."""

    def __init__(self, message: str, cause: Cause) -> None:
        super().__init__(message)
        self.cause: Cause = cause


class Redial:
    """Full-jitter backoff that starts again after a stable connection; falls back to MQTT 3.1.1.

    Wrong credentials wait as long as can be: only a person will change that.
    """

    def __init__(self, low_s: float, high_s: float, rng: random.Random, version: int = 5) -> None:
        if not 0 < low_s <= high_s:
            raise ValueError(f"expected 0 < shortest <= longest wait, got {low_s} and {high_s}")
        self.low_s, self.high_s, self._rng = low_s, high_s, rng
        self.version = version
        """The version of MQTT to try next: 5, or 4 for 3.1.1."""
        self._may_switch = version == 5
        self.failures = 0
        self.is_news = True
        """Whether the next failure is worth a warning: it differs from the last one."""
        self._said = ""
        self._up_at: float | None = None

    def up(self, now: float) -> None:
        """Take note that the broker accepted us."""
        self._up_at, self._said, self.is_news = now, "", True

    def failed(self, error: LinkError, now: float) -> float:
        """Take note of a failure or of the end of a connection; return the seconds to wait."""
        if self._up_at is not None and now - self._up_at >= STABLE_S:
            self.failures = 0
        self._up_at = None
        self.is_news, self._said = str(error) != self._said, str(error)
        if error.cause == "version" and self.version == 5:
            self.version = 4
            return 0.0
        if (
            error.cause == "silent" and self._may_switch
        ):  # some brokers hang up on a version that they do not know
            self.version = 9 - self.version
        if error.cause == "auth":
            return self._rng.uniform(self.high_s / 2, self.high_s)
        ceiling = min(self.high_s, self.low_s * 2.0 ** min(self.failures, 30))
        self.failures += 1
        return self._rng.uniform(0.0, ceiling)
