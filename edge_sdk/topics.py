# SPDX-License-Identifier: Apache-2.0
"""Every MQTT topic: built, parsed and matched here and nowhere else. Pure: strings only.

At most 7 slashes and 64 bytes after the prefix, which the smallest cloud brokers allow.
"""

from __future__ import annotations

import functools
import re
import zlib
from dataclasses import dataclass

from edge_sdk.errors import MessageError

PREFIX = "fedge/1"
SHARDS = 256
UP_KINDS = ("checkin", "update", "chunk")
DOWN_KINDS = ("invite", "receipt", "missing", "heard")
PART_KINDS = {"bundle": "b", "weights": "w", "patch": "p"}
SLOTS = 64
"""Patches that are retained at a time: twice as many as an offer may name."""
MAX_PARTS = 65_535

_TASK = re.compile(r"[a-z0-9-]{1,20}\Z")
_DEVICE = re.compile(r"d[0-9a-f]{15}\Z")
_PATCH = re.compile(r"p([0-5][0-9]|6[0-3])\Z")
_INDEX = re.compile(r"(0|[1-9][0-9]{0,4})\Z")


@dataclass(frozen=True, slots=True)
class Address:
    """What a topic says: the kind of message, and whom or what it is about."""

    kind: str
    """status, offer, part, or one of `UP_KINDS` and `DOWN_KINDS`."""
    task: str = ""
    device: str = ""
    what: str = ""
    """For a part: bundle, weights or patch."""
    index: int = 0
    slot: int = 0
    """For a part of a patch."""


def shard(device: str) -> int:
    """Return which of the 256 slices of the fleet a device is in, for ever."""
    return zlib.crc32(device.encode()) % SHARDS


def offer(task: str) -> str:
    """Return where the task's offer is retained."""
    return f"{PREFIX}/t/{checked_task(task)}/offer"


def slot(version: int) -> int:
    """Return which of the places of patches the one that makes `version` is retained at."""
    return version % SLOTS


def part(task: str, what: str, index: int, version: int = 0) -> str:
    """Return where slice `index` of the bundle, the weights or the patch to `version` is."""
    if what not in PART_KINDS or not 0 <= index < MAX_PARTS:
        raise MessageError(f"expected a part of bundle, weights or patch, got {what!r:.20} {index}")
    place = f"{slot(version):02}" if what == "patch" else ""
    return f"{PREFIX}/t/{checked_task(task)}/model/{PART_KINDS[what]}{place}/{index}"


def up(task: str, device: str, kind: str) -> str:
    """Return where a device writes `kind` for a task."""
    if kind not in UP_KINDS:
        raise MessageError(f"expected one of {', '.join(UP_KINDS)}, got {kind!r:.20}")
    device = checked_device(device)
    return f"{PREFIX}/t/{checked_task(task)}/up/{shard(device)}/{device}/{kind}"


def down(task: str, device: str, kind: str) -> str:
    """Return where the coordinator writes `kind` for one device."""
    if kind not in DOWN_KINDS:
        raise MessageError(f"expected one of {', '.join(DOWN_KINDS)}, got {kind!r:.20}")
    return f"{PREFIX}/t/{checked_task(task)}/dn/{checked_device(device)}/{kind}"


def status(device: str) -> str:
    """Return where a device's status is retained, and where its will goes."""
    return f"{PREFIX}/d/{checked_device(device)}/status"


def down_filter(task: str, device: str) -> str:
    """Return the filter of all that the coordinator sends to one device for a task."""
    return f"{PREFIX}/t/{checked_task(task)}/dn/{checked_device(device)}/+"


@functools.lru_cache(maxsize=256)
def parts_filter(task: str, what: str, version: int = 0) -> str:
    """Return the filter of all slices of the bundle, the weights or the patch to `version`."""
    return part(task, what, 0, version).removesuffix("0") + "+"


def up_filter(task: str = "+") -> str:
    """Return the filter of all that devices send for a task, or for every task."""
    return f"{PREFIX}/t/{task if task == '+' else checked_task(task)}/up/+/+/+"


def status_filter() -> str:
    """Return the filter of every device's status."""
    return f"{PREFIX}/d/+/status"


def parse(topic: str) -> Address:
    """Read a topic back.

    Raises: MessageError when it is not one of ours, or a device writes in another's shard.
    """
    address = _parse(topic.split("/")) if topic.startswith(PREFIX + "/") else None
    if address is None:
        raise MessageError(f"expected a topic of {PREFIX}, got {topic[:64]!r}")
    return address


def checked_task(task: str) -> str:
    """Return `task` if it is a task's name, else raise MessageError."""
    if not _TASK.match(task):
        raise MessageError(f"expected a task name of 1 to 20 of a-z 0-9 -, got {task[:40]!r}")
    return task


def checked_device(device: str) -> str:
    """Return `device` if it is a device id, else raise MessageError."""
    if not _DEVICE.match(device):
        raise MessageError(f"expected a device id (d and 15 hex digits), got {device[:40]!r}")
    return device


def matches(pattern: str, topic: str) -> bool:
    """Say whether an MQTT topic filter, with `+` and `#`, takes in a topic."""
    wanted, levels = pattern.split("/"), topic.split("/")
    if wanted[0] in ("+", "#") and topic.startswith("$"):
        return False
    for i, level in enumerate(wanted):
        if level == "#":
            return True
        if i >= len(levels) or level not in ("+", levels[i]):
            return False
    return len(wanted) == len(levels)


def _parse(levels: list[str]) -> Address | None:
    match levels[2:]:
        case ["d", device, "status"] if _DEVICE.match(device):
            return Address("status", device=device)
        case ["t", task, *rest] if _TASK.match(task):
            return _parse_task(task, rest)
    return None


def _parse_task(task: str, rest: list[str]) -> Address | None:
    match rest:
        case ["offer"]:
            return Address("offer", task)
        case ["model", ("b" | "w") as what, index] if _INDEX.match(index):
            full = "bundle" if what == "b" else "weights"
            return Address("part", task, what=full, index=int(index))
        case ["model", place, index] if _PATCH.match(place) and _INDEX.match(index):
            return Address("part", task, what="patch", index=int(index), slot=int(place[1:]))
        case ["up", slot, device, kind] if kind in UP_KINDS and _DEVICE.match(device):
            return Address(kind, task, device) if slot == str(shard(device)) else None
        case ["dn", device, kind] if kind in DOWN_KINDS and _DEVICE.match(device):
            return Address(kind, task, device)
    return None
