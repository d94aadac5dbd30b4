# SPDX-License-Identifier: Apache-2.0
"""The step of a lattice: a positive bfloat16, so that steps times small integers are exact."""

from __future__ import annotations

import numpy as np

from edge_sdk.errors import CodecError

TINY = 2.0**-126
HUGE = 2.0**127 * (2 - 2.0**-7)


def round_step(step: float, *, up: bool = False) -> float:
    """Round a positive step to a bfloat16, to nearest or `up`, inside the normal range."""
    word = int(np.float32(min(max(step, TINY), HUGE)).view(np.uint32))
    word = (word + (0xFFFF if up else 0x8000)) & 0xFFFF0000
    return min(float(np.uint32(word).view(np.float32)), HUGE)


def word_of(step: float) -> int:
    """Return the 16 bits of a step that `round_step` made."""
    return int(np.float32(step).view(np.uint32)) >> 16


def read_step(word: int) -> float:
    """Return the step that 16 bits stand for.

    Raises: CodecError on zero, negative, subnormal, infinite and NaN.
    """
    step = float(np.uint32(word << 16).view(np.float32))
    if not TINY <= step <= HUGE:
        raise CodecError(f"expected a positive, finite step, got {step}; the body is damaged")
    return step
