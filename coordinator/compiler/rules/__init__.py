# SPDX-License-Identifier: Apache-2.0
"""Gradient rules, one file a family; importing this package fills ``vjp.RULES``."""

from coordinator.compiler.rules import (
    activations,
    conv,
    curves,
    dynamic,
    einsum,
    elementwise,
    gather,
    linear,
    lp,
    norm,
    pool,
    quantize,
    reduce,
    resample,
    shape,
    softmax,
    unfold,
)

__all__ = [
    "activations",
    "conv",
    "curves",
    "dynamic",
    "einsum",
    "elementwise",
    "gather",
    "linear",
    "lp",
    "norm",
    "pool",
    "quantize",
    "reduce",
    "resample",
    "shape",
    "softmax",
    "unfold",
]
