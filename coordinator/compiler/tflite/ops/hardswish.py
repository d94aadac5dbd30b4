# SPDX-License-Identifier: Apache-2.0
"""HARD_SWISH of 8 bits in TFLite's fixed-point arithmetic of 16 bits, for every integer."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from coordinator.compiler.tflite.ops.rounding import codes, fixed_point
from edge_sdk.tflitefile import Tensor

_FINE = 7
"""Bits that integers are shifted up by before they are multiplied."""

_WIDE = np.iinfo(np.int16)
_ONE = 1 << 15


def hard_swish(x: Tensor, y: Tensor) -> NDArray[np.int64]:
    """Return what the kernel makes of each integer of `x`, from the least on.

    The input, scaled to the output's step, is multiplied by ``clip(x + 3, 0, 6) / 6`` in 15 bits.
    """
    fine_step = np.float32(1 / (1 << _FINE)) * x.scale[0]
    factor, out_shift = _short(float(fine_step / y.scale[0]))
    gate_factor, gate_shift = _short(float(fine_step / np.float32(3 / _ONE)))
    fine = (codes(x.dtype) - int(x.zero_point[0])) << _FINE
    scaled = _product(fine, factor)
    gate = _saturated(fine << (gate_shift - 1)) if gate_shift > 0 else fine
    gate = _product(gate, gate_factor)
    if gate_shift > 0:
        gate = _saturated(gate << 1)
    elif gate_shift < 0:
        gate = _divided(gate, -gate_shift)
    gate = (gate + _ONE) >> 1
    product = _saturated(_toward_zero(gate * scaled, _ONE))
    made = _divided(product, max(-out_shift, 0)) + int(y.zero_point[0])
    ends = np.iinfo(y.dtype)
    whole: NDArray[np.int64] = np.clip(made, ends.min, ends.max)
    return whole


def _short(real: float) -> tuple[int, int]:
    """Return a multiplier in 15 bits after the point, and its power of two."""
    number, exponent = fixed_point(real)
    return min((number + (1 << 15)) >> 16, int(_WIDE.max)), exponent


def _saturated(values: NDArray[Any]) -> NDArray[Any]:
    clipped: NDArray[Any] = np.clip(values, _WIDE.min, _WIDE.max)
    return clipped


def _product(values: NDArray[Any], factor: int) -> NDArray[Any]:
    """Multiply by a number of 15 bits after the point, halves upwards in size."""
    whole = values * factor
    nudge = np.where(whole >= 0, 1 << 14, 1 - (1 << 14))
    return _saturated(_toward_zero(whole + nudge, _ONE))


def _toward_zero(values: NDArray[Any], divisor: int) -> NDArray[Any]:
    quotient: NDArray[Any] = np.sign(values) * (np.abs(values) // divisor)
    return quotient


def _divided(values: NDArray[Any], bits: int) -> NDArray[Any]:
    """Divide by a power of two, halves away from zero."""
    half = (1 << bits) >> 1
    quotient: NDArray[Any] = np.sign(values) * ((np.abs(values) + half) >> bits)
    return quotient
