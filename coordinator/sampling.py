# SPDX-License-Identifier: Apache-2.0
"""Who is invited to a round, and who is added up with whom. Randomness is passed in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np


def uniform(eligible: Iterable[str], size: int, generator: np.random.Generator) -> list[str]:
    """Choose a cohort of `size` with equal chances, or everybody where there are fewer.

    The order in which devices are listed has no effect: the same devices and the same state of the
    generator give the same cohort, in ascending order.
    """
    devices = sorted(set(eligible))
    if size >= len(devices):
        return devices
    chosen = generator.permutation(len(devices))[: max(0, size)]
    return [devices[i] for i in sorted(chosen.tolist())]


def buckets(cohort: Iterable[str], seed: int, count: int, *, grows: bool = False) -> dict[str, int]:
    """Put each device of a cohort into one of `count` buckets, equally many into each.

    By a hash that no device can compute without the round's seed, so that attackers cannot choose
    their company. `count` 0 gives each device a bucket of its own. In a cohort that `grows` nobody
    is ever moved, and the buckets are only about equal.
    """
    if count == 1:
        return dict.fromkeys(cohort, 0)
    drawn = {name: _draw(seed, name) for name in cohort}
    if grows:
        return {name: at % count if count else at for name, at in drawn.items()}
    ranked = sorted(drawn, key=drawn.__getitem__)
    return {name: place % count if count else place for place, name in enumerate(ranked)}


def _draw(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:8], "big")
