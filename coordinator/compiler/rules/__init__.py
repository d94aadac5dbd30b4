# SPDX-License-Identifier: Apache-2.0
"""Gradient rules, one file a family; importing this package fills ``vjp.RULES``."""

from coordinator.compiler.rules import (
    conv,
    elementwise,
    linear,
    norm,
    pool,
    quantize,
    reduce,
    shape,
    softmax,
)

__all__ = [
    "conv",
    "elementwise",
    "linear",
    "norm",
    "pool",
    "quantize",
    "reduce",
    "shape",
    "softmax",
]
