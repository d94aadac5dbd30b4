# SPDX-License-Identifier: Apache-2.0
"""Gradient rules, one file a family; importing this package fills ``vjp.RULES``."""

from coordinator.compiler.rules import (
    activations,
    conv,
    elementwise,
    linear,
    norm,
    pool,
    quantize,
    reduce,
    resample,
    shape,
    softmax,
)

__all__ = [
    "activations",
    "conv",
    "elementwise",
    "linear",
    "norm",
    "pool",
    "quantize",
    "reduce",
    "resample",
    "shape",
    "softmax",
]
