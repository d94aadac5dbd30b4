# SPDX-License-Identifier: Apache-2.0
"""Who is invited to a round. How many is the pace's affair; randomness is passed in."""

from __future__ import annotations

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
