# SPDX-License-Identifier: Apache-2.0
"""Sums of updates: memory O(model) however many report, the same sum in whatever order they come.

A sum adds integers. An update of integers `q` and step `m * 2**e` (a bfloat16, so m has
8 bits) adds `q * m * weight * 2**(e + FRACTION_BITS)` to an int64 for each number, rounded to
nearest where that is not whole. Integers add up the same in any order, on any machine, in one
process or sharded over many, and `subtract` takes an update back exactly.

Headroom: an int64 holds 2**63. A fleet of 1e5 devices of 1e4 examples each weighs 1e9 * 2**8 (the
discount's units) = 2**37.9. With 20 fraction bits that leaves changes of up to 2**5 = 32 in every
number of every update, and a resolution of 2**-28 for a single example. The bound is kept exactly:
an update that could overflow is refused before anything is added.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edge_sdk.codec import Lattice
from edge_sdk.errors import FedgeError
from edge_sdk.types import Array

FRACTION_BITS = 20
WEIGHT_ONE = 2**8
"""The weight of one example without a discount."""
MAX_EXAMPLES = 10_000
CEILING = 2**63 - 1


class AccumulatorFull(FedgeError, OverflowError):  # noqa: N818 - named for what it tells
    """Adding this update could overflow: commit what is there, or refuse the update."""


@dataclass(frozen=True, slots=True)
class Sum:
    """A weighted sum on its way. `add` writes into `total`: the state passed in is used up."""

    total: NDArray[np.int64]  # [n], units of 2**-FRACTION_BITS / WEIGHT_ONE
    mass: int = 0
    """What the sum is divided by in the end: of a mean, the sum of the weights."""
    bound: int = 0
    """No entry of |total| is larger."""
    updates: int = 0
    work: int = 0
    """A second number that is summed beside the updates, where a rule needs one."""


def weight_of(examples: int, discount: float = 1.0, *, cap: int = MAX_EXAMPLES) -> int:
    """Return the integer weight of an update: its examples, at most `cap`, times its discount.

    Raises: ValueError for no examples or a discount outside (0, 1].
    """
    if examples < 1 or not 0.0 < discount <= 1.0:
        raise ValueError(
            f"expected at least one example and a discount above 0 up to 1, "
            f"got {examples} examples and a discount of {discount}"
        )
    return min(examples, cap) * max(1, round(discount * WEIGHT_ONE))


def init(count: int) -> Sum:
    """Start a sum over a model of `count` numbers."""
    return Sum(np.zeros(count, np.int64))


def add(state: Sum, update: Lattice, weight: int, *, mass: int | None = None, work: int = 0) -> Sum:
    """Add an update times its weight, which comes from `weight_of`; its `mass` if not the same.

    Raises: AccumulatorFull when the sum might overflow, ValueError when the update does not fit the
        model. The state is unchanged then.
    """
    mass = weight if mass is None else mass
    _check_fit(state.total.size, update, min(weight, mass))
    values, largest = _fixed(update, weight)
    bound = state.bound + largest
    if max(bound, state.mass + mass) > CEILING:
        raise AccumulatorFull(
            f"expected a sum below 2**63, got an update of weight {weight} that may exceed it "
            f"after {state.updates} updates: commit the round first, or clip the update"
        )
    _scatter(state.total, update, values)
    return Sum(state.total, state.mass + mass, bound, state.updates + 1, state.work + work)


def subtract(state: Sum, update: Lattice, weight: int) -> Sum:
    """Take back an update that was added with the same weight and mass; exact.

    Raises: ValueError when the update does not fit the model, or more is taken than was added.
    """
    _check_fit(state.total.size, update, weight)
    values, largest = _fixed(update, weight)
    if state.updates < 1 or largest > state.bound or weight > state.mass:
        raise ValueError("expected an update that was added before, got one that cannot have been")
    _scatter(state.total, update, -values)
    return replace(
        state, mass=state.mass - weight, bound=state.bound - largest, updates=state.updates - 1
    )


def merge(one: Sum, other: Sum) -> Sum:
    """Return the sum of two shards of a round; both are left as they are.

    Raises: AccumulatorFull when the sum might overflow, ValueError for different models.
    """
    if one.total.shape != other.total.shape:
        raise ValueError(f"expected shards of one model, got {one.total.size}, {other.total.size}")
    bound, mass = one.bound + other.bound, one.mass + other.mass
    if bound > CEILING or mass > CEILING:
        raise AccumulatorFull("expected shards that sum below 2**63, got more: commit one first")
    updates, work = one.updates + other.updates, one.work + other.work
    return Sum(one.total + other.total, mass, bound, updates, work)


def mean(state: Sum) -> Array:
    """Return the sum divided by its mass: float32 `[n]`; zeros where nothing was added."""
    if state.mass == 0:
        return np.zeros(state.total.size, np.float32)
    return np.divide(state.total, math.ldexp(state.mass, FRACTION_BITS)).astype(np.float32)


def _check_fit(count: int, update: Lattice, weight: int) -> None:
    found = update.positions
    if weight < 1:
        raise ValueError(f"expected a positive weight, got {weight}")
    if found is None:
        if update.q.size != count:
            raise ValueError(f"expected {count} numbers, got an update of {update.q.size}")
    elif found.size != update.q.size or (found.size and not 0 <= found[0] <= found[-1] < count):
        raise ValueError(f"expected positions below {count}, got an update that does not fit")


def _fixed(update: Lattice, weight: int) -> tuple[NDArray[np.int64], int]:
    """Return the update's integers in the sum's units, and a bound on the largest of them."""
    if not update.q.size:
        return np.zeros(0, np.int64), 0
    top = max(int(update.q.max()), -int(update.q.min()))
    factor, shift = _factor(update.step, weight)
    drop = min(-shift, (top * factor).bit_length() - 62)
    if drop > 0:  # finer than an int64 holds; the steps that codecs write are not
        factor, shift = (factor + (1 << drop >> 1)) >> drop, shift + drop
    whole, below = factor << max(shift, 0), max(-shift, 0)
    if top * whole > CEILING:
        raise AccumulatorFull(
            f"expected changes that fit a sum below 2**63, got up to {top * update.step:g}: "
            "refuse the update"
        )
    if below > 62:  # less than half a unit each
        return np.zeros(update.q.size, np.int64), 0
    values = update.q.astype(np.int64)
    values *= whole
    if below:
        values += 1 << (below - 1)
        values >>= below
    return values, (top * whole >> below) + (below > 0)


def _factor(step: float, weight: int) -> tuple[int, int]:
    """Return (odd integer, shift) with `step * weight * 2**FRACTION_BITS = integer * 2**shift`."""
    over, under = step.as_integer_ratio()  # exact; `under` is a power of two
    number, shift = over * weight, FRACTION_BITS - (under.bit_length() - 1)
    zeros = (number & -number).bit_length() - 1
    return number >> zeros, shift + zeros


def _scatter(total: NDArray[np.int64], update: Lattice, values: NDArray[np.int64]) -> None:
    if update.positions is None:
        total += values
    else:  # positions are unique, and np.add.at is 17 times slower before numpy 1.25
        total[update.positions] += values
