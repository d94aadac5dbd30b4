# SPDX-License-Identifier: Apache-2.0
"""The round that a device has taken up, as it is kept on disk until the round's update is. Pure.

A deadline is so many seconds from when the invitation came. Over a restart of the process the
kernel's clock goes on; over one of the board it begins anew, and how long the board was off is only
known where its clock of the wall is.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields

from edge_sdk.messages import Invite
from edge_sdk.usage import SANE_FROM_S, Instant

MOST_ATTEMPTS = 3
"""A round that took the process with it so many times is let go."""


@dataclass(frozen=True, slots=True)
class UnderWay:
    """An invitation that was taken up: which bundle it trains, and how long there was left."""

    invite: Invite
    bundle: str
    left_s: float
    at: Instant
    attempts: int = 1

    def left(self, now: Instant) -> float:
        """Return how many seconds are left; the most there can be, where nobody can know."""
        if self.at.boot == now.boot != "":
            return self.left_s - max(0.0, now.monotonic - self.at.monotonic)
        if min(self.at.wall, now.wall) >= SANE_FROM_S:
            return self.left_s - max(0.0, now.wall - self.at.wall)
        return self.left_s

    def to_bytes(self) -> bytes:
        """Return it as JSON."""
        named = ((field.name, getattr(self.invite, field.name)) for field in fields(self.invite))
        written = {
            "invite": {k: v.hex() if isinstance(v, bytes) else v for k, v in named},
            "bundle": self.bundle,
            "left_s": self.left_s,
            "at": asdict(self.at),
            "attempts": self.attempts,
        }
        return json.dumps(written, sort_keys=True).encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> UnderWay:
        """Read it back.

        Raises: ValueError, KeyError or TypeError when it does not add up.
        """
        read = json.loads(data)
        invite = read["invite"]
        raw = {name: bytes.fromhex(invite[name]) for name in ("model", "body") if name in invite}
        found = cls(
            Invite(**{**invite, **raw}),
            str(read["bundle"]),
            float(read["left_s"]),
            Instant(**read["at"]),
            int(read["attempts"]),
        )
        numbers = (found.invite.round, found.invite.version, found.invite.seed, found.at.monotonic)
        if len(found.invite.model) != 32 or not all(isinstance(n, int | float) for n in numbers):
            raise ValueError("expected an invitation")
        return found
