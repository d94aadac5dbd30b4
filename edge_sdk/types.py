# SPDX-License-Identifier: Apache-2.0
"""The few types that every module shares, named once. Holds no behaviour."""

from __future__ import annotations

from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float32]
Params: TypeAlias = dict[str, Array]
"""Tensors by forward-model name, in the manifest's order."""

Shapes: TypeAlias = dict[str, tuple[int, ...]]
"""Shapes of `Params`, in the same order; the order fixes the flat layout."""

Spec: TypeAlias = list[object]
"""How a value is spelled outside Python: ``["top_k", 0.01]``, or a list of those for a chain."""


class Clock(Protocol):
    """Time as a port: pure code and tests never read the machine's clock."""

    def monotonic(self) -> float:
        """Return seconds on a clock that never goes back."""
        ...
