# SPDX-License-Identifier: Apache-2.0
"""The k largest of many, exactly and in order, without sorting or partitioning them all."""

from __future__ import annotations

import math
from typing import cast

import numpy as np

from edge_sdk.codec.bits import Ints, nonzero
from edge_sdk.types import Array

SAMPLE = 16_384
STRIDE = 2_654_435_761  # Knuth's multiplicative hash: spreads the sample over any structure


def sample(sizes: Array) -> Array:
    """Return up to 16,384 of the values, spread evenly, the same ones each time."""
    if sizes.size <= SAMPLE:
        return sizes
    return sizes[np.arange(SAMPLE, dtype=np.int64) * STRIDE % sizes.size]


def largest(sizes: Array, k: int) -> Ints:
    """Return the ascending positions of the `k` largest of non-negative `sizes`.

    Zeros are never chosen, so fewer may come back; of equals the first come first. A threshold is
    guessed from a sample, four standard deviations low, and the survivors are partitioned exactly.
    """
    k = min(k, sizes.size)
    if k <= 0:
        return np.zeros(0, np.int64)
    found = nonzero(sizes >= _guess(sizes, k))
    if found.size < k:
        found = np.arange(sizes.size, dtype=np.int64)
    near = sizes[found]
    cut = np.partition(near, near.size - k)[near.size - k]
    if cut == 0:
        return found[near > 0]
    above, equal = near > cut, nonzero(near == cut)
    above[equal[: k - int(np.count_nonzero(above))]] = True
    return cast("Ints", found[above])


def _guess(sizes: Array, k: int) -> np.float32:
    """Return a threshold that at least `k` sizes very probably reach."""
    some = sample(sizes)
    share = k / sizes.size
    keep = math.ceil(some.size * share + 4 * math.sqrt(some.size * share) + 1)
    if keep >= some.size:
        return np.float32(0)
    return cast("np.float32", np.partition(some, some.size - keep)[some.size - keep])
