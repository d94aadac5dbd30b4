# SPDX-License-Identifier: Apache-2.0
"""The stages that a codec is chained from: what to keep, and how finely.

A stage is a value: a name and arguments (how it is spelled in a spec), the form that it takes and
the form that it gives, and one function on a draft. `chain` checks the forms when a codec is built.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_sdk.codec import hadamard, select
from edge_sdk.codec.bits import Ints, nonzero
from edge_sdk.codec.body import MAX_LEVEL, Lattice
from edge_sdk.codec.steps import round_step
from edge_sdk.errors import CodecError
from edge_sdk.types import Array

INT8 = 127
ROUND_UP = np.float32(1 / 3)
"""What a deadzone adds before it floors: a number goes out from 2/3 of a step upwards.

The position of one more number costs more bytes than the error it saves is worth."""
MAX_RESIDUAL_RMS = 4.0
"""The widest deadzone that error feedback bears: the residual widens the step that made it."""


class Draft(NamedTuple):
    """A delta on its way through a chain."""

    flat: Array  # [n]
    rms: float
    random: np.random.Generator
    key: bytes  # fresh for each update
    picked: Ints | None = None
    lattice: Lattice | None = None
    rotated: hadamard.Rotated | None = None


class Stage(NamedTuple):
    """One step of a codec: what form of draft it takes, what form it gives (see `chain.WHY`)."""

    name: str
    args: tuple[float, ...]
    takes: tuple[str, ...]
    gives: str
    apply: Callable[[Draft], Draft]
    drops: bool = False  # leaves numbers out for good, unless error feedback carries them
    unbiased: bool = False


def top_k(share: float) -> Stage:
    """Keep the `share` of all numbers that changed most (0 to 1, at least one number)."""
    _check("top_k", share, 0.0, 1.0, "a share of the numbers")

    def apply(draft: Draft) -> Draft:
        k = max(1, round(share * draft.flat.size))
        return draft._replace(picked=select.largest(np.abs(draft.flat), k))

    return Stage("top_k", (share,), ("float",), "picked", apply, drops=True)


def deadzone(rms: float = 2.0) -> Stage:
    """Round to steps of `rms` times the delta's root mean square; small numbers go to zero."""
    _check("deadzone", rms, 0.0, 64.0, "a multiple of the delta's root mean square")

    def apply(draft: Draft) -> Draft:
        step = round_step(rms * draft.rms)
        size = np.abs(draft.flat)
        found = nonzero(size >= np.float32(step) * (1 - ROUND_UP))
        q = _levels(size[found] / np.float32(step) + ROUND_UP, draft.flat[found])
        return draft._replace(lattice=_without_zeros(found, q, step))

    return Stage("deadzone", (rms,), ("float",), "levels", apply, drops=True)


def grid(rms: float = 0.1) -> Stage:
    """Round every number to the nearest multiple of `rms` times the delta's root mean square."""
    _check("grid", rms, 0.0, 64.0, "a multiple of the delta's root mean square")

    def apply(draft: Draft) -> Draft:
        step = round_step(rms * draft.rms)
        q = np.rint(draft.flat / np.float32(step)).clip(-MAX_LEVEL, MAX_LEVEL).astype(np.int32)
        return draft._replace(lattice=_from_dense(q, step))

    return Stage("grid", (rms,), ("float",), "levels", apply)


def stochastic(share: float) -> Stage:
    """Round at random, without bias, on a step that sends about `share` of all numbers.

    Its noise is averaged away by a cohort, not by one device: use it with ten reports or more.
    """
    _check("stochastic", share, 0.0, 1.0, "a share of the numbers")

    def apply(draft: Draft) -> Draft:
        size = np.abs(draft.flat)
        step = round_step(_step_for_share(size, share))
        level = size / np.float32(step)
        level += draft.random.random(size.size, np.float32)
        found = nonzero(level >= 1)
        q = _levels(level[found], draft.flat[found])
        return draft._replace(lattice=Lattice(found, q, step))

    return Stage("stochastic", (share,), ("float",), "even", apply, unbiased=True)


def int8() -> Stage:
    """Hold each number that is sent in a sign and 127 levels.

    After `top_k`, or alone, the largest number sets the step; after `deadzone` or `grid` the step
    stands, and what passes 127 steps is cut to that.
    """

    def apply(draft: Draft) -> Draft:
        if draft.lattice is not None:
            q = draft.lattice.q.clip(-INT8, INT8)
            return draft._replace(lattice=draft.lattice._replace(q=q))
        values = draft.flat if draft.picked is None else draft.flat[draft.picked]
        step = round_step(float(np.abs(values).max(initial=0)) / INT8, up=True)
        q = np.rint(values / np.float32(step)).astype(np.int32)
        if draft.picked is None:
            return draft._replace(lattice=_from_dense(q, step))
        return draft._replace(lattice=_without_zeros(draft.picked, q, step))

    return Stage("int8", (), ("float", "picked", "levels"), "int8", apply)


def rotate() -> Stage:
    """Mix the numbers by a random rotation, so that one bit of each says equally much."""
    return Stage("rotate", (), ("float",), "turned", lambda draft: draft)


def sign1() -> Stage:
    """Send one bit for each rotated number, and a scale that makes the estimate unbiased (EDEN)."""

    def apply(draft: Draft) -> Draft:
        uniform = draft.random.random(hadamard.chunks_of(draft.flat.size), np.float32)
        return draft._replace(rotated=hadamard.rotate(draft.flat, draft.key, uniform))

    return Stage("sign1", (), ("turned",), "signs", apply, unbiased=True)


def dense() -> Stage:
    """Send every number as float32: no compression, for comparisons."""
    return Stage("dense", (), ("float",), "plain", lambda draft: draft)


def _check(name: str, value: float, low: float, high: float, what: str) -> None:
    if not low < value <= high:
        raise CodecError(f"{name}: expected {what} above {low:g} up to {high:g}, got {value}")


def _levels(level: NDArray[Any], signed: Array) -> NDArray[np.int32]:
    q: NDArray[np.int32] = np.minimum(level, np.float32(MAX_LEVEL)).astype(np.int32)
    q *= hadamard.signs_of(signed < 0)
    return q


def _from_dense(q: NDArray[np.int32], step: float) -> Lattice:
    """Leave the zeros out where that makes most of the numbers go."""
    if 2 * int(np.count_nonzero(q)) > q.size:
        return Lattice(None, q, step)
    found = nonzero(q)
    return Lattice(found, q[found], step)


def _without_zeros(found: Ints, q: NDArray[np.int32], step: float) -> Lattice:
    kept = q != 0
    return Lattice(found, q, step) if kept.all() else Lattice(found[kept], q[kept], step)


def _step_for_share(size: Array, share: float) -> float:
    """Return the step at which about `share` of the numbers is sent, from a sample."""
    if not size.any():
        return 1.0
    some = np.sort(select.sample(size)).astype(np.float64)
    below = np.concatenate([[0.0], np.cumsum(some)])  # sum of the i smallest
    # with step some[i], every number from i up is sent, and those below in proportion
    sent = below[:-1] / np.maximum(some, 1e-300) + np.arange(some.size, 0, -1)
    i = int(np.searchsorted(-sent, -share * some.size))  # sent falls as the step grows
    rest = share * some.size - (some.size - i)
    step = below[i] / rest if rest > 0 and below[i] > 0 else float(some[-1])
    return max(step, float(size.max(initial=0)) / 2**15)
