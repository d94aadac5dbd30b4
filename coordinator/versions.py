# SPDX-License-Identifier: Apache-2.0
"""From a version and the updates folded on top of it to the next: one function, no state. Pure.

The coordinator makes versions by it, and a replay of its journal makes them again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from coordinator.aggregators import Report, Sums
from coordinator.sampling import buckets
from coordinator.store import StoredRound, StoredUpdate, Version
from coordinator.task import Task
from edge_sdk import codec, params, patches
from edge_sdk.bundle import Bundle
from edge_sdk.codec import Lattice
from edge_sdk.errors import CodecError
from edge_sdk.types import Array


def first_version(task: Task, bundle: Bundle) -> Version:
    """Return version 0: the bundle's own parameters and a fresh server optimizer."""
    data = _flat(params.flatten(bundle.params(), bundle.shapes))
    server = task.strategy.server
    state = server.dump(server.init(params.count(bundle.shapes)))
    return Version(0, 0, hashlib.sha256(data).digest(), data, state)


def places(task: Task, r: StoredRound) -> Mapping[str, int]:
    """Return the bucket of each device of a round."""
    return buckets(r.cohort, r.seed, task.strategy.aggregator.buckets, grows=r.quorum == 0)


def report(task: Task, update: StoredUpdate, lattice: Lattice, bucket: int, base: int) -> Report:
    """Return what the aggregator is told of an update that is folded on top of version `base`."""
    return Report(
        examples=min(update.examples, task.max_examples),
        steps=update.steps,
        loss=update.loss,
        norm=codec.norm(lattice),
        discount=task.strategy.discount(max(0, base - update.version)),
        bucket=bucket,
    )


def next_version(
    task: Task, bundle: Bundle, before: Version, total: Sums, number: int
) -> Version | None:
    """Return the version that round `number` makes of the sum; None if it is not finite."""
    aggregator, server = task.strategy.aggregator, task.strategy.server
    size = params.count(bundle.shapes)
    with np.errstate(all="ignore"):  # what is not finite is found below
        mean = aggregator.result(total)
        beside = aggregator.beside(total) if aggregator.beside else None
        known, count = server.load(before.optimizer, size), aggregator.count(total)
        target, state = server.step(target_of(before), mean, known, count, beside)
    if not np.isfinite(target).all():
        return None
    if (down := task.down) is None:
        return _version(before.number + 1, number, target, server.dump(state))
    weights = weights_of(before)
    try:
        delta = params.unflatten(target - weights, bundle.shapes)
        patch, _ = down.encode(delta, down.init(bundle.shapes, seed=before.number + 1))
    except CodecError:  # it has diverged beyond what a patch can carry
        return None
    weights = patches.apply(weights, patch, bundle.shapes)
    made = _version(
        before.number + 1, number, weights, server.dump(state), target=_flat(target), patch=patch
    )
    return made if np.isfinite(weights).all() else None


def weights_of(version: Version) -> Array:
    """Return the masters that devices have: float32, flat."""
    return np.frombuffer(version.params, "<f4").astype(np.float32)


def target_of(version: Version) -> Array:
    """Return what a version would be had its patches carried everything: float32, flat."""
    return np.frombuffer(version.target or version.params, "<f4").astype(np.float32)


def _version(
    number: int, r: int, weights: Array, state: bytes, *, target: bytes = b"", patch: bytes = b""
) -> Version:
    data = _flat(weights)
    return Version(number, r, hashlib.sha256(data).digest(), data, state, target, patch)


def _flat(weights: Array) -> bytes:
    return weights.astype("<f4").tobytes()
