# SPDX-License-Identifier: Apache-2.0
"""Keeps a device within its limits of the day: counts what it uses, over restarts and power cuts.

A flash card wears out by writes, and a kill must not give back what was used. So under a limit a
share of it is written down as used before it is used, and nothing more until that share is gone.
"""

from __future__ import annotations

import ctypes
import json
import logging
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from edge_sdk import files, usage
from edge_sdk.conditions import Condition, always, cooler_than, on_mains
from edge_sdk.errors import StoreError
from edge_sdk.files import SYSTEM, Disk
from edge_sdk.limits import Limits
from edge_sdk.types import Clock
from edge_sdk.usage import Instant, Usage

log = logging.getLogger(__name__)

SHARE = 20  # of a limit, written down at a time
LEAST_SHARE_BYTES, LEAST_SHARE_S = 1 << 16, 60.0
UNLIMITED_SHARE_BYTES, UNLIMITED_SHARE_S = 4 << 20, 3600.0  # written down once it was used
MAX_FILE_BYTES = 4096
TALK_BYTES = 1024  # offers, check-ins and the like, until the day is over
_UNSYNCHRONIZED = 5  # what adjtimex(2) answers then


class _Share(NamedTuple):
    """How much is written down before it is used, and how much may be used unwritten."""

    ahead: float
    behind: float


class Meter:
    """What a device has used today, in one small file; not for several threads at once.

    Args:
        file: where the day is kept.
        limits: those of the day are looked at.
        clock: monotonic seconds, and `time()` where the machine's clock is to be asked.
        root: stands for ``/``, for the boot's name and the clock's state.
        disk: where the file is.
    """

    def __init__(
        self,
        file: Path,
        limits: Limits,
        clock: Clock,
        root: Path = Path("/"),
        disk: Disk = SYSTEM,
    ) -> None:
        self._file, self._limits, self._clock, self._root = file, limits, clock, root
        self._disk = disk
        self._boot = _text(root / "proc/sys/kernel/random/boot_id")
        self._counted = 0  # of this start's bytes
        self._round_from, self._round_bytes = 0, 0
        self._today = self._written = _read(file, disk)
        self._look()

    @property
    def left_bytes(self) -> float:
        """How many bytes may be sent and received yet today; infinite without a limit."""
        most = self._limits.max_bytes_per_day
        return math.inf if most is None else max(0, most - self._today.bytes)

    @property
    def left_s(self) -> float:
        """How many seconds of training there may be yet today; infinite without a limit."""
        most = self._limits.max_minutes_per_day
        return math.inf if most is None else max(0.0, 60 * most - self._today.training_s)

    def count(self, total_bytes: int) -> None:
        """Take note of all the bytes that were sent and received since the start."""
        self._look()
        self._use(total_bytes - self._counted, 0.0)
        self._counted = total_bytes

    def round_began(self) -> None:
        """Take note that a round begins: what it takes is the best guess for the next one."""
        self._round_from = self._counted

    def round_ended(self) -> None:
        """Take note that a round has its receipt."""
        self._round_bytes = max(self._round_bytes, self._counted - self._round_from)

    def trained(self, seconds: float) -> None:
        """Take note of a training that has ended, whatever came of it."""
        self._look()
        self._use(0, max(0.0, seconds))

    def will_train(self, seconds: float) -> None:
        """Write down a training before it begins: a power cut in the midst of it is no gift."""
        if self._limits.max_minutes_per_day is not None and math.isfinite(seconds):
            self._keep(self._today._replace(training_s=self._today.training_s + seconds))

    def lapsed(self, update_bytes: float) -> tuple[str, ...]:
        """Return the names of the limits that leave no room for one more round.

        Args:
            update_bytes: what a round's update takes, as declared.
        """
        found = []
        if self.left_bytes < max(update_bytes, self._round_bytes) + TALK_BYTES:
            found.append("max_bytes_per_day")
        if self.left_s < 1.0:
            found.append("max_minutes_per_day")
        return tuple(found)

    def close(self) -> None:
        """Write down what was used, to the byte."""
        self._look()
        if self._today._replace(seen=None) != self._written._replace(seen=None):
            self._keep(self._today)

    def status(self) -> dict[str, Any]:
        """Return today's use and what is allowed, as ``fedge device status`` shows them."""
        return {
            "bytes": self._today.bytes,
            "max_bytes": self._limits.max_bytes_per_day,
            "training_s": round(self._today.training_s, 1),
            "max_training_s": _seconds(self._limits.max_minutes_per_day),
            "max_celsius": self._limits.max_celsius,
            "on_battery": self._limits.on_battery,
        }

    def _look(self) -> None:
        """See whether it is another day."""
        wall = getattr(self._clock, "time", None)
        is_right = wall is not None and is_synchronized(self._root)
        now = Instant(self._boot, self._clock.monotonic(), wall() if wall and is_right else 0.0)
        before, self._today = self._today, usage.at(self._today, now)
        if self._today.elapsed_s < before.elapsed_s or before.seen is None:
            self._written = self._today._replace(bytes=0, training_s=0.0)

    def _use(self, bytes_: int, seconds: float) -> None:
        today, written = self._today, self._written
        today = today._replace(bytes=today.bytes + bytes_, training_s=today.training_s + seconds)
        self._today = today
        data, time = self._shares()
        if (
            today.bytes > written.bytes + data.behind
            or today.training_s > written.training_s + time.behind
        ):
            ahead_s = max(today.training_s + time.ahead, written.training_s)
            self._keep(today._replace(bytes=today.bytes + int(data.ahead), training_s=ahead_s))

    def _shares(self) -> tuple[_Share, _Share]:
        most, most_s = self._limits.max_bytes_per_day, _seconds(self._limits.max_minutes_per_day)
        data, time = _Share(0, UNLIMITED_SHARE_BYTES), _Share(0, UNLIMITED_SHARE_S)
        if most is not None:
            data = _Share(min(max(most / SHARE, LEAST_SHARE_BYTES), most), 0)
        if most_s is not None:
            time = _Share(min(max(most_s / SHARE, LEAST_SHARE_S), most_s), 0)
        return data, time

    def _keep(self, today: Usage) -> None:
        self._written = today
        try:
            files.write(self._file, json.dumps(_fields(today)).encode() + b"\n", disk=self._disk)
        except StoreError as error:
            log.warning("use of the day not written reason=%s", error)


def within(limits: Limits) -> Condition:
    """Return the limits that are conditions: how warm the board may be, and on what it runs."""
    cool = always if limits.max_celsius is None else cooler_than(limits.max_celsius)
    return cool if limits.on_battery else on_mains & cool


def is_synchronized(root: Path = Path("/")) -> bool:
    """Say whether the machine's clock follows a time server, as the kernel or systemd knows it."""
    if (root / "run/systemd/timesync/synchronized").exists():
        return True
    if root != Path("/"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "adjtimex"):
        return False
    nothing_set = ctypes.create_string_buffer(512)  # struct timex, of 208 bytes or fewer
    return 0 <= int(libc.adjtimex(nothing_set)) < _UNSYNCHRONIZED


def _seconds(minutes: float | None) -> float | None:
    return None if minutes is None else 60 * minutes


def _fields(today: Usage) -> dict[str, Any]:
    moments = {"seen": today.seen, "began": today.began}
    return today._asdict() | {name: at and asdict(at) for name, at in moments.items()}


def _read(file: Path, disk: Disk) -> Usage:
    """Read the day back; what does not add up is a day on which nothing was used."""
    try:
        found = json.loads(disk.read(file, MAX_FILE_BYTES))
        moments = _instant(found["seen"]), _instant(found["began"])
        used = int(found["bytes"]), float(found["training_s"]), float(found["elapsed_s"])
        read = Usage(*used, *moments)
        if not (read.bytes >= 0 and read.training_s >= 0 and read.elapsed_s >= 0):
            raise ValueError("expected no negative use")  # noqa: TRY301 - one way out
    except FileNotFoundError:
        return Usage()
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("use of the day is damaged, begun anew reason=%s", error)
        return Usage()
    return read


def _instant(found: dict[str, Any] | None) -> Instant | None:
    if found is None:
        return None
    return Instant(str(found["boot"]), float(found["monotonic"]), float(found["wall"]))


def _text(path: Path) -> str:
    try:
        return path.read_text("ascii", "replace").strip()
    except OSError:
        return ""
