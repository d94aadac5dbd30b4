# SPDX-License-Identifier: Apache-2.0
"""What systemd asks of a service: readiness, a watchdog, a word on how it is (sd_notify(3))."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Protocol

from edge_sdk.types import Clock

FEEDS_PER_WATCHDOG = 2.0


def notify(state: str) -> bool:
    """Tell the service manager, e.g. ``READY=1``; False when there is none to tell."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
        try:
            out.sendto(state.encode(), address)
        except OSError:  # the manager is gone: nobody is left to tell
            return False
    return True


def watchdog_s() -> float | None:
    """Return how often the manager wants a sign of life; None when it does not ask."""
    asked = os.environ.get("WATCHDOG_USEC", "")
    meant = os.environ.get("WATCHDOG_PID", str(os.getpid()))
    if not asked.isdigit() or int(asked) == 0 or meant != str(os.getpid()):
        return None
    return int(asked) / 1e6


class Watched(Protocol):
    """The part of a `Device` that is looked after."""

    @property
    def id(self) -> str:
        """The device's id."""
        ...

    @property
    def state(self) -> str:
        """What it does, in a word."""
        ...

    @property
    def version(self) -> int | None:
        """The version of its model."""
        ...

    def watch(self, alive: Callable[[], object]) -> None:
        """Call `alive` whenever the device has got on."""
        ...


class Service:
    """Tells the manager how the devices of this process are, and that each of them gets on.

    No timer feeds the watchdog: a sign of life is sent when every device's own thread has taken a
    turn since the last one. One that hangs, in whatever, lets the manager end the process.
    """

    def __init__(
        self,
        send: Callable[[str], object] = notify,
        every_s: float | None = None,
        clock: Clock = time,
    ) -> None:
        asked = every_s if every_s is not None else watchdog_s()
        self._feed_s = None if asked is None else asked / FEEDS_PER_WATCHDOG
        self._send, self._clock = send, clock
        self._devices: list[Watched] = []
        self._turned: set[str] = set()
        self._said, self._fed_at, self._is_ready = "", float("-inf"), False
        self._lock = threading.Lock()

    def look_after(self, device: Watched) -> None:
        """Expect signs of life from `device`, too."""
        with self._lock:
            self._devices.append(device)
        device.watch(partial(self._alive, device.id))

    def ready(self) -> None:
        """Say that all devices have started."""
        with self._lock:
            self._is_ready = True
            self._said = self._status()
            self._send(f"READY=1\nSTATUS={self._said}")

    def stopping(self) -> None:
        """Say that they are leaving."""
        self._send("STOPPING=1")

    def _alive(self, device: str) -> None:
        """Note that a device's thread has taken a turn."""
        with self._lock:
            self._turned.add(device)
            if not self._is_ready:
                return
            told = []
            if (status := self._status()) != self._said:
                self._said = status
                told.append(f"STATUS={status}")
            now = self._clock.monotonic()
            have_all = len(self._turned) == len(self._devices)
            if self._feed_s is not None and have_all and now >= self._fed_at + self._feed_s:
                self._fed_at, self._turned = now, set()
                told.append("WATCHDOG=1")
            if told:
                self._send("\n".join(told))

    def _status(self) -> str:
        if len(self._devices) == 1:
            (device,) = self._devices
            version = "no model yet" if device.version is None else f"version {device.version}"
            return f"{device.state}, {version}"
        counted = Counter(device.state for device in self._devices)
        states = ", ".join(f"{n} {state}" for state, n in sorted(counted.items()))
        return f"{len(self._devices)} devices: {states}"
