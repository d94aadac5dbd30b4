# SPDX-License-Identifier: Apache-2.0
"""The importers, one file for each family of operators; importing this package fills the table."""

from __future__ import annotations

from coordinator.compiler.tflite.ops import (
    activations,
    arrange,
    convolutions,
    elementwise,
    linear,
    pooling,
    quantize,
    recurrent,
    reduce,
    resample,
    select,
    shapes,
)

__all__ = [
    "activations",
    "arrange",
    "convolutions",
    "elementwise",
    "linear",
    "pooling",
    "quantize",
    "recurrent",
    "reduce",
    "resample",
    "select",
    "shapes",
]
