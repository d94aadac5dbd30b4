# SPDX-License-Identifier: Apache-2.0
"""Cohorts are chosen fairly, and only the generator decides."""

from __future__ import annotations

import numpy as np
import pytest

from coordinator import sampling
from coordinator.sampling import uniform

DEVICES = [f"d{i:02}" for i in range(20)]


def test_the_order_in_which_devices_are_listed_has_no_effect() -> None:
    one = uniform(DEVICES, 5, np.random.default_rng(7))
    assert one == uniform(reversed([*DEVICES, "d03"]), 5, np.random.default_rng(7))
    assert len(set(one)) == 5
    assert one == sorted(one)
    assert one != uniform(DEVICES, 5, np.random.default_rng(8))


@pytest.mark.parametrize(("size", "expected"), [(0, 0), (-1, 0), (20, 20), (99, 20)])
def test_no_more_are_chosen_than_there_are(size: int, expected: int) -> None:
    assert len(uniform(DEVICES, size, np.random.default_rng(0))) == expected


def test_every_device_has_an_equal_chance() -> None:
    generator, runs = np.random.default_rng(1), 4000
    counts = dict.fromkeys(DEVICES, 0)
    for _ in range(runs):
        for device in uniform(DEVICES, 5, generator):
            counts[device] += 1
    deviation = np.sqrt(runs * 0.25 * 0.75)
    assert max(abs(n - runs / 4) for n in counts.values()) < 4.5 * deviation


def test_nobody_in_a_growing_cohort_is_ever_moved() -> None:
    few, many = [f"d{i:03}" for i in range(10)], [f"d{i:03}" for i in range(200)]
    before, after = (sampling.buckets(c, 7, 8, grows=True) for c in (few, many))
    assert before == {name: after[name] for name in few}
    assert min(np.bincount(list(after.values()), minlength=8)) > 10
    assert len(set(sampling.buckets(many, 7, 0, grows=True).values())) == 200
