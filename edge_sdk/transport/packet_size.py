# SPDX-License-Identifier: Apache-2.0
"""How large a packet a link carries well, learned from what became of the last ones. Pure.

One PUBLISH that takes longer than the keepalive is never finished: the broker hangs up in the
middle of it, and it starts again from its first byte, for ever. So the first packets are small, one
that is soon acknowledged doubles the size, and a connection that ends while a packet was long under
way quarters it. But a link that goes silent ends so too, whatever the size: what is already cut to
a size that got through stays so, once, or all that has arrived would have to come again.
"""

FIRST = 8192
LEAST = 2048
_HEADER = 128  # packets of one cut differ by less


class PacketSize:
    """The largest payload to publish now: `limit`, of `LEAST` to `most` bytes."""

    def __init__(self, most: int, keepalive_s: float) -> None:
        self.most, self.limit, self._keepalive_s = most, min(most, FIRST), keepalive_s
        self._carried, self._is_doubted = 0, False

    @property
    def carried(self) -> int:
        """A limit that cuts as packets of the largest size that got through were cut, or 0."""
        return min(self._carried + _HEADER, self.most) if self._carried else 0

    def allow(self, most: int) -> None:
        """Take note of what the broker allows."""
        self.most = max(LEAST, most)
        self.limit = min(self.limit, self.most)

    def acked(self, size: int, seconds: float) -> None:
        """Take note that a payload of `size` bytes was acknowledged after so many seconds."""
        if 2 * size > self._carried:
            self._carried, self._is_doubted = max(size, self._carried), False
        if 2 * size > self.limit and seconds < self._keepalive_s / 8:
            self.limit = min(2 * self.limit, self.most)

    def lost(self, seconds: float) -> None:
        """Take note that the connection ended, so many seconds after the oldest open payload."""
        if seconds > self._keepalive_s / 2:
            self.limit = max(self.limit // 4, LEAST)
            self._carried = 0 if self._is_doubted else self._carried  # the link became slower
            self._is_doubted = True
