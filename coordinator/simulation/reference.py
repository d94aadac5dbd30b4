# SPDX-License-Identifier: Apache-2.0
"""Federated averaging once more, as the paper has it: nothing is shared with the code it checks.

Sums of exact products by `math.fsum`, in double precision, from what the journal says was folded.
"""

from __future__ import annotations

import functools
import math
import sqlite3

import numpy as np
from numpy.typing import NDArray

from coordinator.simulation.model import SHAPES, SIZE, tiny
from coordinator.task import Task
from edge_sdk import codec, params
from edge_sdk.types import Spec

TOLERANCE = 2e-6


def compare(db: sqlite3.Connection, task: Task) -> str | None:
    """Return which version differs from the plain sum, None if none does.

    Strategies other than fedavg are left to the replay.
    """
    if task.strategy.spec != _FEDAVG:
        return None
    target = params.flatten(tiny().params(), SHAPES).astype(np.float64)
    weights = target.copy()
    for version, stored, stored_target, patch in db.execute(_VERSIONS).fetchall():
        target = target + _mean(db, task, version)
        found = np.frombuffer(stored_target or stored, "<f4").astype(np.float64)
        if not np.allclose(found, target, rtol=TOLERANCE, atol=TOLERANCE):
            gap = float(np.abs(found - target).max())
            return f"version {version} is {gap:.3g} away from the mean of what it folded"
        target = found
        weights = found if patch is None else weights + decoded(patch)
        held = np.frombuffer(stored, "<f4").astype(np.float64)
        if not np.allclose(held, weights, rtol=TOLERANCE, atol=TOLERANCE):
            return f"version {version} is not what its patch makes of the version before"
        weights = held
    return None


@functools.lru_cache(1024)
def decoded(blob: bytes) -> NDArray[np.float64]:
    """Return the delta that an update carries."""
    return params.flatten(codec.decode(blob, SHAPES), SHAPES).astype(np.float64)


def _mean(db: sqlite3.Connection, task: Task, version: int) -> NDArray[np.float64]:
    rows, weights = [], []
    for examples, base, blob in db.execute(_FOLDED, (version,)):
        staleness = max(0, version - 1 - base)
        share = max(1, round(256 * (1 + staleness) ** -0.5))
        weight = float(min(examples, task.max_examples, 10_000) * share)
        rows.append(decoded(blob) * weight)
        weights.append(weight)
    if not rows:
        return np.zeros(SIZE)
    total = [math.fsum(column) for column in np.transpose(rows)]
    return np.array(total) / math.fsum(weights)


_FEDAVG: Spec = ["fedavg", {"lr": 1.0, "staleness": 0.5}]
_VERSIONS = "SELECT version, params, target, patch FROM versions WHERE version > 0 ORDER BY version"
_FOLDED = "SELECT examples, version, blob FROM updates WHERE folded = ?"
