# SPDX-License-Identifier: Apache-2.0
"""From one version of the weights to the next by a patch: what the update codec writes. Pure.

The coordinator adds a patch to its own weights just as devices do, so that both come to the same
bits; what the patch could not carry goes into the next one (error feedback, server side). A device
checks the sha256 of what it comes to, and takes the weights themselves where that does not hold.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_sdk import codec
from edge_sdk.types import Array, Shapes


def apply(weights: Array, patch: bytes, shapes: Shapes) -> Array:
    """Return the weights (flat float32) after a patch, elementwise in float32.

    Raises: CodecError when the patch is none for these shapes.
    """
    lattice = codec.lattice(patch, shapes)
    after, change = weights.copy(), lattice.q.astype(np.float32) * np.float32(lattice.step)
    if lattice.positions is None:
        return after + change
    after[lattice.positions] += change
    return after


def route(have: int, version: int, sizes: Sequence[int], whole: int) -> range | None:
    """Return the versions whose patches lead from `have` to `version`, where that is cheaper.

    Args:
        have: the version that is here.
        version: the one that is wanted.
        sizes: bytes of the patches that lead to `version`, the last to `version` itself.
        whole: bytes of the weights.

    Returns: the versions that the patches make, in order; None to fetch the weights.
    """
    steps = version - have
    if not 0 < steps <= len(sizes) or sum(sizes[-steps:]) >= whole:
        return None
    return range(have + 1, version + 1)
