# SPDX-License-Identifier: Apache-2.0
"""What systemd asks of a daemon: readiness, a watchdog, a word when stopping (sd_notify(3))."""

from __future__ import annotations

import os
import socket


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
