# SPDX-License-Identifier: Apache-2.0
"""Adding rows back to where they were gathered from."""

from __future__ import annotations

import numpy as np

from coordinator.compiler.emit import Emit


def scatter_rows(e: Emit, g: str, indices: str, like: str, axis: int) -> str:
    """Return zeros with the size of `like` along `axis`, to which the rows of `g` were added.

    `g` stands where ``Gather(like, indices, axis)`` would, but its other dimensions may differ from
    `like`'s (a gradient that is scattered along one axis after the other).
    """
    width = len(e.dims(indices))  # how many axes of g count rows
    rank = e.rank(g)
    front = [*range(axis, axis + width)]
    rest = [i for i in range(rank) if i not in front]
    rows = e.Transpose(g, perm=[*front, *rest]) if axis else g
    out_dims = [e.dims(like)[axis], *[e.dims(g)[i] for i in rest]]
    zeros = e.ConstantOfShape(_shape(e, rows, like, axis, width), value=np.zeros(1, np.float32))
    at = e.Cast(indices, to=7) if e.dtype(indices) != np.int64 else indices
    total = e.ScatterND(zeros, e.Unsqueeze(at, e.ints(-1)), rows, reduction="add")
    e.declare(total, tuple(out_dims))
    if not axis:
        return total
    return e.Transpose(total, perm=[*range(1, axis + 1), 0, *range(axis + 1, len(out_dims))])


def _shape(e: Emit, rows: str, like: str, axis: int, width: int) -> str:
    """Return the shape of the sum, its scattered axis in front."""
    dim, rest = e.dims(like)[axis], e.dims(rows)[width:]
    if dim is not None and None not in rest:
        return e.ints(dim, *[d for d in rest if d is not None])
    first = e.Shape(like, start=axis, end=axis + 1)
    return e.Concat(first, e.Shape(rows, start=width), axis=0) if rest else first
