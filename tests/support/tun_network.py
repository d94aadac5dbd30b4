# SPDX-License-Identifier: Apache-2.0
"""Network namespaces whose every packet passes through this process, which ails it by a seed.

Each `Host` is a namespace with one TUN device; the test's own namespace has another, at `address`.
A thread carries packets between them and loses, delays, repeats, reorders, slows, alters or
swallows them as the `Wire` of each direction says. Nothing of it has a name or outlives its
processes: the devices go with their file descriptors, and a namespace with the last process in it,
also when the test is killed. Needs root, and skips where there are no namespaces or no TUN.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import os
import random
import selectors
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_SET_IFF, _SET_ADDRESS, _SET_MASK, _SET_MTU = 0x400454CA, 0x8916, 0x891C, 0x8922
_GET_FLAGS, _SET_FLAGS, _UP = 0x8913, 0x8914, 0x1
_TUN_WITHOUT_INFO = 0x1001
_TCP, _SYN, _ACK = 6, 0x02, 0x10
NETWORK = f"198.18.{os.getpid() % 256}."
"""Among those for measuring networks (RFC 2544), routed nowhere else; another in each process."""


@dataclass(frozen=True, slots=True)
class Wire:
    """What becomes of the packets of one direction of one host.

    Attributes:
        delay_s, jitter_s: how long each takes, and up to how much longer, in order all the same.
        bytes_per_s: how fast they leave, None for at once.
        queue_s: how long one waits for its turn at most; it is lost beyond that.
        loss, duplicate: the share that is lost, that comes twice.
        reorder: the share that is overtaken by those that come within `held_s` after it.
        corrupt: the share with one byte altered, which the checksum of TCP finds.
        dead_after: bytes, from now on, after which nothing is carried any more; None for never.
    """

    delay_s: float = 0.0
    jitter_s: float = 0.0
    bytes_per_s: float | None = None
    queue_s: float = 10.0
    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    held_s: float = 0.02
    corrupt: float = 0.0
    dead_after: int | None = None


class Way:
    """One direction of one host; assign `wire` to change what becomes of its packets."""

    def __init__(self, rng: random.Random) -> None:
        self.packets, self.bytes, self.lost, self.altered = 0, 0, 0, 0
        self._rng, self._free_s, self._last_s = rng, 0.0, 0.0
        self.wire = Wire()

    @property
    def wire(self) -> Wire:
        return self._wire

    @wire.setter
    def wire(self, wire: Wire) -> None:
        self._wire, self._since = wire, self.bytes

    def through(self, packet: bytes, now: float) -> list[tuple[float, bytes]]:
        """Return when which packets come out at the other end, for one that goes in now."""
        wire, draw = self._wire, self._rng.random
        self.packets += 1
        self.bytes += len(packet)
        is_dead = wire.dead_after is not None and self.bytes - self._since > wire.dead_after
        if is_dead or draw() < wire.loss or self._free_s - now > wire.queue_s:
            self.lost += 1
            return []
        if wire.bytes_per_s is not None:
            self._free_s = max(now, self._free_s) + len(packet) / wire.bytes_per_s
        due = max(now, self._free_s) + wire.delay_s + wire.jitter_s * draw()
        if draw() < wire.reorder:
            due += wire.held_s
        else:
            due = self._last_s = max(due, self._last_s)
        if draw() < wire.corrupt:
            self.altered += 1
            packet = _corrupted(packet, self._rng)
        return [(due, packet)] * (2 if draw() < wire.duplicate else 1)


class Host:
    """A namespace on the network. `under` is what to run a process under, so that it is in it.

    `up` and `down` are its two directions; `connections` counts the TCP connections it has begun.
    """

    def __init__(self, address: str, seed: int) -> None:
        self.address = address
        self.up, self.down = Way(_draws(seed)), Way(_draws(seed + 1))
        self.under: tuple[str, ...] = ()
        self.connections = 0
        self._flows: dict[bytes, int] = {}
        self._mappings = 0

    def forget(self) -> None:
        """Swallow what belongs to a connection begun so far, as a NAT does whose table was lost."""
        self._mappings += 1

    def lets_out(self, packet: bytes) -> bool:
        """Say whether a packet from it passes the NAT; its first opens the way."""
        flow, flags = _flow(packet, packet[16:20])
        if flags is not None and flags & (_SYN | _ACK) == _SYN:
            self.connections += flow not in self._flows
            self._flows[flow] = self._mappings
        return flags is None or self._flows.get(flow) == self._mappings

    def lets_in(self, packet: bytes) -> bool:
        """Say whether a packet to it belongs to a connection that the NAT remembers."""
        flow, flags = _flow(packet, packet[12:16], is_in=True)
        return flags is None or self._flows.get(flow) == self._mappings


class Network:
    """`count` hosts beside the test's own namespace, as a context manager."""

    def __init__(self, count: int, *, seed: int, mtu: int = 1500) -> None:
        self.address = f"{NETWORK}1"
        """Where the hosts find what listens in the test's own namespace."""
        self.hosts = [Host(f"{NETWORK}{n + 2}", 2 * n + seed * 1000) for n in range(count)]
        self._mtu = mtu
        self._holders = contextlib.ExitStack()
        self._devices: dict[str, int] = {}
        self._coming: list[tuple[float, int, Host | None, str, bytes]] = []
        self._count = 0
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._bell, self._ring = os.pipe()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as holders:
            _skip_without_rights()
            self._devices[self.address] = _tun(self.address, 1500)
            holders.callback(os.close, self._devices[self.address])
            for host in self.hosts:
                self._devices[host.address] = holders.enter_context(_namespace(host, self._mtu))
            self._holders = holders.pop_all()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.write(self._ring, b".")
        self._thread.join(5)
        self._holders.close()
        os.close(self._bell)
        os.close(self._ring)

    def _carry(self) -> None:
        by_address = {host.address: host for host in self.hosts}
        with selectors.DefaultSelector() as selector:
            selector.register(self._bell, selectors.EVENT_READ)
            for address, device in self._devices.items():
                selector.register(device, selectors.EVENT_READ, by_address.get(address))
            while True:
                wait_s = self._coming[0][0] - time.monotonic() if self._coming else None
                for key, _ in selector.select(wait_s if wait_s is None else max(0.0, wait_s)):
                    if key.fd == self._bell:
                        return
                    self._take(key.fd, key.data)
                self._deliver(by_address)

    def _take(self, device: int, source: Host | None) -> None:
        """Take in a packet from a host, or from the test's own namespace."""
        with contextlib.suppress(BlockingIOError):
            packet = os.read(device, 65536)
            if packet[0] >> 4 != 4:  # IPv6 announces itself to nobody
                return
            now = time.monotonic()
            if source is None:
                self._later(now, None, packet)
            elif source.lets_out(packet):
                for due, one in source.up.through(packet, now):
                    self._later(due, None, one)

    def _later(self, due: float, host: Host | None, packet: bytes) -> None:
        """Let a packet come out at a time: of a host's upper wire, or of its lower one if named."""
        self._count += 1
        target = socket.inet_ntoa(packet[16:20])
        heapq.heappush(self._coming, (due, self._count, host, target, packet))

    def _deliver(self, by_address: dict[str, Host]) -> None:
        while self._coming and self._coming[0][0] <= time.monotonic():
            due, _, host, target, packet = heapq.heappop(self._coming)
            found = by_address.get(target)
            if host is None and found is not None:
                if found.lets_in(packet):
                    for later, one in found.down.through(packet, due):
                        self._later(later, found, one)
            elif target in self._devices:
                with contextlib.suppress(OSError):  # the kernel takes it for no packet
                    os.write(self._devices[target], packet)


def _flow(packet: bytes, other: bytes, *, is_in: bool = False) -> tuple[bytes, int | None]:
    """Return what names a TCP connection, from its host's side, and the packet's flags."""
    start = 4 * (packet[0] & 15)
    if packet[9] != _TCP or len(packet) < start + 20:
        return b"", None
    ports = packet[start : start + 4]
    mine = ports[2:] + ports[:2] if is_in else ports
    return mine + other, packet[start + 13]


def _corrupted(packet: bytes, rng: random.Random) -> bytes:
    altered = bytearray(packet)
    altered[rng.randrange(20, len(packet))] ^= 1 << rng.randrange(8)
    return bytes(altered)


def _draws(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 - repeats by its seed


# --- namespaces and devices ---------------------------------------------------------------------
def _skip_without_rights() -> None:
    import pytest  # the holder of a namespace does not load it

    if os.geteuid() != 0:
        pytest.skip("network namespaces with TUN devices need root")
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        pytest.skip("there is no /dev/net/tun to open")
    if subprocess.run(["unshare", "--net", "true"], check=False, stderr=-3).returncode:
        pytest.skip("no network namespaces here")


@contextlib.contextmanager
def _namespace(host: Host, mtu: int) -> Iterator[int]:
    """Make a namespace with a TUN device, give the device, and let both go again."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        me = Path(__file__).resolve()
        holder = ["unshare", "--net", sys.executable, "-I", "-S", str(me)]
        arguments = [host.address, str(mtu), str(theirs.fileno())]
        with subprocess.Popen([*holder, *arguments], pass_fds=(theirs.fileno(),)) as process:
            theirs.close()
            try:
                ours.settimeout(20)
                _, [device], _, _ = socket.recv_fds(ours, 1, 1)
                host.under = ("nsenter", f"--net=/proc/{process.pid}/ns/net")
                with os.fdopen(device, "rb", 0):
                    yield device
            finally:
                process.kill()


def _hold(address: str, mtu: int, passing: int) -> None:
    """In a new namespace: make its device, hand it over, and stay until the other end closes."""
    with socket.socket(fileno=passing) as channel:
        socket.send_fds(channel, [b"."], [_tun(address, mtu)])
        channel.recv(1)


def _tun(address: str, mtu: int) -> int:
    """Open a TUN device in this process's namespace, with an address; return it, up."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    made = fcntl.ioctl(device, _SET_IFF, struct.pack("16sH22x", b"fedge%d", _TUN_WITHOUT_INFO))
    name = made[:16]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:

        def request(number: int, value: bytes) -> bytes:
            return fcntl.ioctl(control, number, name + value.ljust(24, b"\0"))

        def internet(text: str) -> bytes:
            return struct.pack("HH", socket.AF_INET, 0) + socket.inet_aton(text)

        request(_SET_ADDRESS, internet(address))
        request(_SET_MASK, internet("255.255.255.0"))
        request(_SET_MTU, struct.pack("i", mtu))
        (flags,) = struct.unpack_from("H", request(_GET_FLAGS, b""), 16)
        request(_SET_FLAGS, struct.pack("H", flags | _UP))
    return device


if __name__ == "__main__":
    _hold(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
