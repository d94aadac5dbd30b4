# SPDX-License-Identifier: Apache-2.0
"""How large a packet a link carries well, learned from what became of the last ones. Pure.

One PUBLISH that takes longer than the keepalive is never finished: the broker hangs up in the
middle of it, and it starts again from its first byte, for ever. So the first packets are small, one
that is soon acknowledged doubles the size, and a connection that ends while a packet was long under
way quarters it.
"""

FIRST = 8192
LEAST = 2048


class PacketSize:
    """The largest payload to publish now: `limit`, of `LEAST` to `most` bytes."""

    def __init__(self, most: int, keepalive_s: float) -> None:
        self.most, self.limit, self._keepalive_s = most, min(most, FIRST), keepalive_s

    def allow(self, most: int) -> None:
        """Take note of what the broker allows."""
        self.most = max(LEAST, most)
        self.limit = min(self.limit, self.most)

    def acked(self, size: int, seconds: float) -> None:
        """Take note that a payload of `size` bytes was acknowledged after so many seconds."""
        if 2 * size > self.limit and seconds < self._keepalive_s / 8:
            self.limit = min(2 * self.limit, self.most)

    def lost(self, seconds: float) -> None:
        """Take note that the connection ended, so many seconds after the oldest open payload."""
        if seconds > self._keepalive_s / 2:
            self.limit = max(self.limit // 4, LEAST)
