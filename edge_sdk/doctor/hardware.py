# SPDX-License-Identifier: Apache-2.0
"""What the board gives a device: memory, a clock, a disk, and how hot and how well fed it is."""

from __future__ import annotations

import datetime as dt
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from edge_sdk import conditions, meter
from edge_sdk.doctor.board import Board
from edge_sdk.doctor.finding import Amiss
from edge_sdk.usage import SANE_FROM_S

MIB = 1 << 20
LEAST_DISK, SOME_DISK = 16 * MIB, 256 * MIB
BASE_RAM = 96 * MIB
"""An interpreter and an engine with a small model: what training takes at the least."""
HOT_C = 80.0  # a Raspberry Pi slows down here
_THROTTLED = {  # bits of the firmware's word: now, and 16 higher since the boot
    0: "the voltage is too low",
    1: "the frequency is capped",
    2: "it is throttled",
    3: "it is near its limit of temperature",
}


def memory(board: Board) -> str:
    """Say whether training has memory enough, for the bundle in use."""
    free = _meminfo(board.root).get("MemAvailable")
    if free is None:
        return "this board does not say how much is free"
    bundle = board.bundle()
    costs = bundle.manifest["cost"] if bundle is not None else {}
    needs = max(BASE_RAM, int(costs.get("ram_peak", 0)))
    if free < needs:
        raise Amiss(
            f"{free // MIB} MiB available, training takes about {needs // MIB} MiB",
            "stop other programs, or train less of the model",
        )
    return f"{free // MIB} MiB available, training takes about {needs // MIB} MiB"


def clock(board: Board) -> str:
    """Say whether the date can be, and whether a time server keeps it."""
    today = dt.datetime.fromtimestamp(board.now_s, dt.UTC).strftime("%Y-%m-%d %H:%M UTC")
    do = "connect a time server (timedatectl set-ntp true) or a battery-backed clock"
    if not SANE_FROM_S <= board.now_s < SANE_FROM_S + 40 * 365 * 86_400:
        raise Amiss(f"it is {today} here, which cannot be; TLS will fail", do)
    if not meter.is_synchronized(board.root):
        raise Amiss(f"{today}, not synchronized with a time server", do, "warn")
    return f"{today}, synchronized"


def disk(board: Board) -> str:
    """Say whether the state folder takes writes, and has space."""
    folder = next(p for p in (board.state, *board.state.absolute().parents) if p.exists())
    kind, options = _mount(board.root, folder)
    if "ro" in options:
        raise Amiss(
            f"{folder} is on a file system that is read-only",
            "a card that fails is remounted so: look at dmesg, replace the card; else remount it",
        )
    try:
        with tempfile.TemporaryFile(dir=folder) as trial:
            trial.write(b"fedge")
            trial.flush()
            os.fsync(trial.fileno())
    except OSError as error:
        do = "correct the folder's owner and mode, or free some space"
        raise Amiss(f"cannot write in {folder}: {error.strerror}", do) from error
    there = os.statvfs(folder)
    free = there.f_bavail * there.f_frsize
    if free < LEAST_DISK:
        raise Amiss(f"{free // MIB} MiB free in {folder}", "free some space: training needs it")
    if free < SOME_DISK:
        raise Amiss(f"{free // MIB} MiB free in {folder}", "free some space soon", "warn")
    if kind == "tmpfs":
        raise Amiss(f"{folder} is in memory and gone at the next boot", "set another state", "warn")
    return f"{free // MIB} MiB free, {folder} takes writes"


def temperature(board: Board) -> str:
    """Say how hot it is, beside what is allowed."""
    readings = conditions.temperatures(board.root)
    if not readings:
        return "this board has no thermometer"
    hottest, limit = max(readings), board.config.limits.max_celsius
    if limit is not None and hottest >= limit:
        do = "let it cool: better air, a heat sink, or a higher max_celsius"
        raise Amiss(f"{hottest:.0f} C, no training above max_celsius={limit:g}", do, "warn")
    if hottest >= HOT_C:
        raise Amiss(f"{hottest:.0f} C, it slows down", "better air or a heat sink", "warn")
    return f"{hottest:.0f} C"


def throttling(board: Board) -> str:
    """Say what the firmware slowed down, now and since the boot."""
    word = _throttled(board.root)
    if word is None:
        return "this board does not tell"
    now = [said for bit, said in _THROTTLED.items() if word >> bit & 1]
    since = [said for bit, said in _THROTTLED.items() if word >> (bit + 16) & 1]
    if word & 1:
        raise Amiss(f"now {', '.join(now)}", "a better power supply and cable: cards die of this")
    if now:
        raise Amiss(f"now {', '.join(now)}", "better air or a heat sink", "warn")
    if since:
        do = "a better power supply" if word >> 16 & 1 else "better air or a heat sink"
        raise Amiss(f"since the boot {', '.join(since)}", do, "warn")
    return "never since the boot"


def _meminfo(root: Path) -> dict[str, int]:
    """Return the kernel's memory figures, bytes."""
    found = {}
    for line in _text(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if value.split()[:1] and value.split()[0].isdigit():
            found[name] = int(value.split()[0]) << 10
    return found


def _mount(root: Path, folder: Path) -> tuple[str, set[str]]:
    """Return the kind of the file system that a folder is on, and its options."""
    best, kind, options = -1, "", set[str]()
    for line in _text(root / "proc/mounts").splitlines():
        fields = line.split(" ")
        if len(fields) < 4:
            continue
        point = Path(fields[1].replace("\\040", " "))
        if folder.absolute().is_relative_to(point) and len(point.parts) > best:
            best, kind, options = len(point.parts), fields[2], set(fields[3].split(","))
    return kind, options


def _throttled(root: Path) -> int | None:
    """Return the firmware's word about throttling, from whoever tells it; None on other boards."""
    word = _text(root / "sys/devices/platform/soc/soc:firmware/get_throttled")
    if not word and root == Path("/") and shutil.which("vcgencmd"):
        asked = subprocess.run(
            ["vcgencmd", "get_throttled"], capture_output=True, text=True, timeout=5, check=False
        )
        word = asked.stdout.partition("=")[2].strip()
    if re.fullmatch(r"(0x)?[0-9a-fA-F]{1,8}", word):
        return int(word, 16)
    for name in root.glob("sys/class/hwmon/hwmon*/name"):
        if _text(name) == "rpi_volt":
            return int(_text(name.with_name("in0_lcrit_alarm")) == "1")
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:  # a reading that this board does not have
        return ""
