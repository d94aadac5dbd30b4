# SPDX-License-Identifier: Apache-2.0
"""How many bytes an update takes: counts, so they are gated."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edge_sdk import codec
from edge_sdk.codec import body, positions, select
from edge_sdk.types import Shapes


def bound_bits(count: int, k: int) -> float:
    """Return log2 C(count, k): what uniform positions cost at least."""
    return (math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)) / math.log(2)


@pytest.mark.parametrize(
    ("count", "k"),
    [
        (100_000, 300),
        (100_000, 1_000),
        (100_000, 10_000),
        (1_000_000, 1_000),
        (1_000_000, 10_000),
        (1_000_000, 30_000),
        (1_000_000, 100_000),
        (1_000_000, 300_000),
        (1_000_000, 490_000),
    ],
)
def test_uniform_positions_cost_at_most_3_percent_over_their_entropy(count: int, k: int) -> None:
    rng = np.random.default_rng(k)
    found = np.sort(rng.choice(count, k, replace=False))
    shapes: Shapes = {"w": (count // 100, 90), "b": (count // 10,)}
    coding, packed = positions.pack(found, count, shapes)
    assert len(packed) * 8 <= 1.03 * bound_bits(count, k)
    np.testing.assert_array_equal(positions.unpack(coding, packed, k, shapes, count), found)


def test_positions_in_few_rows_and_columns_cost_far_less_than_uniform_ones() -> None:
    rng = np.random.default_rng(0)
    live = np.outer(rng.random(400) < 0.3, rng.random(500) < 0.4)
    found = np.flatnonzero(live & (rng.random((400, 500)) < 0.15))
    for shapes in ({"w": (400, 500)}, {"w": (400, 5, 100)}):
        coding, packed = positions.pack(found, 200_000, shapes)
        assert coding == positions.ROWS
        assert len(packed) * 8 < 0.65 * bound_bits(200_000, found.size)


def heavy(count: int, seed: int = 0) -> np.ndarray:
    """A delta as local SGD leaves it: Student-t, a third of it exactly zero."""
    rng = np.random.default_rng(seed)
    values = rng.standard_t(3, count).astype(np.float32)
    values[rng.random(count) < 0.3] = 0
    return values


@pytest.mark.parametrize(
    ("name", "ratio"),
    [
        ("default", 40),
        ("lean", 140),
        ("stateless", 31.5),
        ("stateless-lean", 70),
        ("exact-ish", 6.5),
        ("dense", 0.99),
    ],
)
def test_each_preset_compresses_a_heavy_tailed_delta(name: str, ratio: float) -> None:
    shapes: Shapes = {"w": (300_000,)}
    c = codec.preset(name)
    blob, _ = c.encode({"w": heavy(300_000)}, c.init(shapes))
    assert 4 * 300_000 / len(blob) >= ratio


def test_an_update_of_nothing_is_a_handful_of_bytes() -> None:
    shapes: Shapes = {"w": (300_000,)}
    blob = body.write(codec.Lattice(np.zeros(0, np.int64), np.zeros(0, np.int32), 1.0), shapes)
    assert len(blob) < 32


@pytest.mark.parametrize("k", [0, 1, 5, 999, 1000, 5000])
def test_the_largest_are_found_exactly(k: int) -> None:
    rng = np.random.default_rng(1)
    for sizes in (
        np.abs(rng.standard_t(2, 50_000)).astype(np.float32),
        np.tile(np.arange(1, 6, dtype=np.float32), 10_000),  # ties, and a period
        np.concatenate([np.zeros(49_000), rng.random(1_000)]).astype(np.float32),
        rng.random(40).astype(np.float32),
    ):
        found = select.largest(sizes, k)
        assert np.all(np.diff(found) > 0)
        expected = np.argsort(-sizes, kind="stable")[: min(k, int(np.count_nonzero(sizes)))]
        np.testing.assert_array_equal(found, np.sort(expected))


def test_a_sample_that_misleads_is_made_good() -> None:
    sizes = np.ones(60_000, np.float32)
    seen = np.arange(select.SAMPLE) * select.STRIDE % sizes.size
    sizes[seen] = 2.0  # all of the sample is large, most of the rest is not
    assert select.largest(sizes, 20_000).size == 20_000
