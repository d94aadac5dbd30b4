# SPDX-License-Identifier: Apache-2.0
"""Averages that a minority of poisoned rows cannot drag away. Rows: float32 `[m, n]`. Pure.

Up to `f` of the m rows may be anything. In blocks of columns, so that memory stays O(m * block)
beyond the rows themselves. Where numbers are summed in an order that machines may choose, what is
decided by them is rounded, so that every replay decides alike.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from edge_sdk.types import Array

BLOCK = 1 << 16
"""Columns dealt with at a time."""

GRID = 2.0**-20
"""Weights of the geometric median are multiples of this."""

SMOOTHING = 1e-6
STEPS = 32


def median(rows: Array) -> Array:
    """Return the median of each column (Yin et al. 2018, "Byzantine-robust distributed learning").

    Holds against f < m / 2 rows. Returns: float32 `[n]`.
    """
    return _by_columns(rows, lambda block: np.median(block, axis=0))


def trimmed_mean(rows: Array, cut: int) -> Array:
    """Return each column's mean without its `cut` largest and smallest (Yin et al. 2018).

    Holds against f <= cut rows. Returns: float32 `[n]`.
    Raises: ValueError when nothing would be left.
    """
    if not 0 <= 2 * cut < len(rows):
        raise ValueError(f"expected to cut fewer than half of {len(rows)} rows, got {cut} a side")
    stop = len(rows) - cut
    return _by_columns(rows, lambda block: np.sort(block, axis=0)[cut:stop].mean(0))


def krum(rows: Array, attackers: int, keep: int = 1) -> Array:
    """Return the mean of the `keep` rows nearest to their neighbours.

    A row's score is the sum of its squared distances to the m - f - 2 rows closest to it (Blanchard
    et al. 2017, "Machine learning with adversaries"); `keep` above 1 is their Multi-Krum.
    Returns: float32 `[n]`. Raises: ValueError when 2 f + 2 >= m, where it promises nothing, or
    `keep` is not from 1 to m - f - 2.
    """
    count = len(rows)
    nearest = count - attackers - 2
    if attackers < 0 or 2 * attackers + 2 >= count or not 1 <= keep <= nearest:
        raise ValueError(
            f"expected 2 f + 2 below the {count} rows and to keep 1 to m - f - 2 of them, got "
            f"f = {attackers} and keep = {keep}"
        )
    scores = np.sort(_distances(rows), axis=1)[:, 1 : 1 + nearest].sum(1)
    chosen = np.argsort(scores, kind="stable")[:keep]
    return _by_columns(rows[np.sort(chosen)], lambda block: block.mean(0))


def geometric_median(rows: Array, weights: NDArray[np.float64] | None = None) -> Array:
    """Return the point whose distances to the rows sum to the least.

    Smoothed Weiszfeld (Pillutla et al. 2022, "Robust aggregation for federated learning",
    algorithm 2), from the weighted mean. Holds against rows of less than half the weight.
    Returns: float32 `[n]`.
    """
    alpha = np.ones(len(rows)) if weights is None else np.asarray(weights, np.float64)
    beta = alpha / alpha.sum()
    for _ in range(STEPS):
        point = _weighted(rows, beta)
        away = np.array([np.linalg.norm(row.astype(np.float64) - point) for row in rows])
        pull = alpha / np.maximum(away, SMOOTHING * max(float(away.max()), SMOOTHING))
        before, beta = beta, np.round(pull / pull.sum() / GRID) * GRID
        if (before == beta).all():
            break
    return _weighted(rows, beta)


def _weighted(rows: Array, beta: NDArray[np.float64]) -> Array:
    total = np.zeros(rows.shape[1])
    for row, share in zip(rows, beta, strict=True):
        total += share * row
    return np.asarray(total / beta.sum(), np.float32)


def _by_columns(rows: Array, rule: Callable[[Array], NDArray[np.floating]]) -> Array:
    starts = range(0, rows.shape[1], BLOCK)
    blocks = [np.asarray(rule(rows[:, at : at + BLOCK]), np.float32) for at in starts]
    return np.concatenate(blocks) if blocks else np.zeros(0, np.float32)


def _distances(rows: Array) -> NDArray[np.float64]:
    """Return the squared distances of all pairs: float64 `[m, m]`."""
    found = np.zeros((len(rows), len(rows)))
    for i, row in enumerate(rows):
        for j in range(i):
            gap = row.astype(np.float64) - rows[j]
            found[i, j] = found[j, i] = gap @ gap
    return found
