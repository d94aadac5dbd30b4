# SPDX-License-Identifier: Apache-2.0
"""How the device stands: its state folder, its conditions, and what its limits leave of the day."""

from __future__ import annotations

import os
import time

from edge_sdk import conditions as when
from edge_sdk import meter
from edge_sdk.doctor.board import Board
from edge_sdk.doctor.finding import Amiss
from edge_sdk.store import is_in_use


def state(board: Board) -> str:
    """Say whether the state folder can be written, and what in it was set aside."""
    folder = board.state
    if not folder.exists():
        return f"{folder} will be made at the first start"
    if not os.access(folder, os.W_OK | os.X_OK):
        raise Amiss(f"cannot write in {folder}", "correct its owner, or set another state")
    damaged = sorted(path.name for path in folder.rglob("*.damaged"))
    if damaged:
        do = "look at the disk; the device went on without them, delete them"
        raise Amiss(f"set aside as damaged: {', '.join(damaged)}", do, "warn")
    return f"{folder}, {'in use by a running device' if is_in_use(folder) else 'not in use'}"


def conditions(board: Board) -> str:
    """Say which conditions of training do not hold now."""
    around = when.Surroundings(board.root, int(board.status().get("examples", 0)))
    wanted = board.config.conditions & meter.within(board.config.limits)
    lapsed = wanted.lapsed(around)
    if lapsed:
        return f"no training now: {', '.join(lapsed)} does not hold"
    return f"{wanted.name}: hold now"


def limits(board: Board) -> str:
    """Say what was used today, beside what may be."""
    today = meter.Meter(board.state / "usage.json", board.config.limits, time, board.root)
    if lapsed := today.lapsed(0):
        do = "wait for the next day, or raise it under [limits]"
        raise Amiss(f"{', '.join(lapsed)} is used up", do, "warn")
    used = today.status()
    data = f"{used['bytes'] / 1e6:.1f}" + _of(used["max_bytes"], 1e6) + " MB"
    trained = (
        f"{used['training_s'] / 60:.1f}" + _of(used["max_training_s"], 60) + " min of training"
    )
    return f"used today: {data}, {trained}"


def _of(most: float | None, unit: float) -> str:
    return "" if most is None else f" of {most / unit:.1f}"
