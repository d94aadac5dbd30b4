# SPDX-License-Identifier: Apache-2.0
"""Values to differentiate at, drawn from one seed, and cases of one input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from check_grads import Case

RNG = np.random.default_rng(20)
F = np.float32


def normal(*shape: int) -> np.ndarray:
    """Return standard normal values."""
    return RNG.standard_normal(shape).astype(F)


def positive(*shape: int) -> np.ndarray:
    """Return values in [0.5, 2]."""
    return RNG.uniform(0.5, 2.0, shape).astype(F)


def spaced(*shape: int, gap: float = 0.1, shift: float = 0.05) -> np.ndarray:
    """Return values that differ by at least `gap` and keep half a gap from multiples of it."""
    n = int(np.prod(shape))
    return ((RNG.permutation(n) - n // 2) * gap + shift).astype(F).reshape(shape)


def ints(*values: int) -> np.ndarray:
    """Return an int64 vector."""
    return np.array(values, np.int64)


def unary(op: str, make: Callable[..., np.ndarray], *settings: dict[str, Any]) -> list[Case]:
    settings = settings or ({}, {})
    shapes = [(3, 4), (2, 3, 5), (4,)]
    return [
        Case(op, (make(*shapes[i % 3]),), setting, batch=(0,)) for i, setting in enumerate(settings)
    ]
