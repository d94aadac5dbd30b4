# SPDX-License-Identifier: Apache-2.0
"""Named tensors to one flat vector and back, and the sign of a delta, which lives here alone.

A delta is `local - base`, always; whoever folds deltas adds them. Pure: numpy only.
"""

from __future__ import annotations

import math

import numpy as np

from edge_sdk.types import Array, Params, Shapes


def shapes_of(params: Params) -> Shapes:
    """Return the shape of each tensor, in order."""
    return {name: tuple(int(d) for d in value.shape) for name, value in params.items()}


def count(shapes: Shapes) -> int:
    """Return how many numbers the tensors hold together."""
    return sum(math.prod(shape) for shape in shapes.values())


def flatten(params: Params, shapes: Shapes) -> Array:
    """Lay tensors end to end in the order of `shapes`.

    Returns: float32, `[count(shapes)]`.
    Raises: ValueError when a tensor is missing, extra or of another shape.
    """
    if params.keys() != shapes.keys():
        missing, extra = shapes.keys() - params.keys(), params.keys() - shapes.keys()
        raise ValueError(f"expected the tensors of the bundle; missing {missing}, extra {extra}")
    for name, shape in shapes.items():
        if params[name].shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {params[name].shape}")
    parts = [np.asarray(params[name], np.float32).ravel() for name in shapes]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def unflatten(flat: Array, shapes: Shapes) -> Params:
    """Cut a flat vector into named tensors, as views on it.

    Raises: ValueError when the length is not `count(shapes)`.
    """
    if flat.shape != (count(shapes),):
        raise ValueError(f"expected {count(shapes)} numbers, got an array of shape {flat.shape}")
    params, at = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        params[name] = flat[at : at + size].reshape(shape)
        at += size
    return params


def delta(local: Params, base: Params) -> Params:
    """Return `local - base`: what training changed."""
    return {name: np.subtract(local[name], base[name], dtype=np.float32) for name in base}


def apply(base: Params, change: Params) -> Params:
    """Return `base + change`: the inverse of `delta`, up to rounding."""
    return {name: np.add(base[name], change[name], dtype=np.float32) for name in base}
